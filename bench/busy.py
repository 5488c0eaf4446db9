"""Keeps every core busy, as other programs would, for as long as a `with` block lasts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Ends by itself when its parent is gone, so nothing spins on after a crash or a kill.
SPIN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""
START_SECONDS = 0.3  # until the interpreters are up


@contextmanager
def busy_cores() -> Iterator[list[subprocess.Popen]]:
    """As many spinning processes as this process may use cores."""
    processes: list[subprocess.Popen] = []
    try:
        for _ in range(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1):
            processes.append(subprocess.Popen([sys.executable, "-S", "-c", SPIN, str(os.getpid())]))
        time.sleep(START_SECONDS)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
