"""NaN and infinity stay where they are, extreme numbers do as in torch, empty things, flat memory."""

from __future__ import annotations

import os
import random

import pytest
import torch
from support import harness
from support.harness import CELLS, Case, num_threads

import rnnfast
from rnnfast import _ext

pytestmark = pytest.mark.skipif(_ext.failure is not None, reason=f"the compiled kernels are absent: {_ext.failure}")
KINDS = [(cell, 0) for cell in CELLS] + [("lstm", 3)]


def run(module, cell: str, x, states, grads=None, weights: bool = False):
    """Outputs and states; with `grads` (for the output) also the gradients of input and states (and weights)."""
    leaves = [t.detach().clone().requires_grad_(grads is not None) for t in (x, *states)]
    output, final = module(leaves[0], tuple(leaves[1:]) if cell == "lstm" else leaves[1])
    results = [output, *(final if cell == "lstm" else (final,))]
    wanted = [*leaves, *(module.parameters() if weights else ())]
    found = torch.autograd.grad(output, wanted, grads, allow_unused=True) if grads is not None else []
    return [r.detach() for r in (*results, *found)]


def setup(cell: str, proj: int, **options):
    case = Case(cell, **{"T": 5, "B": 9, "I": 3, "H": 13, "proj": proj, **options})
    module, data = harness.make_module(rnnfast, case), harness.Data(case)
    return module, data, [data.hx, data.cx][: 2 if cell == "lstm" else 1]


@pytest.mark.parametrize("where", ["input", "state", "grad"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("batch", [9, 65])
@pytest.mark.parametrize(("cell", "proj"), KINDS, ids=str)
def test_a_bad_row_stays_alone(cell, proj, batch, bad, where):
    """The other rows, and their gradients, are bit-equal to those of a clean run; so no vector lane is ever mixed."""
    module, data, states = setup(cell, proj, B=batch)
    row = batch // 2
    grad = data.grads["output"]
    with rnnfast.backend("cpu", strict=True):
        clean = run(module, cell, data.input, states, grad)
        inputs = [data.input.clone(), [s.clone() for s in states], grad.clone()]
        {"input": inputs[0], "state": inputs[1][-1], "grad": inputs[2]}[where][1 if where != "state" else 0, row] = bad
        dirty = run(module, cell, *inputs)
        with torch.no_grad():
            inferred = run(module, cell, *inputs[:2])
    others = torch.arange(batch) != row
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:, others], b[:, others])
    for a, b in zip(clean, inferred, strict=False):
        torch.testing.assert_close(a[:, others], b[:, others])
    affected = dirty if where == "grad" else dirty[:1]
    assert bad == torch.inf or any(t[:, row].isnan().any() for t in affected)


@pytest.mark.parametrize(("cell", "proj"), KINDS, ids=str)
def test_nan_comes_through_as_in_torch(cell, proj):
    """In time as well: what lies before a NaN in the direction of travel is clean, the rest is NaN where torch's is."""
    case = Case(cell, T=7, B=3, I=3, H=13, proj=proj, bidirectional=True)
    data, results = harness.Data(case), []
    x = data.input.clone()
    x[4, 1, 0], x[2, 2, 1], x[3, 0, 2] = torch.nan, torch.inf, -torch.inf
    states = [data.hx, data.cx][: 2 if cell == "lstm" else 1]
    for package in (torch.nn, rnnfast):
        with rnnfast.backend("aten" if package is torch.nn else "cpu", strict=True), torch.no_grad():
            results.append(run(harness.make_module(package, case), cell, x, states))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    width = case.proj or case.H
    assert not actual_before_nan(results[1][0], width).isnan().any()


def actual_before_nan(output: torch.Tensor, width: int) -> torch.Tensor:
    """Row 1: forward steps 0 to 3 and backward steps 5 and 6 have not seen the NaN of step 4."""
    return torch.cat([output[:4, 1, :width].flatten(), output[5:, 1, width:].flatten()])


@pytest.mark.parametrize("scale", [1e4, 1e30, 1e-4, 1e-30, 1e-42], ids=str)
@pytest.mark.parametrize(("cell", "proj"), KINDS, ids=str)
def test_huge_and_tiny_numbers(cell, proj, scale):
    """Saturated gates and denormals: finite, and as in torch, gradients included.

    The kernels' sigmoid ends at 1e-28 where torch's ends at 0; a weight's gradient multiplies that by the input.
    """
    case = Case(cell, T=4, B=5, I=3, H=13, proj=proj)
    data, results = harness.Data(case), []
    states = [data.hx, data.cx][: 2 if cell == "lstm" else 1]
    states = [s * min(scale, 1e4) if cell != "rnn_relu" else s for s in states]
    grad = data.grads["output"]
    for package in (torch.nn, rnnfast):
        with rnnfast.backend("aten" if package is torch.nn else "cpu", strict=True):
            module = harness.make_module(package, case)
            results.append(run(module, cell, data.input * scale, states, grad, weights=scale <= 1e4))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        expected, actual = expected.nan_to_num(0, 0, 0), actual.nan_to_num(0, 0, 0)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-20)
    if cell != "rnn_relu":
        assert all(r.isfinite().all() for r in results[1])


@pytest.mark.parametrize("cell", CELLS)
def test_activations_over_the_whole_range(cell):
    """One step of hidden size 1 with weight 1: the activation itself, from -1e38 to 1e38, point by point."""
    points = torch.logspace(-40, 38, 500, dtype=torch.float64).float()
    points = torch.cat([-points, torch.zeros(1), points, torch.linspace(-100, 100, 4001)])
    case = Case(cell, 1, len(points), 1, 1, bias=False)
    x, results = points[None, :, None], []
    for package, dtype in ((torch.nn, torch.float64), (torch.nn, torch.float32), (rnnfast, torch.float32)):
        module = harness.make_module(package, case).to(dtype)
        with torch.no_grad(), rnnfast.backend("cpu" if package is rnnfast else "aten", strict=True):
            for parameter in module.parameters():
                parameter.fill_(1.0)
            results.append(module(x.to(dtype))[0].double())
    truth, of_torch, actual = results
    cancels = torch.finfo(torch.float32).eps if cell == "gru" else 0.0  # in 1 - z
    allowed = 2 * (of_torch - truth).abs() + 1e-5 * truth.abs() + cancels + 1e-25
    assert ((actual - truth).abs() <= allowed).all()


@pytest.mark.parametrize(("cell", "proj"), KINDS, ids=str)
def test_all_lengths_zero(cell, proj):
    """Nothing runs: output 0, states passed through, gradients 0 except the states' own."""
    case = Case(cell, T=4, B=3, I=3, H=5, proj=proj, bidirectional=True)
    module, data = harness.make_module(rnnfast, case), harness.Data(case)
    x = torch.full_like(data.input, torch.nan).requires_grad_()
    states = [s.clone().requires_grad_() for s in (data.hx, data.cx)[: 2 if cell == "lstm" else 1]]
    with rnnfast.backend("cpu", strict=True):
        hx = tuple(states) if cell == "lstm" else states[0]
        output, final = module(x, hx, lengths=torch.zeros(3, dtype=torch.int64))
    final = final if cell == "lstm" else (final,)
    assert not output.any() and all(torch.equal(a, b) for a, b in zip(states, final, strict=True))
    seeds = [torch.randn_like(s) for s in final]
    grads = torch.autograd.grad([output, *final], [*states, x, *module.parameters()], [torch.ones_like(output), *seeds])
    assert all(torch.equal(a, b) for a, b in zip(seeds, grads, strict=False))
    assert all(not g.any() for g in grads[len(states) :])


@pytest.mark.parametrize("backward", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("cell", "proj"), KINDS, ids=str)
def test_empty_batch_as_in_torch(cell, proj, backward):
    """The same shapes and gradients, or the same exception."""
    case = Case(cell, T=4, B=0, I=3, H=5, proj=proj)
    outcomes = []
    for package in (torch.nn, rnnfast):
        module = harness.make_module(package, case)
        x = torch.zeros(4, 0, 3, requires_grad=backward)
        try:
            output, states = module(x)
            results = [output, *(states if cell == "lstm" else (states,))]
            if backward:
                results += torch.autograd.grad(output.sum(), [x, *module.parameters()], allow_unused=True)
            outcomes.append([None if r is None else (r.shape, bool(r.any())) for r in results])
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def random_calls(count: int, seed: int) -> None:
    r = random.Random(seed)
    for _ in range(count):
        cell, proj = r.choice(KINDS)
        hidden_size = r.choice([4, 5, 16, 33, 64])
        case = Case(cell, r.randint(1, 30), r.randint(1, 20), r.choice([3, 8]), hidden_size, proj=proj and 2)
        module = harness.make_module(rnnfast, case)
        x, lengths = torch.randn(case.T, case.B, case.I), None
        if r.random() < 0.3:
            lengths = torch.randint(0, case.T + 1, (case.B,))
        if r.random() < 0.5:
            module(x, lengths=lengths)[0].sum().backward()
        else:
            with torch.no_grad():
                module(x, lengths=lengths)


needs_statm = pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="/proc/self/statm (resident memory, of Linux) is missing"
)


@pytest.mark.quick(1)
@needs_statm
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_stays_flat(threads):
    """Thousands of calls of changing shapes, modules freed, forward and backward: no growth beyond allocator noise."""
    with num_threads(threads), rnnfast.backend("cpu", strict=True):
        random_calls(500, seed=0)
        before = resident_bytes()
        random_calls(10_000, seed=1)
        assert resident_bytes() - before < 16 * 2**20


@needs_statm
def test_errors_leave_nothing_behind():
    """A refused call allocates nothing that stays, and the next good call is right."""
    module, x = rnnfast.LSTM(8, 64), torch.randn(50, 16, 8)
    expected = module(x)[0]
    before = resident_bytes()
    for _ in range(2000):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            module(x, lengths=torch.full((16,), 51))
    assert resident_bytes() - before < 16 * 2**20
    assert torch.equal(module(x)[0], expected)


def test_activations_are_as_exact_as_the_kernels_claim():
    """Gates i and g of an LSTM whose input weights are one are sigmoid(x) and tanh(x): the bounds of kernels/vec.h."""
    x = torch.linspace(-30, 30, 200_001)
    x = torch.cat([x, x * 1e-2, x * 1e-4])
    states = torch.zeros(1, len(x), 1)
    weights = [torch.ones(4, 1), torch.zeros(4, 1)]
    saved = torch.ops.rnnfast.lstm_fwd(x.view(1, -1, 1), states, states.clone(), weights, None, None)[3]
    gates, truth = saved[0].double(), x.double()
    assert (gates[:, 0] - truth.sigmoid()).abs().max() < 1e-7
    assert (gates[:, 2] - truth.tanh()).abs().max() < 1.8e-7
