#!/usr/bin/env python3
"""Makes rnnfast/gpu_table.json, by which CUDA tensors get their kernels, from results of `python -m bench gpu`.

    python3 tools/gpu_table.py bench/out/gpu/results.json [more results.json of the same GPU]

The grid's cases count: one padded layer of one direction. The table has, for each GPU,

    {"NVIDIA H200": {"capability": [9, 0], "date": "2026-12-01", "torch": "2.13.0+cu130", "commit": "3a14f40",
                     "speedups": {"lstm bf16 training": {"256": {"16": {"cuda": 1.84, "triton": 1.31}}}}}}

with the hidden size, the batch, and torch.nn's time divided by that of each backend. A backend whose result was wrong
or missing has no number, so it is nobody's default at this size; a disturbed measurement is left out. A GPU that the
file has already is replaced, others stay. device.json is read too, from the folder of the last results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "rnnfast" / "gpu_table.json"
OURS = ("cuda", "triton")


def speedups_of(record: dict) -> dict[str, float]:
    """The speed-ups of one record over torch.nn, by backend."""
    if record["failure"] or not record["torch_ms"]:
        return {}
    times = {record["backend"]: record["rnnfast_ms"], **record.get("beside_ms", {})}
    return {name: round(record["torch_ms"] / times[name], 3) for name in OURS if name in times}


def table_of(records: list[dict], capability: list[int]) -> dict:
    """The table of one GPU; of a case measured twice the later record counts. Raises ValueError where there is none."""
    cases = [one for one in records if one["section"] == "grid" and one["device"] == "cuda"]
    cases = [one for one in cases if not one.get("noisy") and not one.get("contended")]
    if not cases:
        raise ValueError("no undisturbed case of the grid on a GPU is among the results")
    if len({one["machine"] for one in cases}) > 1:
        raise ValueError(f"results of several machines: {', '.join(sorted({one['machine'] for one in cases}))}")
    found: dict = {}
    for one in cases:
        kind = f"{one['cell'].lower()} {one['dtype']} {one['mode']}"
        found.setdefault(kind, {}).setdefault(one["hidden_size"], {})[one["batch"]] = speedups_of(one)
    speedups = {
        kind: {str(units): {str(rows): of_units[rows] for rows in sorted(of_units)} for units, of_units in by_size}
        for kind, by_size in ((kind, sorted(by_units.items())) for kind, by_units in sorted(found.items()))
    }
    last = cases[-1]
    facts = {"capability": capability, "date": last["date"], "torch": last["versions"]["torch"]}
    return facts | {"commit": last["commit"], "speedups": speedups}


def written(tables: dict) -> str:
    """As JSON with one line for each hidden size."""
    text = json.dumps(tables, indent=1)
    return re.sub(r"\{((?:[^{}]|\{[^{}]*\})*)\}", lambda match: "{" + " ".join(match[1].split()) + "}", text) + "\n"


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--table", type=Path, default=FILE, help="the file to write; default: the package's")
    arguments = parser.parse_args(given)
    records = [record for path in arguments.results for record in json.loads(path.read_text())]
    gpu = json.loads((arguments.results[-1].parent / "device.json").read_text())
    tables = json.loads(arguments.table.read_text()) if arguments.table.exists() else {}
    tables[gpu["name"]] = table_of(records, [int(part) for part in gpu["capability"].split(".")])
    arguments.table.write_text(written(tables))
    sizes = [rows for by_size in tables[gpu["name"]]["speedups"].values() for rows in by_size.values()]
    print(f"{arguments.table}: {sum(map(len, sizes))} sizes of {gpu['name']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
