"""torch.ops.rnnfast.*: torch.library.opcheck on every operator, what they return, and what they refuse."""

from __future__ import annotations

import os

import harness
import pytest
import torch
from harness import CELLS, Case

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
    """(input, *states, weights, batch_sizes, lengths, *flags) of a one-layer case."""
    data, op = harness.Data(case), OPS[case.cell]
    weights = [p.detach() for p in harness.make_module(torch.nn, case).parameters()]
    x, batch_sizes, lengths = harness.laid_out(data.input, case, case.T), None, None
    if case.ragged == "sorted":
        x, batch_sizes, *_ = torch.nn.utils.rnn.pack_padded_sequence(x, data.lengths)
    elif case.ragged:
        lengths = data.lengths
    states = [harness.laid_out(state, case) for state in (data.hx, data.cx)[: op.states]]
    return (x, *states, weights, batch_sizes, lengths, *op.flags)


def backward_arguments(case: Case, needs=(True, True), given=None) -> tuple:
    """Those of `bwd`; `given` says which of the incoming gradients are tensors (default: all)."""
    op, args = OPS[case.cell], arguments(case)
    *outputs, saved = op.fwd(*args)
    given = [True] * len(outputs) if given is None else given
    grads = [torch.randn_like(out) if g else None for out, g in zip(outputs, given, strict=True)]
    return (*grads, *args, outputs[0], saved, *needs)


SMALL = {"T": 4, "B": 3, "I": 2, "H": 5}
VARIANTS = [{}, {"bidirectional": True, "bias": False}, {"bidirectional": True, "ragged": "sorted"}]
VARIANTS += [{"bidirectional": True, "ragged": "lengths"}, {"layout": "transposed", "dtype": torch.bfloat16}]
CASES = [Case(cell, **SMALL, **variant) for cell in CELLS for variant in VARIANTS]
CASES += [Case("lstm", proj=2, **SMALL, **variant) for variant in VARIANTS]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    op = OPS[case.cell]
    torch.library.opcheck(op.infer, arguments(case))
    torch.library.opcheck(op.fwd, arguments(case))
    torch.library.opcheck(op.bwd, backward_arguments(case))


@pytest.mark.parametrize("case", [case for case in CASES if not case.ragged], ids=str)
def test_opcheck_backward_with_less(case):
    bwd, states = OPS[case.cell].bwd, OPS[case.cell].states
    torch.library.opcheck(bwd, backward_arguments(case, needs=(False, True), given=[False] + [True] * states))
    torch.library.opcheck(bwd, backward_arguments(case, needs=(True, False), given=[True] + [False] * states))


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
    inferred = op.infer(*args)
    *outputs, saved = op.fwd(*args)
    assert all(close(a, b) for a, b in zip(inferred, outputs, strict=True))
    expected = op.infer(*args)
    dtypes = [case.dtype, torch.float32 if case.dtype.itemsize == 2 else case.dtype]
    rows = outputs[0].shape[:-1].numel()
    widths = {"gru": [4], "lstm": [4, 1]}.get(case.cell, [])
    assert [s.shape for s in saved] == [(case.directions, rows, width * case.H) for width in widths]
    assert [s.dtype for s in saved] == dtypes[: len(saved)]
    backward = backward_arguments(case)
    *grads, grad_weights = op.bwd(*backward)
    *again, again_weights = op.bwd(*backward)
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
    grad_input, *_, grad_weights = op.bwd(*backward_arguments(case, needs=(False, False)))
    assert grad_input.shape == (0,) and [g.shape for g in grad_weights] == [(0,)] * 4
    torch.manual_seed(1)
    full = op.bwd(*backward_arguments(case))
    torch.manual_seed(1)
    states = op.bwd(*backward_arguments(case, needs=(False, False)))
    assert all(torch.equal(a, b) for a, b in zip(full[1:-1], states[1:-1], strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_missing_gradients_count_as_zero(cell):
    case, op = Case(cell, bidirectional=True, **SMALL), OPS[cell]
    for missing in range(1 + op.states):
        given = [i != missing for i in range(1 + op.states)]
        with_none = backward_arguments(case, given=given)
        with_zeros = list(with_none)
        shape = with_none[-4] if missing == 0 else with_none[1 + op.states + missing]  # the output, or the state's own
        with_zeros[missing] = torch.zeros_like(shape)
        *a, a_weights = op.bwd(*with_none)
        *b, b_weights = op.bwd(*with_zeros)
        assert all(torch.equal(x, y) for x, y in zip([*a, *a_weights], [*b, *b_weights], strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_weights_of_any_strides(cell):
    case, op = Case(cell, **SMALL, ragged="sorted"), OPS[cell]
    args = list(arguments(case))
    expected = op.fwd(*args)[0]
    place = 1 + op.states

    def strided(w):
        return w.t().contiguous().t() if w.dim() == 2 else torch.stack([w, w * torch.nan], 1)[:, 0]

    args[place] = [strided(w) for w in args[place]]
    assert close(op.fwd(*args)[0], expected)
    assert close(op.infer(*args)[0], expected)
