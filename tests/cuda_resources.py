"""What ptxas says of kernels: registers, spills and static shared memory of every instantiation of a source file."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
REGISTERS = 255  # that a thread can address
REGISTER_FILE = 65536  # of an SM


@dataclass(frozen=True)
class Resources:
    kernel: str  # with its template arguments
    registers: int
    spilled_bytes: int
    shared_bytes: int  # static


def compile_kernels(source: Path, arch: str, cubin: Path) -> list[Resources]:
    """Compiles `source` for `arch` (such as "sm_90a") to `cubin`."""
    options = ["-std=c++20", "-O3", f"-arch={arch}", "-I", str(CSRC), "-I", str(CSRC / "cuda"), "-Xptxas", "-v"]
    done = subprocess.run(
        ["nvcc", "-cubin", *options, "-o", str(cubin), str(source)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return parse(done.stderr)


def parse(report: str) -> list[Resources]:
    """Every kernel of a report of `ptxas -v`."""
    plain = subprocess.run(["c++filt"], input=report, capture_output=True, text=True, check=True).stdout
    kernels = []
    for part in plain.split("Compiling entry function '")[1:]:
        numbers = {
            name: sum(int(n) for n in re.findall(pattern, part))
            for name, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("spilled_bytes", r"(\d+) bytes spill (?:stores|loads)"),
                ("shared_bytes", r"(\d+) bytes smem"),
            )
        }
        assert numbers["registers"] > 0, part
        kernels.append(Resources(part[: part.index("'")], **numbers))
    return kernels
