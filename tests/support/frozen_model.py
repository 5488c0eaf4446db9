"""What a frozen layer computes, in float64: the formulas, with operands rounded as the format says, without a kernel.

`dequantised` gives the weights that a frozen layer has. `run` computes with them; activations are rounded as the
kernels round them. The gates are float64. So the distance of `run` from the plain float64 layer on the same weights is
the error that the format itself costs, and a kernel may be twice as far away (see `assert_follows`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from support import harness
from support.harness import Case, Data
from support.tolerances import STORE_ULPS, SUM_ULPS, max_error

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
FORMATS = ("float32", "bfloat16", "int8")
FACTOR = 2.0


def dequantised(frozen: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of a frozen layer in float64, under torch.nn's names and in their order."""
    state = frozen.state_dict()
    scales = {name.removesuffix("_scale"): scale for name, scale in state.items() if name.endswith("_scale")}
    weights = {}
    for name, value in state.items():
        if name in scales:
            weights[name] = value.double() * scales[name].double()[:, None]
        elif name != "format_version" and not name.endswith("_scale"):
            weights[name] = value.double()
    order = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    found = {}
    for suffix in dict.fromkeys(name.split("weight_ih")[1] for name in weights if name.startswith("weight_ih")):
        found |= {name + suffix: weights[name + suffix] for name in order if name + suffix in weights}
    return found


def quantised_row(rows: Tensor, symmetric: bool, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """int64 q [..., K] with scale and zero point [..., 1], in the kernels' float32 steps: rows = scale * (q - zero).

    8 bits, or 16 where `wide`; a row of x has a zero point, and h is symmetric.
    """
    rows = rows.float()
    levels, middle = (65535, 32768) if wide else (255, 128)
    low, high = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        scale = torch.where(high > 0, high / (middle - 1), 1.0)
        zero = torch.full_like(scale, middle)
    else:
        scale = torch.where(high > low, high / levels - low / levels, 1.0)
        zero = (-low / scale + 0.5).floor()
    inverse = torch.where(scale >= torch.finfo(torch.float32).tiny, 1 / scale, 0.0)
    q = ((rows * inverse).round() + zero).clamp(0, levels)
    return q.long(), scale, zero.long()


def rounded(rows: Tensor, weights: str, symmetric: bool, wide: bool) -> Tensor:
    """Activations as a product reads them, in float64."""
    if weights == "bfloat16":
        return rows.to(torch.bfloat16).double()
    if weights == "float32":
        return rows.double()
    q, scale, zero = quantised_row(rows, symmetric, wide)
    return scale.double() * (q - zero).double()


def step(cell: str, x: Tensor, h: Tensor, c: Tensor | None, w: dict[str, Tensor], weights: str, wide: bool):
    """(h, c) after one step of one direction; x [B, I]."""
    ahead = rounded(x, weights, False, wide) @ w["weight_ih"].t() + w.get("bias_ih", 0)
    again = rounded(h, weights, True, wide) @ w["weight_hh"].t()
    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = ahead.chunk(3, 1), (again + w.get("bias_hh", 0)).chunk(3, 1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        return (1 - z) * n + z * h, None
    pre = ahead + again + w.get("bias_hh", 0)
    if cell != "lstm":
        return (pre.relu() if cell == "rnn_relu" else pre.tanh()), None
    i, f, g, o = pre.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (rounded(h, weights, False, wide) @ w["weight_hr"].t() if "weight_hr" in w else h), c


def one_direction(cell, x, h, c, w, weights, wide, lengths, backward):
    steps, output = range(x.size(0)), [None] * x.size(0)
    for t in reversed(steps) if backward else steps:
        active = (t < lengths)[:, None]
        new_h, new_c = step(cell, x[t], h, c, w, weights, wide)
        h, c = torch.where(active, new_h, h), c if c is None else torch.where(active, new_c, c)
        output[t] = torch.where(active, new_h, torch.zeros_like(new_h))
    return torch.stack(output), h, c


def run(case: Case, data: Data, plain: dict[str, Tensor], weights: str, exact: bool, x: Tensor, hx):
    """Output, h_n, c_n of the case's layer with the weights `plain`."""
    stack, h_out = case.layers * case.directions, case.proj or case.H
    lengths = torch.full((case.B,), case.T) if data.lengths is None else data.lengths
    wide = exact or int(lengths.sum()) == 1
    if hx is None:
        hx = x.new_zeros(stack, case.B, h_out)
        hx = (hx, x.new_zeros(stack, case.B, case.H)) if case.cell == "lstm" else hx
    h0, c0 = hx if case.cell == "lstm" else (hx, None)
    h_n, c_n = [], []
    for layer in range(case.layers):
        outputs = []
        for d in range(case.directions):
            k, suffix = layer * case.directions + d, f"_l{layer}" + "_reverse" * d
            w = {name.removesuffix(suffix): v for name, v in plain.items() if name.endswith(suffix)}
            c = None if c0 is None else c0[k]
            output, h, c = one_direction(case.cell, x, h0[k], c, w, weights, wide, lengths, d == 1)
            outputs.append(output)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(outputs, 2)
    return x, torch.stack(h_n), torch.stack(c_n) if case.cell == "lstm" else None


def assert_follows(
    actual: dict[str, Tensor], modelled: dict[str, Tensor], reference: dict[str, Tensor], terms: int
) -> None:
    """The rule of bfloat16 and int8: at most twice as far from float64 as the model is, plus float32's rounding."""
    assert actual.keys() == modelled.keys() == reference.keys()
    for name, truth in reference.items():
        assert actual[name].shape == truth.shape and actual[name].dtype == torch.float32, name
        if truth.numel() == 0:
            continue
        eps = torch.finfo(torch.float32).eps
        floor = (STORE_ULPS + SUM_ULPS * terms**0.5) * eps * max(float(truth.abs().max()), 1.0)
        error, own = max_error(actual[name], truth), max_error(modelled[name], truth)
        assert error <= FACTOR * own + floor, f"{name}: error {error:.3e}, the model's {own:.3e}"


def check(case: Case, frozen: torch.nn.Module, weights: str, exact: bool = False) -> None:
    """Asserts the rule of the format for a case whose layer is frozen: bfloat16 or int8."""
    data, plain = Data(case), dequantised(frozen)

    def forward(x, hx):
        return harness.module_forward(frozen, case, x, hx, data.lengths)

    def model(x, hx):
        return run(case, data, plain, weights, exact, x, hx)

    reference = harness.run_values(case, data, harness.oracle_forward(case, data, plain, []), torch.float64)
    modelled = harness.run_values(case, data, model, torch.float64)
    with harness.num_threads(case.threads):
        actual = harness.run_values(case, data, forward, torch.float32)
    assert_follows(actual, modelled, reference, case.I + case.H)
