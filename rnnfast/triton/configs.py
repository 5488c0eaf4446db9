"""The shipped configurations of the Triton kernels: the tiles of each kernel, and the memory that each needs.

Every number comes from compiling, none from a GPU. `shared` is the largest value that the compiler reported. Triton 3.9
was asked for sm_80, sm_90 and sm_100, Triton 3.6 for sm_90, and for the largest tiles on all three. `make test-full`
compiles every row (tests/triton_kernels/test_triton_compile.py). A program has 16 batch rows where nothing else is
said. That is the least that a tensor core product takes, and makes the most programs. Until something is measured,
each row has a purpose that no other row has. Smaller tiles for smaller H, and second choices for other batches, wait
for a GPU.
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
# No time loop spills. A few values that only the code before and after a loop uses may lie on the stack. All this holds
# for sizes that are multiples of 8. Other sizes have little or no cp.async and up to twice the registers, and some of
# 128 units spill while they load W_hh, before the loop.

# Resident weights. 8 warps, because 4 would need twice the registers; "ieee" LSTMs take 16, because 8 spill. Two stages
# keep the next step's loads in flight (cp.async); one stage is for GPUs where two do not fit. The smallest tiles have
# 64 units, or 128 for the RNN with its one gate: with half the units and 4 warps, each thread would have as much work
# for half the depth of the product. "tf32x3" has no tile: its LSTM of 64 units needs all 255 registers in backward,
# spills, and takes 47 s to compile. Exact projected layers have none either: they would hold two weights.
_WHOLE = (
    # cell, pass, products, padded H, then WholeTile
    ("lstm", "forward", "16-bit", 64, 8, 2, 49152),
    ("lstm", "forward", "16-bit", 128, 8, 2, 163_840),
    ("lstm", "forward", "tf32", 64, 8, 2, 90112),
    ("lstm", "forward", "ieee", 64, 16, 2, 90112),
    ("lstm", "backward", "16-bit", 64, 8, 2, 63488),
    ("lstm", "backward", "16-bit", 128, 8, 2, 192_512),
    ("lstm", "backward", "16-bit", 128, 8, 1, 147_456),
    ("lstm", "backward", "tf32", 64, 8, 2, 118_784),
    ("lstm", "backward", "tf32", 64, 8, 1, 81920),
    ("lstm", "backward", "ieee", 64, 16, 2, 118_784),
    ("lstm", "backward", "ieee", 64, 16, 1, 81920),
    ("lstm_projected", "forward", "16-bit", 64, 8, 2, 57344),
    ("lstm_projected", "forward", "16-bit", 128, 8, 2, 196_608),
    ("lstm_projected", "forward", "tf32", 64, 8, 2, 106_496),
    ("lstm_projected", "backward", "16-bit", 64, 8, 2, 71680),
    ("lstm_projected", "backward", "16-bit", 128, 8, 2, 225_280),
    ("lstm_projected", "backward", "tf32", 64, 8, 2, 135_168),
    ("gru", "forward", "16-bit", 64, 8, 2, 34816),
    ("gru", "forward", "16-bit", 128, 8, 2, 118_784),
    ("gru", "forward", "tf32", 64, 8, 2, 65536),
    ("gru", "forward", "ieee", 64, 8, 2, 65536),
    ("gru", "backward", "16-bit", 64, 8, 2, 47104),
    ("gru", "backward", "16-bit", 128, 8, 2, 143_360),
    ("gru", "backward", "tf32", 64, 8, 2, 94208),
    ("gru", "backward", "ieee", 64, 8, 2, 94208),
    ("rnn", "forward", "16-bit", 128, 8, 2, 40960),
    ("rnn", "forward", "16-bit", 256, 8, 2, 147_456),
    ("rnn", "forward", "tf32", 128, 8, 2, 81920),
    ("rnn", "forward", "ieee", 128, 8, 2, 81920),
    ("rnn", "backward", "16-bit", 128, 8, 2, 53248),
    ("rnn", "backward", "16-bit", 256, 8, 2, 167_936),
    ("rnn", "backward", "16-bit", 256, 8, 1, 143_360),
    ("rnn", "backward", "tf32", 128, 8, 2, 106_496),
    ("rnn", "backward", "tf32", 128, 8, 1, 81920),
    ("rnn", "backward", "ieee", 128, 8, 2, 106_496),
    ("rnn", "backward", "ieee", 128, 8, 1, 81920),
)

# The fewest units that feed a product: most programs, with the least work for each. Batches whose programs are not all
# on the GPU at once take STEP. Forward has no more units than leave room for all of their W_hh. 128 is for layers that
# do not fit WHOLE: "tf32", and GPUs with less memory. Projected layers, "tf32x3" and "ieee" take STEP.
_GROUP = (
    # cell, pass, products, padded sizes H, then GroupTile (`shared` of the largest)
    ("lstm", "forward", "16-bit", (128, 256), 32, 0, 4, 1, 73728),
    ("lstm", "forward", "16-bit", (512,), 16, 0, 4, 1, 81920),
    ("lstm", "forward", "16-bit", (1024,), 8, 0, 4, 1, 98304),
    ("lstm", "forward", "tf32", (128, 256), 16, 0, 4, 1, 81920),
    ("lstm", "forward", "tf32", (512,), 16, 0, 8, 1, 163_840),
    ("lstm", "forward", "tf32", (1024,), 8, 0, 8, 1, 196_608),
    ("lstm", "backward", "16-bit", (128, 256, 512, 1024), 16, 128, 4, 4, 24576),
    ("lstm", "backward", "tf32", (128, 256, 512, 1024), 16, 64, 4, 3, 16384),
    ("gru", "forward", "16-bit", (128, 256), 32, 0, 4, 1, 57344),
    ("gru", "forward", "16-bit", (512,), 16, 0, 4, 1, 65536),
    ("gru", "forward", "16-bit", (1024,), 8, 0, 4, 1, 81920),
    ("gru", "forward", "tf32", (128, 256), 16, 0, 4, 1, 65536),
    ("gru", "forward", "tf32", (512,), 16, 0, 8, 1, 131_072),
    ("gru", "forward", "tf32", (1024,), 8, 0, 8, 1, 163_840),
    ("gru", "backward", "16-bit", (128, 256, 512, 1024), 16, 128, 4, 4, 24576),
    ("gru", "backward", "tf32", (128, 256, 512, 1024), 16, 64, 4, 3, 16384),
    ("rnn", "forward", "16-bit", (128, 256), 32, 0, 4, 1, 24576),
    ("rnn", "forward", "16-bit", (512,), 32, 0, 8, 1, 49152),
    ("rnn", "forward", "16-bit", (1024,), 16, 0, 8, 1, 65536),
    ("rnn", "forward", "tf32", (128, 256), 16, 0, 4, 1, 33792),
    ("rnn", "forward", "tf32", (512,), 16, 0, 8, 1, 66560),
    ("rnn", "forward", "tf32", (1024,), 16, 0, 8, 1, 132_096),
    ("rnn", "backward", "16-bit", (128, 256, 512, 1024), 16, 128, 4, 4, 24576),
    ("rnn", "backward", "tf32", (128, 256, 512, 1024), 16, 64, 4, 3, 16384),
)

# The first row whose batch and memory suffice is taken: 64 batch rows read W_hh from L2 a quarter as often as 16. A
# product is 4 * block_h wide for the LSTM in forward, 3 * block_h for the GRU, block_h else. 8 warps where 4 spill.
_GATED = ("lstm", "lstm_projected", "gru")
_RNN = ("rnn",)
_ALL = (*_GATED, *_RNN)
_STEP = (
    # cells, pass, products, then StepTile
    (_GATED, "forward", "16-bit", 33, 64, 16, 64, 4, 3, 49168),
    (_GATED, "forward", "16-bit", 0, 16, 16, 128, 4, 4, 61440),
    (_GATED, "forward", "tf32", 33, 64, 16, 32, 8, 3, 49168),
    (_GATED, "forward", "tf32", 0, 16, 16, 64, 4, 3, 40960),
    (_GATED, "forward", "tf32x3", 0, 16, 16, 32, 4, 3, 20480),
    (_GATED, "forward", "ieee", 0, 16, 16, 32, 4, 3, 20480),
    (_RNN, "forward", "16-bit", 33, 64, 32, 64, 4, 3, 36880),
    (_RNN, "forward", "16-bit", 0, 16, 32, 128, 4, 4, 36864),
    (_RNN, "forward", "tf32", 33, 64, 32, 32, 8, 3, 36880),
    (_RNN, "forward", "tf32", 0, 16, 32, 64, 4, 3, 24576),
    (_RNN, "forward", "tf32x3", 0, 16, 32, 32, 4, 3, 12288),
    (_RNN, "forward", "ieee", 0, 16, 32, 32, 4, 3, 12288),
    (_ALL, "backward", "16-bit", 33, 64, 32, 64, 8, 3, 36880),
    (_ALL, "backward", "16-bit", 0, 16, 32, 64, 4, 4, 18432),
    (_ALL, "backward", "tf32", 33, 64, 32, 32, 8, 3, 36880),
    (_ALL, "backward", "tf32", 0, 16, 32, 64, 4, 3, 24576),
    (_ALL, "backward", "tf32x3", 0, 16, 32, 32, 4, 3, 12288),
    (_ALL, "backward", "ieee", 0, 16, 32, 32, 4, 3, 12288),
)
# fmt: on


def _whole_tiles():
    """{(cell, backward, products): {padded H: [tiles]}}."""
    tables: dict = {}
    for cell, name, products, padded, *tile in _WHOLE:
        sizes = tables.setdefault((cell, name == "backward", products), {})
        sizes.setdefault(padded, []).append(WholeTile(*tile))
    return tables


def _group_tiles():
    """{(cell, backward, products): {padded H: [tiles]}}."""
    tables: dict = {}
    for cell, name, products, sizes, *tile in _GROUP:
        for padded in sizes:
            of_cell = tables.setdefault((cell, name == "backward", products), {})
            of_cell.setdefault(padded, []).append(GroupTile(*tile))
    return tables


def _step_tiles():
    """{(cell, backward, products): [tiles]}."""
    tables: dict = {}
    for cells, name, products, *tile in _STEP:
        for cell in cells:
            tables.setdefault((cell, name == "backward", products), []).append(StepTile(*tile))
    return tables


WHOLE_TILES = _whole_tiles()
GROUP_TILES = _group_tiles()
STEP_TILES = _step_tiles()
