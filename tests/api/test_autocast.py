"""CPU autocast: result dtypes as torch.nn's class by class, numbers within the rule, gradients for fp32 weights."""

import contextlib
import copy
import itertools

import pytest
import torch
from support.tolerances import assert_parity
from support.twins import (
    CELLS,
    LAYERS,
    assert_same,
    cells_take_the_kernels,  # noqa: F401
    state_of,
    tensors,
    total,
    twins,
)
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

KINDS = [*LAYERS, *CELLS]
NO_PRIMITIVE = "could not create a primitive"  # torch.nn.LSTM under float16 where oneDNN has none for this machine
LOW = [torch.bfloat16, torch.float16]
MISSING = rnnfast.backends()["cpu"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_low = pytest.mark.parametrize("low", LOW, ids=str)


def skip_if_nothing_runs_it(error):
    """Where torch's operator has no primitive and the extension is absent, nothing is left to test."""
    assert NO_PRIMITIVE in error
    if MISSING != "available":
        pytest.skip(f"oneDNN has no float16 LSTM for this machine, and backend cpu: {MISSING}")


def autocast(low):
    return torch.autocast("cpu", dtype=low) if low is not None else contextlib.nullcontext()


def sample(kind, dtype=torch.float32, batch=3):
    return torch.randn(batch, 6, dtype=dtype) if kind in CELLS else torch.randn(7, batch, 6, dtype=dtype)


def named_results(module, x, hx, low):
    """Outputs, states and all gradients by name, in their own dtypes."""
    leaves = [x.detach().clone().requires_grad_(), *(t.detach().clone().requires_grad_() for t in tensors(hx))]
    states = None if hx is None else tuple(leaves[1:]) if isinstance(hx, tuple) else leaves[1]
    with autocast(low):
        results = tensors(module(leaves[0], states))
    for parameter in module.parameters():
        parameter.grad = None
    sum(total(t.to(x.dtype if low is None else torch.float32)) for t in results).backward()
    named = {f"result_{i}": t.detach() for i, t in enumerate(results)}
    named |= {f"grad_leaf_{i}": leaf.grad for i, leaf in enumerate(leaves)}
    return named | {f"grad_{name}": parameter.grad for name, parameter in module.named_parameters()}


@every_kind
@every_low
@pytest.mark.parametrize("given", [False, True], ids=["no_hx", "hx"])
@pytest.mark.parametrize("depth", ["one", "deep"])
def test_parity(kind, low, given, depth):
    """Numbers against the module in float64 without autocast; torch.nn's own autocast error is the yardstick."""
    if kind in CELLS and depth == "deep":
        options = {"bias": False}
    else:
        options = {"num_layers": 2, "bidirectional": True, "batch_first": True} if depth == "deep" else {}
    ours, theirs = twins(kind, 6, 5, **options)
    x, hx = sample(kind), None
    if given:
        hx = state_of(theirs, x.shape[0] if options.get("batch_first") or kind in CELLS else x.shape[1])
    if "relu" in kind:  # far from the kink, where rounding would choose between two derivatives
        x, hx = x.abs(), None if hx is None else hx.abs()
        for parameter in [*ours.parameters(), *theirs.parameters()]:
            parameter.data.abs_()
    try:
        of_torch = named_results(theirs, x, hx, low)
        actual = named_results(ours, x, hx, low)
    except RuntimeError as error:
        skip_if_nothing_runs_it(str(error))
        actual = named_results(ours, x, hx, low)
        with torch.backends.mkldnn.flags(enabled=False):
            of_torch = named_results(theirs, x, hx, low)
        of_torch = {name: t.to(actual[name].dtype) for name, t in of_torch.items()}
    hx = tuple(t.double() for t in hx) if isinstance(hx, tuple) else hx.double() if given else None
    reference = named_results(copy.deepcopy(theirs).double(), x.double(), hx, None)
    assert_parity(actual, of_torch, reference, low)
    assert {t.dtype for name, t in actual.items() if name.startswith("grad_")} == {torch.float32}


STATE_DTYPES = [None, torch.float32, torch.bfloat16, torch.float16]


@every_kind
@every_low
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("input", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(kind, low, input, state, grad):
    """Every mix of input and state dtype: torch.nn's result dtypes and shapes, or torch.nn's error."""
    ours, theirs = twins(kind, 6, 5)
    x = sample(kind, input)
    hx = None if state is None else state_of(theirs, 3, dtype=state)
    outcomes = []
    for module in (theirs, ours):
        with torch.set_grad_enabled(grad), autocast(low):
            try:
                outcomes.append([(t.dtype, t.shape, t.requires_grad) for t in tensors(module(x, hx))])
            except (RuntimeError, ValueError) as error:
                outcomes.append((type(error), str(error)))
    if isinstance(outcomes[0], tuple) and NO_PRIMITIVE in outcomes[0][1]:
        skip_if_nothing_runs_it(outcomes[0][1])
        shapes = [t.shape for t in tensors(theirs(x.float(), None))]
        assert [result[1:] for result in outcomes[1]] == [(shape, grad) for shape in shapes]
    else:
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", LAYERS)
@every_low
def test_packed(kind, low):
    ours, theirs = twins(kind, 6, 5, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(7, 3, 6), torch.tensor([2, 7, 4])

    def run(module, x, low):
        with autocast(low):
            output, state = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return {f"result_{i}": t for i, t in enumerate([output.data, *tensors(state)])}

    with torch.no_grad():
        of_torch, actual = run(theirs, x, low), run(ours, x, low)
        reference = run(copy.deepcopy(theirs).double(), x.double(), None)
    assert_parity(actual, of_torch, reference, low)


@every_kind
def test_disabled_autocast_is_plain(kind):
    ours, theirs = twins(kind, 6, 5)
    x = sample(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert_same(ours(x), theirs(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert_same(ours(x), theirs(x))
        low = ours(x)
    assert_same(ours(x), theirs(x))
    assert any(not torch.equal(a.float(), b) for a, b in zip(tensors(low), tensors(ours(x)), strict=True))


@pytest.mark.skipif(MISSING != "available", reason=f"backend cpu: {MISSING}")
@every_kind
def test_weights_changed_between_calls_in_one_region(kind):
    """torch caches the low-precision weights of a region; a weight that changed in it must be seen nevertheless."""
    ours, _ = twins(kind, 6, 5)
    x, hx = sample(kind), state_of(ours, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = tensors(ours(x, hx))
        for parameter in ours.parameters():
            parameter.mul_(-1.5)
        after = tensors(ours(x, hx))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        fresh = tensors(ours(x, hx))
    assert all(torch.equal(a, f) for a, f in zip(after, fresh, strict=True))
    assert not torch.equal(before[0], after[0])


def test_training_in_mixed_precision_learns():
    """Losses go down alike; the weights stay float32."""
    x = torch.randn(7, 3, 6)
    histories = []
    for module in twins("gru", 6, 5):
        readout = nn.Linear(5, 6)
        with torch.no_grad():
            for i, parameter in enumerate(readout.parameters()):
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view(parameter.shape) * (i + 1))
        parameters = list(itertools.chain(module.parameters(), readout.parameters()))
        optimizer, history = torch.optim.Adam(parameters, lr=0.02), []
        for _ in range(15):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (readout(module(x)[0]).float() - x).square().mean()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        assert {p.dtype for p in parameters} == {torch.float32}
        histories.append(torch.tensor(history))
    assert histories[0][-1] < 0.9 * histories[0][0]
    torch.testing.assert_close(histories[0], histories[1], rtol=2e-2, atol=0)
