"""`rnnfast.stream`: steps one at a time are the layer on the whole sequence; state, reset, wrong arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rnnfast
from rnnfast import _ext

pytestmark = pytest.mark.skipif(_ext.failure is not None, reason=f"the CPU kernels are not there: {_ext.failure}")
LAYERS = {
    "lstm": lambda: nn.LSTM(7, 33, 2),
    "lstm-projected": lambda: nn.LSTM(7, 33, proj_size=9),
    "lstm-batch-first": lambda: rnnfast.LSTM(7, 20, batch_first=True),
    "gru": lambda: nn.GRU(7, 16, 3, bias=False),
    "rnn": lambda: rnnfast.RNN(7, 5, nonlinearity="relu"),
    "lstm-cell": lambda: nn.LSTMCell(7, 33),
    "gru-cell": lambda: rnnfast.GRUCell(7, 33),
    "rnn-cell": lambda: nn.RNNCell(7, 33),
}
FORMATS = (None, "float32", "bfloat16", "int8")  # None: not frozen


def whole(layer, x):
    """The outputs [T, B, Hout] of the layer or cell."""
    with torch.no_grad():
        if isinstance(layer, nn.RNNCellBase) or type(layer).__name__ == "FrozenCell":
            outputs, state = [], None
            for step in x:
                state = layer(step, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(outputs)
        if layer.batch_first:
            return layer(x.transpose(0, 1))[0].transpose(0, 1)
        return layer(x)[0]


def tensors(state):
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_are_the_layer_on_the_sequence(name, weights, batch):
    layer, x = LAYERS[name]().eval(), torch.randn(6, batch, 7)
    if weights:
        layer = rnnfast.freeze(layer, weights, exact=True)  # a step of one row has activations of 16 bits
    stream = rnnfast.stream(layer, batch)
    outputs = torch.stack([stream.step(step) for step in x])
    torch.testing.assert_close(outputs, whole(layer, x), rtol=1e-5, atol=1e-6)
    assert not outputs.requires_grad
    if batch == 1:
        alone = rnnfast.stream(layer)
        for step, output in zip(x, outputs, strict=True):
            assert torch.equal(alone.step(step[0]), output[0])


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_reset_and_state(name, weights):
    layer, x = LAYERS[name]().eval(), torch.randn(5, 3, 7)
    layer = rnnfast.freeze(layer, weights) if weights else layer
    stream, fresh = rnnfast.stream(layer, 3), rnnfast.stream(layer, 3)
    for step in x[:3]:
        stream.step(step)
    kept = stream.state
    first = stream.step(x[3])
    assert not torch.equal(tensors(stream.state)[0], tensors(kept)[0]), "a copy, which no step changes"
    stream.state = kept
    assert torch.equal(stream.step(x[3]), first)
    stream.reset([1])
    expected, after = fresh.step(x[4]), stream.step(x[4])
    torch.testing.assert_close(after[1], expected[1], rtol=1e-5, atol=1e-6)
    assert not torch.equal(after[0], expected[0])
    stream.reset(torch.tensor([True, False, True]))
    assert all(state[:, 0].eq(0).all() and state[:, 1].ne(0).any() for state in tensors(stream.state))
    stream.reset()
    assert all(state.eq(0).all() for state in tensors(stream.state))


def test_wrong_arguments():
    frozen = rnnfast.freeze(nn.LSTM(7, 9), "float32")
    with pytest.raises(TypeError, match="expected an RNN, GRU, LSTM or cell, got Linear"):
        rnnfast.stream(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="one direction"):
        rnnfast.stream(nn.GRU(7, 9, bidirectional=True))
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        rnnfast.stream(frozen, 0)
    stream = rnnfast.stream(frozen, 2)
    before = stream.state
    for wrong in (torch.randn(2, 6), torch.randn(3, 7), torch.randn(2, 7).double(), torch.randn(2, 1, 7)):
        with pytest.raises((RuntimeError, ValueError)):
            stream.step(wrong)
    with pytest.raises(RuntimeError, match="must not require grad"):
        stream.step(torch.randn(2, 7, requires_grad=True))
    for wrong in (before[0], (before[0], before[0], before[1]), (before[0][:, :1], before[1])):
        with pytest.raises(ValueError, match="state: expected"):
            stream.state = wrong
    assert all(map(torch.equal, stream.state, before))
