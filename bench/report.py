"""From records to what people read: tables on the terminal, a markdown report, JSON, and the last line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from .cases import GOAL_MINIMUM, GOALS, Case
from .measure import Record

CONTENDED = "Other programs held the cores while several threads were timed; close them and repeat for these cases."
CASE_FIELDS = tuple(Case.__dataclass_fields__)


def geomean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def measured(records: Iterable[Record]) -> list[Record]:
    """The records that passed the parity check and so have times."""
    return [record for record in records if record["speedup"] is not None]


def case_of(record: Record) -> Case:
    return Case(**{field: record[field] for field in CASE_FIELDS})


def on_grid(record: Record) -> bool:
    return "workload" not in record and case_of(record).on_grid


def slowest(records: Sequence[Record]) -> Record:
    return min(records, key=lambda record: record["speedup"])


def undisturbed(records: Iterable[Record]) -> list[Record]:
    """What means are taken of: without times of several threads whose cores other programs held."""
    return [record for record in measured(records) if not record["contended"]]


def last_line(records: Sequence[Record]) -> str:
    """The line that `make bench` ends with."""
    timed = undisturbed(records)
    if not timed:
        return "no speed-up to report: no case was right and measured undisturbed"
    least, mean = slowest(timed), geomean(record["speedup"] for record in timed)
    return f"geomean speedup {mean:.2f}x over {len(timed)} cases, min {least['speedup']:.2f}x ({least['name']})"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned markdown table, which reads as well on a terminal; columns after the first are flushed right."""
    lines = [tuple(headers), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    padded = [
        [
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    rule = ["-" * (width - bool(i)) + ":" * bool(i) for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (padded[0], rule, *padded[1:]))


def summary_table(records: Sequence[Record]) -> str:
    """Geometric mean and extremes per group: each part of the grid, the special layers, the workloads."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in undisturbed(records):
        what = record["cell"] if on_grid(record) else "workloads" if "workload" in record else "other layers"
        groups.setdefault((what, record["mode"], record["dtype"], str(record["threads"])), []).append(record)
    rows = []
    for key, members in groups.items():
        speedups = [member["speedup"] for member in members]
        least = slowest(members)
        numbers = (str(len(members)), *(f"{f(speedups):.2f}" for f in (geomean, min, max)))
        rows.append((*key, *numbers, least["name"]))
    return table(("", "mode", "dtype", "threads", "cases", "geomean", "min", "max", "case of the minimum"), rows)


def mark(record: Record) -> str:
    return "" if record["speedup"] is None else " !" if record["contended"] else " *" if record["noisy"] else ""


def times(record: Record) -> tuple[str, str, str]:
    """torch's time, rnnfast's, and the ratio where it may be reported."""
    if record["speedup"] is None:
        return "", "", "wrong"
    ratio = "-" if record["contended"] else f"{record['speedup']:.2f}"
    return f"{record['torch_ms']:.4g}", f"{record['rnnfast_ms']:.4g}", ratio


def case_table(records: Iterable[Record]) -> str:
    rows = []
    for record in records:
        errors = f"{record['err']:.1e}", f"{record['torch_err']:.1e}"
        share = ""
        if "gflops" in record and not record["contended"]:
            share = f"{record['gflops'] / record['peak_gflops']:.0%}"
        rows.append((record["name"] + mark(record), record["backend"], *times(record), share, *errors))
    headers = ("case", "backend", "torch ms", "rnnfast ms", "ratio", "of peak", "error", "torch error")
    return table(headers, rows)


def workload_table(records: Iterable[Record]) -> str:
    rows = []
    for record in records:
        losses = record.get("losses")
        ends = ["", "", ""]
        if losses:
            ends = [f"{losses[side][step]:.5f}" for side, step in (("torch", 0), ("torch", -1), ("rnnfast", -1))]
        deviations = f"{record['err']:.1e}", f"{record['torch_err']:.1e}"
        rows.append((record["name"] + mark(record), record["backend"], *times(record), *ends, *deviations))
    headers = ("workload", "backend", "torch ms", "rnnfast ms", "ratio", "first loss", "last, torch", "last, rnnfast")
    return table((*headers, "deviation", "torch's"), rows)


def goal_table(records: Sequence[Record]) -> str:
    """Geometric mean and minimum per cell and mode against the goals of cases.GOALS."""
    rows = []
    for (cell, mode), goal in GOALS.items():
        members = [r for r in undisturbed(records) if on_grid(r) and (r["cell"], r["mode"]) == (cell, mode)]
        if members:
            mean, least = geomean(r["speedup"] for r in members), slowest(members)
            met = "yes" if mean >= goal and least["speedup"] >= GOAL_MINIMUM else "NO"
            numbers = f"{mean:.2f}", f"{goal:.1f}", f"{least['speedup']:.2f}", f"{GOAL_MINIMUM:.2f}"
            rows.append((f"{cell} {mode}", *numbers, met, least["name"]))
    return table(("", "geomean", "goal", "min", "goal", "met", "case of the minimum"), rows)


def losses_table(records: Sequence[Record]) -> str:
    """Every case where torch.nn was faster, the worst first; a sentence where there is none."""
    lost = sorted((r for r in undisturbed(records) if r["speedup"] < 1), key=lambda record: record["speedup"])
    return case_table(lost) if lost else "No case was slower than torch.nn."


def sections(title: str, records: Sequence[Record], goal: bool) -> list[tuple[str, str]]:
    """The report's parts in order, as (heading, text); the terminal prints them all but long lists of cases."""
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    parts = [(title, f"{first['machine']}\n{versions}, commit {first['commit']}")]
    failures = [f"{record['name']}: {record['failure']}" for record in records if record["failure"]]
    if failures:
        parts.append(("WRONG RESULTS (no speed-up is reported for these)", "\n".join(failures)))
    workloads = [record for record in records if "workload" in record]
    parts.append(("Cases", case_table(record for record in records if "workload" not in record)))
    if workloads:
        parts.append(("Workloads on real input (times per epoch, or per step)", workload_table(workloads)))
    parts.append(("Where torch.nn was faster", losses_table(records)))
    parts.append(("Summary (ratio of torch.nn's time to rnnfast's)", summary_table(records)))
    disturbed = len(measured(records)) - len(undisturbed(records))
    if disturbed:
        parts.append((f"{disturbed} cases with ! are left out of all means", CONTENDED))
    if goal:
        parts.append(("Goals", goal_table(records)))
    return parts


def write_json(folder: Path, records: Sequence[Record]) -> None:
    (folder / "results.json").write_text(json.dumps(list(records), indent=1) + "\n")


def write_markdown(
    folder: Path, parts: list[tuple[str, str]], records: Sequence[Record], plots: Sequence[Path]
) -> None:
    """report.md in `folder`, with the plots that lie there."""
    text = [f"{'#' if i == 0 else '##'} {heading}\n\n{body}\n" for i, (heading, body) in enumerate(parts)]
    text += [f"![{plot.stem}]({plot.name})\n" for plot in plots]
    text.append("`*`: noisy; `!`: other programs held the cores. How to read all this: bench/README.md.\n")
    text.append(last_line(records) + "\n")
    (folder / "report.md").write_text("\n".join(text))
