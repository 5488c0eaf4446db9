"""Which implementation CUDA tensors take where none is asked for: what was measured on such a GPU says.

gpu_table.json is made from results of `python -m bench gpu` by tools/gpu_table.py, which says how it looks. Without it,
and for what it has no measurement of (projected layers, cells, float64), nobody's kernels are a default.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from ._call import Call, batch_of, dtype_of
from .ops import CELLS
from .precision import float32_products

FILE = Path(__file__).with_name("gpu_table.json")
TABLES: dict[str, dict] = json.loads(FILE.read_text()) if FILE.exists() else {}
"""By the name of the GPU: capability, date, torch, commit, and `speedups` over torch's own operator."""

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Measured(NamedTuple):
    """What the table says about a call."""

    backends: tuple[str, ...]
    """Those at least as fast as torch's own operator, the fastest first."""
    text: str
    """The row, its GPU and its date."""


def measured(call: Call) -> Measured | None:
    """The measurement nearest to a call on CUDA tensors, or None where there is none of such layers."""
    if not TABLES or call.step:
        return None
    rows, output_size = call.weights[1].shape
    hidden_size = rows // CELLS[call.cell].gates
    dtype = dtype_of(call.input)
    if output_size != hidden_size or (dtype not in DTYPES and dtype is not torch.float32):
        return None
    trains = torch.is_grad_enabled() and (call.weights[0].requires_grad or call.input.requires_grad)
    numbers = DTYPES.get(dtype) or f"fp32-{float32_products(call.input.device)}"
    size = call.input.device.index or 0, call.cell, numbers, trains, hidden_size, batch_of(call)
    if torch.compiler.is_compiling():
        return _look_up(*size)
    if size not in _known:
        _known[size] = _look_up(*size)
    return _known[size]


_known: dict[tuple, Measured | None] = {}


def _look_up(device: int, cell: str, numbers: str, trains: bool, hidden_size: int, batch: int) -> Measured | None:
    name, origin = _table_of(device)
    kind = f"{cell.split('_')[0]} {numbers} {'training' if trains else 'inference'}"
    by_size = TABLES[name]["speedups"].get(kind)
    if by_size is None:
        return None
    units = _nearest(by_size, hidden_size)
    rows = _nearest(by_size[units], batch)
    speedups = by_size[units][rows]
    winners = sorted((one for one in speedups if speedups[one] >= 1), key=lambda one: -speedups[one])
    found = ", ".join(f"{one} {speedup:.2f}" for one, speedup in speedups.items()) or "no result"
    return Measured(tuple(winners), f"{kind}, H {units}, B {rows}: {found} times the speed of torch.nn ({origin})")


def _nearest(sizes, size: int) -> str:
    """The key of `sizes`, ascending numbers as texts, that is nearest by ratio: by comparisons, for graphs."""
    texts = list(sizes)
    for smaller, larger in zip(texts, texts[1:], strict=False):
        if size * size <= int(smaller) * int(larger):
            return smaller
    return texts[-1]


def _table_of(device: int) -> tuple[str, str]:
    """The GPU whose table a device takes, its own or the nearest by compute capability, and a text that says so."""
    name, capability = _gpu(device)

    def distance(other: str) -> tuple[bool, int]:
        major, minor = TABLES[other]["capability"]
        return other != name, abs(10 * major + minor - 10 * capability[0] - capability[1])

    nearest = min(TABLES, key=distance)
    table = TABLES[nearest]
    origin = f"measured on {nearest}, {table['date']}, torch {table['torch']}"
    return nearest, origin if nearest == name else f"{origin}; {name} has not been measured"


_table_of._dynamo_marked_constant = True  # torch._dynamo.assume_constant_result, without its import


def _gpu(device: int) -> tuple[str, tuple[int, int]]:
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
