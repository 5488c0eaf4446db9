"""Sizes beyond what 16 or 32 bits count: very many steps, very many sequences, more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from support import harness
from support.harness import CELLS, Case

import rnnfast
from rnnfast import _ext

pytestmark = pytest.mark.skipif(_ext.failure is not None, reason=f"the compiled kernels are absent: {_ext.failure}")


@pytest.mark.quick(2)
@pytest.mark.parametrize(("cell", "steps", "batch"), [(cell, 200_000, 1) for cell in CELLS] + [("lstm", 2, 70_000)])
def test_many_steps_and_many_sequences(cell, steps, batch):
    """Against torch.nn, loosely: over so many steps both round in their own ways.

    Gradients for the LSTM only: torch's own RNN and GRU take a minute for theirs.
    """
    case = Case(cell, T=steps, B=batch, I=3, H=7)
    data, results = harness.Data(case), []
    states = [data.hx, data.cx][: 2 if cell == "lstm" else 1]
    for package in (torch.nn, rnnfast):
        module = harness.make_module(package, case).requires_grad_(cell == "lstm")
        leaves = [tensor.clone().requires_grad_(cell == "lstm") for tensor in (data.input, *states)]
        with rnnfast.backend("aten" if package is torch.nn else "cpu", strict=True):
            output, final = module(leaves[0], tuple(leaves[1:]) if cell == "lstm" else leaves[1])
            found = [output, *(final if cell == "lstm" else (final,))]
            if cell == "lstm":
                found += torch.autograd.grad(output, [*leaves, *module.parameters()], data.grads["output"])
        results.append(found)
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))


def available_bytes() -> int:
    """Memory that can still be had; 0 where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


@pytest.mark.quick(0)
def test_more_than_2_31_elements():
    """Sequences do not know each other, so a few of them, the last included, must come out as they do alone."""
    steps, batch, hidden_size = 480, 70_000, 64
    elements = steps * batch * hidden_size
    assert elements > 2**31
    needed = elements * 4 + 2 * 2**30
    if available_bytes() < needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB of free memory are needed")
    module, x = rnnfast.RNN(1, hidden_size), torch.randn(steps, batch, 1)
    some = torch.tensor([0, 1, batch // 2, batch - 2, batch - 1])
    with torch.no_grad(), rnnfast.backend("cpu", strict=True):
        output, h_n = module(x)
        alone, h_n_alone = module(x[:, some])
    torch.testing.assert_close(output[:, some], alone)
    torch.testing.assert_close(h_n[:, some], h_n_alone)
