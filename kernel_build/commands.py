"""The commands that compile and link each library."""

import os
import shlex
import subprocess
from collections.abc import Callable
from typing import NamedTuple

from .architectures import BUILD_LIST, code_flags
from .find import Toolkit, Torch
from .sources import CPU_SOURCES, CUDA_HOST_SOURCES, CUDA_KERNEL_SOURCES, EMULATOR_SOURCES, Source

FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc"]
FLAGS += ["-Wno-maybe-uninitialized"]  # gcc's own AVX-512 intrinsics set it off
FLAGS += ["-DTORCH_TARGET_VERSION=0x020B000000000000ULL"]  # 2.11, the oldest torch: newer functions don't compile
_SANITIZE = os.environ.get("RNNFAST_SANITIZE")
if _SANITIZE or os.environ.get("RNNFAST_DEBUG") == "1":
    FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
if _SANITIZE:
    FLAGS += [f"-fsanitize={_SANITIZE}", "-fno-sanitize-recover=all"]
# No relaxed arithmetic: parity is the point. For a profiler: NVCC_APPEND_FLAGS=-lineinfo, which triples the library.
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc"]
# No contraction: emulated kernels round as the device does where they say fmaf, and nowhere else.
EMULATOR_FLAGS = ["-DRNNFAST_EMULATOR", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]


class Commands(NamedTuple):
    """How to make one library."""

    compile: dict[Source, list[str]]
    """The compiler and its flags for each object file, without input and output."""
    link: list[str]
    """What the linker needs beside the object files."""


def cpu_commands(compiler: list[str], torch: Torch, toolkit: None) -> Commands:
    """Of _C."""
    machine = subprocess.check_output([*compiler, "-dumpmachine"], text=True).split("-")[0]
    command = [*compiler, *_host_flags(torch), "-fopenmp"]
    sources = [source for source in CPU_SOURCES if source.machine in (None, machine)]
    return Commands({source: [*command, *source.flags] for source in sources}, ["-fopenmp", "-ltorch_cpu"])


def cuda_commands(compiler: list[str], torch: Torch, toolkit: Toolkit) -> Commands:
    """Of _C_cuda. Its CUDA runtime is linked statically: torch's own may be of another minor version."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or BUILD_LIST
    host = [*compiler, *_host_flags(torch), "-DUSE_CUDA", "-isystem", f"{toolkit.root}/include"]
    device = [toolkit.nvcc, "-ccbin", compiler[0], *NVCC_FLAGS]
    commands = {source: host for source in CUDA_HOST_SOURCES}
    commands |= {source: [*device, *source.flags, *code_flags(listed, source.ptx)] for source in CUDA_KERNEL_SOURCES}
    runtime = [f"-L{toolkit.root}/lib64", "-lcudart_static", "-Wl,--exclude-libs,libcudart_static.a"]
    return Commands(commands, ["-ltorch_cpu", "-ltorch_cuda", *runtime, "-lpthread", "-ldl", "-lrt"])


def emulator_commands(compiler: list[str], torch: Torch, toolkit: None) -> Commands:
    """Of _C_emulator. It is a test tool: compiled quickly, and uninitialised locals have a pattern."""
    flags = [*_host_flags(torch), *EMULATOR_FLAGS, "-O1", "-g1"]
    kernels = [*compiler, *flags, "-ftrivial-auto-var-init=pattern", "-x", "c++"]
    runtime = [flag for flag in flags if flag != "-fsanitize=thread"]  # the race detector must not see the fibers
    commands = {source: [*compiler, *flags] for source in CUDA_HOST_SOURCES}
    commands |= {source: [*kernels, *source.flags] for source in CUDA_KERNEL_SOURCES}
    commands |= {source: [*compiler, *runtime, "-O2"] for source in EMULATOR_SOURCES}
    return Commands(commands, ["-ltorch_cpu"])


def link_command(compiler: list[str], torch: Torch, objects: list[str], library: str, needed: list[str]) -> list[str]:
    """Links a library. `needed`: Commands.link."""
    own, folders = shlex.split(os.environ.get("CXXFLAGS", "")), shlex.split(os.environ.get("LDFLAGS", ""))
    # libtorch_cpu must be named: Python loads torch privately, so nothing is found that is not a dependency.
    return [*compiler, *FLAGS, *own, "-shared", *objects, "-o", library, *folders, f"-L{torch.root}/lib", *needed]


def _host_flags(torch: Torch) -> list[str]:
    return [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), "-isystem", f"{torch.root}/include"]


COMMANDS: dict[str, Callable[..., Commands]] = {
    "rnnfast._C": cpu_commands,
    "rnnfast._C_cuda": cuda_commands,
    "rnnfast._C_emulator": emulator_commands,
}
