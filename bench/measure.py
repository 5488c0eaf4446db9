"""From an experiment or a workload to its record, the dictionary that goes into the JSON."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

import rnnfast
from rnnfast import _ext

from . import device, frozen, memory, onnx_runtime, parity, peak, peers, training
from .busy import busy_cores
from .cases import Case, float32_products
from .goals import Record
from .providers import Problem, Runner, tier_of
from .suites import Experiment
from .timing import BusyClock, Call, Timing, interleave, new_clock
from .workloads import Workload

OTHER_LIMITS = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # variables that slow torch.nn down


def machine(device: str) -> str:
    """One line: what the numbers were measured on, and what limits torch.nn there besides ATEN_CPU_CAPABILITY."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    parts = [f"{cpu}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}", platform.system()]
    parts += [f"{name}={os.environ[name]}" for name in OTHER_LIMITS if name in os.environ]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        parts.insert(0, f"{properties.name}, {properties.total_memory >> 30} GiB")
    return ", ".join(parts)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "rnnfast": rnnfast.__version__}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        with suppress(PackageNotFoundError):
            found["triton"] = version("triton")
    if onnx_runtime.missing() is None:
        found["onnxruntime"] = version("onnxruntime")
    with suppress(PackageNotFoundError):
        found["openvino"] = version("openvino")
    return found | {peer.name: peer.version() for peer in peers.present()}


def isa() -> str:
    """The instruction set of rnnfast's CPU kernels; RNNFAST_CPU_ISA chooses another than the best."""
    return _ext.cpu_isa() if _ext.failure is None else "none"


def commit() -> str:
    """The commit of this checkout, with "+" where files differ from it; "unknown" outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("+" if changes else "")


def measure(job: Experiment | Workload, seconds: float, others: Sequence[str] = ()) -> Iterator[Record]:
    """The records of an experiment or a workload: one, or two where a trained model is also timed at work.

    others: more backends of rnnfast, which take turns in experiments.
    """
    if isinstance(job, Workload):
        yield from measure_workload(job)
    elif job.section == "memory":
        yield measure_memory(job.case)
    else:
        yield measure_case(job, seconds, others)


def measure_on_gpu(
    section: str, name: str, job: Experiment | Workload, seconds: float, backends: Sequence[str]
) -> tuple[list[Record], bool]:
    """The same by the first of `backends`, the others beside it; or the record of its failure, so that one bad case
    does not end hours of others. Also whether the GPU still answers: after a wrong access to memory nothing of this
    process runs on it."""
    try:
        with rnnfast.backend(backends[0], strict=True):
            records = list(measure(job, seconds, backends[1:]))
    except Exception as error:
        records = [unfinished(section, name, job.case, f"{type(error).__name__}: {error}")]
    parity.reference.cache_clear()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return records, False
    return records, True


def measure_case(experiment: Experiment, seconds: float, others: Sequence[str] = ()) -> Record:
    """Checks the case's results, then times it for about `seconds`; a wrong result gets no times."""
    with float32_products(experiment.case):
        return _measured(experiment, seconds, others)


def _measured(experiment: Experiment, seconds: float, others: Sequence[str]) -> Record:
    case = experiment.case
    machine_limits = peak.limits(case)
    torch.set_num_threads(case.threads)
    on_gpu = {}
    with torch.set_grad_enabled(case.mode != "inference"):
        problem = Problem(case)
        is_frozen = experiment.section == frozen.SECTION
        runners = [Runner(nn, problem), Runner(rnnfast, problem, frozen="float32" if is_frozen else None)]
        verdict = parity.check(case, runners[0].run(), runners[1].run())
        timing, failures, of_frozen = None, {}, {}
        if verdict.failure is None:
            if is_frozen:
                calls, failures, errors = frozen.turns(problem, *runners)
                of_frozen = {"rms_errors": errors, "bounds_ms": peak.frozen_limits(case)}
            else:
                beside, failures = _beside(experiment, problem, runners[0], others)
                calls = {"torch": runners[0].timed, "rnnfast": runners[1].timed, **beside}
            busy = experiment.section == "oversubscribed"
            clock = BusyClock() if busy else new_clock(case.device, case.threads, repeatable=True)
            with busy_cores() if busy else nullcontext():
                timing = interleave(calls, clock, seconds, settle="onnxruntime" in calls and case.threads > 1)
            if case.device == "cuda":
                on_gpu = {"clocks": device.state(), "kernels": device.kernels(calls["torch"])}
        record = _record(experiment.section, case.name, case, runners[1].backend(), verdict, timing)
    record |= machine_limits | {"beside_failures": failures} | on_gpu | of_frozen
    if timing is not None:
        record |= {
            "torch_gflops": case.flops() / timing.torch_ms / 1e6,
            "gflops": case.flops() / timing.rnnfast_ms / 1e6,
            "torch_fraction": machine_limits["bound_ms"] / timing.torch_ms,
            "fraction": machine_limits["bound_ms"] / timing.rnnfast_ms,
            "torch_us_per_step": timing.torch_ms * 1e3 / case.seq_len,
            "us_per_step": timing.rnnfast_ms * 1e3 / case.seq_len,
        }
    return record


def unfinished(section: str, name: str, case: Case, reason: str) -> Record:
    """The record of a case or workload that has no result."""
    return _record(section, name, case, "none", parity.Parity("", 0.0, 0.0, 0.0, reason), None)


def _beside(
    experiment: Experiment, problem: Problem, of_torch: Runner, others: Sequence[str]
) -> tuple[dict[str, Call], dict[str, str]]:
    """What else takes turns: the experiment's other cases, rnnfast's `others`, ONNX Runtime or the peers on a GPU.

    Also by name what is wrong with those that are left out."""
    namespaces = {"torch": nn, "rnnfast": rnnfast}
    calls: dict[str, Call] = {
        name: Runner(namespaces[provider], Problem(case)).timed for name, (provider, case) in experiment.beside.items()
    }
    case, failures = experiment.case, {}
    for name in others:
        runner = Runner(rnnfast, problem, name)
        failure = _failure(case, of_torch, runner)
        failures |= {name: failure} if failure else {}
        calls |= {} if failure else {name: runner.timed}
    for peer in peers.present():
        if peer.takes(case) and tier_of(experiment.section) is None:
            call, failure = _peer(case, problem, of_torch, peer)
            failures |= {peer.name: failure} if failure else {}
            calls |= {} if failure else {peer.name: call}
    if experiment.section == "oversubscribed" or not onnx_runtime.takes(case) or onnx_runtime.missing():
        return calls, failures
    call = onnx_runtime.new_call(of_torch.module, case, problem.input)
    failure = parity.check_ceiling(case, {"output": torch.from_numpy(call())})
    return (calls, failures | {"onnxruntime": failure}) if failure else (calls | {"onnxruntime": call}, failures)


def _failure(case: Case, of_torch: Runner, runner: Runner) -> str | None:
    """Why a backend's results are not to be timed, or None: they are wrong, or there are none."""
    try:
        return parity.check(case, of_torch.run(), runner.run()).failure
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def _peer(case: Case, problem: Problem, of_torch: Runner, peer: peers.Peer) -> tuple[Call | None, str | None]:
    """The call of a peer on the GPU, or why it is not to be timed. Whatever it raises is its own affair."""
    try:
        runner = peers.PeerRunner(peer, of_torch.module, problem)
        failure = parity.check_ceiling(case, runner.run())
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return runner.timed, failure


def measure_memory(case: Case) -> Record:
    """Both providers' peak memory."""
    return {"name": case.name, "section": "memory"} | asdict(case) | {"failure": None} | memory.measure(case)


def measure_workload(workload: Workload) -> Iterator[Record]:
    """Trains the workload; for the streaming model also the trained model at work."""
    torch.set_num_threads(workload.case.threads)
    trained, with_torch = training.train(workload)
    record = _record("workloads", workload.name, workload.case, trained.backend, trained.parity, trained.timing)
    yield record | {"workload": workload.name, "epochs": workload.epochs, "losses": trained.losses}
    if workload.streams:
        case, timing, verdict, backend = training.stream(workload, with_torch)
        record = _record("workloads", f"{workload.name}, per step", case, backend, verdict, timing)
        yield record | {"workload": workload.name}


def _record(section: str, name: str, case: Case, backend: str, verdict: parity.Parity, timing: Timing | None) -> Record:
    record: Record = {"name": name, "section": section} | asdict(case) | {"backend": backend}
    record["date"] = str(datetime.date.today())
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
