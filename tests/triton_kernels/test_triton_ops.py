"""torch.ops.rnnfast_triton.* in the interpreter: opcheck, refusals, torch.compile, and which calls reach them.

The tests of the compiled operators, with these in their place.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap

import pytest
import test_ops
import test_ops_checks
import torch
from support.compiled import assert_same, make
from support.harness import CELLS, Case, check, make_module
from test_ops_checks import (  # noqa: F401  these run here with the Triton operators
    test_backward_refuses,
    test_forward_refuses,
    test_lstm_refuses_cx,
    test_other_devices_and_layouts_are_refused,
    test_projection_shapes_are_checked,
    test_stack_refuses,
    test_step_refuses,
)

import rnnfast
from rnnfast import select
from rnnfast.ops import OPERATORS
from rnnfast.precision import float32_products
from rnnfast.triton import layers, plan

SMALL = {"T": 3, "B": 3, "I": 2, "H": 5}
VARIANTS = [{}, {"bidirectional": True, "ragged": "sorted"}, {"bidirectional": True, "ragged": "lengths"}]
KINDS = [(cell, {}) for cell in CELLS] + [("lstm", {"proj": 2})]


@pytest.fixture(autouse=True)
def triton_operators(monkeypatch):
    monkeypatch.setattr(test_ops, "OPS", OPERATORS["rnnfast_triton"])
    monkeypatch.setattr(test_ops_checks, "OPS", OPERATORS["rnnfast_triton"])


@pytest.mark.quick(1)
@pytest.mark.parametrize("variant", VARIANTS, ids=["padded", "packed", "lengths"])
@pytest.mark.parametrize(("cell", "options"), KINDS)
def test_opcheck(cell, options, variant):
    """The fake kernels tell what the launchers allocate, strides included."""
    test_ops.test_opcheck(Case(cell, **SMALL, **options, **variant))


@pytest.mark.quick(1)
@pytest.mark.parametrize("variant", VARIANTS, ids=["padded", "packed", "lengths"])
@pytest.mark.parametrize(("cell", "options"), KINDS)
def test_a_stack_is_its_layers(cell, options, variant):
    test_ops.test_a_stack_is_its_layers(Case(cell, **SMALL, layers=2, **options, **variant))


@pytest.mark.quick(1)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_of_steps(cell):
    test_ops.test_opcheck_step(Case(cell, **SMALL, dtype=torch.half), given=True)
    test_ops.test_opcheck_step(Case(cell, **SMALL, bias=False), given=False)
    test_ops.test_step_is_a_layer_of_one_step(Case(cell, **SMALL), given=True)


@pytest.mark.quick(1)
@pytest.mark.parametrize("cell", CELLS)
def test_backward_of_less(cell):
    test_ops.test_opcheck_backward_with_less(Case(cell, **SMALL))
    test_ops.test_missing_gradients_count_as_zero(cell)
    test_ops.test_gradients_not_needed_are_empty(cell)


@pytest.mark.quick(2)
@pytest.mark.parametrize(("cell", "options"), KINDS)
def test_the_same_call_gives_the_same_bits(cell, options):
    op = OPERATORS["rnnfast_triton"][cell].layer
    arguments = test_ops.backward_arguments(Case(cell, 3, 18, 2, 5, bidirectional=True, ragged="lengths", **options))
    *first, first_weights = op.bwd(*arguments)
    *again, again_weights = op.bwd(*arguments)
    assert all(torch.equal(a, b) for a, b in zip([*first, *first_weights], [*again, *again_weights], strict=True))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("cell", CELLS)
def test_layouts(cell, layout):
    check(Case(cell, 2, 3, 4, 8, layout=layout, grads="transposed"), "triton")


def test_weights_on_odd_addresses():
    module = rnnfast.LSTM(3, 8)
    flat = torch.randn(1 + sum(p.numel() for p in module.parameters()))
    stock = torch.nn.LSTM(3, 8)
    with torch.no_grad():  # weights one float past a 16-byte boundary
        place = 1
        for ours, theirs in zip(module.parameters(), stock.parameters(), strict=True):
            ours.data = flat[place : place + ours.numel()].view(ours.shape)
            theirs.copy_(ours)
            place += ours.numel()
    x = torch.randn(2, 3, 3)
    with rnnfast.backend("triton", strict=True):
        torch.testing.assert_close(module(x), stock(x))


def test_weights_of_any_strides():
    test_ops.test_weights_of_any_strides("lstm")
    test_ops.test_weights_of_any_strides("rnn_tanh")
    stock, ours = torch.nn.GRU(3, 5), rnnfast.GRU(3, 5)
    ours.load_state_dict(stock.state_dict())
    x, replaced = torch.randn(2, 2, 3), {"bias_hh_l0": torch.full((1,), 0.5).expand(15)}
    with rnnfast.backend("triton", strict=True):
        mine = torch.func.functional_call(ours, replaced, x)
    torch.testing.assert_close(mine, torch.func.functional_call(stock, replaced, x))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_backward_inside_autocast_stays_in_the_dtype_of_forward(bidirectional):
    stock, ours = (package.GRU(3, 5, bidirectional=bidirectional) for package in (torch.nn, rnnfast))
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 2, 3)
    for model in (stock, ours):
        with rnnfast.backend("triton"):
            loss = model(x)[0].square().sum()
        with torch.autocast("cpu", torch.bfloat16) if model is ours else contextlib.nullcontext():
            loss.backward()
    for mine, its in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_float64_under_autocast_is_torchs(monkeypatch):
    monkeypatch.setattr(select, "_warned", set())
    model, x = rnnfast.GRU(3, 5).double(), torch.randn(2, 2, 3, dtype=torch.float64)
    told = pytest.warns(RuntimeWarning, match="float64")
    with rnnfast.backend("triton"), torch.autocast("cpu", torch.bfloat16), told:
        assert model(x)[0].dtype is torch.float64


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_finite_in_a_row_without_steps_reaches_no_weight(cell, bidirectional):
    module = make_module(rnnfast, Case(cell, 3, 2, 3, 4, bidirectional=bidirectional))
    hx = torch.zeros(1 + bidirectional, 2, 4)
    hx[:, 1] = torch.nan
    with rnnfast.backend("triton", strict=True):
        hx = (hx, torch.zeros_like(hx)) if cell == "lstm" else hx
        output, _ = module(torch.randn(3, 2, 3), hx, lengths=torch.tensor([3, 0]))
        output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_more_rows_than_a_launch_can_have_are_refused():
    device = plan.Device("H200", (9, 0), 232_448, 132)
    assert "1048577 batch rows" in plan.plan("lstm", False, 20, 20, 1_048_577, 1, "16-bit", device)


@pytest.mark.parametrize("cell", CELLS)
def test_zero_batch(cell):
    with rnnfast.backend("triton", strict=True):
        model = make_module(rnnfast, Case(cell, 4, 1, 3, 6))
        x = torch.randn(4, 0, 3, requires_grad=True)
        output, _ = model(x)
        assert output.shape == (4, 0, 6)
        output.sum().backward()
        assert x.grad.shape == x.shape and all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(name):
    ours, theirs = getattr(rnnfast, name)(3, 5), getattr(torch.nn, name)(3, 5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3)
    with rnnfast.backend("triton", strict=True):
        mine = ours(x)
        torch.testing.assert_close(mine, theirs(x))
        (mine[0] if isinstance(mine, tuple) else mine).sum().backward()
    own = theirs(x)
    (own[0] if isinstance(own, tuple) else own).sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.quick(1)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("cell", CELLS)
def test_fullgraph(cell, training):
    torch._dynamo.reset()  # else every model counts as a recompilation of the same code
    model = make(cell, layers=2, bidirectional=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with rnnfast.backend("triton", strict=True), torch.set_grad_enabled(training):
        for steps, batch in ((3, 2), (2, 5)):
            assert_same(compiled, model, torch.randn(steps, batch, 3), training=training)


def test_a_compiled_graph_follows_the_switch_of_its_own_time(monkeypatch):
    """The interpreter's products are exact whatever is asked, so what the kernels are told is looked at."""
    torch._dynamo.reset()
    told, arguments = [], layers._arguments
    monkeypatch.setattr(layers, "_arguments", lambda *given: told.append(arguments(*given)) or told[-1])
    model, x = rnnfast.RNN(3, 5), torch.randn(2, 2, 3, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with rnnfast.backend("triton", strict=True):
        for forward, backward in (("ieee", "tf32"), ("tf32", "ieee")):
            monkeypatch.setenv("RNNFAST_FLOAT32_PRODUCTS", forward)
            output, _ = compiled(x)
            monkeypatch.setenv("RNNFAST_FLOAT32_PRODUCTS", backward)
            output.sum().backward()
    assert [one["PRECISION"] for one in told] == ["ieee", "tf32", "tf32", "ieee"]


def test_double_backward():
    model = rnnfast.GRU(2, 3).requires_grad_(False)
    x = torch.randn(2, 2, 2, requires_grad=True)
    with rnnfast.backend("triton", strict=True):
        (grad,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
        (ours,) = torch.autograd.grad(grad.square().sum(), x)
    with rnnfast.backend("aten"):
        (grad,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
        (theirs,) = torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_it_must_be_asked_for():
    """Unmeasured kernels are nobody's default."""
    x = torch.randn(2, 2, 3)
    assert rnnfast.explain(rnnfast.LSTM(3, 4), x).backend == "cpu"
    with rnnfast.backend("triton"):
        assert rnnfast.explain(rnnfast.LSTM(3, 4), x).backend == "triton"


def test_what_it_cannot_do_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(select, "_warned", set())
    model = rnnfast.LSTM(3, 4).double()
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    with rnnfast.backend("triton", strict=True), pytest.raises(RuntimeError, match="no kernel for torch.float64"):
        model(x)
    with rnnfast.backend("triton"), pytest.warns(RuntimeWarning, match="no kernel for torch.float64"):
        assert model(x)[0].shape == (2, 2, 4)


def python(program: str, **environment: str) -> None:
    environment = {key: value for key, value in {**os.environ, **environment}.items() if value}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, text=True, timeout=300)
    assert done.returncode == 0


def test_without_a_gpu_or_the_interpreter():
    """Nothing of Triton is imported, and the reason is given."""
    python(
        """
        import sys, torch, rnnfast
        assert "triton" not in sys.modules or torch.cuda.is_available()
        state = rnnfast.backends()["triton"]
        assert torch.cuda.is_available() or "there is no CUDA device" in state, state
        rnnfast.LSTM(3, 4)(torch.randn(2, 2, 3))
        with rnnfast.backend("triton", strict=True):
            try:
                rnnfast.LSTM(3, 4)(torch.randn(2, 2, 3))
            except RuntimeError as error:
                assert "CUDA" in str(error), error
            else:
                raise SystemExit("no error")
        """,
        TRITON_INTERPRET="",
    )


@pytest.mark.quick(0)
def test_environment_runs_a_program_through_the_kernels():
    python(
        """
        import torch, rnnfast
        torch.manual_seed(0)
        model, x = rnnfast.GRU(3, 4), torch.randn(2, 2, 3)
        assert rnnfast.explain(model, x).backend == "triton"
        torch.testing.assert_close(model(x), torch.nn.GRU.forward(rnnfast.revert(model), x))
        """,
        RNNFAST_BACKEND="triton",
        TRITON_INTERPRET="1",
    )


def test_precision_follows_torchs_switch(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert float32_products(cpu) == "ieee"
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    assert float32_products(cuda) == "ieee"
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    assert float32_products(cuda) == "tf32"
    monkeypatch.setenv("RNNFAST_FLOAT32_PRODUCTS", "tf32x3")
    assert float32_products(cpu) == "tf32x3"
    check(Case("lstm", 2, 3, 4, 5), "triton")
    monkeypatch.setenv("RNNFAST_FLOAT32_PRODUCTS", "double")
    with pytest.raises(ValueError, match="expected one of tf32, tf32x3, ieee, got 'double'"):
        float32_products(cpu)
