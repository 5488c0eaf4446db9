"""setup.py's table: which libraries are built with which torch and nvcc, and what is said where one is not.

Compilers, toolkit and torch are stand-ins that write their commands down; nothing here needs a GPU or CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in
  *-dumpmachine*) echo x86_64-linux-gnu; exit 0 ;;
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.88"; exit 0 ;;
  *--dryrun*) echo '#$ TOP={toolkit}/bin/..' >&2; exit 0 ;;
esac
{fails}
while [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done
: > "$out"
"""


class Build(NamedTuple):
    ok: bool
    libraries: set[str]  # in the wheel
    wheel: str
    output: str
    compiled: list[str]  # the commands of c++
    device: list[str]  # those of nvcc


class Machine:
    """A source tree beside a torch, a C++ compiler and, where asked for, an nvcc."""

    def __init__(self, folder: Path):
        self.folder, self.tree = folder, folder / "tree"
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            self.write(self.tree / name, (ROOT / name).read_text())
        shutil.copytree(ROOT / "rnnfast", self.tree / "rnnfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        shutil.copytree(ROOT / "kernel_build", self.tree / "kernel_build")
        shutil.copytree(ROOT / "csrc", self.tree / "csrc")
        (folder / "bin").mkdir()
        for tool in ("sh", "uname"):
            (folder / "bin" / tool).symlink_to(shutil.which(tool))
        self.compiler("c++")

    def write(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def compiler(self, name: str, version: str = "", toolkit: Path | str = "", fails: str = "") -> None:
        path = self.folder / "bin" / name
        text = COMPILER.format(log=self.folder / f"{name}.log", version=version, toolkit=toolkit, fails=fails)
        self.write(path, text).chmod(0o755)

    def torch(self, version: str, cuda: str | None) -> None:
        root = self.folder / "packages" / "torch"
        self.write(root / "version.py", f"__version__ = {version!r}\ncuda = {cuda!r}\n")
        self.write(root / "__init__.py", "")
        (root / "include").mkdir(exist_ok=True)

    def nvcc(self, version: str, fails: str = "") -> None:
        """A toolkit elsewhere, and on the PATH only a script that calls its nvcc."""
        self.compiler("nvcc", version, self.folder / "cuda-real", fails)

    def log(self, name: str) -> list[str]:
        path = self.folder / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []

    def build(self, **environment: str) -> Build:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RNNFAST_", "CUDA", "TORCH"))}
        kept |= {"PATH": str(self.folder / "bin"), "PYTHONPATH": str(self.folder / "packages"), "CXX": "c++"}
        for name in ("c++", "nvcc"):
            (self.folder / f"{name}.log").unlink(missing_ok=True)
        shutil.rmtree(self.tree / "dist", ignore_errors=True)
        command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
        done = subprocess.run(command, cwd=self.tree, env=kept | environment, capture_output=True, text=True)
        wheels = list(self.tree.glob("dist/*.whl")) if done.returncode == 0 else []
        names = zipfile.ZipFile(wheels[0]).namelist() if wheels else []
        libraries = {Path(name).name for name in names if name.endswith(".so")}
        output = done.stdout + done.stderr
        return Build(
            bool(wheels), libraries, wheels[0].name if wheels else "", output, self.log("c++"), self.log("nvcc")
        )


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_no_torch(machine):
    machine.torch("2.10.1", "13.0")  # older than what the headers need, so as good as none
    machine.nvcc("13.0")
    built = machine.build()
    assert built.ok and built.libraries == set() and built.wheel.endswith("-py3-none-any.whl")
    assert "there is no torch>=2.11 to build against" in built.output
    built = machine.build(RNNFAST_CUDA="1")
    assert not built.ok
    assert "RNNFAST_CUDA=1, but the CUDA kernels cannot be built: there is no torch>=2.11" in built.output


def test_torch_without_cuda(machine):
    machine.torch("2.13.0+cpu", None)
    machine.nvcc("13.0")
    built = machine.build()
    assert built.ok and built.libraries == {"_C.so"} and "CUDA" not in built.output, built.output
    assert built.device == []
    built = machine.build(RNNFAST_CUDA="1")
    assert not built.ok and "cannot be built: this torch was built without CUDA" in built.output


@pytest.mark.quick(0)
def test_torch_with_cuda_but_no_nvcc(machine):
    machine.torch("2.14.1", "13.0")
    built = machine.build()
    assert built.ok and built.libraries == {"_C.so"}, built.output
    assert "rnnfast: no CUDA kernels in this build: nvcc was not found (torch has CUDA 13.0)" in built.output
    built = machine.build(RNNFAST_CUDA="1")
    assert not built.ok and "nvcc was not found" in built.output
    built = machine.build(RNNFAST_CUDA="0")
    assert built.ok and built.libraries == {"_C.so"} and "CUDA" not in built.output


@pytest.mark.quick(0)
def test_nvcc_of_another_major_version(machine):
    machine.torch("2.14.1", "13.0")
    machine.nvcc("12.8")
    built = machine.build()
    assert built.ok and built.libraries == {"_C.so"}, built.output
    assert "nvcc is of CUDA 12.8, torch of CUDA 13.0" in built.output
    built = machine.build(RNNFAST_CUDA="1")
    assert not built.ok and "nvcc is of CUDA 12.8, torch of CUDA 13.0" in built.output


def test_nvcc_of_the_same_major_version(machine):
    machine.torch("2.14.1", "13.0")
    machine.nvcc("13.2")
    built = machine.build()
    assert built.ok and built.libraries == {"_C.so", "_C_cuda.so"}, built.output
    assert re.fullmatch(r"rnnfast-[\w.]+-py3-none-linux_\w+\.whl", built.wheel)
    assert "no CUDA kernels" not in built.output
    machine.build(RNNFAST_CUDA="0")
    assert machine.log("nvcc") == []


def test_commands_of_the_cuda_library(machine):
    machine.torch("2.14.1", "13.0")
    machine.nvcc("13.0")
    built = machine.build()
    toolkit = machine.folder / "cuda-real"
    kernels = [line for line in built.device if " -c " in line and "/dev/null" not in line]
    assert kernels and all("-ccbin c++" in line and "fast_math" not in line for line in kernels)
    newer = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_80")
    for name, expected in (
        ("instance-exact.o", {("75", "sm_75"), *(("80", code) for code in newer)}),
        ("instance-bf16.o", {("80", code) for code in newer}),
        ("group/instance-f16-forward.o", {("80", code) for code in newer}),
        ("cluster/instance-f16-forward.o", {("90", code) for code in ("sm_90", "sm_100", "sm_120", "compute_90")}),
    ):
        line = next(line for line in kernels if name in line)
        assert set(re.findall(r"-gencode=arch=compute_(\w+),code=(\w+)", line)) == expected
    host = [line for line in built.compiled if "csrc/cuda/host/ops_cuda.cpp" in line]
    assert host and "-DUSE_CUDA" in host[0] and "-DTORCH_TARGET_VERSION=0x020B000000000000ULL" in host[0]
    assert f"-isystem {toolkit}/include" in host[0]
    link = next(line for line in built.compiled if "-shared" in line and "_C_cuda.so" in line)
    assert "-ltorch_cuda" in link and "-ltorch_cpu" in link
    assert f"-L{toolkit}/lib64 -lcudart_static" in link and "-lcudart " not in link
    link = next(line for line in built.compiled if "-shared" in line and "_C.so" in line)
    assert "cuda" not in link.replace(str(machine.folder), "")


def test_the_toolkit_of_cuda_home_comes_first(machine):
    machine.torch("2.14.1", "13.0")
    machine.nvcc("12.8")
    (machine.folder / "home").mkdir()
    machine.compiler("other-nvcc", "13.0", machine.folder / "home")
    (machine.folder / "home" / "bin").mkdir()
    (machine.folder / "bin" / "other-nvcc").rename(machine.folder / "home" / "bin" / "nvcc")
    built = machine.build(CUDA_HOME=str(machine.folder / "home"))
    assert built.libraries == {"_C.so", "_C_cuda.so"}, built.output


def test_list_of_architectures(machine):
    machine.torch("2.14.1", "13.0")
    machine.nvcc("13.0")
    built = machine.build(TORCH_CUDA_ARCH_LIST="7.5 9.0a+PTX")
    kernels = [line for line in built.device if "tiers/step" in line]
    assert built.ok and kernels
    for line in kernels:
        assert set(re.findall(r",code=(\w+)", line)) - {"sm_75"} == {"sm_90a", "compute_80"}
    built = machine.build(TORCH_CUDA_ARCH_LIST="7.5")
    bf16 = next(line for line in built.device if "instance-bf16.o" in line)
    assert re.findall(r",code=(\w+)", bf16) == ["sm_80"]  # never run there, but linked
    built = machine.build(TORCH_CUDA_ARCH_LIST="Hopper", RNNFAST_CUDA="1")
    assert not built.ok and "expected entries like 8.0, 9.0a or 12.0+PTX, got 'Hopper'" in built.output


@pytest.mark.quick(0)
def test_kernels_that_do_not_compile(machine):
    machine.torch("2.14.1", "13.0")
    machine.nvcc("13.0", fails="echo broken >&2; exit 1")
    built = machine.build()
    assert built.ok and built.libraries == {"_C.so"}, built.output
    assert "rnnfast: no CUDA kernels in this build: Command" in built.output
    assert not machine.build(RNNFAST_CUDA="1").ok


def test_nothing_is_built_when_told_so(machine):
    machine.torch("2.14.1", "13.0")
    machine.nvcc("13.0")
    built = machine.build(RNNFAST_BUILD="0")
    assert built.ok and built.libraries == set() and built.device == []
    built = machine.build(RNNFAST_BUILD="0", RNNFAST_CUDA="1")
    assert not built.ok and "the CUDA kernels cannot be built: RNNFAST_BUILD=0" in built.output


@pytest.mark.quick(0)
def test_the_emulator_is_no_part_of_a_wheel(machine):
    machine.torch("2.13.0+cpu", None)
    built = machine.build()
    assert built.libraries == {"_C.so"}
    emulated = machine.build(RNNFAST_EMULATOR="1")
    assert not any("csrc/cpu/" in line for line in emulated.compiled), emulated.output
    kernels = [line for line in emulated.compiled if "instance-bf16.o" in line]
    assert kernels and "-DRNNFAST_EMULATOR" in kernels[0] and "-x c++" in kernels[0]
