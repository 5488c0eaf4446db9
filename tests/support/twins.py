"""A torch.nn module and its rnnfast twin with the same weights, and the comparison of what both return."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import pytest
import torch
from torch import nn

import rnnfast
from support.tolerances import CEILING, max_error

Tensor = torch.Tensor

# id -> (class name, constructor arguments after input_size and hidden_size)
LAYERS = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
}
CELLS = {
    "rnncell_tanh": ("RNNCell", {}),
    "rnncell_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "grucell": ("GRUCell", {}),
    "lstmcell": ("LSTMCell", {}),
}
NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")


def twins(kind: str, input_size: int = 3, hidden_size: int = 4, **kwargs) -> tuple[nn.Module, nn.Module]:
    """(ours, theirs) of a key of LAYERS or CELLS, or of a class name; equal weights drawn from the current seed."""
    name, options = (LAYERS | CELLS).get(kind, (kind, {}))
    theirs = getattr(nn, name)(input_size, hidden_size, **options, **kwargs)
    ours = getattr(rnnfast, name)(input_size, hidden_size, **options, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture(autouse=True)
def cells_take_the_kernels(request):
    """In files that import it tests of cells ask for the kernels, since by default a step may be torch's own."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    is_cell = "cell" in str(getattr(parameters.get("info"), "name", parameters.get("kind", ""))).lower()
    if not is_cell or os.environ.get("RNNFAST_BACKEND"):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where torch alone can take the call
        with rnnfast.backend("cpu"):
            yield


def state_of(module: nn.Module, batch: int | None, **factory):
    """A random hx as `module` wants it; batch=None for an unbatched input."""
    shape = () if batch is None else (batch,)
    if isinstance(module, nn.RNNCellBase):
        states = [torch.randn(*shape, module.hidden_size, **factory) for _ in range(2)]
        return tuple(states) if isinstance(module, nn.LSTMCell) else states[0]
    stack = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(stack, *shape, module.proj_size or module.hidden_size, **factory)
    return (h, torch.randn(stack, *shape, module.hidden_size, **factory)) if isinstance(module, nn.LSTM) else h


def tensors(result) -> list[Tensor]:
    """Every tensor in a nest of tuples (PackedSequence included), lists and mappings, in order."""
    if isinstance(result, Tensor):
        return [result]
    if result is None:
        return []
    values = result.values() if isinstance(result, Mapping) else result
    return [tensor for value in values for tensor in tensors(value)]


def total(result) -> Tensor:
    """A scalar in which every element of every floating-point tensor counts, each with another weight."""
    parts = [t for t in tensors(result) if t.is_floating_point()]
    return sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in parts)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same(actual, expected, what: str = "") -> None:
    """Same nesting, types, shapes, dtypes; floating-point values within the ceiling of their dtype, others equal."""
    if expected is None or isinstance(expected, Tensor):
        assert type(actual) is type(expected), f"{what}: {type(actual)}, expected {type(expected)}"
        if expected is None:
            return
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
        if not expected.is_floating_point():
            assert torch.equal(actual, expected), what
            return
        scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
        error, allowed = max_error(actual, expected), CEILING[expected.dtype] * scale
        assert error <= allowed, f"{what}: differs from torch.nn by {error:.3e} > {allowed:.3e}"
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected), what
        for key, value in expected.items():
            assert_same(actual[key], value, f"{what}[{key!r}]")
    else:
        assert type(actual) is type(expected) and len(actual) == len(expected), what
        for i, value in enumerate(expected):
            assert_same(actual[i], value, f"{what}[{i}]")


def assert_bitwise(actual, expected) -> None:
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
