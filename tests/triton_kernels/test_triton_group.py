"""GROUP, the Triton kernels whose programs wait for each other after every step, with all programs at work at once."""

import pytest
import torch
import triton
import triton.language as tl
from support.harness import Case, check
from support.triton_threads import concurrent

from rnnfast.triton import configs, gru, layers, lstm, plan, rnn

CELLS = {"lstm": lstm, "gru": gru, "rnn_tanh": rnn}
SHAPE = (4, 18, 5, 40)  # T, B, I, H: 3 programs per batch tile, 2 batch tiles


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Plans of groups of 16 units each, for sizes that the interpreter can bear."""
    keys = [(cell, backward, products) for cell, backward, products in configs.STEP_TILES]
    monkeypatch.setattr(plan, "WHOLE_TILES", {})
    forward = {64: (configs.GroupTile(16, 0, 4, 1, 0),)}
    backward = {64: (configs.GroupTile(16, 32, 4, 2, 0),)}
    monkeypatch.setattr(plan, "GROUP_TILES", {key: backward if key[1] else forward for key in keys})
    monkeypatch.setattr(layers, "plan", lambda *size, interpreted: plan.plan(*size))


@pytest.mark.quick(1)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("ragged", [None, "lengths", "unsorted"])
@pytest.mark.parametrize("cell", CELLS)
def test_parity_whatever_the_order_of_the_programs(cell, ragged, seed):
    with concurrent(seed) as switches:
        check(Case(cell, *SHAPE, bidirectional=ragged is not None, ragged=ragged), "triton")
    programs = 3 * 2 * (2 if ragged else 1)
    assert len(switches) == 3 and min(switches) > programs * SHAPE[0]  # forward, backward, forward without gradients


@pytest.mark.quick(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_parity_in_16_bits(cell, dtype):
    with concurrent(3):
        check(Case(cell, *SHAPE, dtype=dtype), "triton")


@triton.jit
def no_wait(arrivals, step):
    tl.atomic_add(arrivals, 1)


@pytest.mark.parametrize("cell", CELLS)
def test_without_the_barrier_the_numbers_are_wrong(cell, monkeypatch):
    monkeypatch.setattr(CELLS[cell], "wait_for_group", no_wait)
    with concurrent(1), pytest.raises(AssertionError, match="parity rule broken"):
        check(Case(cell, *SHAPE), "triton")


@triton.jit
def never(arrivals, step):
    while tl.atomic_add(arrivals, 0) < 1:
        pass


@pytest.mark.quick(0)
def test_a_program_that_waits_for_ever_is_an_error(monkeypatch):
    monkeypatch.setattr(lstm, "wait_for_group", never)
    with concurrent(1), pytest.raises(Exception, match="wait for each other for ever"):
        check(Case("lstm", *SHAPE), "triton")
