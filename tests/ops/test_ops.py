"""torch.ops.rnnfast.*: torch.library.opcheck on every operator, what they return, and what they refuse."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from support import harness
from support.harness import CELLS, Case

from rnnfast import _ext
from rnnfast.ops import CELLS as OPS

pytestmark = pytest.mark.skipif(
    os.environ.get("RNNFAST_SKIP_EXT", "0") != "0",
    reason="RNNFAST_SKIP_EXT is set: the operators have no implementation",
)


def test_extension_is_loaded():
    """Every other test of the kernels would be about torch's."""
    assert _ext.failure is None
    assert _ext.cpu_isa() in ("base", "avx2", "avx512", "avx512_bf16", "neon")


def arguments(case: Case) -> tuple:
    """(input, *states, weights, batch_sizes, lengths, *flags) of a case, and num_layers where it has several."""
    data, op = harness.Data(case), OPS[case.cell]
    weights = [p.detach() for p in harness.make_module(torch.nn, case).parameters()]
    x, batch_sizes, lengths = harness.laid_out(data.input, case, case.T), None, None
    if case.ragged == "sorted":
        x, batch_sizes, *_ = torch.nn.utils.rnn.pack_padded_sequence(x, data.lengths)
    elif case.ragged:
        lengths = data.lengths
    states = [harness.laid_out(state, case) for state in (data.hx, data.cx)[: op.states]]
    return (x, *states, weights, batch_sizes, lengths, *op.flags, *([case.layers] if case.layers > 1 else []))


def backward_arguments(case: Case, needs=(True, True, True), given=None) -> tuple:
    """Those of `bwd`; `given` says which of the incoming gradients are tensors (default: all)."""
    op, args = OPS[case.cell], arguments(case)
    results = op.layer.fwd(*args)
    outputs, saved = results[: 1 + op.states], results[1 + op.states :]
    given = [True] * len(outputs) if given is None else given
    grads = [torch.randn_like(out) if g else None for out, g in zip(outputs, given, strict=True)]
    return (*grads, *args, outputs[0], *saved, *needs)


SMALL = {"T": 4, "B": 3, "I": 2, "H": 5}
VARIANTS = [{}, {"bidirectional": True, "bias": False}, {"bidirectional": True, "ragged": "sorted"}]
VARIANTS += [{"bidirectional": True, "ragged": "lengths"}, {"layout": "transposed", "dtype": torch.bfloat16}]
CASES = [Case(cell, **SMALL, **variant) for cell in CELLS for variant in VARIANTS]
CASES += [Case("lstm", proj=2, **SMALL, **variant) for variant in VARIANTS]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    op = OPS[case.cell]
    torch.library.opcheck(op.layer.infer, arguments(case))
    torch.library.opcheck(op.layer.fwd, arguments(case))
    torch.library.opcheck(op.layer.bwd, backward_arguments(case))


STACKS = [replace(case, layers=3) for case in CASES]


@pytest.mark.parametrize("case", STACKS[::5] + STACKS[-1:], ids=str)
def test_opcheck_stack(case):
    torch.library.opcheck(OPS[case.cell].layer.infer, arguments(case))


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_a_stack_is_its_layers(case):
    """What its layers give one after the other, with and without states; the fake kernel knows the shapes."""
    op, args = OPS[case.cell], arguments(case)
    given, (weights, *rows) = args[1 : 1 + op.states], args[1 + op.states : -1]
    each, d = len(weights) // case.layers, case.directions
    for states in (given, [None] * op.states) if case.ragged != "sorted" else (given,):
        output, finals = args[0], []
        for k in range(case.layers):
            own = [state if state is None else state[k * d : (k + 1) * d] for state in states]
            output, *final = op.layer.infer(output, *own, weights[k * each : (k + 1) * each], *rows)
            finals.append(final)
        stack = (args[0], *states, weights, *rows, case.layers)
        found, expected = op.layer.infer(*stack), (output, *map(torch.cat, zip(*finals, strict=True)))
        for actual, wanted in zip(found, expected, strict=True):
            assert actual.shape == wanted.shape and actual.is_contiguous() and close(actual, wanted)
        torch.library.opcheck(op.layer.infer, stack, test_utils=("test_schema", "test_faketensor"))


def step_arguments(case: Case, given: bool = True) -> tuple:
    """(input, *states, weight_ih, weight_hh, bias_ih, bias_hh, *flags) of the case's first step."""
    x, *rest = arguments(case)
    op = OPS[case.cell]
    states = [state[0] if given else None for state in rest[: op.states]]
    return (x[0], *states, *(*rest[op.states], None, None)[:4], *op.flags)


def step_backward_arguments(case: Case, needs=(True, True, True), given: bool = True) -> tuple:
    op, args = OPS[case.cell], step_arguments(case, given)
    results = op.step.fwd(*args)
    results = (results,) if isinstance(results, torch.Tensor) else results
    grads = [torch.randn_like(final) for final in results[: op.states]]
    return (*grads, *args, *(results[op.states :] or results), *needs)


STEPS = [Case(cell, **SMALL, **variant) for cell in CELLS for variant in ({}, {"bias": False}, {"dtype": torch.half})]


@pytest.mark.parametrize("given", [True, False], ids=["states", "zeros"])
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_opcheck_step(case, given):
    op = OPS[case.cell]
    torch.library.opcheck(op.step.infer, step_arguments(case, given))
    torch.library.opcheck(op.step.fwd, step_arguments(case, given))
    torch.library.opcheck(op.step.bwd, step_backward_arguments(case, (True, given, True), given))
    torch.library.opcheck(op.step.bwd, step_backward_arguments(case, (False, given, False), given))


@pytest.mark.parametrize("given", [True, False], ids=["states", "zeros"])
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_step_is_a_layer_of_one_step(case, given):
    """The same numbers as the layer's operators, bit for bit, forward and backward."""
    op = OPS[case.cell]
    x, *tensors = step_arguments(case, given)
    states, weights = tensors[: op.states], [weight for weight in tensors[op.states :][:4] if weight is not None]
    layer = (x[None], *(s if s is None else s[None] for s in states), weights, None, None, *op.flags)
    for step, whole in ((op.step.infer, op.layer.infer), (op.step.fwd, op.layer.fwd)):
        found = step(*step_arguments(case, given))
        found = (found,) if isinstance(found, torch.Tensor) else found
        assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(found, whole(*layer)[1:], strict=True))
    grads = step_backward_arguments(case, given=given)
    output, *rest = op.layer.fwd(*layer)
    incoming = [None, *(grad[None] for grad in grads[: op.states])]
    *found, found_weights = op.step.bwd(*grads)
    *wanted, wanted_weights = op.layer.bwd(*incoming, *layer, output, *rest[op.states :], True, True, True)
    pairs = zip([*found, *found_weights], [*wanted, *wanted_weights], strict=True)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in pairs)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_states_of_none_are_zeros(cell, bidirectional):
    case = Case(cell, **SMALL, bidirectional=bidirectional)
    op, args = OPS[case.cell], list(arguments(case))
    zeros = [torch.zeros_like(state) for state in args[1 : 1 + op.states]]
    for function in (op.layer.infer, op.layer.fwd):
        expected = function(args[0], *zeros, *args[1 + op.states :])
        for given in {(None,) * op.states, (zeros[0], *[None] * (op.states - 1))}:
            none = (args[0], *given, *args[1 + op.states :])
            torch.library.opcheck(function, none)
            assert all(torch.equal(a, b) for a, b in zip(expected, function(*none), strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if not case.ragged], ids=str)
def test_opcheck_backward_with_less(case):
    bwd, states = OPS[case.cell].layer.bwd, OPS[case.cell].states
    torch.library.opcheck(bwd, backward_arguments(case, needs=(False, True, True), given=[False] + [True] * states))
    torch.library.opcheck(bwd, backward_arguments(case, needs=(True, False, False), given=[True] + [False] * states))


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the order of summation; that both obey the parity rule is test_parity's matter."""
    return float((actual - expected).abs().max()) <= 8 * torch.finfo(expected.dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_fresh_contiguous_and_repeatable(case):
    """No alias of an input, contiguous, inputs unwritten, two runs bit-equal, infer close to fwd."""
    op = OPS[case.cell]
    args = arguments(case)
    flat = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in flat]
    inferred = op.layer.infer(*args)
    results = op.layer.fwd(*args)
    outputs, saved = results[: 1 + op.states], results[1 + op.states :]
    assert all(close(a, b) for a, b in zip(inferred, outputs, strict=True))
    expected = op.layer.infer(*args)
    dtypes = [case.dtype, torch.float32 if case.dtype.itemsize == 2 else case.dtype]
    rows = outputs[0].shape[:-1].numel()
    widths = {"gru": [4], "lstm": [4, 1]}.get(case.cell, [])
    assert [s.shape for s in saved] == [(case.directions, rows, width * case.H) for width in widths]
    assert [s.dtype for s in saved] == dtypes[: len(saved)]
    backward = backward_arguments(case)
    *grads, grad_weights = op.layer.bwd(*backward)
    *again, again_weights = op.layer.bwd(*backward)
    for first, second in zip([*inferred, *grads, *grad_weights], [*expected, *again, *again_weights], strict=True):
        assert torch.equal(first, second) and first.dtype == case.dtype and not first.isnan().any()
        assert first.is_contiguous()
    pointers = {t.untyped_storage().data_ptr() for t in flat}
    results = [*inferred, *outputs, *saved, *grads, *grad_weights]
    fresh = [t.untyped_storage().data_ptr() for t in results if t.numel()]
    assert len(set(fresh)) == len(fresh) and not pointers & set(fresh)
    assert all(torch.equal(old, new) for old, new in zip(before, flat, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_not_needed_are_empty(cell):
    case, op = Case(cell, **SMALL), OPS[cell]
    *grads, grad_weights = op.layer.bwd(*backward_arguments(case, needs=(False, False, False)))
    assert all(grad.shape == (0,) for grad in (*grads, *grad_weights)) and len(grad_weights) == 4
    torch.manual_seed(1)
    full = op.layer.bwd(*backward_arguments(case))
    torch.manual_seed(1)
    states = op.layer.bwd(*backward_arguments(case, needs=(False, True, False)))
    assert all(torch.equal(a, b) for a, b in zip(full[1:-1], states[1:-1], strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_missing_gradients_count_as_zero(cell):
    case, op = Case(cell, bidirectional=True, **SMALL), OPS[cell]
    for missing in range(1 + op.states):
        given = [i != missing for i in range(1 + op.states)]
        with_none = backward_arguments(case, given=given)
        with_zeros = list(with_none)
        # Of the output, or the state's own.
        shape = with_none[1 + op.states + len(arguments(case)) if missing == 0 else 1 + op.states + missing]
        with_zeros[missing] = torch.zeros_like(shape)
        *a, a_weights = op.layer.bwd(*with_none)
        *b, b_weights = op.layer.bwd(*with_zeros)
        assert all(torch.equal(x, y) for x, y in zip([*a, *a_weights], [*b, *b_weights], strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_weights_of_any_strides(cell):
    case, op = Case(cell, **SMALL, ragged="sorted"), OPS[cell]
    args = list(arguments(case))
    expected = op.layer.fwd(*args)[0]
    place = 1 + op.states

    def strided(w):
        return w.t().contiguous().t() if w.dim() == 2 else torch.stack([w, w * torch.nan], 1)[:, 0]

    args[place] = [strided(w) for w in args[place]]
    assert close(op.layer.fwd(*args)[0], expected)
    assert close(op.layer.infer(*args)[0], expected)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_backward_of_one_step_is_the_same_with_any_threads(cell, bidirectional):
    """Its threads cut columns and units, never a sum; large enough that there are several."""
    case, op = Case(cell, T=1, B=9, I=200, H=301, bidirectional=bidirectional), OPS[cell]
    backward = backward_arguments(case)
    results = []
    for threads in (1, 4):
        with harness.num_threads(threads):
            *grads, grad_weights = op.layer.bwd(*backward)
        results.append([*grads, *grad_weights])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
