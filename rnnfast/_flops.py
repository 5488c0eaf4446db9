"""FLOPs of the operators, for torch.utils.flop_counter.FlopCounterMode: two per multiplication of a matrix product.

In forward, each weight matrix multiplies every row once. A layer has 2 * T*B * G*H * (I + Hout) FLOPs, as torch counts
them for its own cells. Backward has one product for the gradient of each weight, and one for the gradient of the other
factor.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch

from ._imports import after_import
from .cells import FAMILIES, step_weights
from .ops import OPERATORS, Cell

_Shape = Sequence[int]


def _matrices(weights: Sequence[_Shape | None]) -> int:
    return sum(math.prod(shape) for shape in weights if shape is not None and len(shape) == 2)


def _forward(input: _Shape, weights: Sequence[_Shape | None]) -> int:
    return 2 * math.prod(input[:-1]) * _matrices(weights)


def _backward(input: _Shape, weights: Sequence[_Shape | None], batch: int, needed: Sequence[bool]) -> int:
    """`batch`: the rows of the first step, which start from hx."""
    need_input, need_states, need_weights = needed
    matrices = [shape for shape in weights if shape is not None and len(shape) == 2]
    rows, gate_rows = math.prod(input[:-1]), matrices[0][0]
    of_gates = [shape for shape in matrices if shape[0] == gate_rows]  # weight_ih, weight_hh of each direction
    flops = _forward(input, weights) if need_weights else 0
    flops += 2 * rows * (_matrices(matrices) - _matrices(of_gates))  # through weight_hr
    flops += 2 * rows * _matrices(of_gates[::2]) if need_input else 0
    return flops + 2 * (rows if need_states else rows - batch) * _matrices(of_gates[1::2])


def _register(counter: ModuleType) -> None:
    for namespace, cells in OPERATORS.items():
        for operators, spec in FAMILIES.items():
            _register_cell(counter, getattr(torch.ops, namespace), operators, cells[spec.name])


def _register_cell(counter: ModuleType, operators, name: str, cell: Cell) -> None:
    states = cell.states
    weights_of_step = slice(states, states + len(step_weights(cell.spec)))

    def layer(input, *rest, out_shape=None, **_):
        return _forward(input, rest[states])

    def layer_backward(*arguments, out_shape=None, **_):
        input, *rest = arguments[1 + states :]
        batch = input[-2] if rest[0] is None else rest[0][-2]
        return _backward(input, rest[states], batch, arguments[-3:])

    def step(input, *rest, out_shape=None, **_):
        return _forward(input, rest[weights_of_step])

    def step_backward(*arguments, out_shape=None, **_):
        input, *rest = arguments[states:]
        return _backward(input, rest[weights_of_step], input[0], arguments[-3:])

    formulas = {"infer": layer, "fwd": layer, "bwd": layer_backward}
    formulas |= {"step_infer": step, "step_fwd": step, "step_bwd": step_backward}
    for kind, formula in formulas.items():
        counter.register_flop_formula(getattr(operators, f"{name}_{kind}"))(formula)


def install() -> None:
    after_import("torch.utils.flop_counter", _register)
