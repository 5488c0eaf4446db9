"""Peak memory of training by torch.nn and by rnnfast, each in a fresh process that imports nothing of the other.

`python -m bench.memory torch.nn '{"cell": "LSTM", ...}'` is that process; it prints the mebibytes.
"""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .cases import DTYPES, Case, new_module

STEPS = 3
PROCESSES = 3  # of each; their peaks differ by up to 3 %, by how the allocator happens to reuse pages


def peak_mib() -> float:
    """The largest resident size of this process so far.

    Linux counts it per program here; resource.getrusage would still count the parent that the program was forked from.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def train(namespace: str, case: Case) -> float:
    """Some steps of training, every gradient included; the peak of this process afterwards, in MiB."""
    torch.set_num_threads(case.threads)
    module = new_module(importlib.import_module(namespace), case).to(DTYPES[case.dtype])
    x = torch.randn(case.seq_len, case.batch, case.input_size, dtype=DTYPES[case.dtype], requires_grad=True)
    for _ in range(STEPS):
        module(x)[0].sum().backward()
        x.grad = None
        module.zero_grad()
    return peak_mib()


def measure(case: Case) -> dict[str, float]:
    """The median peaks of both; their processes take turns."""
    peaks = [[_peak_of(namespace, case) for namespace in ("torch.nn", "rnnfast")] for _ in range(PROCESSES)]
    torch_mib, rnnfast_mib = (statistics.median(side) for side in zip(*peaks, strict=True))
    return {"torch_mib": torch_mib, "rnnfast_mib": rnnfast_mib}


def _peak_of(namespace: str, case: Case) -> float:
    command = [sys.executable, "-m", "bench.memory", namespace, json.dumps(asdict(case))]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"training {case.name} with {namespace} failed:\n{done.stderr}")
    return float(done.stdout)


if __name__ == "__main__":
    print(train(sys.argv[1], Case(**json.loads(sys.argv[2]))))
