"""What the CPU kernels must reach, as data, and whether the records reach it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from .cases import CELLS
from .frozen import INT8_RIVALS
from .suites import BATCHES, HIDDEN, round_neighbours

Record = dict[str, object]
GRID_SEQ_LEN, GRID_CASES = 100, len(HIDDEN) * len(BATCHES)  # of one cell, mode, dtype and number of threads

# Ratio to torch.nn of the same dtype and threads on the grid of suites.py: (geometric mean, minimum).
GRID = {
    ("inference", "fp32", 1): {"LSTM": (1.6, 1.0), "GRU": (3.3, 1.5), "RNN": (3.0, 1.4)},
    ("inference", "fp32", 2): {"LSTM": (2.0, 1.05), "GRU": (5.0, 1.9), "RNN": (6.5, 2.4)},
    ("training", "fp32", 1): {"LSTM": (1.6, 1.15), "GRU": (4.2, 1.35), "RNN": (3.5, 1.35)},
    ("training", "fp32", 2): {"LSTM": (1.6, 1.1), "GRU": (4.0, 1.3), "RNN": (3.5, 1.3)},
    **{("inference", "bf16", n): {"LSTM": (1.5, 1.0), "GRU": (5.0, 1.6), "RNN": (5.0, 1.6)} for n in (1, 2)},
    **{("training", "bf16", n): {"LSTM": (1.5, 1.0), "GRU": (4.0, 1.3), "RNN": (4.0, 1.3)} for n in (1, 2)},
}
# On AVX2 (RNNFAST_CPU_ISA=avx2, torch with ATEN_CPU_CAPABILITY=avx2) this share of those.
AVX2_SHARE = 0.85
# Two ratios of one interleaved loop are divided by each other: so far a single case may be off by measuring alone.
RATIO_ERROR = 0.05


def geomean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def speedup(record: Record) -> float:
    return record["speedup"]


def microseconds(record: Record) -> float:
    return record["rnnfast_ms"] * 1e3


def of_plain(record: Record) -> float:
    """The layer's ratio to torch.nn in units of the plain layer's."""
    beside = record["beside_ms"]
    return record["speedup"] / (beside["torch plain"] / beside["plain"])


def of_padded(record: Record) -> float:
    """Time in units of the padded layer's."""
    return record["rnnfast_ms"] / record["beside_ms"]["padded"]


def of_onnx_runtime(record: Record) -> float:
    """ONNX Runtime's time in units of rnnfast's."""
    return record["beside_ms"]["onnxruntime"] / record["rnnfast_ms"]


def of_frozen_float32(record: Record) -> float:
    """Frozen float32's time in units of frozen int8's."""
    return record["rnnfast_ms"] / record["beside_ms"]["int8"]


def of_int8_rivals(record: Record) -> float:
    """The time of the fastest other int8 in units of rnnfast's."""
    beside = record["beside_ms"]
    return min(beside[name] for name in INT8_RIVALS if name in beside) / beside["int8"]


def of_one_thread(record: Record) -> float:
    """The largest time of any format in units of its time on one thread."""
    beside = record["beside_ms"]
    times = {"float32": record["rnnfast_ms"], **{name: beside[name] for name in ("bfloat16", "int8")}}
    return max(time / beside[f"{name}, 1 thread"] for name, time in times.items())


def of_memory(record: Record) -> float:
    return record["rnnfast_mib"] / record["torch_mib"]


def of_interpolated(record: Record) -> float:
    """Time in units of what interpolation between the round neighbours gives."""
    name, below, above = round_neighbours(record["hidden_size"], record["batch"])
    times = record["beside_ms"]["below"], record["beside_ms"]["above"]
    return record["rnnfast_ms"] / interpolate(record[name], (below, above), times, power=name == "hidden_size")


def interpolate(size: float, sizes: tuple[float, float], times: tuple[float, float], power: bool) -> float:
    """The time at `size`, which lies between two sizes of known times.

    power: along a power law (straight in logarithms), as time follows H: between H, where activations and latency
    count, and H^2, the products. Else straight: a step costs something for its weights and something for every row.
    """
    if power:
        size, sizes = math.log(size), (math.log(sizes[0]), math.log(sizes[1]))
        return math.exp(interpolate(size, sizes, (math.log(times[0]), math.log(times[1])), power=False))
    share = (size - sizes[0]) / (sizes[1] - sizes[0])
    return times[0] + share * (times[1] - times[0])


@dataclass(frozen=True)
class Goal:
    """`limit`: what every case's value must reach, or stay under where `at_most`; `mean`: the same for their mean."""

    section: str
    what: str
    value: Callable[[Record], float]
    limit: float
    mean: float | None = None
    at_most: bool = False
    where: Callable[[Record], bool] = lambda record: True
    cases: int | None = None  # how many there are, where the mean of fewer would mislead


@dataclass(frozen=True)
class Outcome:
    """What the records give for a goal; `cases` and `values` in the same order."""

    goal: Goal
    cases: list[Record]
    values: list[float]

    @property
    def mean(self) -> float:
        return geomean(self.values)

    @property
    def worst(self) -> int:
        """The index of the case that is farthest on the wrong side."""
        return self.values.index((max if self.goal.at_most else min)(self.values))

    @property
    def met(self) -> bool:
        def reached(value: float, limit: float) -> bool:
            return value <= limit if self.goal.at_most else value >= limit

        mean_met = self.goal.mean is None or reached(self.mean, self.goal.mean)
        return mean_met and reached(self.values[self.worst], self.goal.limit)


def _grid_goal(cell: str, key: tuple[str, str, int], share: float) -> Goal:
    mode, dtype, threads = key
    mean, minimum = GRID[key][cell]

    def where(record: Record) -> bool:
        same = (record["cell"], record["mode"], record["dtype"], record["threads"]) == (cell, *key)
        sizes = record["hidden_size"] in HIDDEN and record["batch"] in BATCHES and record["seq_len"] == GRID_SEQ_LEN
        return same and sizes

    what = f"{cell} {mode}, {dtype}, {threads} thread{'s' * (threads > 1)}: ratio"
    return Goal("grid", what, speedup, minimum * share, mean * share, where=where, cases=GRID_CASES)


def _onnx_goal(cell: str, threads: int) -> Goal:
    """Against ONNX Runtime where that is faster than torch.nn."""

    def where(record: Record) -> bool:
        time = record.get("beside_ms", {}).get("onnxruntime")
        best = time is not None and time < record["torch_ms"]
        return best and (record["cell"], record["threads"]) == (cell, threads)

    what = f"{cell} inference, {threads} thread{'s' * (threads > 1)}: ONNX Runtime / rnnfast"
    return Goal("grid", what, of_onnx_runtime, 1.0, where=where)


def _is_kind(kind: str) -> Callable[[Record], bool]:
    return {
        "bidirectional": lambda record: record["bidirectional"],
        "stacked": lambda record: record["num_layers"] > 1,
        "projected": lambda record: record["proj_size"] > 0,
    }[kind]


def _is_call(form: str | None, mode: str, seq_len: int = 1) -> Callable[[Record], bool]:
    def where(record: Record) -> bool:
        one_layer = record["num_layers"] == 1
        return one_layer and form in (None, record["form"]) and (record["mode"], record["seq_len"]) == (mode, seq_len)

    return where


def _goals(share: float) -> Iterator[Goal]:
    for key in GRID:
        for cell in GRID[key]:
            yield _grid_goal(cell, key, share)
    for cell, threads in product(CELLS, (1, 2)):
        yield _onnx_goal(cell, threads)
    yield Goal("calls", "module, T=1, B=1, H=64: us", microseconds, 8, None, True, _is_call("padded", "inference"))
    yield Goal("calls", "cell, B=1, H=64: us", microseconds, 7, None, True, _is_call("cell", "inference"))
    yield Goal("calls", "either with gradients on: us", microseconds, 16, None, True, _is_call(None, "forward"))
    for steps in (1, 20):
        what = f"{steps} call{'s' * (steps > 1)} of a cell, backward, SGD: ratio"
        yield Goal("calls", what, speedup, 1.3, where=_is_call("cell", "step", steps))
    for kind in ("bidirectional", "stacked", "projected"):
        what = f"{kind} layers: ratio / plain layer's ratio"
        yield Goal("layers", what, of_plain, 1 - RATIO_ERROR, 1.0, where=_is_kind(kind))
    for form in ("packed", "lengths"):

        def where(record: Record, form: str = form) -> bool:
            return record["form"] == form

        yield Goal("packed", f"{form}: time / padded layer's", of_padded, 1.15, None, True, where)
        yield Goal("packed", f"{form}: ratio to torch's packed", speedup, 3.0, where=where)
    for name in ("hidden_size", "batch"):

        def between(record: Record, name: str = name) -> bool:
            return round_neighbours(record["hidden_size"], record["batch"])[0] == name

        what = f"odd {name}: time / interpolated"
        yield Goal("neighbours", what, of_interpolated, 1.15, None, True, between)
    yield Goal("oversubscribed", "busy cores: ratio", speedup, 1.0)
    yield Goal("memory", "training's peak memory / torch's", of_memory, 1.0, None, True)
    yield from _frozen_goals()


def _frozen_goals() -> Iterator[Goal]:
    """Against those that users of fixed weights would take otherwise."""

    def has(name: str, cell: str | None = None, hidden_size: int = 0) -> Callable[[Record], bool]:
        def where(record: Record) -> bool:
            wanted = record["threads"] == 1 and cell in (None, record["cell"]) and name in record["beside_ms"]
            return wanted and record["hidden_size"] >= hidden_size

        return where

    what = "frozen float32: ONNX Runtime / rnnfast"
    yield Goal("frozen", what, of_onnx_runtime, 1.0, 1.25, where=has("onnxruntime"))
    for cell, least, mean in (("LSTM", 1.05, 1.5), ("GRU", 1.05, 2.5)):
        what = f"frozen int8, {cell}: the fastest other int8 / rnnfast"
        yield Goal("frozen", what, of_int8_rivals, least, mean, where=has("torch int8", cell))
    yield Goal("frozen", "frozen, H >= 256: float32 / int8", of_frozen_float32, 1.0, 3.0, where=has("int8", None, 256))
    two = "frozen: time of 2 threads / of 1"
    yield Goal("frozen", two, of_one_thread, 1 + RATIO_ERROR, None, True, lambda record: record["threads"] == 2)


def outcomes(records: Sequence[Record]) -> list[Outcome]:
    """The goals that the records have cases for; these must have passed the parity check, undisturbed."""
    share = AVX2_SHARE if any(record["isa"] == "avx2" for record in records) else 1.0
    found = []
    for goal in _goals(share):
        cases = [record for record in records if record["section"] == goal.section and goal.where(record)]
        if cases:
            found.append(Outcome(goal, cases, [goal.value(record) for record in cases]))
    return found
