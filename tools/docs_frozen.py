"""The picture and the tables of docs/inference.md, from the newest run of the benchmark's section "frozen"."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean

import svg

RESULTS = Path(__file__).parents[1] / "bench" / "results"
CELLS, STEPS = ("LSTM", "GRU"), (1, 5, 25, 100)
BARS = {"float32: ONNX Runtime / rnnfast": "#3579c4", "int8: the fastest other int8 / rnnfast": "#cf6a1e"}
OTHERS = ("onnxruntime", "onnxruntime int8", "torch int8")
TIMED = ((1, 1, 128), (1, 1, 512), (25, 1, 256), (25, 16, 256), (100, 1, 512), (100, 1, 1024), (100, 16, 512))


def newest_run() -> Path:
    return max(RESULTS.glob("frozen_2*.json"))


def plain(file: Path) -> list[dict]:
    """The records of one layer and one thread that are right."""
    records = json.loads(file.read_text())
    return [r for r in records if r["num_layers"] == 1 and r["threads"] == 1 and r["speedup"] is not None]


def members(records: Sequence[dict], cell: str, steps: int) -> list[dict]:
    return [r for r in records if (r["cell"], r["seq_len"]) == (cell, steps)]


def of_float32(r: dict) -> float:
    return r["beside_ms"]["onnxruntime"] / r["rnnfast_ms"]


def of_int8(r: dict) -> float:
    beside = r["beside_ms"]
    return min(beside[name] for name in OTHERS[1:] if name in beside) / beside["int8"]


def float32_to(weights: str):
    return lambda r: r["rnnfast_ms"] / r["beside_ms"][weights]


def picture(file: Path) -> str:
    """Bars of the mean ratio to the rivals, logarithmic from 1x, with a tick at the worst case."""
    records = plain(file)
    width, height, left, right, top, bottom = 880, 400, 46, 16, 96, 330
    title = "Frozen layers: time of the best alternative / time of rnnfast"
    about = "bar: geometric mean of 24 layers, H 64 to 1024, B 1 to 16, one thread; short line: the worst of them"
    groups = [
        (cell, steps, [list(map(of, members(records, cell, steps))) for of in (of_float32, of_int8)])
        for cell in CELLS
        for steps in STEPS
    ]
    lowest = min(min(values) for _, _, bars in groups for values in bars)
    low = math.floor(2 * math.log2(min(1.0, lowest))) / 2
    high = math.ceil(math.log2(max(geometric_mean(values) for _, _, bars in groups for values in bars)) + 0.2)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (math.log2(value) - low) / (high - low)

    parts = [svg.text(18, 30, title, "title"), svg.text(18, 50, about, "faint"), *legend(18, 76)]
    for power in range(math.ceil(low), high + 1):
        parts += [svg.line(left, y(2**power), width - right, y(2**power), "axis" if power == 0 else "grid")]
        parts += [svg.text(left - 8, y(2**power) + 4, f"{2.0**power:g}x", "small faint", "end")]
    step = (width - left - right) / len(groups)
    wide, worst = step / 3, []
    for i, (cell, steps, bars) in enumerate(groups):
        middle = left + step * (i + 0.5)
        parts.append(svg.text(middle, bottom + 20, f"{cell}, T {steps}", anchor="middle"))
        for j, (values, color) in enumerate(zip(bars, BARS.values(), strict=True)):
            mean, x = geometric_mean(values), middle + (j - 1) * wide
            ends = sorted((y(mean), y(1)))
            box = f'x="{x + 1:.1f}" y="{ends[0]:.1f}" width="{wide - 2:.1f}" height="{ends[1] - ends[0]:.1f}"'
            parts.append(f'<rect {box} fill="{color}"/>')
            parts.append(svg.text(x + wide / 2, ends[0] - 5, f"{mean:.2f}", "small", "middle"))
            worst.append(svg.line(x + 1, y(min(values)), x + wide - 1, y(min(values)), "worst"))
    parts += [*worst, svg.text(18, height - 16, f"{facts(records)} (bench/results/{file.name})", "small faint")]
    return svg.picture(width, height, title, parts)


def legend(x: float, y: float) -> Iterator[str]:
    for name, color in BARS.items():
        yield f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" rx="2" fill="{color}"/>'
        yield svg.text(x + 17, y, name)
        x += 280


def facts(records: Sequence[dict]) -> str:
    first, versions = records[0], records[0]["versions"]
    return f"{first['machine']}, torch {versions['torch']}, ONNX Runtime {versions['onnxruntime']}, {first['date']}"


def ratio_table(file: Path) -> str:
    """Geometric mean over H and B, in brackets the worst."""
    records = plain(file)
    columns = {
        "float32: torch.nn": lambda r: r["speedup"],
        "float32: ONNX Runtime": of_float32,
        "int8: fastest other int8": of_int8,
        "bfloat16: float32": float32_to("bfloat16"),
        "int8: float32": float32_to("int8"),
    }
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for cell in CELLS:
        for steps in STEPS:
            found = [list(map(of, members(records, cell, steps))) for of in columns.values()]
            numbers = " | ".join(f"**{geometric_mean(values):.2f}** ({min(values):.2f})" for values in found)
            lines.append(f"| {cell}, T {steps} | {numbers} |")
    return "\n".join(lines)


def time_table(file: Path) -> str:
    """Microseconds of some cases."""
    names = ("torch.nn", "ONNX Runtime", "ONNX Runtime int8", "torch int8", "float32", "bfloat16", "int8")
    lines = ["| us | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for cell in CELLS:
        for steps, batch, hidden in TIMED:
            size = steps, batch, hidden
            found = members(plain(file), cell, steps)
            for r in (r for r in found if (r["seq_len"], r["batch"], r["hidden_size"]) == size):
                beside = [r["beside_ms"].get(name) for name in (*OTHERS, "bfloat16", "int8")]
                times = [r["torch_ms"], *beside[:3], r["rnnfast_ms"], *beside[3:]]
                numbers = " | ".join(
                    "-" if ms is None else f"{1e3 * ms:.3g}" if ms < 0.1 else f"{1e3 * ms:,.0f}" for ms in times
                )
                lines.append(f"| {cell} T {steps}, B {batch}, H {hidden} | {numbers} |")
    return "\n".join(lines)


TABLES = (ratio_table, time_table)
