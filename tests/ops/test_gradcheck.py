"""gradcheck in float64, first and second order, for every cell and calling convention of rnnfast.functional."""

from __future__ import annotations

import pytest
import torch
from support import harness
from support.harness import CELLS, Case
from torch.autograd import gradcheck, gradgradcheck

import rnnfast

F64 = torch.float64
SMALL = {"T": 3, "B": 3, "I": 2, "H": 3, "dtype": F64}
VARIANTS = {
    "plain": {},
    "bidirectional-2-layers": {"bidirectional": True, "layers": 2},
    "no-bias-no-hx": {"bias": False, "hx": False},
    "packed": {"ragged": "sorted", "bidirectional": True},
    "lengths": {"ragged": "lengths", "bidirectional": True},
    "batch-first": {"batch_first": True},
}
CASES = {f"{cell}-{name}": Case(cell, **SMALL, **options) for cell in CELLS for name, options in VARIANTS.items()}
CASES |= {
    f"lstm-proj-{name}": Case("lstm", proj=2, **SMALL, **options)
    for name, options in VARIANTS.items()
    if name != "batch-first"
}


def as_function(case: Case):
    """The case as a function of its differentiable tensors, and these."""
    module, data = harness.make_module(torch.nn, case), harness.Data(case)
    options = {
        "has_biases": case.bias,
        "num_layers": case.layers,
        "bidirectional": case.bidirectional,
        "batch_first": case.batch_first,
    }
    x = data.input.transpose(0, 1).contiguous() if case.batch_first else data.input
    if case.ragged == "sorted":
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, data.lengths)
        x, options["batch_sizes"] = packed.data, packed.batch_sizes
    elif case.ragged:
        options["lengths"] = data.lengths
    states = [data.hx, data.cx][: (2 if case.cell == "lstm" else 1) if case.hx else 0]
    weights = [p.detach().requires_grad_() for p in module.parameters()]
    tensors = [t.requires_grad_() for t in (x, *states)]

    def function(x, *rest):
        hx = None if not case.hx else (rest[0], rest[1]) if case.cell == "lstm" else rest[0]
        weights = list(rest[len(states) :])
        return getattr(rnnfast.functional, case.cell)(x, hx, weights, **options)

    return function, (*tensors, *weights)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    function, tensors = as_function(CASES[name])
    with rnnfast.backend("cpu", strict=True):
        assert gradcheck(function, tensors, fast_mode=len(tensors) > 8)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(("plain", "lengths", "packed"))])
def test_gradgradcheck(name):
    function, tensors = as_function(CASES[name])
    with rnnfast.backend("cpu", strict=True):
        assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_second_order_equals_torch(cell):
    """A gradient penalty: the gradient of |d output / d input|^2 for every weight, against torch.nn in float64."""
    case = Case(cell, T=4, B=2, I=3, H=5, dtype=F64)
    data, results = harness.Data(case), []
    for package in (torch.nn, rnnfast):
        module = harness.make_module(package, case)
        x = data.input.clone().requires_grad_()
        hx = (data.hx, data.cx) if cell == "lstm" else data.hx
        with rnnfast.backend("aten" if package is torch.nn else "cpu", strict=True):
            output, _ = module(x, hx)
            (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), [x, *module.parameters()], allow_unused=True))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
