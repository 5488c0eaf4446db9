"""`make gpu-check`: builds, reports the environment, runs tests/gpu and compute-sanitizer on a GPU.

Every stage has a time limit, all together 8 minutes. OUT gets few files: setup.log, tests.log, one log per tool and
summary.json, written after each stage. Until the tests have ended cases.jsonl has those that have, so that a killed run
leaves what it knows. Ends with 0 only if every stage is good.
pytest loads this file too, as the plugin that writes cases.jsonl and ends workers whose GPU context is broken.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = "RNNFAST_GPU_CASES"  # the file that the plugin appends to
PROCESSES = 10  # of pytest-xdist: compiling one kernel takes a second or more on one core
LIMITS = {"build": 90, "environment": 25, "tests": 260, "sanitizer": 105}  # seconds
SMALL = "tools/gpu_small.py"
TESTS = ("tests/gpu",)
TEST_SECONDS = 90  # of one test, after which it hangs
SANITIZERS = ("memcheck", "racecheck", "synccheck")
FOUND = 99  # compute-sanitizer's exit status where it found something
# Triton's kernels and those of CUDA, whose names in a report may be mangled.
OURS = re.compile(
    r"\b(?:rnn|gru|lstm)_(?:forward|backward|project|unproject)\b"
    r"|(?:cta|cluster|group|step)_(?:forward|backward|project|grad_state)|clear_exchange"
    r"|(?:sum_biases|write_schedule|clamp_lengths|gather_previous|cell_outputs)_kernel"
)


@dataclass
class Stage:
    name: str
    status: str  # "passed", "failed" or "absent"
    seconds: float
    what: str  # in one line
    log: str = ""


def pytest_runtest_logreport(report) -> None:
    """Appends a test that has ended to the file that the environment names; in the process that started the others."""
    path = os.environ.get(CASES)
    ended = report.when == "call" or report.outcome != "passed"
    if not path or not ended or "PYTEST_XDIST_WORKER" in os.environ:
        return
    case = {"case": report.nodeid.split("::")[-1], "outcome": report.outcome, "seconds": round(report.duration, 3)}
    case |= dict(report.user_properties)
    if report.failed:
        case["failure"] = str(report.longrepr)[-3000:]
    elif report.skipped:
        case["failure"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
    with open(path, "a") as file:
        file.write(json.dumps(case) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Ends a worker whose GPU context is broken, so that pytest-xdist starts another for the tests that are left."""
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def start(command: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """Runs a command in the repository's root, everything that it says in `log`, with its own group of processes."""
    file = log.open("a")
    file.write(f"$ {' '.join(command)}\n")
    file.flush()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0", **environment}
    with file:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )


def ended(process: subprocess.Popen, deadline: float) -> int | None:
    """Its exit status, or None where it had to be stopped."""
    try:
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def simple(name: str, command: list[str], out: Path, **environment: str) -> Stage:
    """One command whose exit status says all."""
    log, begin = out / ("tests.log" if name == "tests" else "setup.log"), time.monotonic()
    status = ended(start(command, log, **environment), begin + LIMITS[name])
    good = status == 0
    what = "" if good else f"stopped after {LIMITS[name]} s" if status is None else f"exit status {status}"
    return Stage(name, "passed" if good else "failed", round(time.monotonic() - begin, 1), what, log.name)


def tests(out: Path) -> tuple[Stage, list[dict]]:
    """tests/gpu, in several processes where pytest-xdist is installed."""
    cases = out / "cases.jsonl"
    cases.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "gpu_check", *TESTS, "-v", "-rfEs", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(PROCESSES, max(1, (os.cpu_count() or 2) - 2)))]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    path = os.pathsep.join([str(ROOT / "tools"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    stage = simple("tests", command, out, PYTHONPATH=path.rstrip(os.pathsep), **{CASES: str(cases)})
    records = [json.loads(line) for line in cases.read_text().splitlines()] if cases.exists() else []
    counts = {outcome: sum(r["outcome"] == outcome for r in records) for outcome in ("passed", "failed", "skipped")}
    cases.unlink(missing_ok=True)
    stage.what = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + f" {stage.what}".rstrip()
    if not counts["passed"]:  # pytest is content where everything was skipped
        stage.status = "failed"
    return stage, records


def findings(log: str) -> int:
    """How many lines of compute-sanitizer's report name one of our kernels; who launched a kernel does not count."""
    lines = [line for line in log.splitlines() if line.startswith("=========") and "Host Frame" not in line]
    return sum(bool(OURS.search(line)) for line in lines)


def verdict(tool: str, status: int | None, log: str) -> tuple[str, str]:
    """(status, what) of one tool. What it finds in the kernels of torch and its libraries is told but is not ours."""
    ours, done = findings(log), log.count(" done\n")
    if ours:
        return "failed", f"{ours} lines name our kernels"
    if status == FOUND:
        return "passed", f"{done} layers; it found something, but not in our kernels"
    if status is None:
        return "failed", f"stopped after {LIMITS['sanitizer']} s and {done} layers"
    return ("passed" if status == 0 else "failed"), f"{done} layers, exit status {status}"


def sanitizers(out: Path) -> list[Stage]:
    """All tools of compute-sanitizer side by side, on tools/gpu_small.py."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not sanitizer:
        return [Stage("sanitizer", "absent", 0.0, "compute-sanitizer is not installed")]
    begin = time.monotonic()
    options = ["--error-exitcode", str(FOUND), "--report-api-errors", "no"]
    running = {}
    for tool in SANITIZERS:
        command = [sanitizer, "--tool", tool, *options, sys.executable, SMALL]
        # Each tensor its own allocation, so that memcheck sees a step from one into the next.
        running[tool] = start(command, out / f"{tool}.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    stages = []
    for tool, process in running.items():
        status = ended(process, begin + LIMITS["sanitizer"])
        result = verdict(tool, status, (out / f"{tool}.log").read_text(errors="replace"))
        stages.append(Stage(tool, result[0], round(time.monotonic() - begin, 1), result[1], f"{tool}.log"))
    return stages


def architecture() -> dict[str, str]:
    """For the build: the architecture of the GPU that is here. All that are shipped take minutes."""
    asked = shutil.which("nvidia-smi")
    if not asked or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return {}
    told = subprocess.run([asked, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    found = sorted({line.strip() for line in told.stdout.splitlines() if re.fullmatch(r"\d+\.\d", line.strip())})
    return {"TORCH_CUDA_ARCH_LIST": ";".join(found)} if found else {}


def cuda_wanted() -> dict[str, str]:
    """For the build: where there is an nvcc, kernels that do not compile are a failure, not a notice."""
    if shutil.which("nvcc"):
        return {"RNNFAST_CUDA": "1"}
    usual = "/usr/local/cuda"
    return {"RNNFAST_CUDA": "1", "CUDA_HOME": usual} if shutil.which("nvcc", path=f"{usual}/bin") else {}


def device_and_versions() -> dict[str, object]:
    import torch

    from bench.device import facts
    from bench.measure import commit, versions

    return {"device": facts(), "versions": versions(), "commit": commit(), "torch_cuda": torch.version.cuda}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "gpu")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in ("setup", "tests", *SANITIZERS):
        (out / f"{old}.log").unlink(missing_ok=True)
    stages: list[Stage] = []
    summary: dict[str, object] = {"python": platform.python_version()}

    def keep(*more: Stage) -> None:
        for stage in more:
            stages.append(stage)
            print(f"{stage.name:12} {stage.status:7} {stage.seconds:6.1f} s  {stage.what}", flush=True)
        summary["stages"] = [asdict(stage) for stage in stages]
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "-j2"]  # both libraries at a time
    keep(simple("build", build, out, RNNFAST_BUILD="1", **cuda_wanted(), **architecture()))
    keep(simple("environment", [sys.executable, "-m", "rnnfast.env_report"], out))
    try:
        summary |= device_and_versions()
    except ImportError as error:
        keep(Stage("device", "failed", 0.0, str(error)))
    compiling = start([sys.executable, SMALL], out / "setup.log")  # Triton keeps the kernels, for the sanitizer's runs
    stage, records = tests(out)
    ended(compiling, time.monotonic() + 1)
    summary["cases"] = records
    keep(stage)
    for record in records:
        if record["outcome"] == "failed":
            print("FAILED", record["case"], record["failure"].strip().splitlines()[-1:], flush=True)
    keep(*sanitizers(out))
    print(f"logs and summary.json: {out}")
    return 1 if any(stage.status == "failed" for stage in stages) else 0


if __name__ == "__main__":
    sys.exit(main())
