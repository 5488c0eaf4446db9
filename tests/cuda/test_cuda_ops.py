"""The CUDA operators end to end in the emulator: host path, plan, products of torch, kernels of every compiled tier.

What test_ops.py and test_ops_checks.py ask of the CPU's operators is asked here, too, by the same tests.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import test_ops
import test_ops_checks
import torch
from support.emulated import NAMESPACE, check, needs_emulator
from support.harness import CELLS, Case
from test_ops import (  # noqa: F401
    test_a_stack_is_its_layers,
    test_gradients_not_needed_are_empty,
    test_missing_gradients_count_as_zero,
    test_results_are_fresh_contiguous_and_repeatable,
    test_step_is_a_layer_of_one_step,
    test_weights_of_any_strides,
)
from test_ops_checks import (  # noqa: F401
    test_backward_refuses,
    test_forward_refuses,
    test_lstm_refuses_cx,
    test_other_devices_and_layouts_are_refused,
    test_projection_shapes_are_checked,
    test_stack_refuses,
    test_step_refuses,
)

from rnnfast import _ext
from rnnfast.ops import OPERATORS

pytestmark = needs_emulator
SMALL = test_ops.SMALL
TIERS = ("cta", "cluster", "group", "step")


@pytest.fixture(autouse=True, params=TIERS)
def tier(request, monkeypatch):
    """Every test on every tier, with the emulator's operators in place of the CPU's."""
    monkeypatch.setenv("RNNFAST_TIER", request.param)
    case = request.node.callspec.params.get("case")
    if case and case.proj:
        reason = _ext.cuda_refuses("lstm", case.dtype, case.H, case.proj, namespace=NAMESPACE)
        if reason:
            pytest.skip(reason)
    for module in (test_ops, test_ops_checks):
        monkeypatch.setattr(module, "OPS", OPERATORS[NAMESPACE])
    return request.param


def flat(results) -> list[torch.Tensor]:
    return [tensor for result in results for tensor in (result if isinstance(result, list) else [result])]


# How a kernel gets its numbers does not change shapes, aliases or schemas; opcheck takes long.
OPCHECKS = {"test_utils": ("test_schema", "test_faketensor")}


@pytest.mark.parametrize("case", [case for case in test_ops.CASES if case.bidirectional], ids=str)
def test_opcheck(case, tier):
    if tier == "step":
        op = OPERATORS[NAMESPACE][case.cell].layer
        torch.library.opcheck(op.fwd, test_ops.arguments(case), **OPCHECKS)
        torch.library.opcheck(op.bwd, test_ops.backward_arguments(case), **OPCHECKS)
        torch.library.opcheck(op.bwd, test_ops.backward_arguments(case, (False, False, False)), **OPCHECKS)


@pytest.mark.parametrize("case", test_ops.STEPS, ids=str)
def test_opcheck_step(case, tier):
    if tier == "step":
        op = OPERATORS[NAMESPACE][case.cell].step
        torch.library.opcheck(op.infer, test_ops.step_arguments(case, False), **OPCHECKS)
        torch.library.opcheck(op.fwd, test_ops.step_arguments(case), **OPCHECKS)
        torch.library.opcheck(op.bwd, test_ops.step_backward_arguments(case), **OPCHECKS)


@pytest.mark.parametrize("cell", CELLS)
def test_states_of_none_are_zeros(cell):
    op = OPERATORS[NAMESPACE][cell]
    args = test_ops.arguments(Case(cell, **SMALL, bidirectional=True))
    given, rest = args[1 : 1 + op.states], args[1 + op.states :]
    for function in (op.layer.infer, op.layer.fwd):
        zeros = function(args[0], *map(torch.zeros_like, given), *rest)
        assert all(map(torch.equal, zeros, function(args[0], *[None] * op.states, *rest)))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("cell", CELLS)
def test_layouts_of_inputs(cell, layout):
    for dtype in (torch.float32, torch.bfloat16):
        check(Case(cell, 3, 4, 5, 10, layout=layout, bidirectional=True, grads="transposed", dtype=dtype))
    check(Case(cell, 3, 4, 5, 10, grads="sum"))


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=1e-2 if actual.element_size() == 2 else 1e-5, atol=1e-6)


def shifted(value):
    """The same numbers one element further on in memory: contiguous, but at an address of no alignment."""
    if isinstance(value, list):
        return [shifted(tensor) for tensor in value]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.numel() == 0:
        return value
    return torch.cat([value.new_full((1,), torch.nan), value.flatten()])[1:].view(value.shape)


@pytest.mark.parametrize("H", [8, 13])
@pytest.mark.parametrize("cell", CELLS)
def test_misaligned_tensors(cell, H):
    op = OPERATORS[NAMESPACE][cell]
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(cell, 4, 3, 8, H, bidirectional=True, ragged="lengths", dtype=dtype)
        args = test_ops.arguments(case)
        found = op.layer.fwd(*[shifted(arg) for arg in args])
        assert all(map(near, found, op.layer.fwd(*args)))  # torch's products add in another order at other addresses
        args = test_ops.backward_arguments(case)
        found = op.layer.bwd(*[shifted(arg) for arg in args])
        assert all(map(near, flat(found), flat(op.layer.bwd(*args))))


@pytest.mark.parametrize("cell", CELLS)
def test_long_packed_batches(cell, tier):
    """The schedule reaches the device 256 steps at a time, for all tiers in the same way."""
    if tier == "step":
        check(Case(cell, 258, 2, 1, 2, ragged="sorted"))
    elif tier == "cta":
        check(Case(cell, 515, 3, 1, 2, ragged="sorted", bidirectional=True))


@pytest.mark.parametrize("cell", CELLS)
def test_no_sequence_takes_part(cell):
    op, case = OPERATORS[NAMESPACE][cell], Case(cell, **SMALL, bidirectional=True, ragged="lengths")
    args = list(test_ops.arguments(case))
    args[3 + op.states] = torch.zeros(case.B, dtype=torch.int64)  # lengths
    output, *finals = op.layer.fwd(*args)
    assert not output.any()
    assert all(torch.equal(final, given) for final, given in zip(finals, args[1 : 1 + op.states], strict=False))
    grads = [torch.randn_like(tensor) for tensor in (output, *finals[: op.states])]
    found = op.layer.bwd(*grads, *args, output, *finals[op.states :], True, True, True)
    assert not found[0].any() and not any(weight.any() for weight in found[-1])
    assert all(torch.equal(a, b) for a, b in zip(found[1:-1], grads[1:], strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch(cell):
    op, case = OPERATORS[NAMESPACE][cell], Case(cell, **SMALL)
    input, *rest = test_ops.arguments(case)
    args = (input[:, :0], *(state[:, :0] for state in rest[: op.states]), *rest[op.states :])
    output, *finals = op.layer.fwd(*args)
    assert output.shape == (case.T, 0, case.H)
    grads = [torch.zeros_like(tensor) for tensor in (output, *finals[: op.states])]
    found = op.layer.bwd(*grads, *args, output, *finals[op.states :], True, True, True)
    assert found[0].shape == args[0].shape and not any(weight.any() for weight in found[-1])


def test_float64_is_refused(tier):
    op = OPERATORS[NAMESPACE]["lstm"]
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16, not Double"):
        op.layer.infer(*test_ops.arguments(Case("lstm", **SMALL, dtype=torch.float64)))
    assert _ext.cuda_refuses("lstm", torch.float64, 64, namespace=NAMESPACE) == "it has no kernel for float64"


def test_a_forced_tier_that_cannot_run_raises_its_reason(tier, monkeypatch):
    for forced, H, reason in (
        ("cta", 129, "weight_hh exceeds the registers of one CTA"),
        ("cluster", 513, "weight_hh exceeds the registers of a cluster"),
        ("group", 513, "weight_hh exceeds what a group can hold"),
    ):
        monkeypatch.setenv("RNNFAST_TIER", forced)
        args = test_ops.arguments(Case("lstm", T=1, B=1, I=1, H=H))
        with pytest.raises(RuntimeError, match=f"tier {forced}: {reason}"):
            OPERATORS[NAMESPACE]["lstm"].layer.infer(*args)
    monkeypatch.setenv("RNNFAST_TIER", "warp")
    with pytest.raises(RuntimeError, match="expected cta, cluster, group or step, got warp"):
        OPERATORS[NAMESPACE]["lstm"].layer.infer(*args)


def test_the_plan_can_be_asked(tier, monkeypatch):
    assert _ext.cuda_plan("gru", torch.float16, 64, batch=3, namespace=NAMESPACE).startswith(f"tier {tier}: ")
    monkeypatch.delenv("RNNFAST_TIER")
    assert _ext.cuda_plan("gru", torch.float16, 64, namespace=NAMESPACE).startswith("tier cta: 64 units x 8 rows")
    plans = [_ext.cuda_plan("lstm", torch.float32, H, namespace=NAMESPACE) for H in (130, 300, 600)]
    assert [plan.split(":")[0] for plan in plans] == ["tier cluster", "tier group", "tier step"]
    assert "not tier cta: weight_hh exceeds the registers of one CTA; tier cluster: weight_hh exceeds" in plans[1]
    assert _ext.cuda_refuses("lstm", torch.bfloat16, 3000, namespace=NAMESPACE) is None


@pytest.mark.parametrize("H", [130, 300])
def test_larger_layers_without_a_forced_tier(tier, monkeypatch, H):
    """The emulator's device takes tier cluster, then group."""
    if tier == "step":
        monkeypatch.delenv("RNNFAST_TIER")
        check(Case("gru", 2, 3, 4, H, ragged="sorted"))


BOTH_WAYS = {"bidirectional": True, "ragged": "lengths"}
PROJECTED = Case("lstm", 3, 9, 3, 20, proj=7, **BOTH_WAYS)


@pytest.mark.parametrize("case", [PROJECTED], ids=str)
def test_a_projection(case):
    check(case)


@pytest.mark.parametrize("case", [*(Case(cell, 3, 4, 3, 20, **BOTH_WAYS) for cell in CELLS), PROJECTED], ids=str)
def test_tiers_agree(case, tier, monkeypatch):
    """What `tier` saves any other may read: a plan is made for each pass on its own."""
    args = test_ops.backward_arguments(case)
    size, found = (case.cell.split("_")[0], case.dtype, case.H, case.proj), []
    for other in TIERS:
        monkeypatch.setenv("RNNFAST_TIER", other)
        if _ext.cuda_refuses(*size, backward=True, namespace=NAMESPACE) is None:
            found.append(flat(OPERATORS[NAMESPACE][case.cell].layer.bwd(*args)))
    assert len(found) >= 2 and all(all(map(near, found[0], other)) for other in found[1:])


SMALL_DEVICE = """
import os, torch, rnnfast
from rnnfast import _ext

def plan():
    return _ext.cuda_plan("lstm", torch.float32, 130, namespace=_ext.EMULATOR_NAMESPACE)

print(plan())
for tier in ("cluster", "group"):
    os.environ["RNNFAST_TIER"] = tier
    print(plan())
with rnnfast.backend("emulator", strict=True):  # 3 CTAs, which all fit; but who waits gives up at once
    try:
        print(rnnfast.LSTM(2, 40)(torch.ones(2, 1, 2)))
    except RuntimeError as error:
        print(error)
"""


def test_what_waits_is_refused_on_a_small_device_and_never_waits_for_ever(tier):
    """No plan with CTAs that cannot all run; and a wait that ends by its bound is an error of the operator."""
    if tier != "step":
        return
    options = {"RNNFAST_EMULATOR_RESIDENT_BLOCKS": "3", "RNNFAST_EMULATOR_SPIN_ROUNDS": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "RNNFAST_TIER"} | options
    done = subprocess.run([sys.executable, "-c", SMALL_DEVICE], env=environment, capture_output=True, text=True)
    free, cluster, group, waited = done.stdout.strip().split("\n", 3)
    reason = "its CTAs wait for each other and this device cannot run all of them at once"
    assert free.startswith("tier step: ") and f"tier cluster: {reason}; tier group: {reason}" in free
    assert cluster == f"refused: tier cluster: {reason}" and group == f"refused: tier group: {reason}"
    assert waited.startswith("emulator: ") and ("poll" in waited or "spin" in waited), waited
