"""The drop-in contract: what a program may do to torch.nn's recurrent classes, it may do to rnnfast's."""

import abc
import copy
import inspect
import io
import pickle

import pytest
import torch
from support.twins import (
    CELLS,
    LAYERS,
    NAMES,
    assert_bitwise,
    assert_same,
    cells_take_the_kernels,  # noqa: F401
    state_of,
    tensors,
    twins,
)
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import rnnfast
from rnnfast import _backends, select

DEEP = {"num_layers": 2, "bidirectional": True}


class ForwardOnly(abc.ABC):
    @abc.abstractmethod
    def forward(self, input, hx=None): ...


# ------------------------------------------------ class and attributes


@pytest.mark.parametrize("name", NAMES)
def test_class(name):
    ours, theirs = getattr(rnnfast, name), getattr(nn, name)
    assert issubclass(ours, theirs) and ours is not theirs
    assert ours.__name__ == ours.__qualname__ == name and ours.__module__.split(".")[0] == "rnnfast"
    assert type(ours) is type, "no metaclass: a subclass may bring its own"
    assert inspect.getdoc(ours) and inspect.getdoc(ours.forward)
    assert ours.__setattr__ is theirs.__setattr__
    parameters = list(inspect.signature(ours.forward).parameters)
    assert parameters[:3] == ["self", "input", "hx"]
    assert isinstance(ours(3, 4), (theirs, nn.RNNBase if "Cell" not in name else nn.RNNCellBase))


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("RNN", {}),
        ("RNN", {"nonlinearity": "relu", "num_layers": 2, "dropout": 0.25}),
        ("GRU", {"bias": False, "batch_first": True, "bidirectional": True}),
        ("LSTM", {"proj_size": 2, "num_layers": 3}),
        ("RNNCell", {"nonlinearity": "relu"}),
        ("GRUCell", {"bias": False}),
        ("LSTMCell", {}),
    ],
    ids=str,
)
def test_repr(name, kwargs):
    ours, theirs = twins(name, **kwargs)
    assert repr(ours) == repr(theirs)
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(theirs))


@pytest.mark.parametrize("kind", LAYERS)
def test_flat_weights(kind):
    ours, theirs = twins(kind, **DEEP)
    assert ours._flat_weights_names == theirs._flat_weights_names
    for weight, name in zip(ours._flat_weights, ours._flat_weights_names, strict=True):
        assert weight is getattr(ours, name)
    assert [[w.shape for w in layer] for layer in ours.all_weights] == [
        [w.shape for w in layer] for layer in theirs.all_weights
    ]
    assert all(w is f for w, f in zip(sum(ours.all_weights, []), ours._flat_weights, strict=True))
    assert (ours.mode, ours.proj_size, ours.num_layers) == (theirs.mode, theirs.proj_size, theirs.num_layers)


@pytest.mark.parametrize("kind", LAYERS)
def test_flatten_parameters_is_harmless(kind):
    ours, theirs = twins(kind, **DEEP)
    pointers, x = [p.data_ptr() for p in ours.parameters()], torch.randn(5, 2, 3)
    assert ours.flatten_parameters() is None
    assert pointers == [p.data_ptr() for p in ours.parameters()]
    assert_same(ours(x), theirs(x))
    ours.flatten_parameters = lambda *args: None  # what weight-drop modules do
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_same_seed_gives_the_same_weights(kind):
    name, options = (LAYERS | CELLS)[kind]
    modules = []
    for library in (rnnfast, nn):
        torch.manual_seed(7)
        modules.append(getattr(library, name)(5, 6, **options))
    assert_bitwise(modules[0].state_dict(), modules[1].state_dict())
    for module in modules:
        torch.manual_seed(8)
        module.reset_parameters()
    assert_bitwise(modules[0].state_dict(), modules[1].state_dict())


# ------------------------------------------------ state, copies, serialization


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_state_dict_both_ways(kind):
    name, options = (LAYERS | CELLS)[kind]
    ours, theirs = getattr(rnnfast, name)(3, 4, **options), getattr(nn, name)(3, 4, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((ours, theirs), (theirs, ours)):
        source.reset_parameters()
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        result = target.load_state_dict(torch.load(buffer, weights_only=True))
        assert not result.missing_keys and not result.unexpected_keys
        assert_bitwise(target.state_dict(), source.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({})


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_and_loaded}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_copies(kind, how):
    ours, _ = twins(kind)
    x = torch.randn(5, 3) if kind in CELLS else torch.randn(5, 2, 3)
    expected = ours(x)
    twin = COPIES[how](ours)
    assert type(twin) is type(ours) and repr(twin) == repr(ours)
    assert_bitwise(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert_bitwise(ours(x), expected)
    assert not torch.equal(tensors(twin(x))[0], tensors(expected)[0]), "the copy has weights of its own and uses them"


def test_old_pickles_without_proj_size_load():
    ours, theirs = twins("lstm")
    state = ours.__getstate__()
    del state["proj_size"]
    revived = rnnfast.LSTM.__new__(rnnfast.LSTM)
    revived.__setstate__(state)
    x = torch.randn(5, 2, 3)
    assert_same(revived(x), theirs(x))


# ------------------------------------------------ subclasses and ways to call


def test_subclass_with_abc_and_mixin():
    class Base(nn.GRU, ForwardOnly):  # torch's own class first, to show that the pattern is legal there
        def forward(self, input, hx=None):
            return super().forward(input, hx=hx)

    class Ours(rnnfast.GRU, ForwardOnly):
        def __init__(self, *args, scale=1.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = scale

        def forward(self, input, hx=None):
            output, state = super().forward(input * self.scale, hx=hx)
            return output, state

    theirs, ours = Base(3, 4, 2), Ours(3, 4, 2, scale=2.0)
    ours.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(5, 2, 3), torch.randn(2, 2, 4)
    assert_same(ours(x, hx), theirs(x * 2.0, hx))
    assert type(Ours) is abc.ABCMeta


def test_class_body_can_be_copied():
    """A well-known library copies nn.LSTM's attributes, all but __init__, to a base of its own and brings a forward."""

    class Base(nn.RNNBase):
        def __init__(self, *args, **kwargs):
            super().__init__("LSTM", *args, **kwargs)

    for attribute in rnnfast.LSTM.__dict__:
        if attribute != "__init__":
            setattr(Base, attribute, getattr(rnnfast.LSTM, attribute))

    class Copied(Base):
        __doc__ = rnnfast.LSTM.__doc__ + "more"

        def forward(self, input, hx):
            output, *state = torch.lstm(input, hx, self._flat_weights, self.bias, 1, 0.0, True, False, False)
            return output, tuple(state)

    _, theirs = twins("lstm")
    copied = Copied(3, 4)
    copied.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(5, 2, 3), state_of(theirs, 2)
    assert_same(copied(x, hx), theirs(x, hx))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_every_way_to_pass_arguments(kind):
    ours, theirs = twins(kind)
    x = torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)
    hx = state_of(theirs, 2)
    expected = theirs(x, hx)
    for call in (ours, ours.forward):
        assert_same(call(x, hx), expected)
        assert_same(call(x, hx=hx), expected)
        assert_same(call(input=x, hx=hx), expected)
        assert_same(call(x), theirs(x))
        assert_same(call(x, None), theirs(x))
    if isinstance(hx, tuple):
        assert_same(ours(x, list(hx)), theirs(x, list(hx)))
    assert type(ours(x, hx)) is type(expected)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_take_what_torch_takes(kind):
    name, options = CELLS[kind]
    for bias in (1, 0):
        ours, theirs = (getattr(m, name)(torch.tensor(3), 4, bias=bias, **options) for m in (rnnfast, nn))
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 3)
        assert_same(ours(x), theirs(x))
        assert (ours.bias_ih is None) == (not bias)
        assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_dropout_draws_what_torch_draws(kind, p, packed):
    ours, theirs = twins(kind, num_layers=3, bidirectional=True)
    x = torch.randn(6, 4, 3)
    x = pack_padded_sequence(x, torch.tensor([6, 4, 2, 1])) if packed else x
    plain = theirs(x)
    results, states = [], []
    for module in (ours, theirs):
        module.dropout = p  # set after construction: counts from the next call on
        torch.manual_seed(3)
        results.append(module(x))
        states.append(torch.get_rng_state())
    assert_same(*results)
    assert torch.equal(*states)
    assert not torch.equal(tensors(results[0])[0], tensors(plain)[0])
    assert_same(ours.eval()(x), plain)


# ------------------------------------------------ inputs


def layouts(x):
    """The numbers of a [T, B, I] tensor in several memory layouts."""
    return {
        "transposed": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "sliced": torch.cat([x, x * torch.nan], -1)[..., : x.shape[-1]],
        "strided": torch.stack([x, x * torch.nan], -1).flatten(-2)[..., ::2],
        "offset": torch.cat([torch.full((1,), torch.nan), x.flatten()])[1:].view(x.shape),
    }


@pytest.mark.parametrize("kind", LAYERS)
def test_any_strides(kind):
    ours, theirs = twins(kind, **DEEP)
    x, hx = torch.randn(5, 2, 3), state_of(theirs, 2)
    expected = theirs(x, hx)
    for name, view in layouts(x).items():
        assert_same(ours(view, hx), expected, name)
    for name in layouts(tensors(hx)[0]):
        strided = [layouts(t)[name] for t in tensors(hx)]
        assert_same(ours(x, tuple(strided) if isinstance(hx, tuple) else strided[0]), expected, name)


@pytest.mark.parametrize("kind", LAYERS)
def test_expanded_hx_stays_unwritten(kind):
    ours, theirs = twins(kind, **DEEP)
    x = torch.randn(5, 3, 3)
    rows = [torch.randn(1, 1, t.shape[-1]) for t in tensors(state_of(theirs, 3))]
    before = [row.clone() for row in rows]
    hx = [row.expand(4, 3, -1) for row in rows]
    hx = tuple(hx) if len(hx) == 2 else hx[0]
    assert_same(ours(x, hx), theirs(x, hx))
    with torch.no_grad():
        ours(x, hx)
    assert_bitwise(rows, before)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("given", [False, True], ids=["no_hx", "hx"])
@pytest.mark.parametrize("kind", LAYERS)
def test_padded_unbatched_and_packed(kind, given, batch_first):
    ours, theirs = twins(kind, batch_first=batch_first, **DEEP)
    lengths = torch.tensor([2, 5, 1, 4])
    x = torch.randn(4, 5, 3) if batch_first else torch.randn(5, 4, 3)
    hx, hx_unbatched = (state_of(theirs, 4), state_of(theirs, None)) if given else (None, None)
    assert_same(ours(x, hx), theirs(x, hx))
    one = x[0] if batch_first else x[:, 0]
    assert_same(ours(one, hx_unbatched), theirs(one, hx_unbatched))
    unsorted = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    ordered = pack_padded_sequence(x, lengths.sort(descending=True).values, batch_first=batch_first)
    for packed in (unsorted, ordered):
        output, state = ours(packed, hx)
        assert type(output) is PackedSequence
        assert_same((output, state), theirs(packed, hx))
        assert output.sorted_indices is packed.sorted_indices
    padded, back = pad_packed_sequence(ours(unsorted, hx)[0], batch_first=batch_first)
    assert torch.equal(back, lengths)
    assert_same(padded, pad_packed_sequence(theirs(unsorted, hx)[0], batch_first=batch_first)[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_equals_one_sequence_at_a_time(kind):
    ours, _ = twins(kind, **DEEP)
    sequences = [torch.randn(length, 3) for length in (3, 7, 1)]
    output, state = ours(pack_sequence(sequences, enforce_sorted=False))
    padded, _ = pad_packed_sequence(output)
    for i, sequence in enumerate(sequences):
        alone, alone_state = ours(sequence)
        assert_same(padded[: len(sequence), i], alone)
        assert_same([s[:, i] for s in tensors(state)], tensors(alone_state))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_dtype_conversion(kind, dtype):
    ours, theirs = twins(kind)
    x = torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)
    assert_same(ours(x), theirs(x))
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
    assert_same(ours(x), theirs(x))
    assert tensors(ours(x))[0].dtype == dtype
    ours, theirs = ours.float(), theirs.float()
    assert_same(ours(x.float()), theirs(x.float()))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_meta_device(kind):
    ours, theirs = twins(kind, device="cpu")
    x = torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)
    name, options = (LAYERS | CELLS)[kind]
    on_meta = getattr(rnnfast, name)(3, 4, device="meta", **options)
    results = on_meta(x.to("meta"))
    assert [(t.shape, t.device.type) for t in tensors(results)] == [(t.shape, "meta") for t in tensors(theirs(x))]
    on_meta.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    assert_same(on_meta(x), theirs(x))
    on_meta = copy.deepcopy(ours).to("meta")
    on_meta.load_state_dict(theirs.state_dict(), assign=True)
    assert_same(on_meta(x), theirs(x))
    if kind in CELLS:
        skipped = nn.utils.skip_init(getattr(rnnfast, name), 3, 4, **options)
        skipped.load_state_dict(theirs.state_dict())
        assert_same(skipped(x), theirs(x))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "both-ways"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_stack_takes_the_shortest_way(kind, given, bidirectional, monkeypatch):
    ours, theirs = twins(kind, num_layers=3, bidirectional=bidirectional)
    x, hx = torch.randn(5, 2, 3), state_of(theirs, 2) if given else None
    expected = theirs(x, hx)
    monkeypatch.setattr(select, "choose", None)  # which such a call need not ask
    assert_same(ours(x, hx), expected)


@pytest.mark.parametrize("dtype", _backends.DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_dtype_takes_the_shortest_way(kind, dtype, monkeypatch):
    ours, theirs = (module.to(dtype) for module in twins(kind))
    x = torch.randn(5, 2, 3, dtype=dtype)
    expected = theirs(x)
    monkeypatch.setattr(select, "choose", None)
    assert_same(ours(x), expected)


@pytest.mark.parametrize("wrong", ["weight_ih_l1", "weight_hh_l1", "bias_hh_l1"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_stack_with_one_wrong_layer_is_refused_as_by_torch(kind, wrong):
    messages = []
    for module in twins(kind, num_layers=2):
        setattr(module, wrong, nn.Parameter(torch.zeros(7, 7, dtype=torch.float64)))
        with pytest.raises(RuntimeError) as error:
            module(torch.randn(5, 2, 3))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
