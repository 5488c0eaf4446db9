"""RNNFAST_AUTOTUNE=1: the plan of a pass is measured instead of estimated, and the result is kept on disk.

It is off by default, because the first call of each size then takes seconds. A size is measured with the tensors of its
first call, so that call should be a typical one. The number of steps never matters, and the batch only for the question
which plans are possible. A batch that allows a plan without a measurement causes another one. Each call takes the
fastest plan that it can. Whole passes are measured on the GPU, REPEATS times in turn, and their medians compared.
"""

import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

from .plan import Plan

REPEATS = 5


def wanted(input: torch.Tensor) -> bool:
    """Whether this call may be measured: it is asked for, on a GPU, and no CUDA graph is being captured."""
    asked = os.environ.get("RNNFAST_AUTOTUNE", "0") not in ("", "0")
    return asked and input.is_cuda and not torch.cuda.is_current_stream_capturing()


def cache_file() -> Path:
    """RNNFAST_CACHE_DIR/autotune.json; without that variable in the user's cache folder."""
    folder = os.environ.get("RNNFAST_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "rnnfast")
    return Path(folder).expanduser() / "autotune.json"


def _name(plan: Plan) -> str:
    return f"{plan.kind} {'x'.join(map(str, plan.config[:-1]))}"


def gpu_seconds(run: Callable[[], object]) -> float:
    """The time that the GPU works on the launches of `run`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def best(
    size: Sequence, plans: Sequence[Plan], run: Callable[[Plan], object], seconds: Callable[..., float] = gpu_seconds
) -> Plan:
    """The fastest of `plans` in the ranking of this size. Plans that it lacks are measured with `run` first.

    A ranking belongs to `size`, to the GPU and to the version of Triton.
    """
    if len(plans) == 1:
        return plans[0]
    path = cache_file()
    if path not in _rankings:
        _rankings[path] = _read(path)
    rankings = _rankings[path]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    ranking = rankings.setdefault(" ".join(map(str, (device, triton.__version__, *size))), {})
    missing = [plan for plan in plans if _name(plan) not in ranking]
    if missing:
        times: dict[str, list[float]] = {_name(plan): [] for plan in plans}  # all: ratios hold within a run
        for repeat in range(REPEATS + 1):
            for plan in plans:
                elapsed = seconds(lambda plan=plan: run(plan))
                if repeat:  # the first one compiles
                    times[_name(plan)].append(elapsed)
        ranking.update({name: statistics.median(found) for name, found in times.items()})
        _write(path, rankings)
    return min(plans, key=lambda plan: ranking[_name(plan)])


_rankings: dict[Path, dict[str, dict[str, float]]] = {}  # read or measured by this process, by file


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # no file, or half a file: measure again
        return {}


def _write(path: Path, rankings: dict) -> None:
    """Replaces the file at once, because other processes read it. On failure the next process measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(rankings, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"rnnfast: the measured plans are not kept: {error}", RuntimeWarning, stacklevel=2)
