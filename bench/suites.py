"""Which cases each suite has. A suite is made of sections; every section has goals of its own (goals.py)."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from .cases import CELLS, MODES, Case, grid

HIDDEN, BATCHES = (32, 64, 128, 256, 512, 1024), (1, 4, 16, 64)
GPU_SEQ_LEN = 512
GPU_DTYPES = ("bf16", "fp16", "fp32-tf32", "fp32-ieee")
GPU_HIDDEN, GPU_BATCHES = (32, 64, 128, 192, 256, 320, 512, 640, 1024, 2048), (1, 4, 16, 64, 256)
# Seconds of timing per case, beyond the check and the warm-up. Long calls take more: at least 3 rounds are timed.
SECONDS = {"grid": 5.0, "calls": 1.0, "layers": 1.0, "packed": 1.0, "neighbours": 1.0, "oversubscribed": 4.0}
SECONDS |= {"frozen": 0.5}
SECONDS_ELSEWHERE, SECONDS_QUICK, SECONDS_GPU = 1.0, 0.6, 0.4


@dataclass(frozen=True)
class Experiment:
    """A case that torch.nn and rnnfast take turns on, in one section of the report.

    beside: what else takes its turn in the same loop, to be compared with: a name -> ("torch" or "rnnfast", a case).
    """

    section: str
    case: Case
    beside: dict[str, tuple[str, Case]] = field(default_factory=dict)


def cpu_grid() -> Iterator[Experiment]:
    for dtype in ("fp32", "bf16"):
        for case in grid(HIDDEN, BATCHES, threads=(1, 2), dtype=dtype):
            yield Experiment("grid", case)


def calls() -> Iterator[Experiment]:
    """One call of one step, also of a stack; cells in training, where the weights change before 1 or 20 calls."""
    for cell, form, mode in product(CELLS, ("padded", "cell"), ("inference", "forward", "training")):
        yield Experiment("calls", Case(cell, mode, 64, 1, seq_len=1, form=form))
    for cell, num_layers in product(CELLS, (2, 4)):
        yield Experiment("calls", Case(cell, "inference", 64, 1, seq_len=1, num_layers=num_layers))
    for cell, hidden, batch, steps in product(CELLS, (64, 128, 256, 512), (1, 16), (1, 20)):
        yield Experiment("calls", Case(cell, "step", hidden, batch, seq_len=steps, form="cell"))


def layers() -> Iterator[Experiment]:
    """Bidirectional, stacked and projected layers, each beside the plain layer of both providers."""
    for cell, (hidden, batch) in product(CELLS, ((64, 1), (128, 16), (256, 16))):
        kinds = [{"bidirectional": True}, {"num_layers": 2}, {"num_layers": 3}, {"num_layers": 4}]
        kinds += [{"proj_size": hidden // 4}] * (cell == "LSTM")
        for kind, mode, threads in product(kinds, MODES, (1, 2)):
            plain = Case(cell, mode, hidden, batch, threads=threads)
            beside = {"torch plain": ("torch", plain), "plain": ("rnnfast", plain)}
            yield Experiment("layers", replace(plain, **kind), beside)


def packed() -> Iterator[Experiment]:
    """Unequal lengths, half the maximum on average, beside the padded layer."""
    for form in ("packed", "lengths"):
        for case in grid((64, 256, 512), (16, 64), form=form):
            yield Experiment("packed", case, {"padded": ("rnnfast", replace(case, form="padded"))})


def neighbours() -> Iterator[Experiment]:
    """Sizes off the round numbers, beside their round neighbours."""
    odd_hidden = grid((33, 65, 130, 200, 320, 640), (1, 16))
    odd_batch = grid((64, 256), (3, 5, 7, 17, 48))
    for case in (*odd_hidden, *odd_batch):
        name, below, above = round_neighbours(case.hidden_size, case.batch)
        sizes = {"below": below, "above": above}
        if name == "hidden_size":
            others = {key: replace(case, hidden_size=size, input_size=size) for key, size in sizes.items()}
        else:
            others = {key: replace(case, batch=size) for key, size in sizes.items()}
        yield Experiment("neighbours", case, {key: ("rnnfast", other) for key, other in others.items()})


def round_neighbours(hidden_size: int, batch: int) -> tuple[str, int, int]:
    """Which size is off the grid, and the grid's numbers below and above it."""
    name, size, sizes = ("batch", batch, BATCHES) if hidden_size in HIDDEN else ("hidden_size", hidden_size, HIDDEN)
    above = bisect.bisect(sizes, size)
    return name, sizes[above - 1], sizes[above]


def oversubscribed() -> Iterator[Experiment]:
    """Small, middle and long calls while other programs keep every core busy."""
    for shape in ((64, 1), (64, 16), (256, 4), (512, 16)):
        for case in grid(shape[:1], shape[1:], threads=(1, 2)):
            yield Experiment("oversubscribed", case)


def memory() -> Iterator[Experiment]:
    """Trainings of little and of much memory; each is a process of its own."""
    for hidden, batch, steps in ((64, 16, 100), (256, 64, 100), (512, 64, 200), (1024, 16, 100), (64, 64, 2000)):
        for case in grid((hidden,), (batch,), modes=("training",), seq_len=steps):
            yield Experiment("memory", case)


FROZEN_HIDDEN, FROZEN_BATCHES, FROZEN_STEPS = (64, 128, 160, 256, 384, 512, 1000, 1024), (1, 4, 16), (1, 5, 25, 100)


def frozen() -> Iterator[Experiment]:
    """Frozen layers with the state of a stream, beside ONNX Runtime and other int8; stacks; two threads beside one."""
    for steps in FROZEN_STEPS:
        for case in grid(FROZEN_HIDDEN, FROZEN_BATCHES, ("LSTM", "GRU"), ("inference",), seq_len=steps, hx=True):
            yield Experiment("frozen", case)
    for layers, steps in product((2, 3, 5), (1, 25)):
        for case in grid((128, 512), (1,), ("LSTM", "GRU"), ("inference",), seq_len=steps, num_layers=layers, hx=True):
            yield Experiment("frozen", case)
    for steps in (1, 25):
        hidden, batches = (64, 256, 512, 1024), (1, 16)
        for case in grid(hidden, batches, ("LSTM", "GRU"), ("inference",), (2,), seq_len=steps, hx=True):
            yield Experiment("frozen", case)


SECTIONS: dict[str, Callable[[], Iterator[Experiment]]] = {
    "grid": cpu_grid,
    "calls": calls,
    "layers": layers,
    "packed": packed,
    "neighbours": neighbours,
    "oversubscribed": oversubscribed,
    "memory": memory,
    "frozen": frozen,
}


def special(threads: int) -> Iterator[Case]:
    """A few of what is not in the grid: cell loops, stacked, bidirectional, projected and unequal rows."""
    for mode, cell in product(MODES, CELLS):
        yield Case(cell, mode, 64, 1, form="cell", threads=threads)
    for mode in MODES:
        yield Case("LSTM", mode, 128, 16, bidirectional=True, threads=threads)
        yield Case("GRU", mode, 256, 4, num_layers=2, threads=threads)
        yield Case("LSTM", mode, 256, 16, proj_size=64, threads=threads)
        yield Case("LSTM", mode, 128, 16, form="packed", threads=threads)
        yield Case("GRU", mode, 128, 16, form="packed", threads=threads)
        yield Case("GRU", mode, 128, 16, form="lengths", threads=threads)


def large(**rest) -> Iterator[Case]:
    """Named workloads on random input: a speech stack, and a batch of many environments."""
    for mode in MODES:
        yield Case("LSTM", mode, 320, 8, 80, num_layers=4, bidirectional=True, proj_size=160, **rest)
        for cell in ("LSTM", "GRU"):
            yield Case(cell, mode, 256, 1024, seq_len=32, **rest)


def quick() -> list[Experiment]:
    """5 to 7 minutes on 2 cores, with the shapes where rnnfast has the least to win (LSTM with many rows)."""
    cases = list(grid((64, 256, 512), (1, 16, 64)))
    cases += grid((1024,), (64,), cells=("LSTM",), modes=("inference",))
    cases += grid((64,), (1,), dtype="bf16")
    cases += grid((256,), (16,), dtype="bf16")
    cases += grid((256,), (64,), cells=("LSTM",), dtype="bf16")
    cases += grid((64, 512), (1,), threads=(2,))
    cases += grid((256,), (16,), threads=(2,))
    experiments = [Experiment("grid", case) for case in cases]
    experiments += [e for e in calls() if e.case.mode in ("inference", "forward")]
    experiments += [e for e in neighbours() if e.case.name.endswith("_h200_b16_t100_fp32_infer")]
    return experiments + [Experiment("other", case) for case in special(threads=1)]


def cpu() -> list[Experiment]:
    """Everything that the CPU goals speak of."""
    return [experiment for section in SECTIONS.values() for experiment in section()]


def full() -> list[Experiment]:
    """The goals' cases, more sizes, other layers, and large named workloads."""
    experiments = cpu()
    for dtype in ("fp32", "bf16"):
        cases = grid((192, 320, 640), BATCHES, threads=(1, 2), dtype=dtype)
        experiments += [Experiment("grid", case) for case in cases]
    for threads in (1, 2):
        cases = [*special(threads), *large(threads=threads)]
        experiments += [Experiment("other", case) for case in cases]
    return experiments


def tiers(hidden: Sequence[int], batches: Sequence[int], **rest) -> Iterator[Experiment]:
    """Every kind of CUDA kernel by itself, on the same layers: where one should give way to another.

    The plan that decides on it: csrc/cuda/plan/plan.h.

    What a tier cannot run is left out when the suite runs.
    """
    cases = list(grid(hidden, batches, seq_len=GPU_SEQ_LEN, device="cuda", **rest))
    for tier, case in product(("cta", "cluster", "group", "step"), cases):
        yield Experiment(f"tier {tier}", case)


def gpu_quick() -> list[Experiment]:
    """6 to 8 minutes on an H200: small and large layers, one row and many, in every kind of numbers."""
    rest = {"seq_len": GPU_SEQ_LEN, "device": "cuda"}
    cases: list[Case] = []
    for dtype in GPU_DTYPES:
        cases += grid((64, 128, 256, 512, 1024), (1, 64), cells=("LSTM", "GRU"), dtype=dtype, **rest)
    for dtype in ("bf16", "fp32-tf32"):
        cases += grid((128, 512), (1, 64), cells=("RNN",), dtype=dtype, **rest)
    forced = tiers((64, 256, 512, 1024), (1, 64), cells=("LSTM",), modes=("training",), dtype="bf16")
    return [*(Experiment("grid", case) for case in cases), *forced]


def gpu() -> list[Experiment]:
    """The whole grid on the current CUDA device, sizes at which cuDNN changes its kernel, other layers."""
    rest = {"seq_len": GPU_SEQ_LEN, "device": "cuda"}
    cases: list[Case] = []
    for dtype in GPU_DTYPES:
        cases += grid(GPU_HIDDEN, GPU_BATCHES, dtype=dtype, **rest)
    others: list[Case] = []
    for dtype in ("fp16", "bf16"):
        others += grid((96, 129, 193, 200, 384, 768), (8, 64), cells=("LSTM",), dtype=dtype, **rest)
    others += [Case(cell, mode, 64, 1, seq_len=1, device="cuda") for mode, cell in product(MODES, CELLS)]
    others += [*(replace(case, device="cuda") for case in special(threads=1)), *large(device="cuda")]
    experiments = [Experiment("grid", case) for case in cases] + [Experiment("other", case) for case in others]
    for dtype in ("bf16", "fp32-tf32"):
        experiments += tiers(GPU_HIDDEN, GPU_BATCHES, cells=("LSTM", "GRU"), dtype=dtype)
    return experiments


WHOLES = {"quick": quick, "cpu": cpu, "full": full, "gpu-quick": gpu_quick, "gpu": gpu}
ON_GPU = ("gpu-quick", "gpu")


def experiments_of(suite: str) -> list[Experiment]:
    """The experiments of a suite or of one section by their name."""
    return list((WHOLES.get(suite) or SECTIONS[suite])())


def seconds_of(suite: str, section: str) -> float:
    if suite in ON_GPU:
        return SECONDS_GPU
    return SECONDS_QUICK if suite == "quick" else SECONDS.get(section, SECONDS_ELSEWHERE)


def selected(name: str, words: str) -> bool:
    """Whether all words are part of the name; a "not" turns the word behind it round."""
    wanted = True
    for word in words.split():
        if word == "not":
            wanted = False
        elif (word in name) != wanted:
            return False
        else:
            wanted = True
    return True
