"""Interleaved timing: torch.nn, rnnfast and others take turns call by call, so what the machine does meets all alike.

The clock depends on what runs. One CPU thread: CPU time of the process, which does not count the time that other
programs take away. Several threads: wall time (CPU time would hide waiting for each other), and only of rounds in which
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

Call = Callable[[], object]
MIN_ROUNDS, MAX_ROUNDS = 5, 400
WARM_CALLS = 10
FEWEST_ROUNDS = 3  # of calls so long that MIN_ROUNDS of them would exhaust the patience
NOISY = 0.15  # half the rounds' ratios are farther than this from their median
QUIET = 0.02  # the largest share of a sample's time that our threads may have waited for a core
PATIENCE = 3  # how many times longer a measurement may last in the hope of quiet rounds
# A call finds code, data and pages pushed out of the caches by the other sides (a GRU's training, H 33, B 1: 1.4 ms
# instead of 0.2), so an untimed one comes before each sample; where calls last this long that is no more than noise.
LONG_NS = 20_000_000
# After a call of torch or rnnfast libgomp's threads spin on for 8 ms (CPU time used during a sleep; Zen 4) and would
# hold the cores of another library's threads.
SETTLE_SECONDS = 0.012


class Sample(NamedTuple):
    """Nanoseconds per call by the clock and by wall time, and the share that our threads waited for a core."""

    clock: float
    wall: float
    waited: float = 0.0

    def __add__(self, other: Sample) -> Sample:
        wall = self.wall + other.wall
        waited = self.wall * self.waited + other.wall * other.waited
        return Sample(self.clock + other.clock, wall, waited / wall)


Round = Sequence[Sample]  # torch's, rnnfast's, and of those beside them


@dataclass(frozen=True)
class Timing:
    """Medians (on busy cores means) in milliseconds per call; `speedup` is torch's over rnnfast's."""

    torch_ms: float
    rnnfast_ms: float
    torch_wall_ms: float
    rnnfast_wall_ms: float
    rounds: int
    spread: float  # half the interquartile range of the ratios of the rounds, relative to their median
    clock: str  # "cpu", "wall" or "cuda"
    contended: bool  # a wall time, and there were too few quiet rounds: other programs held the cores
    beside_ms: dict[str, float] = field(default_factory=dict)  # of whatever else took turns

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

    average = staticmethod(statistics.median)
    warms = True  # whether an untimed call comes before each sample
    shortest_ns = 1_000_000  # a sample repeats its call until it lasts this long

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


class BusyClock:
    """Wall time on cores that other programs keep busy: long samples, of many of the scheduler's slices of some ms.

    Their mean counts, not their median: time lost to another program is what this is about.
    """

    name, shortest_ns, warms = "wall", 100_000_000, False
    average = staticmethod(statistics.fmean)

    def measure(self, call: Call, repeats: int) -> Sample:
        wall = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        wall = (time.perf_counter_ns() - wall) / repeats
        return Sample(wall, wall)


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
    """Times a call on the GPU by events on the current stream; the L2 cache is overwritten before every call.

    repeatable: a sample is two calls. For the first the GPU is still busy with the cache while the CPU launches, so
    that gaps between launches count only as far as they last longer; the second gives the wall time from an idle GPU.
    Else, for a training that must not step twice, both times are of one call.
    """

    name, shortest_ns, warms = "cuda", 1, False  # one call per sample
    average = staticmethod(statistics.median)
    FLUSH_BYTES = 512 << 20  # more than twice any L2; by the datasheet's bandwidth writing it lasts 0.1 ms

    def __init__(self, repeatable: bool = False) -> None:
        self.repeatable = repeatable
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(max(2 * l2_bytes, self.FLUSH_BYTES), dtype=torch.uint8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(self, call: Call, repeats: int) -> Sample:
        if not self.repeatable:
            return self._measure(call, repeats, wait=True)
        clock = self._measure(call, repeats, wait=False).clock
        return Sample(clock, self._measure(call, repeats, wait=True).wall)

    def _measure(self, call: Call, repeats: int, wait: bool) -> Sample:
        self.flush.zero_()
        if wait:
            torch.cuda.synchronize()
        wall = time.perf_counter_ns()
        self.start.record()
        for _ in range(repeats):
            call()
        self.end.record()
        torch.cuda.synchronize()
        wall = time.perf_counter_ns() - wall
        return Sample(self.start.elapsed_time(self.end) * 1e6 / repeats, wall / repeats)


Clock = CpuClock | BusyClock | CudaClock


def new_clock(device: str, threads: int, repeatable: bool = False) -> Clock:
    return CudaClock(repeatable) if device == "cuda" else CpuClock(threads)


def interleave(calls: Mapping[str, Call], clock: Clock, seconds: float, settle: bool = False) -> Timing:
    """The calls take turns for about `seconds`, and a few times more where they are long; "torch", "rnnfast" first.

    settle: the calls use threads of different libraries, so each sample waits for the others' to sleep.
    """
    names = list(calls)
    lasting = {name: _warm_ns(call, clock) for name, call in calls.items()}
    repeats = {name: max(1, round(clock.shortest_ns / max(1.0, wall))) for name, wall in lasting.items()}

    def sample(name: str) -> Sample:
        if settle:
            time.sleep(SETTLE_SECONDS)
        if clock.warms and lasting[name] < LONG_NS:
            calls[name]()
        return clock.measure(calls[name], repeats[name])

    rounds: list[Round] = []
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while _wants_more(rounds, (time.perf_counter() - start) / seconds):
            samples = {side: sample(names[side]) for side in turn(len(rounds), len(names))}
            rounds.append([samples[side] for side in range(len(names))])
    finally:
        if collecting:
            gc.enable()
    return summarise(rounds, clock.name, names[2:], clock.average)


def _warm_ns(call: Call, clock: Clock) -> float:
    """How long a call lasts, by wall time, after one that is not timed; of a short one the mean of several."""
    call()
    first = clock.measure(call, 1).wall
    return first if first > clock.shortest_ns else clock.measure(call, WARM_CALLS).wall


def turn(index: int, sides: int = 2) -> list[int]:
    """The order of the sides in round number `index`: each is first, second, ... equally often."""
    return [(index + position) % sides for position in range(sides)]


def _wants_more(rounds: list[Round], elapsed: float) -> bool:
    """`elapsed`: the time since the start in units of the time that was given."""
    if len(rounds) < FEWEST_ROUNDS:
        return True
    return len(rounds) < MAX_ROUNDS and elapsed < (1 if len(_quiet(rounds)) >= MIN_ROUNDS else PATIENCE)


def _quiet(rounds: list[Round]) -> list[Round]:
    return [samples for samples in rounds if max(sample.waited for sample in samples) <= QUIET]


def summarise(
    rounds: list[Round],
    clock: str,
    beside: Sequence[str] = (),
    average: Callable[[Iterable[float]], float] = statistics.median,
) -> Timing:
    """Averages of the quiet rounds; of all rounds, and `contended`, where too few are quiet."""
    quiet = _quiet(rounds)
    contended = len(quiet) < min(MIN_ROUNDS, max(2, len(rounds) // 2))
    if not contended:
        rounds = quiet

    def average_ms(side: int, kind: int = 0) -> float:
        return average(samples[side][kind] for samples in rounds) / 1e6

    low, middle, high = statistics.quantiles([a.clock / b.clock for a, b, *_ in rounds], n=4)
    spread = (high - low) / 2 / middle
    times = average_ms(0), average_ms(1), average_ms(0, 1), average_ms(1, 1)
    others = {name: average_ms(side) for side, name in enumerate(beside, start=2)}
    return Timing(*times, len(rounds), spread, clock, contended, others)
