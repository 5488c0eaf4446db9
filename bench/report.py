"""From records to what people read: tables on the terminal, a markdown report, JSON, and the last line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import frozen, goals, peak, peers
from .goals import Outcome, Record, geomean
from .providers import GPU_BACKENDS, tier_of

CONTENDED = "Other programs held the cores while several threads were timed; close them and repeat for these cases."
LONGEST_KERNEL = 40  # characters of its name in a table; results.json has more
HEADINGS = {
    "grid": "Cases",
    "other": "Other layers",
    "calls": "Single calls, and cells in training",
    "layers": "Bidirectional, stacked and projected layers beside the plain layer",
    "packed": "Unequal lengths (half of the maximum on average) beside the padded layer",
    "neighbours": "Sizes off the round numbers beside their round neighbours",
    "oversubscribed": "As many busy processes as cores (wall time)",
    **{f"tier {tier}": f"CUDA kernels, tier {tier} alone" for tier in ("cta", "cluster", "group", "step")},
}
# The number that a section is about, besides the ratio to torch.nn.
RELATIVE = {
    "layers": ("/ plain's ratio", goals.of_plain),
    "packed": ("time / padded", goals.of_padded),
    "neighbours": ("time / between", goals.of_interpolated),
}


def merged(files: Sequence[Path]) -> list[Record]:
    """The records of several runs; of a case that was measured again, the last one, where the first one stood.

    Raises ValueError where the runs are of different machines or instruction sets: their goals are not the same.
    """
    records: dict[tuple[str, str], Record] = {}
    for file in files:
        records |= {(record["section"], record["name"]): record for record in json.loads(file.read_text())}
    places = {(record["machine"], record["isa"]) for record in records.values()}
    if len(places) != 1:
        raise ValueError(f"these results cannot be merged: {sorted(places)}")
    return list(records.values())


def measured(records: Iterable[Record]) -> list[Record]:
    """The records that passed the parity check and so have times."""
    return [record for record in records if record.get("speedup") is not None]


def slowest(records: Sequence[Record]) -> Record:
    return min(records, key=lambda record: record["speedup"])


def undisturbed(records: Iterable[Record]) -> list[Record]:
    """What means are taken of: without times of several threads whose cores other programs held."""
    return [record for record in measured(records) if not record["contended"]]


def not_forced(records: Iterable[Record]) -> list[Record]:
    """Without the tiers that were measured only to be compared with each other."""
    return [record for record in records if tier_of(record["section"]) is None]


def last_line(records: Sequence[Record]) -> str:
    """The line that `make bench` ends with."""
    timed = not_forced(undisturbed(records))
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
    """Geometric mean and extremes per group: each part of the grid, and of every other section."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in undisturbed(records):
        what = record["cell"] if record["section"] == "grid" else record["section"]
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


def times(record: Record, unit: float = 1.0) -> tuple[str, str, str]:
    """torch's time, rnnfast's, and the ratio where it may be reported."""
    if record["speedup"] is None:
        return "", "", "wrong"
    ratio = "-" if record["contended"] else f"{record['speedup']:.2f}"
    return f"{record['torch_ms'] * unit:.4g}", f"{record['rnnfast_ms'] * unit:.4g}", ratio


def case_table(records: Sequence[Record]) -> str:
    """One row per case; a column that no row has anything for is left out."""
    among = {record["section"] for record in records}
    name, unit = ("us", 1e3) if among == {"calls"} else ("ms", 1.0)
    heading, relative = RELATIVE.get(min(among), ("", None)) if len(among) == 1 else ("", None)

    def when_timed(text: Callable[[Record], str]) -> Callable[[Record], str]:
        return lambda record: "" if record["speedup"] is None or record["contended"] else text(record)

    def on_gpu(text: Callable[[Record], str]) -> Callable[[Record], str]:
        return when_timed(lambda r: text(r) if "kernels" in r else "")

    def other(provider: str) -> dict[str, Callable[[Record], str]]:
        def ms(text: Callable[[float, Record], str]) -> Callable[[Record], str]:
            beside = "beside_ms"
            return when_timed(lambda r: text(r[beside][provider], r) if provider in r.get(beside, ()) else "")

        return {
            f"{provider} {name}": ms(lambda value, r: f"{value * unit:.4g}"),
            f"{provider} / rnnfast": ms(lambda value, r: f"{value / r['rnnfast_ms']:.2f}"),
        }

    columns: dict[str, Callable[[Record], str]] = {
        "case": lambda r: r["name"] + mark(r),
        "section": lambda r: r["section"] if len(among) > 1 else "",
        "backend": lambda r: r["backend"],
        f"torch {name}": lambda r: times(r, unit)[0],
        f"rnnfast {name}": lambda r: times(r, unit)[1],
        "ratio": lambda r: times(r)[2],
        **{
            heading: text
            for provider in ("onnxruntime", *GPU_BACKENDS, *peers.NAMES)
            for heading, text in other(provider).items()
        },
        heading: when_timed(lambda r: f"{relative(r):.2f}" if relative else ""),
        "wall ratio": on_gpu(lambda r: f"{r['wall_speedup']:.2f}"),
        "torch us/step": on_gpu(lambda r: f"{r['torch_us_per_step']:.2f}"),
        "us/step": on_gpu(lambda r: f"{r['us_per_step']:.2f}"),
        "torch's kernel": on_gpu(lambda r: r["kernels"][0][:LONGEST_KERNEL] if r["kernels"] else ""),
        "of limit": when_timed(lambda r: f"{r['fraction']:.0%}" if "fraction" in r else ""),
        "limit": when_timed(lambda r: r.get("bound_by", "")),
        "error": lambda r: f"{r['err']:.1e}",
        "torch error": lambda r: f"{r['torch_err']:.1e}",
    }
    rows = [[text(record) for text in columns.values()] for record in records]
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    headers = list(columns)
    return table([headers[i] for i in kept], ([row[i] for i in kept] for row in rows))


def frozen_table(records: Iterable[Record]) -> str:
    """Frozen layers: microseconds of every side, ratios to the rivals, and the share of the machine's limit."""
    records, rows = measured(records), []
    sides = [name for name in frozen.SIDES[2:] if any(name in r["beside_ms"] for r in records)]
    for r in records:
        beside = r["beside_ms"]
        own = {"float32": r["rnnfast_ms"], **{name: beside[name] for name in ("bfloat16", "int8") if name in beside}}
        times = [f"{own[name] * 1e3:.4g}" if name in own else "" for name in peak.FORMATS]
        others = [f"{beside[name] * 1e3:.4g}" if name in beside else "" for name in sides]
        of_float = f"{goals.of_onnx_runtime(r):.2f}" if "onnxruntime" in beside else ""
        of_int8 = f"{goals.of_int8_rivals(r):.2f}" if "int8" in beside and "torch int8" in beside else ""
        shares = [f"{r['bounds_ms'][name] / own[name]:.0%}" if name in own else "" for name in peak.FORMATS]
        ratios = of_float, of_int8, f"{goals.of_frozen_float32(r):.2f}" if "int8" in own else ""
        rows.append((r["name"] + mark(r), *times, *others, *ratios, *shares))
    headers = ("us", *peak.FORMATS, *sides, "onnxruntime / float32", "other int8 / int8", "float32 / int8")
    return table((*headers, *(f"{name} of limit" for name in peak.FORMATS)), rows)


def frozen_threads_table(records: Iterable[Record]) -> str:
    rows = []
    for r in measured(records):
        times = {"float32": r["rnnfast_ms"], **r["beside_ms"]}
        ratios = [f"{times[name] / times[f'{name}, 1 thread']:.2f}" if name in times else "" for name in peak.FORMATS]
        rows.append((r["name"] + mark(r), *([""] * len(ratios) if r["contended"] else ratios)))
    return table(("", *peak.FORMATS), rows)


def peer_table(records: Sequence[Record]) -> str:
    """Each peer's time / rnnfast's over the cases that it takes; empty where there are none."""
    rows = []
    for name in peers.NAMES:
        ratios = {r["name"]: r["beside_ms"][name] / r["rnnfast_ms"] for r in records if name in r.get("beside_ms", ())}
        if ratios:
            worst = min(ratios, key=ratios.get)
            ahead = sum(ratio > 1 for ratio in ratios.values())
            numbers = f"{geomean(ratios.values()):.2f}", f"{ratios[worst]:.2f}"
            rows.append((name, str(len(ratios)), str(ahead), *numbers, worst))
    headers = ("peer", "cases", "rnnfast ahead in", "geomean", "worst", "the worst case")
    return table(headers, rows) if rows else ""


def memory_table(records: Iterable[Record]) -> str:
    rows = []
    for record in records:
        mib = record["torch_mib"], record["rnnfast_mib"]
        rows.append((record["name"], *(f"{value:.0f}" for value in mib), f"{goals.of_memory(record):.2f}"))
    return table(("training", "torch MiB", "rnnfast MiB", "rnnfast / torch"), rows)


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


def valid(records: Sequence[Record]) -> list[Record]:
    """What goals are judged by: the undisturbed times, and the memory."""
    return [*undisturbed(records), *(record for record in records if record["section"] == "memory")]


def judged(records: Sequence[Record], grid: bool) -> list[Outcome]:
    """The CPU's goals that the records have cases for; without those of the grid where the records are a part of it."""
    outcomes = goals.outcomes(valid([record for record in records if record["device"] == "cpu"]))
    return [outcome for outcome in outcomes if grid or outcome.goal.section != "grid"]


def goal_table(outcomes: Sequence[Outcome]) -> str:
    """Every goal: the mean and the worst of its cases, each with its limit."""
    rows = []
    for outcome in outcomes:
        goal, worst = outcome.goal, outcome.worst
        mean = "" if goal.mean is None else f"{goal.mean:.2f}"
        limit = f"{'<=' if goal.at_most else '>='} {goal.limit:.2f}"
        numbers = f"{outcome.mean:.2f}", mean, f"{outcome.values[worst]:.2f}", limit
        count, met = str(len(outcome.cases)), "yes" if outcome.met else "NO"
        if goal.cases:
            count += f" of {goal.cases}"
            met += " so far" * (len(outcome.cases) < goal.cases)
        rows.append((goal.what, count, *numbers, met, outcome.cases[worst]["name"]))
    return table(("goal", "cases", "geomean", "goal", "worst", "goal", "met", "the worst case"), rows)


def losses_table(records: Sequence[Record]) -> str:
    """Every case where torch.nn was faster, the worst first; a sentence where there is none."""
    lost = [record for record in not_forced(undisturbed(records)) if record["speedup"] < 1]
    lost.sort(key=lambda record: record["speedup"])
    return case_table(lost) if lost else "No case was slower than torch.nn."


def sections(title: str, records: Sequence[Record], outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """The report's parts in order, as (heading, text)."""
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records))
    parts = [(title, f"{first['machine']}, rnnfast on {first['isa']}\n{versions}, commit {commits}")]
    failures = [f"{record['name']}: {record['failure']}" for record in records if record["failure"]]
    if failures:
        parts.append(("WRONG RESULTS (no speed-up is reported for these)", "\n".join(failures)))
    others = [f"{r['name']}: {who}: {why}" for r in records for who, why in r.get("beside_failures", {}).items()]
    if others:
        parts.append(("What was to take turns but has no right result (not timed)", "\n".join(others)))
    for section, heading in HEADINGS.items():
        members = [record for record in records if record["section"] == section]
        if members:
            parts.append((heading, case_table(members)))
    for heading, text, several in (
        ("Frozen layers and others with fixed weights, one thread", frozen_table, False),
        ("Frozen layers: time of two threads / time of one", frozen_threads_table, True),
    ):
        members = [record for record in records if record["section"] == "frozen"]
        members = [record for record in members if (record["threads"] > 1) == several]
        if members:
            parts.append((heading, text(members)))
    memory = [record for record in records if record["section"] == "memory"]
    if memory:
        parts.append(("Peak memory of training, each in a process of its own", memory_table(memory)))
    workloads = [record for record in records if record["section"] == "workloads"]
    if workloads:
        parts.append(("Workloads on real input (times per epoch, or per step)", workload_table(workloads)))
    if measured(records):
        parts.append(("Where torch.nn was faster", losses_table(records)))
        parts.append(("Summary (ratio of torch.nn's time to rnnfast's)", summary_table(records)))
    of_peers = peer_table(undisturbed(records))
    if of_peers:
        parts.append(("Peers (ratio of their time to rnnfast's)", of_peers))
    disturbed = len(measured(records)) - len(undisturbed(records))
    if disturbed:
        parts.append((f"{disturbed} cases with ! are left out of all means", CONTENDED))
    if outcomes:
        parts.append(("Goals", goal_table(outcomes)))
    return parts


def write_json(folder: Path, records: Sequence[Record]) -> None:
    unfinished = folder / "results.json.unfinished"
    unfinished.write_text(json.dumps(list(records), indent=1) + "\n")
    unfinished.replace(folder / "results.json")  # a run that is killed here leaves the file as it was


def write_markdown(
    folder: Path, parts: list[tuple[str, str]], records: Sequence[Record], plots: Sequence[Path]
) -> None:
    """report.md in `folder`, with the plots that lie there."""
    text = [f"{'#' if i == 0 else '##'} {heading}\n\n{body}\n" for i, (heading, body) in enumerate(parts)]
    text += [f"![{plot.stem}]({plot.name})\n" for plot in plots]
    text.append("`*`: noisy; `!`: other programs held the cores. How to read all this: docs/benchmarking.md.\n")
    text.append(last_line(records) + "\n")
    (folder / "report.md").write_text("\n".join(text))
