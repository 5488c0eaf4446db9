"""Interleaved A/B timing: the two sides take turns call by call, so that whatever the machine does meets both alike.

The clock depends on what runs. One CPU thread: CPU time of the process, which does not count the time that other
programs take away. Several threads: wall time (CPU time would hide waiting for each other), and only of pairs in which
no thread of ours had to wait for a core: on a busy machine torch's threads lose far more than ours, which is true but
not what a reader expects. CUDA: the time between two events on the stream, after the L2 cache was overwritten.
Wall time is always taken too, as a check.
"""

from __future__ import annotations

import gc
import glob
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

Call = Callable[[], object]
SHORTEST_NS = 200_000  # a sample repeats its call until it lasts this long: the clock's own cost stays below 1 %
MIN_PAIRS, MAX_PAIRS = 5, 400
FEWEST_PAIRS = 3  # of calls so long that MIN_PAIRS of them would exhaust the patience
NOISY = 0.15  # half the pairs' ratios are farther than this from their median
QUIET = 0.02  # the largest share of a sample's time that our threads may have waited for a core
PATIENCE = 3  # how many times longer a measurement may last in the hope of quiet pairs


class Sample(NamedTuple):
    """Nanoseconds per call by the clock and by wall time, and the share that our threads waited for a core."""

    clock: float
    wall: float
    waited: float = 0.0

    def __add__(self, other: Sample) -> Sample:
        wall = self.wall + other.wall
        waited = self.wall * self.waited + other.wall * other.waited
        return Sample(self.clock + other.clock, wall, waited / wall)


Pair = tuple[Sample, Sample]  # torch's, rnnfast's


@dataclass(frozen=True)
class Timing:
    """Medians of one interleaved measurement, in milliseconds per call; `speedup` is torch's over rnnfast's."""

    torch_ms: float
    rnnfast_ms: float
    torch_wall_ms: float
    rnnfast_wall_ms: float
    pairs: int
    spread: float  # half the interquartile range of the ratios of the pairs, relative to their median
    clock: str  # "cpu", "wall" or "cuda"
    contended: bool  # a wall time, and there were too few quiet pairs: other programs held the cores

    @property
    def speedup(self) -> float:
        return self.torch_ms / self.rnnfast_ms

    @property
    def wall_speedup(self) -> float:
        return self.torch_wall_ms / self.rnnfast_wall_ms

    def per(self, steps: int) -> Timing:
        """The times of one step of a call that does `steps` of them."""
        times = ("torch_ms", "rnnfast_ms", "torch_wall_ms", "rnnfast_wall_ms")
        return replace(self, **{name: getattr(self, name) / steps for name in times})

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY


class CpuClock:
    """Times a call on the CPU: process CPU time for one thread (where the system counts it finely), else wall time."""

    def __init__(self, threads: int) -> None:
        self.name = "cpu" if threads == 1 and sys.platform == "linux" else "wall"

    def measure(self, call: Call, repeats: int) -> Sample:
        waited = _run_queue_ns() if self.name == "wall" else 0
        cpu, wall = time.process_time_ns(), time.perf_counter_ns()
        for _ in range(repeats):
            call()
        wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
        if self.name == "cpu":
            return Sample(cpu / repeats, wall / repeats)
        return Sample(wall / repeats, wall / repeats, (_run_queue_ns() - waited) / wall)


def _run_queue_ns() -> int:
    """How long all threads of this process have waited for a core so far; 0 where the system does not tell."""
    waited = 0
    for status in glob.glob("/proc/self/task/*/schedstat"):
        try:
            waited += int(Path(status).read_text().split()[1])
        except OSError:  # that thread has just ended
            continue
    return waited


class CudaClock:
    """Times a call on the GPU by events on the current stream; the L2 cache is overwritten before every sample."""

    name = "cuda"

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(self, call: Call, repeats: int) -> Sample:
        self.flush.zero_()
        torch.cuda.synchronize()
        wall = time.perf_counter_ns()
        self.start.record()
        for _ in range(repeats):
            call()
        self.end.record()
        torch.cuda.synchronize()
        wall = time.perf_counter_ns() - wall
        return Sample(self.start.elapsed_time(self.end) * 1e6 / repeats, wall / repeats)


def new_clock(device: str, threads: int) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock(threads)


def interleave(torch_call: Call, rnnfast_call: Call, clock: CpuClock | CudaClock, seconds: float) -> Timing:
    """Alternates the two calls (A B, B A, A B, ...) for about `seconds`, and a few times more where calls are long.

    One untimed call of each comes first; the caller has made others, to check the results.
    """
    calls = (torch_call, rnnfast_call)
    repeats = [max(1, round(SHORTEST_NS / max(1.0, clock.measure(call, 1).wall))) for call in calls]
    pairs: list[Pair] = []
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while _wants_more(pairs, (time.perf_counter() - start) / seconds):
            sample = {side: clock.measure(calls[side], repeats[side]) for side in turn(len(pairs))}
            pairs.append((sample[0], sample[1]))
    finally:
        if collecting:
            gc.enable()
    return summarise(pairs, clock.name)


def turn(index: int) -> tuple[int, int]:
    """Which side comes first in pair number `index`."""
    return (0, 1) if index % 2 == 0 else (1, 0)


def _wants_more(pairs: list[Pair], elapsed: float) -> bool:
    """`elapsed`: the time since the start in units of the time that was given."""
    if len(pairs) < FEWEST_PAIRS:
        return True
    return len(pairs) < MAX_PAIRS and elapsed < (1 if len(_quiet(pairs)) >= MIN_PAIRS else PATIENCE)


def _quiet(pairs: list[Pair]) -> list[Pair]:
    return [pair for pair in pairs if max(sample.waited for sample in pair) <= QUIET]


def summarise(pairs: list[Pair], clock: str) -> Timing:
    """Medians of the quiet pairs; of all pairs, and `contended`, where too few are quiet."""
    quiet = _quiet(pairs)
    contended = len(quiet) < min(MIN_PAIRS, max(2, len(pairs) // 2))
    if not contended:
        pairs = quiet
    low, middle, high = statistics.quantiles([a.clock / b.clock for a, b in pairs], n=4)
    medians = [statistics.median(pair[side][kind] for pair in pairs) / 1e6 for kind in (0, 1) for side in (0, 1)]
    return Timing(*medians, len(pairs), (high - low) / 2 / middle, clock, contended)
