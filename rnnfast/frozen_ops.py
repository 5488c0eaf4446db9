"""The operators of frozen layers, torch.ops.rnnfast.*_frozen: schemas and fake kernels.

    input         float32 [T, B, I] of any strides, or packed [sum(batch_sizes), I]; of a step [B, I]
    hx, cx        [num_layers * D, B, Hout] and [num_layers * D, B, H], or None for zeros; of a step [B, H]
    packed        the weights of the whole stack (packing.py)
    batch_sizes, lengths   as in ops.py
    wide_activations       int8 weights: activations have 16 bits, not 8

Results are those of `*_infer` and `*_step_infer` in ops.py. There is no backward.
`_stream_step` is one step of a stack. It overwrites the states h [num_layers, B, Hout] and c [num_layers, B, H]; its
input is [B, I], its output [B, Hout].
"""

import torch
from torch import Tensor

from ._torch_internals import without_python_frame
from .ops import CELLS, _libraries, require

_LAYER = (
    "Tensor? batch_sizes, Tensor? lengths, int hidden_size, {}int num_layers, bool bidirectional, bool wide_activations"
)
_STEP = "int hidden_size, bool wide_activations"


def _define(cell: str) -> None:
    library, lstm = _libraries[0], cell == "lstm"
    inputs = "Tensor input, Tensor? hx, " + ("Tensor? cx, " if lstm else "") + "Tensor packed, "
    layer = inputs + _LAYER.format("int proj_size, " if lstm else "")
    finals = "Tensor h_n, Tensor c_n" if lstm else "Tensor h_n"
    states = CELLS["rnn_tanh" if cell == "rnn" else cell].states

    def fake(input: Tensor, *rest):
        require(input.dtype is torch.float32, f"input: expected float32, got {input.dtype}")
        given, (_packed, batch_sizes, _lengths, hidden_size, *sizes) = rest[:states], rest[states:]
        proj_size = sizes.pop(0) if lstm else 0
        num_layers, bidirectional, _ = sizes
        directions = 2 if bidirectional else 1
        batch = input.size(1) if batch_sizes is None else given[0].size(1)
        output_size = proj_size or hidden_size
        results = [input.new_empty(*input.shape[:-1], directions * output_size)]
        for size in (output_size, hidden_size)[:states]:
            results.append(input.new_empty(num_layers * directions, batch, size))
        return tuple(results)

    def fake_step(input: Tensor, *rest):
        hidden_size = rest[states + 1]
        results = [input.new_empty(input.size(0), hidden_size) for _ in range(states)]
        return tuple(results) if lstm else results[0]

    for schema, function in (
        (f"{cell}_frozen({layer}) -> (Tensor output, {finals})", fake),
        (f"{cell}_step_frozen({inputs}{_STEP}) -> ({finals})", fake_step),
    ):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{library.ns}::{schema.partition('(')[0]}", function, lib=library)


for _cell in ("rnn", "gru", "lstm"):
    _define(_cell)
_libraries[0].define("_frozen_isa(int format) -> str")
_libraries[0].define(
    "_stream_step(Tensor input, Tensor(a!) h, Tensor(b!)? c, Tensor packed, bool wide_activations) -> Tensor"
)

_NAMES = {"rnn_tanh": "rnn", "rnn_relu": "rnn", "gru": "gru", "lstm": "lstm"}
_OVERLOADS = {cell: getattr(torch.ops.rnnfast, f"{name}_frozen").default for cell, name in _NAMES.items()}
_STEP_OVERLOADS = {cell: getattr(torch.ops.rnnfast, f"{name}_step_frozen").default for cell, name in _NAMES.items()}
EAGER = {cell: without_python_frame(overload) for cell, overload in _OVERLOADS.items()}
_EAGER_STEPS = {cell: without_python_frame(overload) for cell, overload in _STEP_OVERLOADS.items()}


def operator(cell: str):
    """The operator of a frozen stack of layers."""
    return (_OVERLOADS if torch.compiler.is_compiling() else EAGER)[cell]


def step_operator(cell: str):
    """The operator of a frozen cell's step."""
    return (_STEP_OVERLOADS if torch.compiler.is_compiling() else _EAGER_STEPS)[cell]


stream_step = without_python_frame(torch.ops.rnnfast._stream_step.default)
"""One step of a frozen stack whose states are overwritten."""
