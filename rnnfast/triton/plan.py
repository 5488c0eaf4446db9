"""The choice of kernel and tile for a layer on a GPU: a pure function of shapes and of the GPU's limits."""

from collections.abc import Iterator
from typing import NamedTuple

from .common import GROUP, STEP, WHOLE
from .configs import GROUP_TILES, STEP_TILES, WHOLE_TILES

KINDS = {"whole": WHOLE.value, "group": GROUP.value, "step": STEP.value}


class Config(NamedTuple):
    """One compiled form of a kernel."""

    block_b: int  # batch rows of a program
    block_h: int  # units of a program
    block_k: int  # columns of one block of the recurrent product
    warps: int
    stages: int
    shared: int


class Device(NamedTuple):
    """The limits of a GPU."""

    name: str
    capability: tuple[int, int]
    shared: int  # bytes of shared memory that one program may have
    processors: int  # streaming multiprocessors


class Plan(NamedTuple):
    """How one pass of a layer runs. `reasons` says why not by the kinds before this one."""

    kind: str
    config: Config
    reasons: tuple[str, ...]


OLDEST = (8, 0)  # sm_80: bfloat16 and TF32 products, cp.async


MOST_BATCH_TILES = 65_535  # CUDA's limit of the grid's second axis


def pad(size: int) -> int:
    """The next power of two, and at least 32, the least depth of a product that the tiles of configs.py expect."""
    return max(32, 1 << (size - 1).bit_length())


def plan(*shape_and_device, interpreted: bool = False) -> Plan | str:
    """How a pass runs on a device: the first of `candidates`, with the same arguments; or why it cannot."""
    reasons: list[str] = []
    found = next(candidates(*shape_and_device, interpreted=interpreted, reasons=reasons), None)
    return found or "; ".join(reasons)


def candidates(
    cell: str,
    backward: bool,
    hidden_size: int,
    output_size: int,
    batch: int,
    directions: int,
    products: str,
    device: Device,
    *,
    interpreted: bool,
    reasons: list[str],
) -> Iterator[Plan]:
    """Every plan of one pass that `device` can run, the best by estimate first.

    `products` is "16-bit" or one of precision.PRODUCTS. `reasons` gets the reasons against other plans. WHOLE comes
    first and needs weights that fit into one program. GROUP needs all its programs on the GPU at once. STEP is last.
    """
    if device.capability < OLDEST:
        found = ".".join(map(str, device.capability))
        reasons.append(f"the kernels need compute capability 8.0 or newer, {device.name} has {found}")
        return
    if -(-batch // 16) > MOST_BATCH_TILES:
        reasons.append(f"{batch} batch rows are more than the {16 * MOST_BATCH_TILES} of one launch")
        return
    projected = output_size != hidden_size
    key = "lstm_projected" if projected else cell, backward, products
    padded = pad(max(hidden_size, output_size))

    def fits(kind: str, shared: int) -> bool:
        if shared > device.shared:
            reasons.append(
                f"{kind}: a program needs {shared} bytes of shared memory, {device.name} has {device.shared}"
            )
        return shared <= device.shared

    sizes = WHOLE_TILES.get(key, {})
    units = min((size for size in sizes if size >= padded), default=0)
    if units == 0:
        reasons.append(f"whole: there is no tile for {padded} units (padded)")
    for tile in sizes.get(units, ()):
        if fits("whole", tile.shared):
            columns = pad(output_size) if projected else units
            yield Plan("whole", Config(16, units, columns, *tile), tuple(reasons))

    tiles = GROUP_TILES.get(key, {}).get(padded)
    if not tiles:
        reasons.append(f"group: there is no tile for {padded} units (padded)")
    elif interpreted:
        reasons.append("group: the interpreter runs one program after the other, so they would wait for ever")
        tiles = None
    for tile in tiles or ():
        programs = padded // tile.block_h * -(-batch // 16) * directions
        if programs > device.processors:
            reasons.append(f"group: {programs} programs are not all on {device.processors} processors at once")
        elif fits("group", tile.shared):
            config = Config(16, tile.block_h, tile.block_k or padded, tile.warps, tile.stages, tile.shared)
            yield Plan("group", config, tuple(reasons))

    for smallest_batch, *tile in STEP_TILES[key]:
        if batch >= smallest_batch and fits("step", tile[-1]):
            yield Plan("step", Config(*tile), tuple(reasons))
