"""`python -m bench [quick|goal|full]` checks every result, times rnnfast against torch.nn, reports (see README.md)."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

NEEDED = {"numpy": "numpy", "matplotlib": "matplotlib", "tqdm": "tqdm", "sklearn": "scikit-learn", "torch": "torch"}
SUITES = ("quick", "goal", "full")
SECONDS_PER_CASE = {"quick": 0.6, "goal": 2.0, "full": 1.0}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmark of rnnfast against torch.nn.")
    default = os.environ.get("BENCH") or "quick"
    parser.add_argument("suite", nargs="?", default=default, help=f"{', '.join(SUITES)}; default: $BENCH or quick")
    parser.add_argument("-k", dest="only", default="", help="only cases and workloads whose name contains this")
    parser.add_argument("--seconds", type=float, help="time per case, beyond the check and the warm-up")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="where the reports go")
    arguments = parser.parse_args()
    if arguments.suite not in SUITES:
        parser.error(f"unknown suite {arguments.suite!r}; known are {', '.join(SUITES)}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"the benchmark needs {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    import rnnfast

    from . import cases, measure, peak, plots, report
    from .workloads import workloads

    suite, full = arguments.suite, arguments.suite == "full"
    device = "cuda" if torch.cuda.is_available() and suite != "goal" else "cpu"
    todo = {"quick": cases.quick, "goal": cases.goal, "full": cases.full}[suite]()
    if device == "cuda":
        todo = cases.gpu(quick=not full)
    trainings = [] if suite == "goal" else workloads(full, 1, device)
    if full and device == "cpu":
        trainings += workloads(full, 2, device)
    todo = [case for case in todo if arguments.only in case.name]
    trainings = [workload for workload in trainings if arguments.only in workload.name]
    if not todo and not trainings:
        print(f"no case of the suite {suite} has {arguments.only!r} in its name", file=sys.stderr)
        return 2

    common = {"machine": measure.machine(device), "versions": measure.versions(), "commit": measure.commit()}
    print(
        f"{common['machine']}; torch {torch.__version__}, rnnfast {rnnfast.__version__}, backends {rnnfast.backends()}"
    )
    folder = arguments.out / (f"{suite}-{arguments.only}" if arguments.only else suite)
    folder.mkdir(parents=True, exist_ok=True)
    records: list[measure.Record] = []
    peaks: dict[tuple[str, int], float] = {}

    def keep(record: measure.Record) -> None:
        key = record["dtype"], record["threads"]
        if key not in peaks:
            peaks[key] = peak.peak_gflops(cases.DTYPES[key[0]], key[1], device)
        records.append(record | {"peak_gflops": peaks[key]} | common)
        if record["failure"]:
            progress.write(f"WRONG RESULT {record['name']}: {record['failure']}")

    tqdm.monitor_interval = 0  # its thread would be counted in the CPU time
    title = f"rnnfast against torch.nn: {suite}"
    progress = tqdm(total=len(todo) + len(trainings), desc=suite, unit="case", dynamic_ncols=True)
    try:
        with progress:
            for case in todo:
                progress.set_postfix_str(case.name)
                keep(measure.measure_case(case, arguments.seconds or SECONDS_PER_CASE[suite]))
                progress.update()
            for workload in trainings:
                progress.set_postfix_str(workload.name)
                for record in measure.measure_workload(workload):
                    keep(record)
                progress.update()
    finally:  # hours of measurements must survive an interruption
        report.write_json(folder, records)
    parts = report.sections(title, records, goal=suite == "goal")
    report.write_markdown(folder, parts, records, plots.draw(records, folder))
    for heading, body in parts:
        print(f"\n{heading}\n{body}")
    print(f"\nreport, JSON and plots: {folder}")
    print(report.last_line(records))
    return 1 if any(record["failure"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
