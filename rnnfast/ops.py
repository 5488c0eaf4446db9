"""The operators torch.ops.rnnfast.*: schemas, fake kernels and documentation. C++ registers only implementations.

One operator is one layer with all its directions, input projection included. In every schema:

    input         [T, B, I] of any strides, or packed [sum(batch_sizes), I]
    hx, cx        [D, B, Hout], [D, B, H] of any strides; D = 1 or 2 directions, Hout = proj_size if projected, else H
    weights       per direction weight_ih [G*H, I], weight_hh [G*H, Hout], then, where the layer has them, bias_ih and
                  bias_hh [G*H], then weight_hr [Hout, H]; G = 1 (RNN), 3 (GRU: r z n), 4 (LSTM: i f g o)
    batch_sizes   PackedSequence's: int64 [T] on the CPU, descending. None: padded input
    lengths       padded input only: int32 or int64 [B], unsorted, zeros allowed. Steps t >= length give zero output,
                  h_n and c_n are the states after a row's last step, direction 1 starts at step length - 1
    output        [T, B, D*Hout] or [sum(batch_sizes), D*Hout], contiguous; h_n [D, B, Hout], c_n [D, B, H]
    saved         what `bwd` needs of `fwd`, private to the implementation of the device (see csrc/README.md)

All floating tensors share one dtype (float32, float64, bfloat16, float16) and one device; saved[1] is float32 for the
16-bit types. `infer` saves nothing and may round otherwise than `fwd`. In `bwd` a gradient of None counts as zero;
without need_grad_input, grad_input is empty, and without need_grad_weights each of grad_weights is. No output aliases
an input. Wrong shapes, dtypes, devices or lengths raise RuntimeError before anything is computed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

_library = torch.library.Library("rnnfast", "DEF")  # lives as long as the module: dropping it unregisters the operators


def _define(cell: str, states: int, saved_widths: tuple[int, ...], flags: str = "") -> None:
    """Defines {cell}_infer, {cell}_fwd and {cell}_bwd with their fake kernels (shapes, dtypes and devices, no values).

    `saved_widths`: the widths of `saved`, each [D, T*B or sum(batch_sizes), width * H].
    """
    names = ("h", "c")[:states]

    def tensors(pattern: str) -> str:
        return ", ".join(pattern.format(name) for name in names)

    arguments = f"Tensor input, {tensors('Tensor {}x')}, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths{flags}"
    outputs = f"Tensor output, {tensors('Tensor {}_n')}"
    incoming = f"Tensor? grad_output, {tensors('Tensor? grad_{}_n')}"
    needs = "bool need_grad_input, bool need_grad_weights"
    gradients = f"Tensor grad_input, {tensors('Tensor grad_{}x')}, Tensor[] grad_weights"

    def fake_infer(input, *rest):
        # Where some tensors are meta tensors and others are not, the dispatcher comes here with real ones too.
        devices = {tensor.device for tensor in (input, *rest[:states], *rest[states])}
        torch._check(len(devices) == 1, lambda: f"expected all tensors on one device, got {devices}")
        hx = rest[0]
        output = input.new_empty(*input.shape[:-1], hx.size(0) * hx.size(2))
        return (output, *(state.new_empty(state.shape) for state in rest[:states]))

    def fake_fwd(input, *rest):
        rows = math.prod(input.shape[:-1])  # not Size.numel(), which would fix a dynamic T
        directions, _, hidden_size = rest[states - 1].shape  # of the last state: hx is narrower where projected
        wide = torch.float32 if input.dtype.itemsize == 2 else input.dtype
        dtypes = zip(saved_widths, (input.dtype, wide), strict=False)
        saved = [input.new_empty(directions, rows, width * hidden_size, dtype=dtype) for width, dtype in dtypes]
        return (*fake_infer(input, *rest), saved)

    def fake_bwd(*args):
        input, *rest = args[1 + states :]
        need_grad_input, need_grad_weights = args[-2:]
        return (
            input.new_empty(input.shape if need_grad_input else 0),
            *(state.new_empty(state.shape) for state in rest[:states]),
            [weight.new_empty(weight.shape if need_grad_weights else 0) for weight in rest[states]],
        )

    for schema, fake in (
        (f"{cell}_infer({arguments}) -> ({outputs})", fake_infer),
        (f"{cell}_fwd({arguments}) -> ({outputs}, Tensor[] saved)", fake_fwd),
        (f"{cell}_bwd({incoming}, {arguments}, Tensor output, Tensor[] saved, {needs}) -> ({gradients})", fake_bwd),
    ):
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"rnnfast::{schema.partition('(')[0]}", fake, lib=_library)


_define("rnn", states=1, saved_widths=(), flags=", bool relu")
_define("gru", states=1, saved_widths=(4,))  # r z n and W_hn h + b_hn
_define("lstm", states=2, saved_widths=(4, 1))  # i f g o; c
_library.define("_cpu_isa() -> str")

rnn_infer: Callable = torch.ops.rnnfast.rnn_infer.default
rnn_fwd: Callable = torch.ops.rnnfast.rnn_fwd.default
rnn_bwd: Callable = torch.ops.rnnfast.rnn_bwd.default
gru_infer: Callable = torch.ops.rnnfast.gru_infer.default
gru_fwd: Callable = torch.ops.rnnfast.gru_fwd.default
gru_bwd: Callable = torch.ops.rnnfast.gru_bwd.default
lstm_infer: Callable = torch.ops.rnnfast.lstm_infer.default
lstm_fwd: Callable = torch.ops.rnnfast.lstm_fwd.default
lstm_bwd: Callable = torch.ops.rnnfast.lstm_bwd.default


class Cell(NamedTuple):
    """What the Python layers need to know about one cell."""

    gates: int  # G: the rows of weight_ih are G * H
    states: int  # 1 (hx) or 2 (hx, cx)
    flags: tuple[bool, ...]  # the operators' own trailing arguments
    infer: Callable
    fwd: Callable
    bwd: Callable


CELLS = {
    "rnn_tanh": Cell(1, 1, (False,), rnn_infer, rnn_fwd, rnn_bwd),
    "rnn_relu": Cell(1, 1, (True,), rnn_infer, rnn_fwd, rnn_bwd),
    "gru": Cell(3, 1, (), gru_infer, gru_fwd, gru_bwd),
    "lstm": Cell(4, 2, (), lstm_infer, lstm_fwd, lstm_bwd),
}
