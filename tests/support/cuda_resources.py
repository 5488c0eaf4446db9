"""What nvcc makes of a source file of csrc/cuda: machine code, and what ptxas says of every kernel in it.

As in the shipped library, PTX is made once and serves all architectures (kernel_build/sources.py).
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from emulator import build

from kernel_build.architectures import ARCHITECTURES, RESOURCE_TESTS, newest_ptx
from kernel_build.sources import Source

CSRC = build.CSRC
BUILD = build.ROOT / "build" / "ptxas"
REGISTERS = 255  # that a thread can address
REGISTER_FILE = 65536  # of an SM
SHARED_BYTES = {f"sm_{sm}": ARCHITECTURES[sm].shared_bytes for sm in RESOURCE_TESTS}


@dataclass(frozen=True)
class Resources:
    kernel: str  # with its template arguments
    registers: int
    spilled_bytes: int
    shared_bytes: int  # static


def compile_kernels(source: Source, arch: str) -> list[Resources]:
    """The kernels of `source` for `arch` (such as "sm_90"), without a GPU."""
    cubin = machine_code(source, arch)
    return parse(cubin.with_name(f"{cubin.name}.log").read_text())


def machine_code(source: Source, arch: str) -> Path:
    """The cubin; it is kept in build/, with the report of ptxas, until something that it came from changes."""
    version, path = newest_ptx(source.ptx, int(arch.removeprefix("sm_"))), build.ROOT / source.path
    options = ["-ptx", "-std=c++20", "-O3", f"-I{CSRC}", *source.flags, f"-arch=compute_{version}"]
    inputs = [path, *CSRC.glob("common/*.h"), *(CSRC / "cuda").rglob("*.*h")]
    name = f"{path.parent.name}{source.suffix}-{build.digest(inputs, options)}"
    ptx = build.made(BUILD / f"{name}.ptx", ["nvcc", *options, str(path)])
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
