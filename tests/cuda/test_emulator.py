"""The CUDA emulator: each primitive by itself, the bugs that it must find, and that nvcc accepts the same primitives.

csrc/emulator/ runs csrc/cuda on the CPU. Here small kernels with a known result go through it; nothing needs a GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from emulator import build

from kernel_build.architectures import ARCHITECTURES

SEEDS = range(1, 6)
SCHEDULES = ("random", "uniform", "fifo")
NAN_BYTES = 0xFF  # what shared memory holds until somebody writes it


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


class Library:
    """primitive_checks.cpp: a failed call raises with the emulator's message."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.error_text.restype = ctypes.c_char_p

    def configure(self, seed: int, schedule: str = "random", resident: int = 1 << 20) -> None:
        self("configure", seed, schedule.encode(), resident)

    def __call__(self, name: str, *arguments) -> None:
        converted = [pointer(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        if getattr(self.library, name)(*converted):
            raise RuntimeError(self.library.error_text().decode())


def library_path() -> Path:
    return build.build([build.program("primitive_checks.cpp")], shared=True)


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(library_path())


@pytest.fixture(params=SEEDS)
def check(request, library) -> Library:
    """The library with a seed set, in each of the schedules in turn."""
    library.configure(request.param, SCHEDULES[request.param % 3])
    return library


# --- Primitives


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


ELEMENTS = {
    "bf16": (0, 16, lambda x: x.bfloat16().float()),
    "half": (1, 16, lambda x: x.half().float()),
    "tf32": (2, 8, rounded_to_tf32),
}


@pytest.mark.parametrize("element", ELEMENTS)
def test_mma_is_the_matrix_product(check, element):
    number, depth, rounded = ELEMENTS[element]
    a, b, c = torch.randn(16, depth), torch.randn(depth, 8), torch.randn(16, 8)
    expected = c.double() + rounded(a).double() @ rounded(b).double()
    sums = c.clone()
    check("check_mma", number, a, b, sums)
    # The sum is exact, then cut off towards zero.
    assert ((sums.double() - expected).abs() <= 2**-23 * expected.abs() + 1e-15).all()
    assert (sums.double().abs() <= expected.abs() + 1e-15).all()


def test_mma_passes_nan_and_infinity_on(check):
    a, b, sums = torch.ones(16, 16), torch.ones(16, 8), torch.zeros(16, 8)
    a[3, 5], a[7, 2] = torch.nan, torch.inf
    check("check_mma", 0, a, b, sums)
    assert sums[3].isnan().all() and (sums[7] == torch.inf).all()
    assert (sums[[0, 15]] == 16).all()


def test_transpose(check):
    tile = torch.randint(-(2**15), 2**15, (8, 8), dtype=torch.int16)
    transposed = torch.zeros_like(tile)
    check("check_transpose", tile, transposed)
    assert torch.equal(transposed, tile.T)


def test_shuffles_and_votes(check):
    value, out = torch.randn(32), torch.zeros(5, 32)
    check("check_warp", value, out)
    lanes = torch.arange(32)
    assert torch.equal(out[0], value[lanes ^ 5])
    assert torch.equal(out[1], value[(lanes + 1) % 32])
    assert (out[2] == 1).all() and (out[3] == 0).all() and (out[4] == 1).all()


def test_conversions_round_as_torch_does(library):
    library.configure(1)
    bits = torch.randint(-(2**31), 2**31, (20000,), dtype=torch.int64).to(torch.int32)
    x = torch.cat(
        [bits.view(torch.float32), torch.randn(20000), torch.randn(20000) * 2.0**-20, torch.tensor([65519.9])]
    )
    x = torch.cat([x, torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 65520.0, 2.0**-24, 2.0**-25, 1e-8])])
    n = x.numel()
    out, words = torch.zeros(6, n), torch.zeros(2, n, dtype=torch.int32)
    library("check_convert", x, n, out, words)
    bf16, half = x.bfloat16(), x.half()
    for row, expected in enumerate((bf16, -bf16, bf16, half, -half, half)):
        torch.testing.assert_close(out[row], expected.float(), rtol=0, atol=0, equal_nan=True)
    # The exchange by polling relies on it: no packed word looks like memory that nobody has written.
    assert (words != -1).all()
    assert (words[:, x.isnan()] == 0x7FFF7FFF).all()


@pytest.mark.parametrize("bytes_each", [4, 8, 16])
@pytest.mark.parametrize("waits", [0, 1, 2])
def test_copies_are_nan_until_waited_for(check, bytes_each, waits):
    source = torch.randint(0, 255, (2, 32, 16), dtype=torch.uint8)
    out = torch.zeros(2, 32, 16, dtype=torch.uint8)
    check("check_copy", bytes_each, waits, source, out)
    expected = source.clone()
    expected[1, 1::2] = 0  # not valid: zeros
    expected[waits:] = NAN_BYTES
    assert torch.equal(out[..., :bytes_each], expected[..., :bytes_each])


@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_store_async_reaches_every_rank(check, ranks):
    rounds = 5  # each mbarrier goes through both parities
    out = torch.zeros(ranks, rounds, ranks, 32, dtype=torch.int32)
    check("check_exchange", ranks, rounds, out)
    lane, sender, turn = torch.arange(32), torch.arange(ranks)[:, None], torch.arange(rounds)[:, None, None]
    assert torch.equal(out, (sender + lane + turn + 7 + 1100).expand_as(out).int())


def test_store_async_arrives_in_any_order(library):
    first = torch.zeros(1, dtype=torch.int32)

    def order(seed):
        library.configure(seed)
        library("check_order", first)
        return first.item()

    orders = [order(seed) for seed in range(20)]
    assert set(orders) == {0, 1}
    assert [order(seed) for seed in range(20)] == orders  # a seed repeats its run


def test_named_barriers(check):
    out = torch.zeros(8, dtype=torch.int32)
    check("check_named_barrier", 8, out)
    assert out.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def group(library, blocks, cooperative):
    meetings = 4
    counter, values = torch.zeros(1, dtype=torch.int32), torch.zeros(meetings, blocks, dtype=torch.int32)
    out = torch.zeros(blocks, meetings, dtype=torch.int32)
    library("check_group", blocks, meetings, cooperative, counter, values, out)
    return out, torch.arange(meetings) * 10 * blocks + sum(range(blocks))


def test_cooperative_blocks_meet(check):
    out, expected = group(check, 6, True)
    assert torch.equal(out, expected.expand_as(out).int())


def test_a_grid_of_ten_thousand_threads(library):
    library.configure(1)
    out, expected = group(library, 313, True)
    assert torch.equal(out, expected.expand_as(out).int())


def test_blocks_that_do_not_run_together_are_an_error_and_no_hang(check):
    with pytest.raises(RuntimeError, match="spin budget exceeded"):
        group(check, 6, False)


def test_blocks_hand_a_number_on(check):
    flags, count = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    check("check_relay", 7, flags, count)
    assert flags.tolist() == [7, 7] and count.item() == 7


def mail(library, cooperative):
    blocks, box, gave_up = 5, torch.full((5, 4), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    library("check_poll", blocks, cooperative, box, gave_up)
    return box, bool(gave_up)


def test_polled_data_is_complete(check):
    box, gave_up = mail(check, True)
    assert not gave_up
    assert torch.equal(box, torch.arange(5)[:, None].int() + torch.arange(4).int())


def test_a_poll_can_give_up_by_itself(library):
    outcomes = set()
    for seed in range(8):  # blocks that run one by one, in random order
        library.configure(seed)
        outcomes.add(mail(library, False)[1])
    assert True in outcomes


# --- Activations. In the emulator the hardware's 2^x, 1/x and tanh err up to the bounds that PTX documents, which is a
# model of them: what holds here does not depend on the host's better mathematics.


def activations(library, x: torch.Tensor) -> torch.Tensor:
    library.configure(1)
    out = torch.zeros(6, x.numel())
    library("check_math", x, x.numel(), out)
    return out.double()


def test_exact_activations_have_float32_accuracy(library):
    x = torch.cat([torch.linspace(-12, 12, 60001), torch.logspace(-30, 1, 2000), -torch.logspace(-30, 1, 2000)])
    sigmoid, tanh, _, _, relu, step = activations(library, x)
    truth = x.double()
    assert (sigmoid - truth.sigmoid()).abs().max() < 3e-7
    assert ((sigmoid - truth.sigmoid()) / truth.sigmoid()).abs().max() < 2e-6
    assert (tanh - truth.tanh()).abs().max() < 2e-7
    assert ((tanh - truth.tanh()) / truth.tanh()).abs().max() < 5e-7
    assert torch.equal(relu, truth.relu()) and torch.equal(step, (truth > 0).double())


def test_approximate_activations_keep_to_their_bounds(library):
    x = torch.linspace(-12, 12, 20001)
    _, _, sigmoid, tanh, _, _ = activations(library, x)
    truth = x.double()
    assert (tanh - truth.tanh()).abs().max() < 2**-11
    assert (sigmoid - truth.sigmoid()).abs().max() < 2**-12


def test_activations_of_extreme_arguments(library):
    x = torch.tensor([-torch.inf, -1e30, -100.0, 0.0, 100.0, 1e30, torch.inf, torch.nan])
    sigmoid, tanh, approximate_sigmoid, approximate_tanh, relu, _ = activations(library, x)
    for value, expected, atol in (
        (sigmoid, x.sigmoid(), 1e-30),
        (approximate_sigmoid, x.sigmoid(), 2**-12),
        (relu, x.relu(), 0),
    ):
        torch.testing.assert_close(value.float(), expected, rtol=1e-6, atol=atol, equal_nan=True)
    for value in (tanh, approximate_tanh):
        torch.testing.assert_close(value.float(), x.tanh(), rtol=2**-11, atol=0, equal_nan=True)


# --- Misuse ends the launch with an error, and the next launch works

MISUSE = {
    "divergent warp: one lane in .*shuffle_xor": "a lane in another primitive",
    r"deadlock.*\n.*in shuffle_xor": "a lane that skips a shuffle",
    r"deadlock.*\n.*63 threads .* in block_sync": "a thread that skips block_sync",
    r"(threads disagree on how many take part|deadlock.*\n.*32 threads)": "block_sync with two counts",
    "cluster_wait: without cluster_arrive": "cluster_wait alone",
    "mbarrier used before barrier_init": "an mbarrier before its init",
    "more arrivals than barrier_init said": "an arrival too many",
    "more bytes arrived than were expected": "more bytes than expected",
    r"deadlock.*\n.*in barrier_wait": "an mbarrier that nobody arms",
    "copy_async: destination outside": "a copy past the end",
    "copy_async: not aligned": "a copy to an odd place",
    "store_async: destination outside": "a remote store past the end",
    "(block that has exited|bytes that nobody expected)": "a remote store to a block that is gone",
    "the cluster has no rank 2": "a rank too high",
    "shared memory written 0 bytes past its end": "a plain store past the end",
    "spin budget exceeded": "a poll that never ends",
    "a poll without Spin does not end": "the same without Spin",
    r"trap\(\)": "trap()",
    "divergent warp: one lane in .*cluster_arrive": "a lane that does not come to the cluster barrier",
}


@pytest.mark.parametrize("kind, message", list(enumerate(MISUSE, 1)), ids=MISUSE.values())
def test_misuse_is_an_error(library, kind, message):
    for seed in SEEDS:
        library.configure(seed)
        with pytest.raises(RuntimeError, match=f"(?s)emulator: .*{message}"):
            library("check_misuse", kind)
    library("check_misuse", 0)


def test_launches_that_a_gpu_refuses(library):
    library.configure(1, resident=4)
    for grid, block, cluster, cooperative, shared in (
        (0, 32, 1, 0, 0),
        (1, 1025, 1, 0, 0),
        (3, 32, 2, 0, 0),
        (17, 32, 17, 0, 0),
        (1, 32, 1, 0, (227 << 10) + 1),
    ):
        with pytest.raises(RuntimeError, match="invalid configuration"):
            library("check_launch", grid, block, cluster, cooperative, ctypes.c_size_t(shared))
    with pytest.raises(RuntimeError, match="too many blocks in cooperative launch"):
        library("check_launch", 5, 32, 1, 1, ctypes.c_size_t(0))
    library("check_launch", 4, 33, 2, 1, ctypes.c_size_t(227 << 10))
    assert library.library.check_resident(1) == 4 and library.library.check_resident(3) == 3


def test_launches_of_several_threads_take_turns(library):
    library.configure(1)
    results = {}

    def work(number):
        results[number] = group(library, 2 + number, True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for out, expected in results.values():
        assert torch.equal(out, expected.expand_as(out).int())


def test_options_from_the_environment():
    program = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.error_text.restype = ctypes.c_char_p
print(library.check_misuse(0), library.error_text().decode())
"""

    def run(schedule):
        command = [sys.executable, "-c", program, str(library_path())]
        environment = {**os.environ, "RNNFAST_EMULATOR_SCHEDULE": schedule, "RNNFAST_EMULATOR_SEED": "7"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout

    assert run("uniform") == "0 \n"
    assert run("alphabetical") == "1 emulator: schedule alphabetical, expected random, uniform or fifo\n"


# --- Planted bugs: a small recurrent loop on one block, on clusters of 2 and 4, on a group of 4 (planted.cuh)


class Outcome:
    """What planted.cpp found in its runs, and what a sanitizer said."""

    def __init__(self, result: subprocess.CompletedProcess):
        self.returncode, self.report = result.returncode, result.stderr
        counts, _, self.error = result.stdout.partition("\n")
        self.runs, self.wrong, self.errors = map(int, counts.split() or (0, 0, 0))


def planted(form: str, bug: str, seeds: int, schedule: str = "random", sanitizer: str | None = None) -> Outcome:
    program = build.build([build.program("planted.cpp")], sanitizer)
    outcome = Outcome(build.run(program, form, bug, seeds, schedule))
    assert outcome.runs == seeds or outcome.returncode, outcome.report
    return outcome


FORMS = ("block", "cluster2", "cluster4", "group4")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", FORMS)
def test_the_loop_without_a_bug_is_right(form, schedule):
    outcome = planted(form, "none", 20, schedule)
    assert (outcome.returncode, outcome.wrong, outcome.errors) == (0, 0, 0), outcome.error


@pytest.mark.quick(0)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("form", ["block", "cluster2", "group4"])
def test_sanitizers_report_nothing_without_a_bug(form, sanitizer):
    outcome = planted(form, "none", 20, sanitizer=sanitizer)
    assert (outcome.returncode, outcome.wrong, outcome.errors, outcome.report) == (0, 0, 0, ""), outcome.error


@pytest.mark.parametrize("bug", ["no_barrier", "no_barrier_once", "single_buffer", "no_copy_wait", "late_copy_wait"])
def test_a_block_with_a_bug_computes_nonsense(bug):
    outcome = planted("block", bug, 20)
    assert (outcome.wrong, outcome.errors) == (20, 0)


@pytest.mark.parametrize("form", ["cluster2", "cluster4", "group4"])
def test_a_cluster_with_a_single_buffer_computes_nonsense(form):
    assert planted(form, "single_buffer", 20).wrong == 20


@pytest.mark.parametrize("bug", ["no_group_sync", "early_group_sync"])
def test_a_group_with_a_bug_computes_nonsense(bug):
    assert planted("group4", bug, 20).wrong >= 15


ERRORS = [
    ("block", "ring_copy_outside", "copy_async: destination outside"),
    ("block", "ring_write_outside", "shared memory written 0 bytes past its end"),
    ("cluster2", "no_mbarrier_wait", "more arrivals than barrier_init said"),
    ("cluster4", "no_mbarrier_wait", "more arrivals than barrier_init said"),
    ("cluster4", "no_cluster_barrier", "mbarrier used before barrier_init"),
    ("cluster2", "no_rearm", "deadlock"),
]


@pytest.mark.parametrize("form, bug, message", ERRORS)
def test_a_bug_that_the_emulator_names(form, bug, message):
    outcome = planted(form, bug, 20)
    assert outcome.errors == 20 and message in outcome.error


def test_a_ring_read_past_its_end_is_nan():
    assert planted("block", "ring_read_outside", 20).wrong == 20


def test_only_random_priorities_let_one_block_run_ahead():
    """The reason for them: taking any thread with equal chance never shows this bug."""
    assert planted("cluster2", "no_cluster_barrier", 20, "random").errors > 5
    assert planted("cluster2", "no_cluster_barrier", 20, "uniform").errors == 0


RACES = [("block", "no_barrier"), ("block", "no_barrier_once"), ("block", "single_buffer")]
RACES += [("cluster2", "single_buffer"), ("cluster2", "no_mbarrier_wait")]
RACES += [("cluster2", "no_warp_sync")]  # its values stay right: only TSan sees it
RACES += [("block", "shared_output")]  # between blocks that never run at the same time here
RACES += [("group4", "no_group_sync"), ("group4", "early_group_sync"), ("group4", "single_buffer")]


@pytest.mark.quick(1)
@pytest.mark.parametrize("form, bug", RACES)
def test_tsan_sees_the_race(form, bug):
    outcome = planted(form, bug, 1, sanitizer="thread")
    assert outcome.returncode and "ThreadSanitizer: data race" in outcome.report and "planted.cuh" in outcome.report


@pytest.mark.parametrize("bug, message", [("read", "READ of size 4"), ("write", "WRITE of size 4")])
def test_asan_names_the_line_that_leaves_the_ring(bug, message):
    outcome = planted("block", f"ring_{bug}_outside", 1, sanitizer="address")
    assert outcome.returncode and "heap-buffer-overflow" in outcome.report and message in outcome.report
    assert "planted.cuh" in outcome.report


def test_a_misaligned_vector_is_reported():
    """The GPU traps on it, a CPU does not care."""
    outcome = planted("block", "misaligned", 1, sanitizer="address")
    assert outcome.returncode and "misaligned address" in outcome.report and "planted.cuh" in outcome.report


@pytest.mark.quick(0)
def test_the_portable_fiber_switch():
    program = build.build([build.program("planted.cpp")], flags=("-DRNNFAST_EMULATOR_UCONTEXT", "-O0"))
    outcome = Outcome(build.run(program, "cluster4", "none", 3, "random"))
    assert (outcome.returncode, outcome.wrong, outcome.errors) == (0, 0, 0)


# --- nvcc

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing")


def nvcc(*words: str) -> subprocess.CompletedProcess:
    command = ["nvcc", "-std=c++20", "-Werror", "all-warnings", f"-I{build.CSRC}", *words]
    command.append(str(build.PROGRAMS / "compile_primitives.cu"))
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.quick(0)
@needs_nvcc
def test_nvcc_compiles_every_primitive(tmp_path):
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    result = nvcc("-c", *targets, "-o", str(tmp_path / "primitives.o"))
    assert result.returncode == 0, result.stderr


@pytest.mark.quick(0)
@needs_nvcc
def test_a_primitive_that_an_architecture_lacks_fails_the_build(tmp_path):
    result = nvcc("-cubin", "-DNEEDS_SM_90", "-arch=sm_80", "-o", str(tmp_path / "primitives.cubin"))
    assert result.returncode != 0 and "this_primitive_needs_sm_90" in result.stderr
    result = nvcc("-cubin", "-DNEEDS_SM_90", "-arch=sm_90", "-o", str(tmp_path / "primitives.cubin"))
    assert result.returncode == 0, result.stderr
