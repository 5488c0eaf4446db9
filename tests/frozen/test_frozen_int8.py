"""Frozen int8 weights: exact integer sums on every instruction set, and numbers at the edges of float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_isa
import torch
from support import frozen_model, harness
from support.frozen_model import FORMATS, dequantised
from support.harness import CELLS, Case, Data
from test_isa import X86, available  # noqa: F401
from torch import nn

from rnnfast import _ext
from rnnfast.freeze import freeze
from rnnfast.packing import quantised

pytestmark = pytest.mark.skipif(_ext.failure is not None, reason=f"the compiled kernels are absent: {_ext.failure}")

SIZES = [(1, 1), (3, 17), (16, 16), (64, 33), (130, 100), (1000, 48)]
ROWS = (1, 2, 5, 8, 33)


def integer_layer(inputs: int, hidden: int) -> nn.RNN:
    """A relu layer without bias whose weights are integers, each row with a 127: the scales are 1."""
    layer = nn.RNN(inputs, hidden, nonlinearity="relu", bias=False)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randint(-127, 128, weight.shape))
            weight[:, 0] = torch.where(torch.rand(len(weight)) < 0.5, 127.0, -127.0)
    return layer


def integers(rows: int, columns: int, low: int, high: int) -> torch.Tensor:
    """Integers as floats; each row has `low` and `high`, where it has room for both, so that its scale is 1."""
    values = torch.randint(low, high + 1, (rows, columns)).float()
    values[:, -1], values[:, 0] = float(low), float(high)
    return values


def test_weights_are_rounded_to_the_nearest():
    """W = scale * q, the largest value of a row is 127; a row of zeros stays one."""
    weight = torch.randn(7, 33) * torch.logspace(-6, 6, 7)[:, None]
    weight[3] = 0
    q, scale = quantised(weight)
    assert q.dtype == torch.int8 and int(q.min()) >= -127
    error = (q * scale[:, None] - weight).abs()
    assert (error <= scale[:, None] * (0.5 + 1e-4)).all()
    rows = q.int().abs().amax(1)
    assert rows[3] == 0 and torch.equal(rows[[0, 1, 2, 4, 5, 6]], torch.full((6,), 127, dtype=torch.int32))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_are_exact_integers(sizes, rows):
    """One step of relu(W x + W h) by Python's own integers."""
    layer = integer_layer(*sizes)
    frozen = freeze(layer, "int8")
    wide = rows == 1
    x = integers(rows, sizes[0], -60, -60 + (65535 if wide else 255))
    h = integers(rows, sizes[1], -100, 32767 if wide else 127)
    weight_ih, weight_hh = (weight.int().tolist() for weight in layer.parameters())
    expected = [
        [
            max(0, sum(map(int.__mul__, w, a)) + sum(map(int.__mul__, u, b)))
            for w, u in zip(weight_ih, weight_hh, strict=True)
        ]
        for a, b in zip(x.int().tolist(), h.int().tolist(), strict=True)
    ]
    if sizes[0] == 1:
        return  # a row of one number has another scale; the shapes of test_frozen have it
    _, actual = frozen(x[None], h[None])
    if wide:  # such sums are more than float32 can hold
        torch.testing.assert_close(actual[0].double(), torch.tensor(expected).double(), rtol=1e-6, atol=10.0)
    else:
        assert actual[0].tolist() == expected


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("cell", CELLS)
def test_each_step_is_the_model_s(cell, batch, exact):
    """Every step beside the formulas, from the state that the kernel itself had: only float32's rounding is between."""
    case = Case(cell, 12, batch, 20, 50)
    frozen, data = freeze(harness.make_module(nn, case), "int8", exact=exact), Data(case)
    plain = {name.removesuffix("_l0"): weight for name, weight in dequantised(frozen).items()}
    output, _ = frozen(data.input, (data.hx, data.cx) if cell == "lstm" else data.hx)
    h, c = data.hx[0].double(), data.cx[0].double()
    for t in range(case.T):
        expected, c = frozen_model.step(cell, data.input[t].double(), h, c, plain, "int8", exact)
        torch.testing.assert_close(output[t].double(), expected, rtol=1e-5, atol=3e-6)
        h = output[t].double()


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from support import frozen_model, harness
from support.harness import CELLS, Case, Data
from rnnfast.freeze import freeze
from test_frozen_int8 import ROWS, SIZES, integer_layer, integers
print(torch.ops.rnnfast._frozen_isa(2), flush=True)
torch.manual_seed(0)
results = {}
with torch.no_grad():
    for sizes in SIZES[1:]:
        frozen = freeze(integer_layer(*sizes), "int8")
        for rows in ROWS[1:]:
            x, h = integers(rows, sizes[0], -60, 195), integers(rows, sizes[1], -100, 127)
            results["exact", sizes, rows] = frozen(x[None], h[None])[1]
    for cell in CELLS:
        for weights in ("float32", "bfloat16", "int8"):
            for shape in ((1, 1, 40, 33), (1, 9, 70, 50), (1, 33, 16, 16)):
                case = Case(cell, *shape)
                data, frozen = Data(case), freeze(harness.make_module(torch.nn, case), weights)
                results[weights, cell, shape] = frozen(data.input, (data.hx, data.cx) if cell == "lstm" else data.hx)[0]
            if weights != "float32":
                options = {"layers": 2, "bidirectional": True, "ragged": "lengths"}
                case = Case(cell, 9, 7, 21, 35, **options, proj=20 if cell == "lstm" else 0)
                for exact in (False, True):
                    frozen = freeze(harness.make_module(torch.nn, case), weights, exact=exact)
                    frozen_model.check(case, frozen, weights, exact)
torch.save(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def of_best(tmp_path_factory):
    return results_of(None, tmp_path_factory.mktemp("best"))


def results_of(isa: str | None, folder) -> dict:
    path = folder / "results.pt"
    folders = [str(Path(module).parent) for module in (__file__, test_isa.__file__)]
    program = f"import sys; sys.argv = ['', {str(path)!r}]; sys.path += {folders}\n" + PROGRAM
    if isa is None:
        program = "import os; del os.environ['RNNFAST_CPU_ISA']\n" + program
    done = test_isa.run(isa or "base", program)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("isa", [*X86, "neon"])
def test_every_instruction_set_has_the_same_sums(isa, available, of_best, tmp_path):  # noqa: F811
    """Integer sums are equal, bit by bit. One step with scales and activations is so but for float32's rounding."""
    if isa not in available:
        pytest.skip(f"this machine has no {isa}")
    actual = results_of(isa, tmp_path)
    for key, expected in of_best.items():
        if key[0] == "exact":
            assert torch.equal(actual[key], expected), key
        else:
            atol = 1e-2 if key[0] == "bfloat16" else 2e-6  # without AVX512-BF16 activations stay float32
            torch.testing.assert_close(
                actual[key], expected, rtol=2e-6, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e30], ids=str)
def test_weights_of_any_size(size, cell, weights):
    """Zeros, numbers below the normal ones, and sizes at which every gate is open or shut."""
    case = Case(cell, 3, 4, 9, 18)
    stock, data = harness.make_module(nn, case), Data(case)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter *= size
        frozen = freeze(stock, weights)
        hx = (data.hx, data.cx) if cell == "lstm" else data.hx
        output, expected = frozen(data.input, hx)[0], stock(data.input, hx)[0]
    if size < 1:
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    elif cell == "rnn_relu":  # infinity less infinity: NaN in torch.nn, too
        assert expected[-1].isnan().any() and not output[0].isnan().any()
    else:
        assert float(output.abs().max()) <= max(float(data.hx.abs().max()), 1.0)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30], ids=str)
def test_input_of_any_size(size, weights):
    case = Case("lstm", 3, 4, 9, 18, hx=False)
    frozen, stock = freeze(harness.make_module(nn, case), weights), harness.make_module(nn, case)
    x = torch.randn(3, 4, 9) * size
    with torch.no_grad():
        output, expected = frozen(x)[0], stock(x)[0]
    assert not output.isnan().any()
    if size < 1:
        tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 2e-2}[weights]
        torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity_reach_the_output(cell, value, exact, weights):
    """NaN in a row makes that row's results NaN from there on, and no other row's. An infinity is no crash."""
    case = Case(cell, 4, 3, 9, 18, layers=2)
    frozen, data = freeze(harness.make_module(nn, case), weights, exact=exact), Data(case)
    hx = (data.hx, data.cx) if cell == "lstm" else data.hx
    good = frozen(data.input, hx)[0]
    x = data.input.clone()
    x[2, 1, 4] = value
    output = frozen(x, hx)[0]
    assert torch.equal(output[:, [0, 2]], good[:, [0, 2]]) and torch.equal(output[:2, 1], good[:2, 1])
    if value != value:
        assert output[2:, 1].isnan().all()
    else:
        assert not torch.equal(output[2:, 1], good[2:, 1])


@pytest.mark.parametrize("weights", FORMATS)
def test_nan_in_a_weight_or_state_reaches_the_output(weights):
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"):
        layer = nn.LSTM(4, 5)
        with torch.no_grad():
            getattr(layer, name).view(-1)[3] = float("nan")
        assert freeze(layer, weights)(torch.randn(3, 2, 4))[0].isnan().any(), name
    frozen, h = freeze(nn.GRU(4, 5), weights), torch.zeros(1, 2, 5)
    h[0, 1, 2] = float("nan")
    output, h_n = frozen(torch.randn(3, 2, 4), h)
    assert output[:, 1].isnan().all() and h_n[0, 1].isnan().all() and not output[:, 0].isnan().any()


@pytest.mark.parametrize("exact", [False, True])
def test_rows_of_the_largest_finite_numbers(exact):
    """Their range is more than float32 can hold."""
    x = torch.zeros(2, 2, 4)
    x[0, 0, :2] = torch.tensor([3e38, -3e38])
    assert not freeze(nn.LSTM(4, 5), "int8", exact=exact)(x)[0].isnan().any()
