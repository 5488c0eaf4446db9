"""Compiles the kernels of many cases beforehand, in several processes: Triton keeps them on disk.

Else most of a GPU run would be one core's compiling, a second or more for every hidden size, dtype and pass.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from .cases import Case

COMPILED_WHEN_CALLED = ("triton",)  # backends
PROCESSES = 10
SECONDS = 150  # beyond, what is missing is compiled when it is measured


def shares(cases: Sequence[Case], processes: int) -> list[list[Case]]:
    """The cases shortened to 2 steps, without repetitions; those that differ in the batch only, together in one share.

    No kernel depends on the number of steps, and few on the batch.
    """
    groups: dict[Case, list[Case]] = {}
    for case in dict.fromkeys(replace(case, seq_len=min(case.seq_len, 2)) for case in cases):
        groups.setdefault(replace(case, batch=0), []).append(case)
    parts: list[list[Case]] = [[] for _ in range(max(1, min(processes, len(groups))))]
    for index, group in enumerate(groups.values()):
        parts[index % len(parts)] += group
    return parts


def compile_kernels(cases: Sequence[Case], backend: str) -> float:
    """Runs every case once, with few steps, in other processes. Returns the seconds that it took; errors show later."""
    begin = time.monotonic()
    processes = max(1, min(PROCESSES, (os.cpu_count() or 2) - 2))
    running = []
    for part in shares(cases, processes):
        command = [sys.executable, "-m", "bench.warm", backend]
        process = subprocess.Popen(
            command, cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        process.stdin.write(json.dumps([asdict(case) for case in part]))
        process.stdin.close()
        running.append(process)
    for process in running:
        try:
            process.wait(max(0.1, begin + SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return time.monotonic() - begin


def main(backend: str, cases: Sequence[Case]) -> None:
    import torch

    import rnnfast

    from .cases import float32_products
    from .providers import Problem, Runner

    for case in cases:
        gradients = torch.set_grad_enabled(case.mode != "inference")
        with gradients, float32_products(case), rnnfast.backend(backend, strict=True):
            try:
                Runner(rnnfast, Problem(case)).run()
            except Exception as error:  # whatever it is, the measurement of this case meets it again and tells it
                print(case.name, error, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], [Case(**fields) for fields in json.load(sys.stdin)])
