"""The shipped configurations of the Triton kernels: which tiles a kernel comes in, and what each needs.

Every number comes from compiling, none from a GPU: `shared` is what the compiler reports, the largest of sm_80, sm_90
and sm_100 and of Triton 3.6 and 3.9 (tests/test_triton_compile.py compiles them all and asserts it). A program has 16
batch rows where nothing else is said: the least that a tensor core product takes, and what makes most programs.
"""

from typing import NamedTuple


class WholeTile(NamedTuple):
    """WHOLE has 16 batch rows and all units."""

    warps: int
    stages: int  # how many steps of the time loop loads run ahead
    shared: int  # bytes of shared memory


class GroupTile(NamedTuple):
    """GROUP has 16 batch rows."""

    block_h: int  # units of a program
    block_k: int  # rows of a block of W_hh in backward; 0 in forward, which holds all of them
    warps: int
    stages: int  # how many blocks loads run ahead
    shared: int


class StepTile(NamedTuple):
    smallest_batch: int  # from which it is taken
    block_b: int
    block_h: int
    block_k: int
    warps: int
    stages: int
    shared: int


# fmt: off
# Resident weights; the longest prefetch first. 8 warps from 64 units on, for 4 double the registers. Three stages keep
# the next two steps' gates in flight (cp.async); one is for GPUs with less memory.
_WHOLE = (
    # cell, pass, products, padded H, then WholeTile
    ("lstm", "forward", "16-bit", 32, 4, 3, 20480),
    ("lstm", "forward", "16-bit", 32, 4, 1, 12288),
    ("lstm", "forward", "16-bit", 64, 8, 3, 57344),
    ("lstm", "forward", "16-bit", 64, 8, 1, 40960),
    ("lstm", "forward", "16-bit", 128, 8, 3, 180_224),
    ("lstm", "forward", "16-bit", 128, 8, 1, 147_456),
    ("lstm", "forward", "tf32", 32, 4, 3, 36864),
    ("lstm", "forward", "tf32", 32, 4, 1, 20480),
    ("lstm", "forward", "tf32", 64, 8, 3, 106_496),
    ("lstm", "forward", "tf32", 64, 8, 1, 73728),
    ("lstm", "forward", "tf32x3", 32, 4, 3, 53248),
    ("lstm", "forward", "tf32x3", 32, 4, 1, 36864),
    ("lstm", "forward", "tf32x3", 64, 8, 3, 172_032),
    ("lstm", "forward", "tf32x3", 64, 8, 1, 139_264),
    ("lstm", "backward", "16-bit", 32, 4, 3, 34816),
    ("lstm", "backward", "16-bit", 32, 4, 1, 12288),
    ("lstm", "backward", "16-bit", 64, 8, 3, 86016),
    ("lstm", "backward", "16-bit", 64, 8, 1, 40960),
    ("lstm", "backward", "16-bit", 128, 8, 1, 147_456),
    ("lstm", "backward", "tf32", 32, 4, 3, 61440),
    ("lstm", "backward", "tf32", 32, 4, 1, 24576),
    ("lstm", "backward", "tf32", 64, 8, 3, 155_648),
    ("lstm", "backward", "tf32", 64, 8, 1, 81920),
    ("lstm", "backward", "tf32x3", 32, 4, 3, 86016),
    ("lstm", "backward", "tf32x3", 32, 4, 1, 49152),
    ("lstm", "backward", "tf32x3", 64, 8, 1, 163_840),
    ("lstm_projected", "forward", "16-bit", 32, 4, 3, 22528),
    ("lstm_projected", "forward", "16-bit", 32, 4, 1, 14336),
    ("lstm_projected", "forward", "16-bit", 64, 8, 3, 65536),
    ("lstm_projected", "forward", "16-bit", 64, 8, 1, 49152),
    ("lstm_projected", "forward", "16-bit", 128, 8, 3, 212_992),
    ("lstm_projected", "forward", "16-bit", 128, 8, 1, 180_224),
    ("lstm_projected", "forward", "tf32", 32, 4, 3, 40960),
    ("lstm_projected", "forward", "tf32", 32, 4, 1, 24576),
    ("lstm_projected", "forward", "tf32", 64, 8, 3, 122_880),
    ("lstm_projected", "forward", "tf32", 64, 8, 1, 90112),
    ("lstm_projected", "backward", "16-bit", 32, 4, 3, 36864),
    ("lstm_projected", "backward", "16-bit", 32, 4, 1, 14336),
    ("lstm_projected", "backward", "16-bit", 64, 8, 3, 94208),
    ("lstm_projected", "backward", "16-bit", 64, 8, 1, 49152),
    ("lstm_projected", "backward", "16-bit", 128, 8, 1, 180_224),
    ("lstm_projected", "backward", "tf32", 32, 4, 3, 65536),
    ("lstm_projected", "backward", "tf32", 32, 4, 1, 28672),
    ("lstm_projected", "backward", "tf32", 64, 8, 3, 172_032),
    ("lstm_projected", "backward", "tf32", 64, 8, 1, 98304),
    ("gru", "forward", "16-bit", 32, 4, 3, 14336),
    ("gru", "forward", "16-bit", 32, 4, 1, 8192),
    ("gru", "forward", "16-bit", 64, 8, 3, 40960),
    ("gru", "forward", "16-bit", 64, 8, 1, 28672),
    ("gru", "forward", "16-bit", 128, 8, 3, 131_072),
    ("gru", "forward", "16-bit", 128, 8, 1, 106_496),
    ("gru", "forward", "tf32", 32, 4, 3, 26624),
    ("gru", "forward", "tf32", 32, 4, 1, 14336),
    ("gru", "forward", "tf32", 64, 8, 3, 77824),
    ("gru", "forward", "tf32", 64, 8, 1, 53248),
    ("gru", "forward", "tf32x3", 32, 4, 3, 40960),
    ("gru", "forward", "tf32x3", 32, 4, 1, 28672),
    ("gru", "backward", "16-bit", 32, 4, 3, 25600),
    ("gru", "backward", "16-bit", 32, 4, 1, 9216),
    ("gru", "backward", "16-bit", 64, 8, 3, 63488),
    ("gru", "backward", "16-bit", 64, 8, 1, 30720),
    ("gru", "backward", "16-bit", 128, 8, 3, 176_128),
    ("gru", "backward", "16-bit", 128, 8, 1, 110_592),
    ("gru", "backward", "tf32", 32, 4, 3, 51200),
    ("gru", "backward", "tf32", 32, 4, 1, 18432),
    ("gru", "backward", "tf32", 64, 8, 3, 126_976),
    ("gru", "backward", "tf32", 64, 8, 1, 61440),
    ("gru", "backward", "tf32x3", 32, 4, 3, 65536),
    ("gru", "backward", "tf32x3", 32, 4, 1, 32768),
    ("rnn", "forward", "16-bit", 32, 4, 3, 5120),
    ("rnn", "forward", "16-bit", 32, 4, 1, 3072),
    ("rnn", "forward", "16-bit", 64, 8, 3, 14336),
    ("rnn", "forward", "16-bit", 64, 8, 1, 10240),
    ("rnn", "forward", "16-bit", 128, 8, 3, 45056),
    ("rnn", "forward", "16-bit", 128, 8, 1, 36864),
    ("rnn", "forward", "16-bit", 256, 16, 3, 155_648),
    ("rnn", "forward", "16-bit", 256, 16, 1, 139_264),
    ("rnn", "forward", "tf32", 32, 4, 3, 10240),
    ("rnn", "forward", "tf32", 32, 4, 1, 6144),
    ("rnn", "forward", "tf32", 64, 8, 3, 28672),
    ("rnn", "forward", "tf32", 64, 8, 1, 20480),
    ("rnn", "forward", "tf32", 128, 8, 3, 90112),
    ("rnn", "forward", "tf32", 128, 8, 1, 73728),
    ("rnn", "backward", "16-bit", 32, 4, 3, 9216),
    ("rnn", "backward", "16-bit", 32, 4, 1, 3072),
    ("rnn", "backward", "16-bit", 64, 8, 3, 22528),
    ("rnn", "backward", "16-bit", 64, 8, 1, 10240),
    ("rnn", "backward", "16-bit", 128, 8, 3, 61440),
    ("rnn", "backward", "16-bit", 128, 8, 1, 36864),
    ("rnn", "backward", "16-bit", 256, 16, 3, 188_416),
    ("rnn", "backward", "16-bit", 256, 16, 1, 139_264),
    ("rnn", "backward", "tf32", 32, 4, 3, 18432),
    ("rnn", "backward", "tf32", 32, 4, 1, 6144),
    ("rnn", "backward", "tf32", 64, 8, 3, 45056),
    ("rnn", "backward", "tf32", 64, 8, 1, 20480),
    ("rnn", "backward", "tf32", 128, 8, 3, 122_880),
    ("rnn", "backward", "tf32", 128, 8, 1, 73728),
)

# The most programs first, which is the least work for each. Forward: as many units as leave room for all of their W_hh.
_GROUP = (
    # cell, pass, products, padded H, then GroupTile
    ("lstm", "forward", "16-bit", 256, 32, 0, 4, 1, 73728),
    ("lstm", "forward", "16-bit", 256, 32, 0, 8, 1, 73728),
    ("lstm", "forward", "16-bit", 512, 16, 0, 4, 1, 81920),
    ("lstm", "forward", "16-bit", 512, 32, 0, 8, 1, 147_456),
    ("lstm", "forward", "16-bit", 1024, 8, 0, 4, 1, 98304),
    ("lstm", "forward", "16-bit", 1024, 16, 0, 8, 1, 163_840),
    ("lstm", "forward", "tf32", 256, 16, 0, 4, 1, 81920),
    ("lstm", "forward", "tf32", 512, 16, 0, 8, 1, 163_840),
    ("lstm", "forward", "tf32", 1024, 8, 0, 8, 1, 196_608),
    ("lstm", "backward", "16-bit", 256, 32, 128, 4, 4, 36864),
    ("lstm", "backward", "16-bit", 512, 32, 128, 4, 4, 36864),
    ("lstm", "backward", "16-bit", 1024, 16, 128, 4, 4, 24576),
    ("lstm", "backward", "tf32", 256, 32, 64, 4, 3, 24576),
    ("lstm", "backward", "tf32", 512, 32, 64, 4, 3, 24576),
    ("lstm", "backward", "tf32", 1024, 16, 64, 4, 3, 16384),
    ("gru", "forward", "16-bit", 256, 32, 0, 4, 1, 57344),
    ("gru", "forward", "16-bit", 256, 32, 0, 8, 1, 57344),
    ("gru", "forward", "16-bit", 512, 16, 0, 4, 1, 65536),
    ("gru", "forward", "16-bit", 512, 32, 0, 8, 1, 114_688),
    ("gru", "forward", "16-bit", 1024, 8, 0, 4, 1, 81920),
    ("gru", "forward", "16-bit", 1024, 16, 0, 8, 1, 131_072),
    ("gru", "forward", "tf32", 256, 16, 0, 4, 1, 65536),
    ("gru", "forward", "tf32", 512, 16, 0, 8, 1, 131_072),
    ("gru", "forward", "tf32", 1024, 8, 0, 8, 1, 163_840),
    ("gru", "backward", "16-bit", 256, 32, 128, 4, 4, 36864),
    ("gru", "backward", "16-bit", 512, 32, 128, 4, 4, 36864),
    ("gru", "backward", "16-bit", 1024, 16, 128, 4, 4, 24576),
    ("gru", "backward", "tf32", 256, 32, 64, 4, 3, 24576),
    ("gru", "backward", "tf32", 512, 32, 64, 4, 3, 24576),
    ("gru", "backward", "tf32", 1024, 16, 64, 4, 3, 16384),
    ("rnn", "forward", "16-bit", 256, 32, 0, 4, 1, 24576),
    ("rnn", "forward", "16-bit", 256, 32, 0, 8, 1, 24576),
    ("rnn", "forward", "16-bit", 512, 16, 0, 4, 1, 32768),
    ("rnn", "forward", "16-bit", 512, 32, 0, 8, 1, 49152),
    ("rnn", "forward", "16-bit", 1024, 16, 0, 4, 1, 65536),
    ("rnn", "forward", "16-bit", 1024, 16, 0, 8, 1, 65536),
    ("rnn", "forward", "tf32", 256, 16, 0, 4, 1, 33792),
    ("rnn", "forward", "tf32", 512, 16, 0, 8, 1, 66560),
    ("rnn", "forward", "tf32", 1024, 16, 0, 8, 1, 132_096),
    ("rnn", "backward", "16-bit", 256, 32, 128, 4, 4, 36864),
    ("rnn", "backward", "16-bit", 512, 32, 128, 4, 4, 36864),
    ("rnn", "backward", "16-bit", 1024, 16, 128, 4, 4, 24576),
    ("rnn", "backward", "tf32", 256, 32, 64, 4, 3, 24576),
    ("rnn", "backward", "tf32", 512, 32, 64, 4, 3, 24576),
    ("rnn", "backward", "tf32", 1024, 16, 64, 4, 3, 16384),
)

# The first whose batch and memory suffice.
_STEP = (
    # cell, pass, products, then StepTile
    ("lstm", "forward", "16-bit", 33, 64, 32, 64, 8, 3, 73744),
    ("lstm", "forward", "16-bit", 0, 16, 16, 128, 4, 4, 61440),
    ("lstm", "forward", "tf32", 33, 64, 16, 32, 4, 3, 49168),
    ("lstm", "forward", "tf32", 0, 16, 16, 64, 4, 3, 40960),
    ("lstm", "forward", "tf32x3", 0, 16, 16, 32, 4, 3, 20480),
    ("lstm", "forward", "ieee", 0, 16, 16, 32, 4, 3, 20480),
    ("lstm", "backward", "16-bit", 33, 64, 64, 64, 8, 3, 49168),
    ("lstm", "backward", "16-bit", 0, 16, 32, 128, 4, 4, 36864),
    ("lstm", "backward", "tf32", 33, 64, 32, 32, 4, 3, 36880),
    ("lstm", "backward", "tf32", 0, 16, 32, 64, 4, 3, 24576),
    ("lstm", "backward", "tf32x3", 0, 16, 32, 32, 4, 3, 12288),
    ("lstm", "backward", "ieee", 0, 16, 32, 32, 4, 3, 12288),
    ("lstm_projected", "forward", "16-bit", 33, 64, 32, 64, 8, 3, 73744),
    ("lstm_projected", "forward", "16-bit", 0, 16, 16, 128, 4, 4, 61440),
    ("lstm_projected", "forward", "tf32", 33, 64, 16, 32, 4, 3, 49168),
    ("lstm_projected", "forward", "tf32", 0, 16, 16, 64, 4, 3, 40960),
    ("lstm_projected", "forward", "tf32x3", 0, 16, 16, 32, 4, 3, 20480),
    ("lstm_projected", "forward", "ieee", 0, 16, 16, 32, 4, 3, 20480),
    ("lstm_projected", "backward", "16-bit", 33, 64, 32, 64, 8, 3, 36880),
    ("lstm_projected", "backward", "16-bit", 0, 16, 16, 128, 4, 4, 24576),
    ("lstm_projected", "backward", "tf32", 33, 64, 16, 32, 4, 3, 30736),
    ("lstm_projected", "backward", "tf32", 0, 16, 16, 64, 4, 3, 16384),
    ("lstm_projected", "backward", "tf32x3", 0, 16, 16, 32, 4, 3, 8192),
    ("lstm_projected", "backward", "ieee", 0, 16, 16, 32, 4, 3, 8192),
    ("gru", "forward", "16-bit", 33, 64, 32, 64, 8, 3, 61472),
    ("gru", "forward", "16-bit", 0, 16, 16, 128, 4, 4, 49152),
    ("gru", "forward", "tf32", 33, 64, 16, 32, 4, 3, 43040),
    ("gru", "forward", "tf32", 0, 16, 16, 64, 4, 3, 32768),
    ("gru", "forward", "tf32x3", 0, 16, 16, 32, 4, 3, 16384),
    ("gru", "forward", "ieee", 0, 16, 16, 32, 4, 3, 16384),
    ("gru", "backward", "16-bit", 33, 64, 64, 64, 8, 3, 49168),
    ("gru", "backward", "16-bit", 0, 16, 32, 128, 4, 4, 36864),
    ("gru", "backward", "tf32", 33, 64, 32, 32, 4, 3, 36880),
    ("gru", "backward", "tf32", 0, 16, 32, 64, 4, 3, 24576),
    ("gru", "backward", "tf32x3", 0, 16, 32, 32, 4, 3, 12288),
    ("gru", "backward", "ieee", 0, 16, 32, 32, 4, 3, 12288),
    ("rnn", "forward", "16-bit", 33, 64, 64, 64, 8, 3, 49168),
    ("rnn", "forward", "16-bit", 0, 16, 32, 128, 4, 4, 36864),
    ("rnn", "forward", "tf32", 33, 64, 32, 32, 4, 3, 36880),
    ("rnn", "forward", "tf32", 0, 16, 32, 64, 4, 3, 24576),
    ("rnn", "forward", "tf32x3", 0, 16, 32, 32, 4, 3, 12288),
    ("rnn", "forward", "ieee", 0, 16, 32, 32, 4, 3, 12288),
    ("rnn", "backward", "16-bit", 33, 64, 64, 64, 8, 3, 49168),
    ("rnn", "backward", "16-bit", 0, 16, 64, 128, 4, 4, 61440),
    ("rnn", "backward", "tf32", 33, 64, 64, 32, 4, 3, 49168),
    ("rnn", "backward", "tf32", 0, 16, 64, 64, 4, 3, 40960),
    ("rnn", "backward", "tf32x3", 0, 16, 64, 32, 4, 3, 20480),
    ("rnn", "backward", "ieee", 0, 16, 64, 32, 4, 3, 20480),
)
# fmt: on


def _tables(rows, tile_type, names: int):
    """{(cell, backward, products): {padded H: [tiles]}} of rows whose first `names` entries are names and sizes."""
    tables: dict = {}
    for row in rows:
        cell, name, products, *sizes = row[:names]
        tiles = tables.setdefault((cell, name == "backward", products), {})
        tiles.setdefault(sizes[0] if sizes else 0, []).append(tile_type(*row[names:]))
    return tables


WHOLE_TILES = _tables(_WHOLE, WholeTile, 4)
GROUP_TILES = _tables(_GROUP, GroupTile, 4)
STEP_TILES = {key: tiles[0] for key, tiles in _tables(_STEP, StepTile, 3).items()}
