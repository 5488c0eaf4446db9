#!/usr/bin/env python3
"""Draws docs/images/*.svg from bench/results: `make docs-images`. The same input gives the same bytes.

    speedup.svg   the newest run of the CPU's grid: one bar per cell, pass, dtype and number of threads
    trend.svg     bench/results/history.csv: how those means moved from run to run
    frozen.svg    the newest run of frozen layers: beside what else runs fixed weights (docs_frozen.py)

`--tables` prints the tables of docs/performance.md and docs/inference.md instead. tests/project/test_docs.py compares
pictures and tables with the committed ones. The pictures are written by hand as SVG (svg.py), so that they need no
plotting package and stay small.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean

import docs_frozen
import history
from svg import line, picture, text

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "bench" / "results", ROOT / "docs" / "images"
CELLS, PASSES = ("LSTM", "GRU", "RNN"), ("inference", "training")
SERIES = (("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2))
# One hue per dtype, the stronger shade for two threads; readable on both backgrounds.
COLORS = ("#86b8ea", "#3579c4", "#f2b277", "#cf6a1e")


def newest_run(isa: str = "") -> Path:
    """The newest run of the whole grid in bench/results, by the date in its name; `isa` is "" or "avx2"."""
    return max(RESULTS.glob(f"cpu{isa and '_' + isa}_2*.json"))


def label(dtype: str, threads: int) -> str:
    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def legend(x: float, y: float) -> Iterator[str]:
    for (dtype, threads), color in zip(SERIES, COLORS, strict=True):
        yield f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" rx="2" fill="{color}"/>'
        yield text(x + 17, y, label(dtype, threads))
        x += 138


def facts(records: Sequence[dict]) -> str:
    """Where and when a run was made: the line under the picture, and in the README's caption."""
    dates = sorted({one["date"] for one in records if one.get("date")})
    return f"{records[0]['machine']}, torch {records[0]['versions']['torch']}, {dates[-1]}"


def speedup_picture(file: Path) -> str:
    """Bars of the mean speed-up, linear from 0, with a tick at the slowest case."""
    records = json.loads(file.read_text())
    grids = history.whole_grids(records)
    width, height, left, right, top, bottom = 880, 420, 46, 16, 96, 352
    speedups = {key: [one["speedup"] for one in members] for key, members in grids.items()}
    most = math.ceil(max(map(geometric_mean, speedups.values())))

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / most

    title = "Speed-up over torch.nn (time of torch.nn / time of rnnfast)"
    about = "bar: geometric mean of up to 24 layers, H 32 to 1024, B 1 to 64, T 100; short line: the slowest of them"
    parts = [text(18, 30, title, "title"), text(18, 50, about, "faint"), *legend(18, 76)]
    worst = []
    for value in range(0, most + 1, 2):
        parts += [line(left, y(value), width - right, y(value), "grid")]
        parts += [text(left - 8, y(value) + 4, f"{value}x", "small faint", "end")]
    step = (width - left - right) / (len(CELLS) * len(PASSES))
    wide = step / 5
    for i, (cell, mode) in enumerate((cell, mode) for cell in CELLS for mode in PASSES):
        middle = left + step * (i + 0.5)
        parts.append(text(middle, bottom + 20, f"{cell} {mode}", anchor="middle"))
        for j, (dtype, threads) in enumerate(SERIES):
            values = speedups.get((threads, dtype, cell, mode))
            if values is None:
                continue
            mean, x = geometric_mean(values), middle + (j - 2) * wide
            box = f'x="{x + 1:.1f}" y="{y(mean):.1f}" width="{wide - 2:.1f}" height="{bottom - y(mean):.1f}"'
            parts.append(f'<rect {box} fill="{COLORS[j]}"/>')
            worst.append(line(x + 1, y(min(values)), x + wide - 1, y(min(values)), "worst"))
            parts.append(
                text(x + wide / 2, y(mean) - 5, f"{mean:.2f}" if mean < 9.95 else f"{mean:.1f}", "small", "middle")
            )
    parts += [line(left, y(1), width - right, y(1), "axis"), text(left - 8, y(1) + 4, "1x", "small", "end"), *worst]
    parts.append(
        text(18, height - 16, f"{facts(records)} (bench/results/{file.name}). Line at 1x: torch.nn.", "small faint")
    )
    return picture(width, height, title, parts)


def trend_picture(rows: Sequence[dict[str, str]]) -> str:
    """One panel per cell and pass, one line per dtype and number of threads, over the commits that were measured."""
    machine = rows[0]["machine"]
    rows = [row for row in rows if row["machine"] == machine and (row["dtype"], int(row["threads"])) in SERIES]
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    width, height, top = 880, 610, 96
    wide, high = (width - 12) / len(CELLS), 220
    most = 2 ** math.ceil(math.log2(max(float(row["geomean"]) for row in rows)))
    title = "How the speed-up over torch.nn moved from run to run"
    about = "geometric mean over the grid, logarithmic scale; a point is a commit that was measured"
    parts = [text(18, 30, title, "title"), text(18, 50, about, "faint"), *legend(18, 76)]
    for i, (mode, cell) in enumerate((mode, cell) for mode in PASSES for cell in CELLS):
        left, above = 46 + wide * (i % len(CELLS)), top + (high + 12) * (i // len(CELLS)) + 14
        across, down = wide - 58, high - 46

        def place(commit: str, value: float, left=left, above=above, across=across, down=down) -> tuple[float, float]:
            x = left + across * (commits.index(commit) + 0.5) / len(commits)
            return x, above + down * (1 - math.log2(value) / math.log2(most))

        parts.append(text(left, above - 6, f"{cell} {mode}"))
        for value in (2**power for power in range(int(math.log2(most)) + 1)):
            _, y = place(commits[0], value)
            parts.append(line(left, y, left + across, y, "axis" if value == 1 else "grid"))
            parts.append(text(left - 6, y + 4, f"{value}x", "small faint", "end"))
        for (dtype, threads), color in zip(SERIES, COLORS, strict=True):
            key = cell, mode, dtype, str(threads)
            own = [row for row in rows if (row["cell"], row["pass"], row["dtype"], row["threads"]) == key]
            points = [place(row["commit"], float(row["geomean"])) for row in own]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{color}"/>' for x, y in points]
        for n, commit in enumerate(commits):
            x, _ = place(commit, 1)
            parts.append(text(x, above + down + 15, str(n + 1), "small faint", "middle"))
    dates = {row["commit"]: row["date"] for row in rows}
    names = [f"{n + 1}: {commit} ({dates[commit]})" for n, commit in enumerate(commits)]
    lines = [",  ".join(names[i : i + 5]) for i in range(0, len(names), 5)]
    lines.append(f"{machine}, torch {rows[-1]['torch']} (bench/results/history.csv)")
    parts += [text(18, height - 16 - 17 * n, words, "small faint") for n, words in enumerate(reversed(lines))]
    return picture(width, height, title, parts)


def table(file: Path) -> str:
    """docs/performance.md's table of a run: geometric mean and, in brackets, the slowest case."""
    grids = history.whole_grids(json.loads(file.read_text()))
    series = [key for key in SERIES if any(grid[:2] == (key[1], key[0]) for grid in grids)]
    lines = ["| |" + "".join(f" {label(*key)} |" for key in series), "|---|" + "---|" * len(series)]
    for mode in PASSES:
        for cell in CELLS:
            speedups = [[one["speedup"] for one in grids[threads, dtype, cell, mode]] for dtype, threads in series]
            numbers = [f" **{geometric_mean(values):.2f}** ({min(values):.2f}) |" for values in speedups]
            lines.append(f"| {cell} {mode} |" + "".join(numbers))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--tables", action="store_true", help="print the tables of docs/performance.md, draw nothing")
    options = parser.parse_args()
    if options.tables:
        print(f"{table(newest_run())}\n\n{table(newest_run('avx2'))}")
        print("\n\n".join(part(docs_frozen.newest_run()) for part in docs_frozen.TABLES))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "speedup.svg").write_text(speedup_picture(newest_run()))
    (options.out / "trend.svg").write_text(trend_picture(history.read()))
    (options.out / "frozen.svg").write_text(docs_frozen.picture(docs_frozen.newest_run()))


if __name__ == "__main__":
    main()
