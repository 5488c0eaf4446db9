"""A model around a recurrent layer, and the comparison of its compiled form with the eager one."""

from __future__ import annotations

import torch

import rnnfast

from . import harness
from .harness import Case
from .tolerances import CEILING


class Model(torch.nn.Module):
    """What surrounds a recurrent layer in practice."""

    def __init__(self, recurrent: torch.nn.Module, width: int):
        super().__init__()
        self.embed = torch.nn.Linear(3, recurrent.input_size)
        self.recurrent = recurrent
        self.head = torch.nn.Linear(width, 2)

    def forward(self, x, hx=None):
        output, states = self.recurrent(torch.relu(self.embed(x)), hx)
        return self.head(output), states


def make(cell: str, **options) -> Model:
    case = Case(cell, 1, 1, 4, 6, **options)
    width = case.directions * (case.proj or case.H)
    return Model(harness.make_module(rnnfast, case), width)


def tensors(result) -> list[torch.Tensor]:
    return list(torch.utils._pytree.tree_leaves(result))


def assert_same(compiled, eager, x, *args, training: bool):
    """Equal results and, in training, equal gradients of input and parameters."""
    x = x.requires_grad_(training)
    collected = []
    for function in (compiled, eager):
        results = tensors(function(x, *args))
        if training:
            loss = sum((r * torch.linspace(0.5, 1.5, r.numel()).view_as(r)).sum() for r in results)
            results += torch.autograd.grad(loss, [x, *eager.parameters()])
        collected.append(results)
    ceiling = CEILING[x.dtype]
    for actual, expected in zip(*collected, strict=True):
        torch.testing.assert_close(actual, expected, rtol=ceiling, atol=ceiling * float(expected.abs().max() + 1e-30))
