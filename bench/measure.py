"""From a case or a workload to its record, the dictionary that goes into the JSON."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import rnnfast

from . import parity, training
from .cases import Case
from .providers import Problem, Runner
from .timing import Timing, interleave, new_clock
from .workloads import Workload

Record = dict[str, object]


def machine(device: str) -> str:
    """One line: what the numbers were measured on."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    parts = [f"{cpu}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}", platform.system()]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        parts.insert(0, f"{properties.name}, {properties.total_memory >> 30} GiB")
    return ", ".join(parts)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "rnnfast": rnnfast.__version__}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def commit() -> str:
    """The commit of this checkout, with "+" where files differ from it; "unknown" outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("+" if changes else "")


def measure_case(case: Case, seconds: float) -> Record:
    """Checks the case's results, then times it for about `seconds`; a wrong result gets no times."""
    torch.set_num_threads(case.threads)
    problem = Problem(case)
    sides = [Runner(namespace, problem) for namespace in (nn, rnnfast)]
    verdict = parity.check(case, sides[0].run(), sides[1].run())
    timing = None
    if verdict.failure is None:
        timing = interleave(sides[0].run, sides[1].run, new_clock(case.device, case.threads), seconds)
    record = _record(case.name, case, sides[1].backend(), verdict, timing)
    if timing is not None:
        record |= {
            "torch_gflops": case.flops() / timing.torch_ms / 1e6,
            "gflops": case.flops() / timing.rnnfast_ms / 1e6,
        }
    return record


def measure_workload(workload: Workload) -> Iterator[Record]:
    """Trains the workload; for the streaming model also the trained model at work."""
    torch.set_num_threads(workload.case.threads)
    trained, with_torch = training.train(workload)
    record = _record(workload.name, workload.case, trained.backend, trained.parity, trained.timing)
    yield record | {"workload": workload.name, "epochs": workload.epochs, "losses": trained.losses}
    if workload.streams:
        case, timing, verdict, backend = training.stream(workload, with_torch)
        yield _record(f"{workload.name}, per step", case, backend, verdict, timing) | {"workload": workload.name}


def _record(name: str, case: Case, backend: str, verdict: parity.Parity, timing: Timing | None) -> Record:
    record: Record = {"name": name} | asdict(case) | {"backend": backend}
    record |= {"torch_ms": None, "rnnfast_ms": None, "speedup": None}
    if timing is not None and verdict.failure is None:
        record |= asdict(timing)
        record |= {"speedup": timing.speedup, "wall_speedup": timing.wall_speedup, "noisy": timing.noisy}
    record |= {"err": verdict.err, "torch_err": verdict.torch_err, "err_limit": verdict.limit}
    record |= {"err_of": verdict.result, "failure": verdict.failure}
    return record


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
