"""`python -m bench [suite]` checks every result, times rnnfast against torch.nn, reports; see README.md."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

NEEDED = {"numpy": "numpy", "matplotlib": "matplotlib", "tqdm": "tqdm", "sklearn": "scikit-learn", "torch": "torch"}
WHOLE_SUITES = ("quick", "cpu", "full")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    from .suites import SECTIONS

    suites = (*WHOLE_SUITES, *SECTIONS)
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmark of rnnfast against torch.nn.")
    default = os.environ.get("BENCH") or "quick"
    parser.add_argument("suite", nargs="?", default=default, help=f"{', '.join(suites)}, or report; default: $BENCH")
    parser.add_argument("results", nargs="*", type=Path, help="report: the results.json of earlier runs, newest last")
    parser.add_argument("-k", dest="only", default="", help="only names with these words: 'lstm fp32 not 2thr'")
    parser.add_argument("--seconds", type=float, help="time per case, beyond the check and the warm-up")
    parser.add_argument("--out", type=Path, help="where the reports go; default: bench/out/<suite>")
    parsed = parser.parse_args(arguments)
    if parsed.suite not in (*suites, "report"):
        parser.error(f"unknown suite {parsed.suite!r}; known are {', '.join(suites)}, report")
    if (parsed.suite == "report") != bool(parsed.results):
        parser.error("`report` wants files, and only `report` takes them: python -m bench report a.json b.json")
    name = "-".join([parsed.suite, *parsed.only.split()])
    parsed.out = parsed.out or Path(__file__).parent / "out" / name
    return parsed


def main() -> int:
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"the benchmark needs {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    arguments = parse_arguments(sys.argv[1:])
    return merge(arguments) if arguments.suite == "report" else run(arguments)


def merge(arguments: argparse.Namespace) -> int:
    from . import report

    records = report.merged(arguments.results)
    write(arguments.out, "rnnfast against torch.nn", records, grid_goals=True)
    return 1 if any(record["failure"] for record in records) else 0


def write(folder: Path, title: str, records: list[dict], grid_goals: bool) -> None:
    """JSON, report and plots into `folder`; the report also to the terminal."""
    from . import plots, report

    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(folder, records)
    outcomes = report.judged(records, grid_goals)
    parts = report.sections(title, records, outcomes)
    report.write_markdown(folder, parts, records, plots.draw(records, outcomes, folder))
    for heading, body in parts:
        print(f"\n{heading}\n{body}")
    print(f"\nreport, JSON and plots: {folder}")
    print(report.last_line(records))


def run(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    import rnnfast

    from . import measure, onnx_runtime, report, suites
    from .workloads import workloads

    suite = arguments.suite
    device = "cuda" if torch.cuda.is_available() and suite in ("quick", "full") else "cpu"
    todo = suites.experiments_of(suite, device)
    trainings = workloads(suite == "full", 1, device) if suite in ("quick", "full") else []
    if suite == "full" and device == "cpu":
        trainings += workloads(True, 2, device)
    todo = [experiment for experiment in todo if suites.selected(experiment.case.name, arguments.only)]
    trainings = [workload for workload in trainings if suites.selected(workload.name, arguments.only)]
    if not todo and not trainings:
        print(f"no case of the suite {suite} has {arguments.only!r} in its name", file=sys.stderr)
        return 2

    common = {"machine": measure.machine(device), "isa": measure.isa(), "versions": measure.versions()}
    common["commit"] = measure.commit()
    print(
        f"{common['machine']}; torch {torch.__version__}, rnnfast {rnnfast.__version__}, backends {rnnfast.backends()}"
    )
    if device == "cpu" and onnx_runtime.missing():
        print(f"without ONNX Runtime: {onnx_runtime.missing()}")
    records: list[measure.Record] = []

    def keep(record: measure.Record) -> None:
        records.append(record | common)
        if record["failure"]:
            progress.write(f"WRONG RESULT {record['name']}: {record['failure']}")

    tqdm.monitor_interval = 0  # its thread would be counted in the CPU time
    progress = tqdm(total=len(todo) + len(trainings), desc=suite, unit="case", dynamic_ncols=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        with progress:
            for experiment in todo:
                progress.set_postfix_str(experiment.case.name)
                if experiment.section == "memory":
                    keep(measure.measure_memory(experiment.case))
                else:
                    seconds = arguments.seconds or suites.seconds_of(suite, experiment.section)
                    keep(measure.measure_case(experiment, seconds))
                progress.update()
            for workload in trainings:
                progress.set_postfix_str(workload.name)
                for record in measure.measure_workload(workload):
                    keep(record)
                progress.update()
    finally:  # hours of measurements must survive an interruption
        report.write_json(arguments.out, records)
    write(arguments.out, f"rnnfast against torch.nn: {suite}", records, grid_goals=suite != "quick")
    return 1 if any(record["failure"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
