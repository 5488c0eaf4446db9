"""Frozen layers give the layer's numbers: every constructor option, every form of input, all three formats of weights.

float32 obeys the parity rule beside torch.nn. bfloat16 and int8 obey frozen_model's rule: at most twice as far from
float64 on the same (rounded) weights as the bare formulas with rounded activations are.
"""

from __future__ import annotations

import pytest
import torch
from support import frozen_model, harness
from support.frozen_model import FORMATS
from support.harness import CELLS, Case, Data
from support.tolerances import assert_parity
from torch import nn

import rnnfast
from rnnfast import _ext
from rnnfast.freeze import freeze

pytestmark = pytest.mark.skipif(_ext.failure is not None, reason=f"the compiled kernels are absent: {_ext.failure}")

OPTIONS = {
    "plain": {},
    "no-hx": {"hx": False},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "layers": {"layers": 3},
    "bidirectional": {"bidirectional": True},
    "all": {"layers": 2, "bidirectional": True, "bias": False, "batch_first": True, "ragged": "unsorted"},
    "sorted": {"ragged": "sorted"},
    "unsorted": {"ragged": "unsorted", "layers": 2, "bidirectional": True},
    "unsorted-no-hx": {"ragged": "unsorted", "hx": False},
    "lengths": {"ragged": "lengths", "bidirectional": True},
    "lengths-batch-first": {"ragged": "lengths", "batch_first": True, "hx": False},
    "transposed": {"layout": "transposed"},
    "strided": {"layout": "strided"},
    "expanded": {"layout": "expanded"},
    "two-threads": {"threads": 2, "layers": 2},
}
PROJECTIONS = {
    "proj": {"proj": 5},
    "proj-all": {"proj": 1, "layers": 2, "bidirectional": True, "ragged": "lengths"},
    "proj-no-bias": {"proj": 11, "bias": False, "hx": False},
}
# (T, B, I, H): one of each, no multiple of 16, whole vectors, several blocks, many rows, one row of many steps.
SHAPES = [(1, 1, 1, 1), (1, 1, 40, 33), (6, 2, 1, 3), (4, 3, 16, 16), (3, 5, 65, 50), (2, 33, 7, 17), (20, 1, 9, 130)]


def check(case: Case, weights: str, exact: bool = False) -> None:
    stock_case = case if case.ragged != "lengths" else Case(**{**vars(case), "batch_first": False})
    stock = harness.make_module(nn, stock_case)
    frozen = freeze(harness.make_module(nn, case), weights, exact=exact)
    if weights != "float32":
        return frozen_model.check(case, frozen, weights, exact)
    data = Data(case)
    parameters = {name: p.detach().double() for name, p in stock.named_parameters()}
    forward_64 = harness.oracle_forward(case, data, parameters, [])

    def forward(x, hx):
        return harness.module_forward(frozen, case, x, hx, data.lengths)

    def forward_of_torch(x, hx):
        if case.ragged == "lengths":
            return harness.stock_with_lengths(stock, stock_case, x, hx, data.lengths)
        return harness.module_forward(stock, stock_case, x, hx, data.lengths)

    with harness.num_threads(case.threads):
        actual = harness.run_values(case, data, forward, torch.float32)
        of_torch = harness.run_values(stock_case, data, forward_of_torch, torch.float32)
    reference = harness.run_values(case, data, forward_64, torch.float64)
    assert_parity(
        actual,
        of_torch,
        reference,
        torch.float32,
        value_terms=case.I + case.H,
        conditioning=lambda: harness.conditioning(case, data, stock),
    )


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_options(cell, name, weights):
    check(Case(cell, 7, 5, 6, 19, **OPTIONS[name]), weights)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections(name, weights):
    check(Case("lstm", 7, 5, 6, 19, **PROJECTIONS[name]), weights)
    check(Case("lstm", 3, 1, 70, 100, **{**PROJECTIONS[name], "proj": 66}), weights)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_shapes(cell, shape, weights):
    check(Case(cell, *shape), weights)


@pytest.mark.parametrize("case", [Case(cell, 6, 4, 40, 70, bidirectional=True) for cell in CELLS], ids=str)
def test_exact_int8(case):
    check(case, "int8", exact=True)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("shape", [(12, 48, 40, 130), (12, 1, 64, 512)], ids=["many-rows", "few-rows"])
def test_two_threads(cell, shape, weights):
    """Both ways to share the work: over the batch, over the units."""
    check(Case(cell, *shape, threads=2), weights)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("cell", CELLS)
def test_unbatched(cell, weights):
    """[T, I] is the batch of one row, with `batch_first` too."""
    for batch_first in (False, True):
        frozen = freeze(harness.make_module(nn, Case(cell, 4, 1, 6, 19, layers=2, batch_first=batch_first)), weights)
        x, h = torch.randn(4, 6), torch.randn(2, 19)
        hx = (h, torch.randn(2, 19)) if cell == "lstm" else h
        dim = 0 if batch_first else 1
        batched = (h[:, None], hx[1][:, None]) if cell == "lstm" else h[:, None]
        expected, states = frozen(x.unsqueeze(dim), batched)
        output, own = frozen(x, hx)
        assert torch.equal(output, expected.squeeze(dim))
        for one, other in zip(as_tuple(own), as_tuple(states), strict=True):
            assert torch.equal(one, other.squeeze(1))
        assert torch.equal(frozen(x)[0], frozen(x.unsqueeze(dim))[0].squeeze(dim))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell, weights):
    """No row: torch.nn's shapes, and nothing in them."""
    stock = harness.make_module(nn, Case(cell, 3, 1, 6, 19, layers=2, bidirectional=True))
    frozen = freeze(stock, weights)
    x, h = torch.randn(3, 0, 6), torch.randn(4, 0, 19)
    for hx in (None, (h, h) if cell == "lstm" else h):
        expected, actual = stock(x, hx), frozen(x, hx)
        assert actual[0].shape == expected[0].shape
        for one, other in zip(as_tuple(actual[1]), as_tuple(expected[1]), strict=True):
            assert one.shape == other.shape


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_all_zero(cell, weights):
    """Then the states pass through and the output is zero."""
    frozen = freeze(harness.make_module(nn, Case(cell, 3, 2, 6, 19)), weights)
    h = torch.randn(1, 2, 19)
    hx = (h, h + 1) if cell == "lstm" else h
    output, states = frozen(torch.randn(3, 2, 6), hx, lengths=torch.zeros(2, dtype=torch.int64))
    assert torch.equal(output, torch.zeros(3, 2, 19))
    for one, other in zip(as_tuple(states), as_tuple(hx), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("package", [nn, rnnfast], ids=["torch.nn", "rnnfast"])
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell, bias, weights, package):
    """A frozen cell is the frozen layer's single step."""
    options = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    name = "RNN" if options else cell.upper()
    own = getattr(package, name + "Cell")(6, 19, bias=bias, **options)
    layer = getattr(package, name)(6, 19, bias=bias, **options)
    layer.load_state_dict({f"{key}_l0": weight for key, weight in own.state_dict().items()})
    cell_, layer = freeze(own, weights), freeze(layer, weights)
    for batch in (1, 5):
        x, h, c = torch.randn(batch, 6), torch.randn(batch, 19), torch.randn(batch, 19)
        for hx in (None, (h, c) if cell == "lstm" else h):
            states = hx if hx is None else tuple(s[None] for s in hx) if cell == "lstm" else hx[None]
            expected = layer(x[None], states)[1]
            for one, other in zip(as_tuple(cell_(x, hx)), as_tuple(expected), strict=True):
                assert torch.equal(one, other[0])
            if batch == 1:
                alone = hx if hx is None else tuple(s[0] for s in hx) if cell == "lstm" else hx[0]
                for one, other in zip(as_tuple(cell_(x[0], alone)), as_tuple(cell_(x, hx)), strict=True):
                    assert torch.equal(one, other[0])


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_stand_alone(cell, weights):
    """A row's result hangs on that row alone: in a batch, packed with others, or by itself. So do layers in a stack."""
    case = Case(cell, 6, 4, 10, 37, layers=2)
    stock = harness.make_module(nn, case)
    frozen, data = freeze(stock, weights), Data(case)
    states = (data.hx, data.cx) if cell == "lstm" else (data.hx,)
    lengths = torch.tensor([3, 6, 2, 5])
    whole = frozen(data.input, states if cell == "lstm" else data.hx, lengths=lengths)
    packed = nn.utils.rnn.pack_padded_sequence(data.input, lengths, enforce_sorted=False)
    unpacked, _ = nn.utils.rnn.pad_packed_sequence(frozen(packed, states if cell == "lstm" else data.hx)[0])
    assert torch.equal(whole[0], unpacked)
    for row, length in enumerate(lengths.tolist()):
        own = tuple(state[:, row : row + 1] for state in states)
        alone = frozen(data.input[:length, row : row + 1], own if cell == "lstm" else own[0])
        assert_close(whole[0][:length, row], alone[0][:, 0], weights)


def assert_close(actual, expected, weights):
    """Sums of int8 products are exact, whatever the order. Sums of floats have an order for one row and for many."""
    if weights == "int8":
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 if weights == "float32" else 2e-2)


def as_tuple(states):
    return states if isinstance(states, tuple) else (states,)


def test_a_model_has_every_layer_frozen():
    """Layers in a model are replaced, shared ones by one; the model's other parts are copies."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 6)
            self.layers = nn.ModuleList([nn.LSTM(6, 8), rnnfast.GRU(8, 8), nn.RNN(8, 8)])
            self.shared = self.layers[0]
            self.cell = nn.GRUCell(8, 8)

        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x, _ = layer(x)
            return self.cell(x[-1])

    model, x = Model(), torch.randn(5, 2, 3)
    expected = model(x)
    for inplace in (False, True):
        frozen = freeze(model, "float32", inplace=inplace)
        assert (frozen is model) == inplace and not frozen.training
        assert [type(layer).__name__ for layer in frozen.layers] == ["FrozenLayer"] * 3
        assert frozen.shared is frozen.layers[0] and type(frozen.cell).__name__ == "FrozenCell"
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), expected.detach(), rtol=1e-4, atol=1e-5)
        if not inplace:
            assert frozen.embed.weight is not model.embed.weight and type(model.layers[0]) is nn.LSTM and model.training
    assert freeze(model, "int8") is not model, "what is frozen stays as it is"


def test_what_cannot_be_frozen_stays(caplog):
    class Own(nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(input, hx)

    hooked = nn.GRU(3, 4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({"own": Own(3, 4), "wide": nn.RNN(3, 4).double(), "hooked": hooked, "good": nn.GRU(3, 4)})
    with caplog.at_level("WARNING", "rnnfast"):
        frozen = freeze(model)
    kinds = {name: type(module).__name__ for name, module in frozen.items()}
    assert kinds == {"own": "Own", "wide": "RNN", "hooked": "GRU", "good": "FrozenLayer"}
    said = "\n".join(record.getMessage() for record in caplog.records)
    for name in ("own", "wide", "hooked"):
        assert f"{name} (" in said, said
    assert "good" not in said
