"""Each instruction set that this machine has, forced by RNNFAST_CPU_ISA in a process of its own, by the parity rule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
X86 = ["base", "avx2", "avx512", "avx512_bf16"]  # each has all before it
SELECTION = """
import torch
torch.set_num_threads(1)
from support.harness import CELLS, Case, check
F64, BF16, F16 = torch.float64, torch.bfloat16, torch.float16
print(torch.ops.rnnfast._cpu_isa(), flush=True)
shapes = [(2, 3, 1, 5), (9, 5, 7, 63), (3, 65, 5, 33), (5, 1, 40, 130)]
cases = [Case(cell, *shape) for cell in CELLS for shape in shapes]
cases += [Case(cell, 4, 21, 5, 9, dtype=dtype) for cell in CELLS for dtype in (F64, BF16, F16)]
cases += [Case(cell, 4, 2, 70, 33, dtype=dtype) for cell in ("gru", "lstm") for dtype in (F64, BF16, F16)]
cases += [
    Case("lstm", 6, 9, 5, 33, proj=17, bidirectional=True, ragged="lengths", dtype=dtype)
    for dtype in (torch.float32, BF16)
]
cases += [Case(cell, 6, 9, 5, 17, layers=2, bidirectional=True, ragged="unsorted") for cell in CELLS]
cases += [Case(cell, 9, 1, 64, 512, threads=2) for cell in ("gru", "lstm")]
for case in cases:
    try:
        check(case)
    except Exception as error:
        raise AssertionError(str(case)) from error
"""


def run(isa: str, program: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "RNNFAST_CPU_ISA": isa, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)


def best_isa() -> str:
    """What the kernels choose by themselves."""
    program = "import os; del os.environ['RNNFAST_CPU_ISA']; import torch, rnnfast; print(torch.ops.rnnfast._cpu_isa())"
    return run("base", program).stdout.strip()


@pytest.fixture(scope="module")
def available() -> list[str]:
    best = best_isa()
    assert best in [*X86, "neon"]
    return ["base", "neon"] if best == "neon" else X86[: X86.index(best) + 1]


@pytest.mark.quick(2)
@pytest.mark.parametrize("isa", [*X86, "neon"])
def test_forced_isa(isa, available):
    if isa not in available:
        done = run(isa, "import rnnfast, torch; rnnfast.LSTM(2, 3)(torch.zeros(1, 1, 2))")
        assert done.returncode != 0
        assert "RuntimeError" in done.stderr and isa in done.stderr and available[-1] in done.stderr, done.stderr
        return
    done = run(isa, SELECTION)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[0] == isa


@pytest.mark.quick(0)
def test_unknown_isa_is_refused():
    done = run("sse9", "import rnnfast, torch; rnnfast.GRU(2, 3)(torch.zeros(1, 1, 2))")
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr and "sse9" in done.stderr


def test_best_is_what_the_machine_reports(available):
    """Not less than torch itself finds here."""
    if "neon" not in available:
        level = {"DEFAULT": "base", "NO AVX": "base", "AVX2": "avx2", "AVX512": "avx512"}[
            torch.backends.cpu.get_cpu_capability()
        ]
        assert level in available
