"""What ptxas says of kernels: registers, spills and static shared memory of every instantiation of a source file."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
BUILD = CSRC.parent / "build" / "ptxas"
REGISTERS = 255  # that a thread can address
REGISTER_FILE = 65536  # of an SM
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90a": 227 << 10, "sm_100a": 227 << 10}  # that a block can ask for


@dataclass(frozen=True)
class Resources:
    kernel: str  # with its template arguments
    registers: int
    spilled_bytes: int
    shared_bytes: int  # static


def compile_kernels(source: Path, arch: str) -> list[Resources]:
    """Compiles `source` for `arch` (such as "sm_90a"); the report is kept in build/ until something it read changes."""
    options = ["-std=c++20", "-O3", f"-arch={arch}", "-Xptxas", "-v"]
    digest = hashlib.sha256(" ".join(options).encode())
    for file in (source, *sorted(CSRC.glob("c*/*.*h")), *sorted(CSRC.glob("c*/*.h"))):
        digest.update(file.read_bytes())
    report = BUILD / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}.txt"
    if not report.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            cubin = Path(folder) / "kernels.cubin"
            command = ["nvcc", "-cubin", *options, "-o", str(cubin), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
            partial = Path(folder) / report.name
            partial.write_text(done.stderr)
            partial.rename(report)
    return parse(report.read_text())


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
