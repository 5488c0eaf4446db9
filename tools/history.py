#!/usr/bin/env python3
"""Appends the grid's rows of a benchmark run to bench/results/history.csv, one row per dtype, threads, cell and pass.

    python3 tools/history.py bench/results/cpu_2026-11-28.json

Only whole grids count: the 24 sizes of H and B below, T=100, one padded layer. The mean is over the cases that no other
program disturbed; `cases` says how many. Rows that the file already has are not written again, and no row ever changes.
A run from uncommitted code has a commit that ends in "+". Where a run was measured at two commits, both are named.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from statistics import geometric_mean

FILE = Path(__file__).parents[1] / "bench" / "results" / "history.csv"
COLUMNS = ("date", "commit", "machine", "torch", "threads", "dtype", "cell", "pass", "geomean", "min", "cases")
HIDDEN, BATCHES, STEPS = (32, 64, 128, 256, 512, 1024), (1, 4, 16, 64), 100


def whole_grids(records: list[dict]) -> dict[tuple, list[dict]]:
    """The undisturbed records of every (threads, dtype, cell, pass) whose 24 cases were all run."""
    groups: dict[tuple, list[dict]] = {}
    for one in records:
        on_grid = one["hidden_size"] in HIDDEN and one["batch"] in BATCHES and one["seq_len"] == STEPS
        if one["section"] == "grid" and on_grid and one["device"] == "cpu":
            groups.setdefault((one["threads"], one["dtype"], one["cell"], one["mode"]), []).append(one)
    whole = {key: members for key, members in groups.items() if len(members) == len(HIDDEN) * len(BATCHES)}
    return {
        key: [one for one in members if one["speedup"] is not None and not one["contended"]]
        for key, members in whole.items()
    }


def rows_of(records: list[dict], date: str | None = None) -> list[dict[str, str]]:
    """The rows of a run; `date` is that of records which have none of their own."""
    rows = []
    for (threads, dtype, cell, mode), members in whole_grids(records).items():
        if not members:
            continue
        speedups = [one["speedup"] for one in members]
        values = (
            max(one.get("date") or date or "" for one in members),
            "/".join(sorted({one["commit"] for one in members})),
            members[0]["machine"],
            members[0]["versions"]["torch"],
            *(str(threads), dtype, cell, mode),
            f"{geometric_mean(speedups):.3f}",
            f"{min(speedups):.3f}",
            str(len(members)),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def read(file: Path = FILE) -> list[dict[str, str]]:
    """The rows of the history, the oldest first."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def append(rows: list[dict[str, str]], file: Path = FILE) -> int:
    """Writes the rows that are new behind the others; returns their number."""
    known = read(file)
    new = [row for row in rows if row not in known]
    begins = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if begins:
            writer.writeheader()
        writer.writerows(new)
    return len(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.json of `python -m bench grid`")
    parser.add_argument("--date", help="YYYY-MM-DD, for records without a date (before 2026-11-27)")
    options = parser.parse_args()
    for path in options.results:
        rows = rows_of(json.loads(path.read_text()), options.date)
        if any(not row["date"] for row in rows):
            sys.exit(f"{path}: its records have no date, give --date")
        print(f"{path}: {append(rows)} of {len(rows)} rows are new")


if __name__ == "__main__":
    main()
