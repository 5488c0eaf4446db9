"""Which implementation CUDA tensors take where none is asked for: a table of measurements on GPUs.

tools/gpu_table.py makes gpu_table.json from results of `python -m bench gpu` and describes its form. Without an entry,
no kernel is the default: for projected layers, cells, float64, and wherever the file is missing.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._torch_internals import assume_constant
from .autocast import dtype_of
from .call import Call, batch_of
from .cells import SPECS
from .precision import float32_products

FILE = Path(__file__).with_name("gpu_table.json")
TABLES: dict[str, dict] = json.loads(FILE.read_text()) if FILE.exists() else {}
"""By the name of the GPU: capability, date, torch, commit, and `speedups` over torch's own operator."""

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Measured(NamedTuple):
    """What the table says about a call."""

    backends: tuple[str, ...]
    """The backends at least as fast as torch's own operator, the fastest first."""
    text: str
    """The row, its GPU and its date."""


def measured(call: Call) -> Measured | None:
    """The measurement nearest to a call on CUDA tensors; None if there is none of such layers."""
    if not TABLES or call.step:
        return None
    input, weight_hh = call.input, call.weights[1]
    dtype = dtype_of(input)
    numbers = f"fp32-{float32_products(input.device)}" if dtype is torch.float32 else DTYPES.get(dtype)
    trains = torch.is_grad_enabled() and (weight_hh.requires_grad or input.requires_grad)
    size = input.device.index, call.cell, weight_hh.shape, batch_of(call), numbers, trains
    if torch.compiler.is_compiling():
        return _look_up(*size)
    found = _known.get(size, _known)
    if found is _known:
        found = _known[size] = _look_up(*size)
    return found


_known: dict[tuple, Any] = {}


def _look_up(
    device: int | None, cell: str, weight_hh: torch.Size, batch: int, numbers: str | None, trains: bool
) -> Measured | None:
    spec = SPECS[cell]
    hidden_size = weight_hh[0] // len(spec.gates)
    if numbers is None or weight_hh[-1] != hidden_size:
        return None
    table, origin = _table_of(device or 0)
    kind = f"{spec.operators} {numbers} {'training' if trains else 'inference'}"
    by_size = TABLES[table]["speedups"].get(kind)
    if by_size is None:
        return None
    units = _nearest(by_size, hidden_size)
    rows = _nearest(by_size[units], batch)
    return Measured(*_row(table, kind, units, rows, origin))


def _row(table: str, kind: str, units: str, rows: str, origin: str) -> tuple[tuple[str, ...], str]:
    """The fields of Measured."""
    speedups = TABLES[table]["speedups"][kind][units][rows]
    winners = sorted((one for one in speedups if speedups[one] >= 1), key=lambda one: -speedups[one])
    found = ", ".join(f"{one} {speedup:.2f}" for one, speedup in speedups.items()) or "no result"
    return tuple(winners), f"{kind}, H {units}, B {rows}: {found} times the speed of torch.nn ({origin})"


def _nearest(sizes, size: int) -> str:
    """The key of `sizes`, ascending numbers as texts, that is nearest by ratio. Only comparisons, for Dynamo."""
    texts = list(sizes)
    for smaller, larger in zip(texts, texts[1:], strict=False):
        if size * size <= int(smaller) * int(larger):
            return smaller
    return texts[-1]


def _table_of(device: int) -> tuple[str, str]:
    """The GPU whose table a device takes, and a text about it: its own, or the nearest by compute capability."""
    name, capability = _gpu(device)

    def distance(other: str) -> tuple[bool, int]:
        major, minor = TABLES[other]["capability"]
        return other != name, abs(10 * major + minor - 10 * capability[0] - capability[1])

    nearest = min(TABLES, key=distance)
    table = TABLES[nearest]
    origin = f"measured on {nearest}, {table['date']}, torch {table['torch']}"
    return nearest, origin if nearest == name else f"{origin}; {name} has not been measured"


def _gpu(device: int) -> tuple[str, tuple[int, int]]:
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


for _function in (_row, _table_of, float32_products):
    assume_constant(_function)
