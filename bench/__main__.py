"""`python -m bench [suite]` checks every result, times rnnfast against torch.nn, reports; see docs/benchmarking.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

NEEDED = {"numpy": "numpy", "matplotlib": "matplotlib", "tqdm": "tqdm", "sklearn": "scikit-learn", "torch": "torch"}
QUICK_GPU_MINUTES = 8.0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    import torch

    from .suites import ON_GPU, SECTIONS, WHOLES

    suites = (*WHOLES, *SECTIONS)
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmark of rnnfast against torch.nn.")
    default = os.environ.get("BENCH") or ("gpu-quick" if torch.cuda.is_available() else "quick")
    parser.add_argument("suite", nargs="?", default=default, help=f"{', '.join(suites)}, or report; default: $BENCH")
    parser.add_argument("results", nargs="*", type=Path, help="report: the results.json of earlier runs, newest last")
    parser.add_argument("-k", dest="only", default="", help="only names with these words: 'lstm fp32 not 2thr'")
    parser.add_argument("--seconds", type=float, help="time per case, beyond the check and the warm-up")
    parser.add_argument("--out", type=Path, help="where the reports go; default: bench/out/<suite>")
    parser.add_argument(
        "--resume", action="store_true", help="keep what the results.json in the folder has, do the rest"
    )
    parser.add_argument("--minutes", type=float, help="begin no case after this time; default: 8 for gpu-quick")
    parsed = parser.parse_args(arguments)
    if parsed.suite not in (*suites, "report"):
        parser.error(f"unknown suite {parsed.suite!r}; known are {', '.join(suites)}, report")
    parsed.device = "cuda" if parsed.suite in ON_GPU else "cpu"
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"the suite {parsed.suite} needs a CUDA device, and there is none")
    if parsed.suite == "gpu-quick" and parsed.minutes is None:
        parsed.minutes = QUICK_GPU_MINUTES
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

    from . import device as gpu
    from . import measure, onnx_runtime, peers, suites, warm
    from .providers import forced_tier, gpu_backends, tier_of, tier_refuses
    from .workloads import workloads

    begin = time.monotonic()
    suite, device = arguments.suite, arguments.device
    experiments = suites.experiments_of(suite)
    trainings = workloads(suite in ("full", "gpu"), 1, device) if suite in suites.WHOLES and suite != "cpu" else []
    if suite == "full":
        trainings += workloads(True, 2, device)
    todo = {(e.section, e.case.name): e for e in experiments if suites.selected(e.case.name, arguments.only)}
    todo |= {("workloads", w.name): w for w in trainings if suites.selected(w.name, arguments.only)}
    if not todo:
        print(f"no case of the suite {suite} has {arguments.only!r} in its name", file=sys.stderr)
        return 2

    backends = gpu_backends() if device == "cuda" else []
    common = {"machine": measure.machine(device), "isa": ", ".join(backends) or measure.isa()}
    common |= {"versions": measure.versions(), "commit": measure.commit()}
    print(
        f"{common['machine']}; torch {torch.__version__}, rnnfast {rnnfast.__version__}, backends {rnnfast.backends()}"
    )
    if device == "cpu" and onnx_runtime.missing():
        print(f"without ONNX Runtime: {onnx_runtime.missing()}")
    if device == "cuda":
        print("\n".join(f"without {peer.name}: {why}" for peer in peers.PEERS if (why := peer.missing())))
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out, common)
    if arguments.resume:
        todo = results.left_of(todo)
    if device == "cuda":
        (arguments.out / "device.json").write_text(json.dumps(gpu.facts(), indent=1) + "\n")
        refusals = {key: tier_refuses(key[0], job.case) for key, job in todo.items()}
        todo = {key: job for key, job in todo.items() if refusals[key] is None}
        for section in dict.fromkeys(section for (section, _), reason in refusals.items() if reason):
            reasons = [reason for key, reason in refusals.items() if key[0] == section and reason]
            print(f"{section}: {len(reasons)} cases are left out; {reasons[0]}")
        experiments = [job for job in todo.values() if isinstance(job, suites.Experiment)]
        cases = [experiment.case for experiment in experiments if not tier_of(experiment.section)]
        seconds = sum(warm.compile_kernels(cases, name) for name in backends if name in warm.COMPILED_WHEN_CALLED)
        print(f"compiled the kernels of {len(cases)} cases in {seconds:.0f} s")

    tqdm.monitor_interval = 0  # its thread would be counted in the CPU time
    with tqdm(total=len(todo), desc=suite, unit="case", dynamic_ncols=True) as progress:
        for (section, name), job in todo.items():
            if arguments.minutes and time.monotonic() - begin > 60 * arguments.minutes:
                progress.write(f"{arguments.minutes:g} minutes are over; --resume measures the rest")
                break
            progress.set_postfix_str(name)
            seconds = arguments.seconds or suites.seconds_of(suite, section)
            if device == "cpu":
                found, alive = list(measure.measure(job, seconds)), True
            else:
                results.keep(measure.unfinished(section, name, job.case, "did not end: it hung or was stopped"))
                with forced_tier(section):
                    measured = ["cuda"] if tier_of(section) else backends
                    found, alive = measure.measure_on_gpu(section, name, job, seconds, measured)
            for record in found:
                results.keep(record)
                if record["failure"]:
                    progress.write(f"WRONG RESULT {record['name']}: {record['failure']}")
            progress.update()
            if not alive:
                progress.write("the GPU answers no more after this case; --resume measures the rest, this one last")
                break
    records = results.records()
    write(arguments.out, f"rnnfast against torch.nn: {suite}", records, grid_goals=suite != "quick")
    return 1 if any(record["failure"] for record in records) else 0


class Results:
    """The records of a run by section and name, written to results.json after every case."""

    def __init__(self, folder: Path, common: dict) -> None:
        self.folder, self.common = folder, common
        self.by_name: dict[tuple[str, str], dict] = {}

    def records(self) -> list[dict]:
        return list(self.by_name.values())

    def keep(self, record: dict) -> None:
        from . import report

        self.by_name[record["section"], record["name"]] = record | self.common
        report.write_json(self.folder, self.records())

    def left_of(self, todo: dict[tuple[str, str], object]) -> dict[tuple[str, str], object]:
        """Takes over what results.json has; returns the rest, and last of all what failed: it may hang again.

        Raises ValueError where those results are of another machine.
        """
        path = self.folder / "results.json"
        for record in json.loads(path.read_text()) if path.exists() else []:
            if any(record[key] != self.common[key] for key in ("machine", "isa")):
                there, here = (f"{of['machine']} ({of['isa']})" for of in (record, self.common))
                raise ValueError(f"{path} is of {there}, this is {here}")
            self.by_name[record["section"], record["name"]] = record
        failed = {key: job for key, job in todo.items() if key in self.by_name and self.by_name[key]["failure"]}
        return {key: job for key, job in todo.items() if key not in self.by_name} | failed


if __name__ == "__main__":
    sys.exit(main())
