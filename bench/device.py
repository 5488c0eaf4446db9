"""The GPU that is measured: facts, clocks, and the kernels that a call runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch

FACTS = ("driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit")
STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "pstate")
KERNELS, LONGEST_NAME = 3, 90  # of a call: the kernels that took most of its time


def ask(fields: tuple[str, ...]) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; nothing where it does not answer."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.strip().split(",")), strict=False))


def facts() -> dict[str, object]:
    """Name, limits and clocks of the current GPU; empty where there is none."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        **ask((*FACTS, *STATE)),
    }


def state() -> dict[str, str]:
    """Clocks, temperature and power at this moment."""
    return ask(STATE)


def kernels(call: Callable[[], object]) -> list[str]:
    """The kernels that took most of the GPU's time in one call, with their share and how often they ran."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        events = profiler.key_averages()
    except (RuntimeError, AttributeError, AssertionError) as error:  # the times do not depend on it
        return [f"unknown: {error}"]
    return summary([(event.key, event.self_device_time_total, event.count) for event in events])


def summary(events: list[tuple[str, float, int]]) -> list[str]:
    """The first KERNELS of (name, microseconds, runs) as lines of text."""
    events = sorted((event for event in events if event[1] > 0), key=lambda event: -event[1])
    total = sum(time for _, time, _ in events)
    return [f"{name[:LONGEST_NAME]} ({time / total:.0%}, {count}x)" for name, time, count in events[:KERNELS]]
