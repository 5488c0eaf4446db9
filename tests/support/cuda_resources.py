"""What nvcc makes of a source file of csrc/cuda: machine code, and what ptxas says of every kernel in it.

As in the shipped library, PTX is made once and serves all architectures (CUDA_SOURCES in setup.py).
"""

from __future__ import annotations

import ast
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from emulator import build

CSRC = Path(__file__).parents[2] / "csrc"
BUILD = CSRC.parent / "build" / "ptxas"
REGISTERS = 255  # that a thread can address
REGISTER_FILE = 65536  # of an SM
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # that a block can ask for


def versions_of_ptx() -> dict[str, tuple[int, ...]]:
    """CUDA_SOURCES of setup.py, which cannot be imported without running it."""
    for statement in ast.parse((CSRC.parent / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "CUDA_SOURCES":
            return eval(compile(ast.Expression(statement.value), "setup.py", "eval"))
    raise LookupError("setup.py has no CUDA_SOURCES")


VERSIONS = versions_of_ptx()


@dataclass(frozen=True)
class Resources:
    kernel: str  # with its template arguments
    registers: int
    spilled_bytes: int
    shared_bytes: int  # static


def compile_kernels(source: Path, arch: str) -> list[Resources]:
    """The kernels of `source` for `arch` (such as "sm_90"), without a GPU."""
    cubin = machine_code(source, arch)
    return parse(cubin.with_name(f"{cubin.name}.log").read_text())


def machine_code(source: Path, arch: str) -> Path:
    """The cubin; it is kept in build/, with the report of ptxas, until something that it came from changes."""
    version = max(v for v in VERSIONS[f"csrc/cuda/{source.name}"] if v <= int(arch.removeprefix("sm_")))
    options = ["-ptx", "-std=c++20", "-O3", f"-arch=compute_{version}"]
    inputs = [source, *CSRC.glob("common/*.h"), *CSRC.glob("cuda/*.*h")]
    name = f"{source.stem}-{build.digest(inputs, options)}"
    ptx = build.made(BUILD / f"{name}.ptx", ["nvcc", *options, str(source)])
    return build.made(BUILD / f"{name}-{arch}.cubin", ["nvcc", "-cubin", f"-arch={arch}", "-Xptxas", "-v", str(ptx)])


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
