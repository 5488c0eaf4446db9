"""Wrong arguments of frozen layers: torch.nn's own class of error with torch.nn's own words, or the same result."""

from __future__ import annotations

import pytest
import torch
from support import harness
from support.harness import Case
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from rnnfast import _ext
from rnnfast.freeze import freeze

pytestmark = pytest.mark.skipif(_ext.failure is not None, reason=f"the compiled kernels are absent: {_ext.failure}")

X, H = torch.randn(4, 2, 6), torch.randn(2, 2, 9)
ROW, STATE = torch.randn(2, 6), torch.randn(2, 9)
# (input, hx) of a GRU or RNN of 2 layers, 6 inputs and 9 units; {} stands for an argument that is left out.
ONE_STATE = {
    "input-features": (torch.randn(4, 2, 5), None),
    "input-rank-1": (torch.randn(6), None),
    "input-rank-4": (torch.randn(1, 4, 2, 6), None),
    "input-scalar": (torch.tensor(1.0), None),
    "input-float64": (X.double(), None),
    "input-int64": (X.long(), None),
    "input-complex": (X.to(torch.complex64), None),
    "input-none": (None, None),
    "input-list": (X.tolist(), None),
    "input-no-steps": (X[:0], None),
    "hx-batch": (X, torch.randn(2, 3, 9)),
    "hx-layers": (X, torch.randn(1, 2, 9)),
    "hx-size": (X, torch.randn(2, 2, 8)),
    "hx-rank-2": (X, torch.randn(2, 9)),
    "hx-rank-2-of-2": (X[:, 0], torch.randn(2, 8)),
    "hx-rank-3-of-2": (X[:, 0], H),
    "hx-float64": (X, H.double()),
    "hx-number": (X, 1.0),
    "hx-list": (X, [H]),
    "hx-packed-batch": (pack_sequence([ROW, ROW[:1]]), torch.randn(2, 3, 9)),
    "hx-packed-size": (pack_sequence([ROW, ROW[:1]]), torch.randn(2, 2, 8)),
    "packed-features": (pack_sequence([STATE, STATE[:1]]), None),
    "packed-float64": (pack_sequence([ROW.double()]), None),
}
# hx of an LSTM of the same sizes.
TWO_STATES = {
    "one": (X, (H,)),
    "three": (X, (H, H, H)),
    "none-inside": (X, (H, None)),
    "no-tuple": (X, H),
    "number": (X, 3),
    "h-batch": (X, (torch.randn(2, 3, 9), H)),
    "c-batch": (X, (H, torch.randn(2, 3, 9))),
    "c-size": (X, (H, torch.randn(2, 2, 8))),
    "c-rank": (X, (H, torch.randn(2, 9))),
    "h-rank": (X, (torch.randn(2, 9), H)),
    "c-float64": (X, (H, H.double())),
    "unbatched-rank": (X[:, 0], (H, H)),
    "packed-h-batch": (pack_sequence([ROW, ROW[:1]]), (torch.randn(2, 3, 9), H)),
    "packed-one": (pack_sequence([ROW, ROW[:1]]), (H,)),
}
CELL_ONE_STATE = {
    "input-features": (torch.randn(2, 5), None),
    "input-rank-3": (X, None),
    "input-scalar": (torch.tensor(1.0), None),
    "input-float64": (ROW.double(), None),
    "input-none": (None, None),
    "hx-batch": (ROW, torch.randn(3, 9)),
    "hx-size": (ROW, torch.randn(2, 8)),
    "hx-rank": (ROW, torch.randn(1, 2, 9)),
    "hx-rank-1": (ROW, torch.randn(9)),
    "hx-float64": (ROW, STATE.double()),
    "hx-number": (ROW, 1.0),
    "unbatched-hx": (ROW[0], STATE),
}
CELL_TWO_STATES = {
    "one": (ROW, (STATE,)),
    "no-tuple": (ROW, STATE),
    "number": (ROW, 3),
    "h-batch": (ROW, (torch.randn(3, 9), STATE)),
    "c-batch": (ROW, (STATE, torch.randn(3, 9))),
    "c-size": (ROW, (STATE, torch.randn(2, 8))),
    "c-rank": (ROW, (STATE, torch.randn(9))),
    "c-float64": (ROW, (STATE, STATE.double())),
    "unbatched": (ROW[0], (STATE, STATE)),
}
KINDS = {
    "rnn": (lambda **rest: nn.RNN(6, 9, 2, **rest), ONE_STATE),
    "gru": (lambda **rest: nn.GRU(6, 9, 2, **rest), ONE_STATE),
    "gru-batch-first": (lambda **rest: nn.GRU(6, 9, 2, batch_first=True, **rest), ONE_STATE),
    "lstm": (lambda **rest: nn.LSTM(6, 9, 2, **rest), {**ONE_STATE, **TWO_STATES}),
    "lstm-proj": (lambda **rest: nn.LSTM(6, 9, 2, proj_size=4, **rest), TWO_STATES),
    "rnn-cell": (lambda **rest: nn.RNNCell(6, 9, **rest), CELL_ONE_STATE),
    "gru-cell": (lambda **rest: nn.GRUCell(6, 9, **rest), CELL_ONE_STATE),
    "lstm-cell": (lambda **rest: nn.LSTMCell(6, 9, **rest), CELL_TWO_STATES),
}
ALL = [(kind, name) for kind, (_, table) in KINDS.items() for name in table]
ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError, NotImplementedError)


def outcome(module: nn.Module, arguments: tuple):
    """The shapes of a call's results, or its error."""
    try:
        with torch.no_grad():
            results = module(*arguments)
    except ERRORS as error:
        return error
    return [tuple(tensor.shape) for tensor in torch.utils._pytree.tree_leaves(results)]


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize(("kind", "name"), ALL)
def test_as_torch(kind, name, weights):
    new, table = KINDS[kind]
    expected, actual = outcome(new(), table[name]), outcome(freeze(new(), weights), table[name])
    if isinstance(expected, list):
        assert actual == expected or isinstance(actual, ERRORS), "a result of another shape"
        return
    assert isinstance(actual, ERRORS), f"torch.nn: {expected!r}"
    assert isinstance(actual, type(expected)), f"{actual!r}; torch.nn: {expected!r}"
    assert str(actual).splitlines()[0] == str(expected).splitlines()[0]


def test_lengths():
    frozen, x = freeze(nn.GRU(6, 9)), torch.randn(4, 2, 6)
    for lengths in (torch.tensor([1, 5]), torch.tensor([-1, 2]), torch.tensor([1]), torch.tensor([1.0, 2.0])):
        with pytest.raises((RuntimeError, TypeError, ValueError), match="lengths"):
            frozen(x, lengths=lengths)
    with pytest.raises(ValueError, match="lengths is for padded input"):
        frozen(pack_sequence([ROW]), lengths=torch.tensor([2]))


@pytest.mark.parametrize("weights", ["int4", "INT8", "", None, torch.int8, 8])
def test_unknown_weights(weights):
    with pytest.raises(ValueError, match="weights: expected one of 'float32', 'bfloat16', 'int8', got"):
        freeze(nn.GRU(3, 4), weights)


def test_no_module():
    for model in (None, "model", torch.zeros(2), nn.GRU):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got"):
            freeze(model)
    with pytest.raises(ValueError, match="inplace=True"):
        freeze(nn.GRU(3, 4), inplace=True)


def test_nothing_is_frozen_halfway(caplog):
    """A layer that cannot be frozen is named with the reason, and a model that is all such layers stays as it is."""
    model = nn.Sequential(nn.LSTM(3, 4).half())
    with caplog.at_level("WARNING", "rnnfast"):
        assert type(freeze(model)[0]) is nn.LSTM
    assert "0 (LSTM) is not frozen: weight_ih_l0 is torch.float16" in caplog.text


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_messages_of_our_own_have_no_place_in_the_source(weights):
    """bfloat16 input under autocast is fine for torch.nn. A frozen layer says what it takes."""
    frozen = freeze(harness.make_module(nn, Case("gru", 1, 1, 6, 9)), weights)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError) as raised:
        frozen(X.bfloat16())
    assert "frozen.cpp" not in str(raised.value) and "float32" in str(raised.value)
