"""Bad input: torch.nn's own exception class and message, and a module that works as before afterwards.

Each table row is run on torch.nn's class and on rnnfast's; what torch.nn does is what is expected.
"""

import contextlib
import re
import warnings

import pytest
import torch
from support.twins import assert_bitwise, assert_same, state_of, tensors, twins
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

randn = torch.randn


def outcome(function, *args):
    """("raises", class, message) or ("returns", result)."""
    torch.manual_seed(0)
    try:
        return "returns", function(*args)
    except Exception as error:  # whatever torch raises, ours must raise too
        return "raises", type(error), str(error)


def packed(rows, batch_sizes, *indices, dtype=torch.int64):
    return PackedSequence(randn(rows, 3), torch.tensor(batch_sizes, dtype=dtype), *indices)


def states(module, *shape, **factory):
    """Zeros of one shape as the hx of `module`."""
    h = torch.zeros(*shape, **factory)
    return (h, h.clone()) if isinstance(module, (nn.LSTM, nn.LSTMCell)) else h


def good_input(module):
    return randn(2, 3) if isinstance(module, nn.RNNCellBase) else randn(5, 2, 3)


# ------------------------------------------------ layers: input_size 3, hidden_size 4, one layer

LAYER_INPUTS = {
    "1-D": lambda m: m(randn(3)),
    "4-D": lambda m: m(randn(1, 5, 2, 3)),
    "0-D": lambda m: m(randn(())),
    "input_size": lambda m: m(randn(5, 2, 7)),
    "input_size_0": lambda m: m(randn(5, 2, 0)),
    "unbatched_input_size": lambda m: m(randn(5, 7)),
    "T=0": lambda m: m(randn(0, 2, 3)),
    "T=0_unbatched": lambda m: m(randn(0, 3)),
    "T=0_B=0": lambda m: m(randn(0, 0, 3)),
    "float64": lambda m: m(randn(5, 2, 3).double()),
    "float16": lambda m: m(randn(5, 2, 3).half()),
    "int64": lambda m: m(torch.ones(5, 2, 3, dtype=torch.int64)),
    "bool": lambda m: m(torch.ones(5, 2, 3, dtype=torch.bool)),
    "complex": lambda m: m(randn(5, 2, 3, dtype=torch.complex64)),
    "meta": lambda m: m(randn(5, 2, 3, device="meta")),
    "sparse": lambda m: m(randn(5, 2, 3).to_sparse()),
    "None": lambda m: m(None),
    "list": lambda m: m([[1.0, 2.0, 3.0]]),
    "nothing": lambda m: m(),
    "unknown_keyword": lambda m: m(randn(5, 2, 3), hidden=None),
    "too_many_arguments": lambda m: m(randn(5, 2, 3), None, None),
}
LAYER_STATES = {
    "batch": lambda m: m(randn(5, 2, 3), states(m, 1, 3, 4)),
    "layers": lambda m: m(randn(5, 2, 3), states(m, 2, 2, 4)),
    "hidden_size": lambda m: m(randn(5, 2, 3), states(m, 1, 2, 5)),
    "batch_first": lambda m: m(randn(5, 2, 3), states(m, 2, 1, 4)),
    "2-D_for_batched": lambda m: m(randn(5, 2, 3), states(m, 1, 4)),
    "3-D_for_unbatched": lambda m: m(randn(5, 3), states(m, 1, 1, 4)),
    "unbatched_layers": lambda m: m(randn(5, 3), states(m, 2, 4)),
    "1-D": lambda m: m(randn(5, 2, 3), states(m, 4)),
    "4-D": lambda m: m(randn(5, 2, 3), states(m, 1, 1, 2, 4)),
    "empty": lambda m: m(randn(5, 2, 3), states(m, 0, 2, 4)),
    "float64": lambda m: m(randn(5, 2, 3), states(m, 1, 2, 4, dtype=torch.float64)),
    "bfloat16": lambda m: m(randn(5, 2, 3), states(m, 1, 2, 4, dtype=torch.bfloat16)),
    "int64": lambda m: m(randn(5, 2, 3), states(m, 1, 2, 4, dtype=torch.int64)),
    "meta": lambda m: m(randn(5, 2, 3), states(m, 1, 2, 4, device="meta")),
    "number": lambda m: m(randn(5, 2, 3), 5),
    "string": lambda m: m(randn(5, 2, 3), "hx"),
    "one_of_two": lambda m: m(randn(5, 2, 3), (torch.zeros(1, 2, 4),)),
    "three": lambda m: m(randn(5, 2, 3), (torch.zeros(1, 2, 4),) * 3),
    "None_inside": lambda m: m(randn(5, 2, 3), (torch.zeros(1, 2, 4), None)),
    "two_in_a_tensor": lambda m: m(randn(5, 2, 3), torch.zeros(2, 1, 2, 4)),
    "packed_batch": lambda m: m(packed(3, [2, 1]), states(m, 1, 3, 4)),
    "packed_2-D": lambda m: m(packed(3, [2, 1]), states(m, 1, 4)),
    "packed_float64": lambda m: m(packed(3, [2, 1]), states(m, 1, 2, 4, dtype=torch.float64)),
}
LAYER_PACKED = {
    "ascending": lambda m: m(packed(3, [1, 2])),
    "up_and_down": lambda m: m(packed(6, [2, 1, 3])),
    "sum_too_large": lambda m: m(packed(2, [2, 1])),
    "negative": lambda m: m(packed(2, [3, -1])),
    "zero_first": lambda m: m(packed(2, [0, 2])),
    "no_steps": lambda m: m(packed(0, [])),
    "float": lambda m: m(packed(3, [2.0, 1.0], dtype=torch.float32)),
    "int32": lambda m: m(packed(3, [2, 1], dtype=torch.int32)),
    "2-D": lambda m: m(packed(3, [[2, 1]])),
    "meta": lambda m: m(PackedSequence(randn(3, 3), torch.tensor([2, 1], device="meta"))),
    "data_3-D": lambda m: m(PackedSequence(randn(3, 1, 3), torch.tensor([2, 1]))),
    "data_input_size": lambda m: m(PackedSequence(randn(3, 7), torch.tensor([2, 1]))),
    "data_float64": lambda m: m(PackedSequence(randn(3, 3).double(), torch.tensor([2, 1]))),
    "data_meta": lambda m: m(PackedSequence(randn(3, 3, device="meta"), torch.tensor([2, 1]))),
    "indices": lambda m: m(packed(3, [2, 1], torch.tensor([0, 5]), torch.tensor([0, 1])), states(m, 1, 2, 4)),
}


def with_weight(name, value):
    """Calls a module one of whose weights is of the wrong kind."""

    def call(m):
        weight = getattr(m, name).detach()
        setattr(m, name, value(weight) if value(weight) is None else nn.Parameter(value(weight)))
        return m(good_input(m))

    return call


def with_attribute(name, value):
    def call(m):
        setattr(m, name, value)
        return m(good_input(m))

    return call


LAYER_MODULES = {
    "weight_ih_float64": with_weight("weight_ih_l0", lambda w: w.double()),
    "weight_hh_float64": with_weight("weight_hh_l0", lambda w: w.double()),
    "bias_meta": with_weight("bias_hh_l0", lambda w: w.to("meta")),
    "weight_None": with_weight("weight_ih_l0", lambda w: None),
    "all_meta": lambda m: m.to("meta")(randn(5, 2, 3)),
    "num_layers": with_attribute("num_layers", 3),
}
# Ours names the weight; torch.nn's error, if any, comes from within a product.
WRONG_SHAPES = {
    "bias_short": with_weight("bias_hh_l0", lambda w: w[:3].clone()),
    "weight_ih_shape": with_weight("weight_ih_l0", lambda w: w[:, :2].clone()),
    "weight_hh_shape": with_weight("weight_hh_l0", lambda w: w[:, :3].clone()),
    "weight_hh_rows": with_weight("weight_hh_l0", lambda w: w[:-1].clone()),
}
# What torch.nn takes although one might not think so.
LAYER_ACCEPTED = {
    "B=0": lambda m: m(randn(5, 0, 3)),
    "B=0_with_state": lambda m: m(randn(5, 0, 3), states(m, 1, 0, 4)),
    "sum_too_small": lambda m: m(packed(6, [2, 1])),
    "zero_last": lambda m: m(packed(2, [2, 0])),
    "bias_deleted": lambda m: (delattr(m, "bias_hh_l0"), m(randn(5, 2, 3)))[1],
}


# ------------------------------------------------ cells: input_size 3, hidden_size 4

CELL_CALLS = {
    "3-D": lambda m: m(randn(5, 2, 3)),
    "0-D": lambda m: m(randn(())),
    "input_size": lambda m: m(randn(2, 7)),
    "unbatched_input_size": lambda m: m(randn(7)),
    "float64": lambda m: m(randn(2, 3).double()),
    "int64": lambda m: m(torch.ones(2, 3, dtype=torch.int64)),
    "meta": lambda m: m(randn(2, 3, device="meta")),
    "None": lambda m: m(None),
    "list": lambda m: m([1.0, 2.0, 3.0]),
    "nothing": lambda m: m(),
    "unknown_keyword": lambda m: m(randn(2, 3), hidden=None),
    "state_batch": lambda m: m(randn(2, 3), states(m, 3, 4)),
    "state_hidden_size": lambda m: m(randn(2, 3), states(m, 2, 5)),
    "state_3-D": lambda m: m(randn(2, 3), states(m, 1, 2, 4)),
    "state_0-D": lambda m: m(randn(2, 3), states(m)),
    "state_1-D_for_batched": lambda m: m(randn(2, 3), states(m, 4)),
    "state_2-D_for_unbatched": lambda m: m(randn(3), states(m, 1, 4)),
    "state_float64": lambda m: m(randn(2, 3), states(m, 2, 4, dtype=torch.float64)),
    "state_meta": lambda m: m(randn(2, 3), states(m, 2, 4, device="meta")),
    "state_number": lambda m: m(randn(2, 3), 5),
    "weight_hh_shape": with_weight("weight_hh", lambda w: w[:, :3].clone()),
    "weight_ih_float64": with_weight("weight_ih", lambda w: w.double()),
    "weight_None": with_weight("weight_hh", lambda w: None),
}
CELL_ACCEPTED = {
    "B=0": lambda m: m(randn(0, 3)),
    "B=0_with_state": lambda m: m(randn(0, 3), states(m, 0, 4)),
    "one_bias_None": with_weight("bias_hh", lambda w: None),
}

# ------------------------------------------------ constructors

LAYER_CONSTRUCTORS = {
    "no_arguments": lambda cls: cls(),
    "unknown_keyword": lambda cls: cls(3, 4, layers=2),
    "too_many": lambda cls: cls(3, 4, 1, True, False, 0.0, False, 0, None, None, None, None),
    "input_size_float": lambda cls: cls(3.0, 4),
    "input_size_str": lambda cls: cls("3", 4),
    "input_size_tensor": lambda cls: cls(torch.tensor(3), 4),
    "input_size_0": lambda cls: cls(0, 4),
    "hidden_size_0": lambda cls: cls(3, 0),
    "hidden_size_negative": lambda cls: cls(3, -4),
    "hidden_size_float": lambda cls: cls(3, 4.0),
    "num_layers_0": lambda cls: cls(3, 4, 0),
    "num_layers_float": lambda cls: cls(3, 4, 2.0),
    "bias_int": lambda cls: cls(3, 4, bias=1),
    "bias_None": lambda cls: cls(3, 4, bias=None),
    "batch_first_int": lambda cls: cls(3, 4, batch_first=1),
    "dropout_large": lambda cls: cls(3, 4, 2, dropout=1.5),
    "dropout_negative": lambda cls: cls(3, 4, 2, dropout=-0.1),
    "dropout_bool": lambda cls: cls(3, 4, 2, dropout=True),
    "dropout_str": lambda cls: cls(3, 4, 2, dropout="much"),
    "proj_size_negative": lambda cls: cls(3, 4, proj_size=-1),
    "proj_size_too_large": lambda cls: cls(3, 4, proj_size=4),
    "nonlinearity": lambda cls: cls(3, 4, nonlinearity="gelu"),
    "dtype_int": lambda cls: cls(3, 4, dtype=torch.int64),
    "device_unknown": lambda cls: cls(3, 4, device="abacus"),
}
CELL_CONSTRUCTORS = {
    "no_arguments": lambda cls: cls(),
    "unknown_keyword": lambda cls: cls(3, 4, num_layers=2),
    "input_size_float": lambda cls: cls(3.0, 4),
    "hidden_size_negative": lambda cls: cls(3, -4),
    "dtype_int": lambda cls: cls(3, 4, dtype=torch.int64),
    "too_many": lambda cls: cls(3, 4, True, "tanh", None, None, None),
    "nonlinearity": lambda cls: cls(3, 4, nonlinearity="gelu")(randn(2, 3)),
}


def assert_same_outcome(case, ours, theirs, raises):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own fallbacks
        expected, actual = outcome(case, theirs), outcome(case, ours)
    assert (expected[0] == "raises") == raises, f"the table is wrong: torch.nn {expected}"
    assert actual[0] == expected[0], f"rnnfast {actual}, torch.nn {expected}"
    if raises:
        assert actual[1] is expected[1], f"rnnfast {actual}, torch.nn {expected}"
        # Python names the function that got the wrong arguments; ours is inherited by all three classes.
        plain = [re.sub(r"\w+\.(forward|__init__)\(\)", r"\1()", message) for message in (actual[2], expected[2])]
        assert plain[0] == plain[1]
    else:
        assert_same(actual[1], expected[1])


def rows(*tables):
    return [pytest.param(case, id=f"{name}-{row}") for name, table in tables for row, case in table.items()]


every_layer = pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
every_cell = pytest.mark.parametrize("kind", ["rnncell_tanh", "grucell", "lstmcell"])
by_default_and_by_kernels = pytest.mark.parametrize("request_", [None, "cpu"], ids=["default", "cpu"])
grad_modes = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])


@every_layer
@grad_modes
@pytest.mark.parametrize(
    "case", rows(("input", LAYER_INPUTS), ("hx", LAYER_STATES), ("packed", LAYER_PACKED), ("module", LAYER_MODULES))
)
def test_layer_rejects(kind, case, grad):
    with torch.set_grad_enabled(grad):
        assert_same_outcome(case, *twins(kind), raises=True)


@every_layer
@grad_modes
@pytest.mark.parametrize("case", rows(("", WRONG_SHAPES)))
def test_a_weight_of_a_wrong_shape_is_named(kind, case, grad):
    ours, _ = twins(kind)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(RuntimeError, match=r"(weight|bias)_.h_l0: expected shape .*, got "),
    ):
        case(ours)


@every_cell
@grad_modes
@by_default_and_by_kernels
def test_a_bias_of_a_wrong_shape_is_named(kind, grad, request_):
    ours, _ = twins(kind)
    with torch.set_grad_enabled(grad), rnnfast.backend(request_) if request_ else contextlib.nullcontext():
        with pytest.raises(RuntimeError, match=r"bias_ih: expected shape .*, got \[3\]"):
            with_weight("bias_ih", lambda w: w[:3].clone())(ours)


def test_unknown_mode():
    assert_same_outcome(with_attribute("mode", "RNN_GELU"), *twins("rnn_tanh"), raises=True)


@every_layer
@grad_modes
@pytest.mark.parametrize("case", rows(("", LAYER_ACCEPTED)))
def test_layer_accepts(kind, case, grad):
    with torch.set_grad_enabled(grad):
        assert_same_outcome(case, *twins(kind), raises=False)


@every_cell
@grad_modes
@by_default_and_by_kernels
@pytest.mark.parametrize("case", rows(("", CELL_CALLS)))
def test_cell_rejects(kind, case, grad, request_):
    with torch.set_grad_enabled(grad), rnnfast.backend(request_) if request_ else contextlib.nullcontext():
        assert_same_outcome(case, *twins(kind), raises=True)


@every_cell
@grad_modes
@by_default_and_by_kernels
@pytest.mark.parametrize("case", rows(("", CELL_ACCEPTED)))
def test_cell_accepts(kind, case, grad, request_):
    with torch.set_grad_enabled(grad), rnnfast.backend(request_) if request_ else contextlib.nullcontext():
        assert_same_outcome(case, *twins(kind), raises=False)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("case", rows(("", LAYER_CONSTRUCTORS)))
def test_layer_constructor_rejects(name, case):
    assert_same_outcome(case, getattr(rnnfast, name), getattr(nn, name), raises=True)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("case", rows(("", CELL_CONSTRUCTORS)))
def test_cell_constructor_rejects(name, case):
    assert_same_outcome(case, getattr(rnnfast, name), getattr(nn, name), raises=True)


@pytest.mark.parametrize("library", [rnnfast, nn], ids=["rnnfast", "torch.nn"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_useless_dropout_warns(library, name):
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        getattr(library, name)(3, 4, dropout=0.5)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "lstm_proj", "rnncell_tanh", "grucell", "lstmcell"])
def test_module_works_as_before_after_errors(kind):
    ours, theirs = twins(kind)
    cell = isinstance(ours, nn.RNNCellBase)
    x, hx = good_input(ours), state_of(ours, 2)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    table = {k: v for k, v in CELL_CALLS.items() if "weight" not in k and "bias" not in k} if cell else LAYER_INPUTS
    for case in [*table.values(), *({} if cell else LAYER_STATES | LAYER_PACKED).values()]:
        assert outcome(case, ours)[0] == "raises"
    assert_bitwise(ours.state_dict(), state)
    assert vars(ours).keys() == vars(theirs).keys()
    assert_same(ours(x, hx), theirs(x, hx))
    assert all(parameter.grad is None for parameter in ours.parameters())


@every_layer
def test_empty_batch_trains(kind):
    grads = []
    for module in twins(kind, num_layers=2, bidirectional=True):
        x = randn(5, 0, 3, requires_grad=True)
        sum(t.sum() for t in tensors(module(x))).backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    assert_same(*grads)


# ------------------------------------------------ lengths, which torch.nn does not have

LENGTHS = {
    "too_large": (torch.tensor([6, 1]), RuntimeError, "6"),
    "negative": (torch.tensor([-1, 1]), RuntimeError, "-1"),
    "too_few": (torch.tensor([5]), RuntimeError, r"\(2,\).*\(1,\)"),
    "too_many": (torch.tensor([5, 5, 5]), RuntimeError, r"\(2,\).*\(3,\)"),
    "2-D": (torch.tensor([[5, 5]]), RuntimeError, r"\(2,\).*\(1, 2\)"),
    "float": (torch.tensor([5.0, 5.0]), RuntimeError, "float32"),
    "bool": (torch.tensor([True, True]), RuntimeError, "bool"),
    "int16": (torch.tensor([5, 5], dtype=torch.int16), RuntimeError, "int16"),
    "list": ([5, 5], RuntimeError, "list"),
    "meta": (torch.tensor([5, 5], device="meta"), RuntimeError, "meta"),
}


@every_layer
@grad_modes
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("row", LENGTHS)
def test_lengths_are_checked(kind, row, grad, batch_first, backend):
    if rnnfast.backends()[backend] != "available":
        pytest.skip(f"backend {backend}: {rnnfast.backends()[backend]}")
    lengths, error, message = LENGTHS[row]
    ours, _ = twins(kind, batch_first=batch_first)
    x = randn(2, 5, 3) if batch_first else randn(5, 2, 3)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        ours(x, lengths=lengths)
    assert torch.isfinite(ours(x, lengths=torch.tensor([5, 0]))[0]).all()


@every_layer
def test_lengths_with_a_packed_sequence(kind):
    ours, _ = twins(kind)
    x = pack_padded_sequence(randn(5, 2, 3), torch.tensor([5, 2]))
    with pytest.raises(ValueError, match="packed sequence"):
        ours(x, lengths=torch.tensor([5, 2]))


@every_cell
def test_cells_have_no_lengths(kind):
    ours, _ = twins(kind)
    with pytest.raises(TypeError, match="lengths"):
        ours(randn(2, 3), lengths=torch.tensor([1, 1]))
