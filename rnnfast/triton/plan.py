"""Which kernel with which tile a layer takes on a GPU: a pure function of shapes and of the GPU's limits."""

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
    """How one pass of a layer runs; `reasons` says why the kinds before it do not."""

    kind: str
    config: Config
    reasons: tuple[str, ...]


OLDEST = (8, 0)  # sm_80: bfloat16 and TF32 products, cp.async


def pad(size: int) -> int:
    """The next power of two, and at least 32, the smallest that configs.py has."""
    return max(32, 1 << (size - 1).bit_length())


def _whole(key, padded: int, device: Device, reasons: list[str]) -> Config | None:
    tiles = WHOLE_TILES.get(key, {}).get(padded, ())
    for warps, stages, shared in tiles:
        if shared <= device.shared:
            return Config(16, padded, 0, warps, stages, shared)
    if tiles:
        reasons.append(
            f"whole: weights and tiles need {tiles[-1][-1]} bytes of shared memory, there are {device.shared}"
        )
    else:
        reasons.append(f"whole: the weights of {padded} units (padded) do not fit into one program")
    return None


def _group(key, padded, tiles_of_rows, device: Device, interpreted: bool, reasons: list[str]) -> Config | None:
    tiles = GROUP_TILES.get(key, {}).get(padded, ())
    if not tiles:
        reasons.append(f"group: there is no configuration for {padded} units (padded)")
        return None
    if interpreted:
        reasons.append("group: the interpreter runs one program after the other")
        return None
    for block_h, warps, shared in tiles:
        programs = padded // block_h * tiles_of_rows
        if shared <= device.shared and programs <= device.processors:
            return Config(16, block_h, 0, warps, 1, shared)
    reasons.append(f"group: its programs are not all on the {device.processors} processors at once")
    return None


def plan(
    cell: str,
    backward: bool,
    hidden_size: int,
    output_size: int,
    batch: int,
    directions: int,
    products: str,
    device: Device,
    interpreted: bool = False,
) -> Plan | str:
    """How a pass runs on `device`, or why it cannot. `products` is "16-bit" or one of precision.PRODUCTS.

    WHOLE where the weights fit into one program, else GROUP where all its programs are on the GPU at once, else STEP.
    The interpreter runs one program after the other, so a GROUP would wait there forever.
    """
    if device.capability < OLDEST:
        found = ".".join(map(str, device.capability))
        return f"the kernels need compute capability 8.0 or newer, {device.name} has {found}"
    key = "lstm_projected" if output_size != hidden_size else cell, backward, products
    reasons = []
    padded = pad(max(hidden_size, output_size))
    config = _whole(key, padded, pad(output_size), device, reasons)
    if config is not None:
        return Plan("whole", config, tuple(reasons))
    config = _group(key, padded, -(-batch // 16) * directions, device, interpreted, reasons)
    if config is not None:
        return Plan("group", config, tuple(reasons))
    for smallest_batch, *tile in STEP_TILES[key]:
        config = Config(*tile)
        if batch >= smallest_batch and config.shared <= device.shared:
            return Plan("step", config, tuple(reasons))
    return f"{device.name} has {device.shared} bytes of shared memory, the smallest program needs {config.shared}"


def _whole(key, padded: int, block_k: int, device: Device, reasons: list[str]) -> Config | None:
    tiles = WHOLE_TILES.get(key, {}).get(padded, ())
    for tile in tiles:
        if tile.shared <= device.shared:
            return Config(16, padded, block_k, *tile)
    if tiles:
        reasons.append(f"whole: a program needs {tiles[-1].shared} bytes of shared memory, there are {device.shared}")
    else:
        reasons.append(f"whole: the weights of {padded} units (padded) do not fit into one program")
    return None


def _group(key, padded: int, batch_tiles: int, device: Device, interpreted: bool, reasons: list[str]) -> Config | None:
    tiles = GROUP_TILES.get(key, {}).get(padded, ())
    if not tiles:
        reasons.append(f"group: there is no configuration for {padded} units (padded)")
        return None
    if interpreted:
        reasons.append("group: the interpreter runs one program after the other, so they would wait for ever")
        return None
    for tile in tiles:
        programs = padded // tile.block_h * batch_tiles
        if tile.shared <= device.shared and programs <= device.processors:
            return Config(16, tile.block_h, tile.block_k or padded, tile.warps, tile.stages, tile.shared)
    reasons.append(f"group: its programs are not all on the {device.processors} processors at once")
    return None
