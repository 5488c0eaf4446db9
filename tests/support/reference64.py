"""The oracle: RNN, GRU, LSTM (with projection) as plain float64 loops, from the formulas in torch's documentation.

Shares nothing with rnnfast/reference.py or csrc. Gradients come from autograd over these loops.
test_reference64.py checks it against torch.nn in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch

Tensor = torch.Tensor


# name -> the function and its derivative in terms of its result
ACTIVATIONS = {
    "tanh": (torch.tanh, lambda y: 1 - y * y),
    "sigmoid": (torch.sigmoid, lambda y: y * (1 - y)),
    "relu": (torch.relu, lambda y: (y > 0).double()),
}
_eps = 0.0


@contextmanager
def rounded_activations(eps: float):
    """Within the block activations err by up to `eps`, relatively: results move as far as rounding may move them."""
    global _eps
    _eps = eps
    try:
        yield
    finally:
        _eps = 0.0


def rounded(y: Tensor) -> Tensor:
    return y * (1 + _eps * (torch.rand_like(y) * 2 - 1))


class Rounded(torch.autograd.Function):
    """An inexact activation whose derivative is taken from the inexact result, as kernels do."""

    @staticmethod
    def forward(ctx, name, x):
        y = rounded(ACTIVATIONS[name][0](x))
        ctx.save_for_backward(y)
        ctx.name = name
        return y

    @staticmethod
    def backward(ctx, grad):
        return None, rounded(grad * ACTIVATIONS[ctx.name][1](*ctx.saved_tensors))


def activate(name: str, x: Tensor) -> Tensor:
    return Rounded.apply(name, x) if _eps else ACTIVATIONS[name][0](x)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.t()
    return y if bias is None else y + bias


def rnn_step(x, h, w, nonlinearity):
    pre = affine(x, w["weight_ih"], w["bias_ih"]) + affine(h, w["weight_hh"], w["bias_hh"])
    return activate(nonlinearity, pre), pre


def gru_step(x, h, w):
    x_r, x_z, x_n = affine(x, w["weight_ih"], w["bias_ih"]).chunk(3, dim=1)
    h_r, h_z, h_n = affine(h, w["weight_hh"], w["bias_hh"]).chunk(3, dim=1)
    r, z = activate("sigmoid", x_r + h_r), activate("sigmoid", x_z + h_z)
    n = activate("tanh", x_n + r * h_n)
    return (1 - z) * n + z * h


def lstm_step(x, h, c, w):
    pre = affine(x, w["weight_ih"], w["bias_ih"]) + affine(h, w["weight_hh"], w["bias_hh"])
    i, f, g, o = pre.chunk(4, dim=1)
    c = activate("sigmoid", f) * c + activate("sigmoid", i) * activate("tanh", g)
    h = activate("sigmoid", o) * activate("tanh", c)
    return (h if w["weight_hr"] is None else h @ w["weight_hr"].t()), c


def one_direction(cell, x, h, c, w, lengths, backward, pre_activations):
    """x [T, B, I] -> output [T, B, Hout] (zero beyond a row's length), last h, last c."""
    seq_len = x.shape[0]
    output: list[Tensor] = [None] * seq_len  # type: ignore[list-item]
    for t in range(seq_len - 1, -1, -1) if backward else range(seq_len):
        active = (t < lengths).unsqueeze(1)
        if cell == "lstm":
            new_h, new_c = lstm_step(x[t], h, c, w)
            c = torch.where(active, new_c, c)
        elif cell == "gru":
            new_h = gru_step(x[t], h, w)
        else:
            new_h, pre = rnn_step(x[t], h, w, cell.removeprefix("rnn_"))
            pre_activations.append(torch.where(active, pre, torch.full_like(pre, torch.inf)).detach())
        h = torch.where(active, new_h, h)
        output[t] = torch.where(active, new_h, torch.zeros_like(new_h))
    return torch.stack(output), h, c


def split_weights(weights: Sequence[Tensor], has_biases: bool, projected: bool) -> dict[str, Tensor | None]:
    """One direction's tensors of torch's flat list, by name."""
    rest = list(weights)
    named: dict[str, Tensor | None] = {"weight_ih": rest.pop(0), "weight_hh": rest.pop(0)}
    named["bias_ih"] = rest.pop(0) if has_biases else None
    named["bias_hh"] = rest.pop(0) if has_biases else None
    named["weight_hr"] = rest.pop(0) if projected else None
    assert not rest
    return named


def run(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    projected: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """A whole stack on padded, time-major, float64 input.

    x [T, B, I], h0 [layers * D, B, Hout], c0 [layers * D, B, H] (LSTM), weights in torch's flat order,
    lengths [B] (default: all T).
    Returns output [T, B, D * Hout], h_n, c_n (None unless LSTM) and, for the plain RNN, every pre-activation [B, H].
    """
    assert x.dtype == torch.float64
    directions = 2 if bidirectional else 1
    per_direction = 2 + 2 * has_biases + projected
    if lengths is None:
        lengths = torch.full((x.shape[1],), x.shape[0])
    h_n, c_n, pre_activations = [], [], []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w = split_weights(weights[k * per_direction : (k + 1) * per_direction], has_biases, projected)
            c = None if c0 is None else c0[k]
            output, h, c = one_direction(cell, x, h0[k], c, w, lengths, direction == 1, pre_activations)
            outputs.append(output)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(outputs, dim=2)
    return x, torch.stack(h_n), (torch.stack(c_n) if cell == "lstm" else None), pre_activations
