"""Builds the shared libraries rnnfast/_C.so and rnnfast/_C_cuda.so; everything else is in pyproject.toml.

They use LibTorch's stable ABI and no Python ABI: one file serves every torch >= 2.11 and every Python.

    torch                                   nvcc                        result
    not importable, or RNNFAST_BUILD=0      any                         pure Python, with a notice
    without CUDA                            any                         _C
    with CUDA                               none, or of another major   _C, with a notice that names both versions
    with CUDA                               of the same major           _C and _C_cuda

Whether a GPU is there does not matter. From the environment:
  RNNFAST_BUILD     0: no library, pure Python. 1: fail if _C cannot be built. Unset: build it, or say loudly why not.
  RNNFAST_CUDA      0: no _C_cuda. 1: fail if it cannot be built. auto, unset: by the table.
  RNNFAST_EMULATOR  1: builds rnnfast/_C_emulator.so and nothing else: _C_cuda's source for the CPU (tests/emulator).
  RNNFAST_DEBUG     1: -O1 -g and the standard library's assertions.
  RNNFAST_SANITIZE  what -fsanitize= takes, "address,undefined" say; the build is a debug build then.
  TORCH_CUDA_ARCH_LIST   as torch's: "8.0;9.0a+PTX". CUDA_HOME: the toolkit, else the one of the nvcc on the PATH.
  MAX_JOBS          how many files to compile at a time (default: one per core).   CXX, CXXFLAGS, LDFLAGS: as usual.
"""

import glob
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"building rnnfast needs setuptools >= 77.0.3, this is {setuptools.__version__}")
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# File -> (machines that it is for, or None for all; its own flags). The files without flags come first: where several
# files carry the same inline function the linker keeps the first, which must run on every machine.
CPU_SOURCES = {
    "csrc/cpu/ops_cpu.cpp": (None, []),
    "csrc/cpu/layers.cpp": (None, []),
    "csrc/cpu/dispatch.cpp": (None, []),
    "csrc/cpu/isa_base.cpp": (None, []),
    "csrc/cpu/isa_neon.cpp": ("aarch64", []),
    "csrc/cpu/isa_avx2.cpp": ("x86_64", AVX2),
    "csrc/cpu/isa_avx512.cpp": ("x86_64", AVX512),
    "csrc/cpu/isa_avx512_bf16.cpp": ("x86_64", [*AVX512, "-mavx512bf16"]),
}
# Host code sees torch, kernels do not. Kernels: the architectures from which on their PTX differs. It is made once for
# each of them, which takes two thirds of the time for one architecture, and machine code from it for all in the list:
# with as many registers as from PTX of the architecture's own (all kernels of inst_cta_bf16_*, sm_90).
# Where that spills, which the tests' resources tell, a file has PTX of the architecture's own too.
CUDA_HOST_SOURCES = ["ops_cuda", "host", "forward", "backward"]
CUDA_SOURCES = {
    "csrc/cuda/around.cu": (75,),
    "csrc/cuda/resident.cu": (80,),
    **{
        f"csrc/cuda/inst_{tier}_{p}_{way}.cu": versions
        for tier, versions in (("cta", (80,)), ("cluster", (90,)), ("group", (80,)))
        for p in ("exact", "f16", "bf16", "tf32")
        for way in ("fwd", "bwd")
    },
    "csrc/cuda/inst_step_f32.cu": (75, 80),
    "csrc/cuda/inst_step_f16.cu": (75, 80),
    "csrc/cuda/inst_step_bf16.cu": (80,),
    "csrc/cuda/inst_step_tf32.cu": (80, 100),  # machine code of sm_100 from PTX of 80 spills
}
EMULATOR_RUNTIME = ["fiber", "schedule", "runtime", "memory", "warp"]
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"  # no "a": code of 10.0a does not run on 10.3

FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-maybe-uninitialized"]  # gcc's own AVX-512 intrinsics set it off
FLAGS += ["-DTORCH_TARGET_VERSION=0x020B000000000000ULL"]  # 2.11, the oldest torch: newer functions don't compile
SANITIZE = os.environ.get("RNNFAST_SANITIZE")
if SANITIZE or os.environ.get("RNNFAST_DEBUG") == "1":
    FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
# No relaxed arithmetic: parity is the point. For a profiler: NVCC_APPEND_FLAGS=-lineinfo, which triples the library.
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# No contraction: emulated kernels round as the device does where they say fmaf, and nowhere else.
EMULATOR_FLAGS = ["-DRNNFAST_EMULATOR", "-Itests", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
BUILD = os.environ.get("RNNFAST_BUILD", "auto")
CUDA = os.environ.get("RNNFAST_CUDA", "auto")
EMULATOR = os.environ.get("RNNFAST_EMULATOR") == "1"
TORCH = "torch>=2.11"


def notice(what: str, reason: str) -> None:
    print("*" * 100, f"rnnfast: no {what} kernels in this build: {reason}", "*" * 100, sep="\n", file=sys.stderr)


class Torch(NamedTuple):
    root: Path
    cuda: str | None  # the version of CUDA that it was built with


def find_torch() -> Torch | None:
    """A torch >= 2.11 to build against, or None.

    pip's build isolation hides the torch that the user has, and naming torch in build-system.requires would download
    another one, on Linux gigabytes of CUDA, to read some headers. The stable ABI makes every torch >= 2.11 the right
    one, so take the hidden one from its folder; only where there is none does a front end fetch one (setup_requires).
    """
    spec = importlib.util.find_spec("torch")
    folders = spec.submodule_search_locations if spec else None
    hidden = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    for root in map(Path, folders or [f"{folder}/torch" for folder in hidden]):
        if (root / "version.py").exists() and (root / "include").exists():
            version = runpy.run_path(str(root / "version.py"))
            if tuple(map(int, version["__version__"].split(".")[:2])) >= (2, 11):
                return Torch(root, version.get("cuda"))
    return None


class Toolkit(NamedTuple):
    nvcc: str
    version: str
    root: Path


def find_toolkit() -> Toolkit | None:
    """The CUDA toolkit of CUDA_HOME or of the nvcc on the PATH, which may be a script that calls the real one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        return None
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    version, top = re.search(r"release (\d+\.\d+)", told), re.search(r"^#\$ TOP=(.*)$", plan.stderr, re.MULTILINE)
    return Toolkit(nvcc, version[1], Path(top[1]).resolve()) if version and top else None


def cuda_missing(torch: Torch | None, toolkit: Toolkit | None) -> str | None:
    """Why _C_cuda cannot be built, or None."""
    if torch is None:
        return f"there is no {TORCH} to build against"
    if torch.cuda is None:
        return "this torch was built without CUDA"
    if toolkit is None:
        return f"nvcc was not found (torch has CUDA {torch.cuda}); put it on the PATH or set CUDA_HOME"
    if toolkit.version.split(".")[0] != torch.cuda.split(".")[0]:
        return f"nvcc is of CUDA {toolkit.version}, torch of CUDA {torch.cuda}; the major versions must be the same"
    return None


def architecture_flags(listed: str, versions: tuple[int, ...]) -> list[str]:
    """nvcc's -gencode flags for a list like torch's, without what is older than all of a file's versions of PTX."""
    flags = []
    for name in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 12.0+PTX, got {name!r}")
        number = match[1] + match[2]
        version = max((v for v in versions if v <= int(number)), default=None)
        if version is None:
            continue
        flags += [f"-gencode=arch=compute_{version},code=sm_{number}{match[3]}"]
        if match[4]:
            flags += [f"-gencode=arch=compute_{version},code=compute_{version}"]
    # A list of older devices only: the plan never chooses such a kernel there, but the linker wants it.
    return flags or [f"-gencode=arch=compute_{versions[0]},code=sm_{versions[0]}"]


class BuildLibrary(build_ext):
    """Compiles each file with its own flags, which setuptools and torch's BuildExtension cannot do."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            self.compile_and_link(ext, library)
        except (OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            if ext.optional:
                notice("CUDA" if ext.name.endswith("cuda") else "compiled", str(error))
            raise CompileError(str(error)) from error

    def compile_and_link(self, ext: Extension, library: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        commands, libraries = COMMANDS[ext.name](compiler)
        newest_header = max(map(os.path.getmtime, ext.depends), default=0.0)

        def compiled(source: str) -> str:
            """The object file, made anew when what lies beside it, its command and the age of its sources, changed."""
            target = Path(self.build_temp, ext.name, source).with_suffix(".o")
            command = [*commands[source], "-c", source, "-o", str(target)]
            record = target.with_suffix(".command")
            text = f"{shlex.join(command)}\n{max(newest_header, os.path.getmtime(source))}\n"
            if not record.exists() or record.read_text() != text:
                target.parent.mkdir(parents=True, exist_ok=True)
                record.unlink(missing_ok=True)
                print("compiling", source, flush=True)
                subprocess.run(command, check=True)
                record.write_text(text)
            return str(target)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compiled, commands))
        link = [
            *compiler,
            *FLAGS,
            *shlex.split(os.environ.get("CXXFLAGS", "")),
            "-shared",
            *objects,
            "-o",
            str(library),
        ]
        # libtorch_cpu must be named: Python loads torch privately, so nothing is found that is not a dependency.
        link += [*shlex.split(os.environ.get("LDFLAGS", "")), f"-L{TORCH_FOUND.root}/lib", *libraries]
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # never write into a file that a running program has mapped
        print("linking", library, flush=True)
        subprocess.run(link, check=True)


def host_flags() -> list[str]:
    return [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), "-isystem", f"{TORCH_FOUND.root}/include"]


def cpu_commands(compiler: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """How to compile each file of _C, and what to link it with."""
    machine = subprocess.check_output([*compiler, "-dumpmachine"], text=True).split("-")[0]
    commands = {
        source: [*compiler, *host_flags(), "-fopenmp", *own]
        for source, (only, own) in CPU_SOURCES.items()
        if only in (None, machine)
    }
    return commands, ["-fopenmp", "-ltorch_cpu"]


def cuda_commands(compiler: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The same of _C_cuda. Its runtime is linked statically: torch's own may be of another minor version."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    host = [*compiler, *host_flags(), "-DUSE_CUDA", "-isystem", f"{TOOLKIT.root}/include"]
    device = [TOOLKIT.nvcc, "-ccbin", compiler[0], *NVCC_FLAGS]
    commands = {f"csrc/cuda/{name}.cpp": host for name in CUDA_HOST_SOURCES}
    commands |= {name: [*device, *architecture_flags(listed, versions)] for name, versions in CUDA_SOURCES.items()}
    runtime = [f"-L{TOOLKIT.root}/lib64", "-lcudart_static", "-Wl,--exclude-libs,libcudart_static.a"]
    return commands, ["-ltorch_cpu", "-ltorch_cuda", *runtime, "-lpthread", "-ldl", "-lrt"]


def emulator_commands(compiler: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The same of _C_emulator: a test tool, so it is compiled quickly and finds uninitialised locals."""
    flags = [*host_flags(), *EMULATOR_FLAGS, "-O1", "-g1"]
    kernels = [*flags, "-ftrivial-auto-var-init=pattern", "-x", "c++"]
    runtime = [flag for flag in flags if flag != "-fsanitize=thread"]  # not what the race detector shall look at
    commands = {f"csrc/cuda/{name}.cpp": [*compiler, *flags] for name in CUDA_HOST_SOURCES}
    commands |= {name: [*compiler, *kernels] for name in CUDA_SOURCES}
    commands |= {f"tests/emulator/{name}.cpp": [*compiler, *runtime, "-O2", "-Icsrc"] for name in EMULATOR_RUNTIME}
    return commands, ["-ltorch_cpu"]


class PlatformWheel(bdist_wheel):
    """Any Python, one platform: py3-none-linux_x86_64 (py3-none-any without the library)."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def headers(*folders: str) -> list[str]:
    return sorted(path for folder in folders for path in glob.glob(f"{folder}/*.*h"))


COMMANDS = {"rnnfast._C": cpu_commands, "rnnfast._C_cuda": cuda_commands, "rnnfast._C_emulator": emulator_commands}
TORCH_FOUND = find_torch() if BUILD != "0" else None
TOOLKIT = find_toolkit() if TORCH_FOUND and TORCH_FOUND.cuda and CUDA != "0" else None
EXTENSIONS = []
if BUILD == "0":
    notice("compiled", "RNNFAST_BUILD=0")
elif TORCH_FOUND is None:
    notice("compiled", f"there is no {TORCH} to build against")
    if BUILD == "1" and "egg_info" not in sys.argv:
        sys.exit("RNNFAST_BUILD=1, but the compiled kernels cannot be built")
elif EMULATOR:
    sources = [f"csrc/cuda/{name}.cpp" for name in CUDA_HOST_SOURCES] + list(CUDA_SOURCES)
    depends = headers("csrc/common", "csrc/cuda", "tests/emulator")
    EXTENSIONS = [Extension("rnnfast._C_emulator", sources, depends=depends)]
else:
    depends = headers("csrc/common", "csrc/cpu")
    EXTENSIONS = [Extension("rnnfast._C", list(CPU_SOURCES), depends=depends, optional=BUILD != "1")]
if CUDA != "0" and not EMULATOR:
    reason = "RNNFAST_BUILD=0" if BUILD == "0" else cuda_missing(TORCH_FOUND, TOOLKIT)
    if reason is None:
        sources = [f"csrc/cuda/{name}.cpp" for name in CUDA_HOST_SOURCES] + list(CUDA_SOURCES)
        depends = headers("csrc/common", "csrc/cuda")
        EXTENSIONS += [Extension("rnnfast._C_cuda", sources, depends=depends, optional=CUDA != "1")]
    elif CUDA == "1" and "egg_info" not in sys.argv:
        sys.exit(f"RNNFAST_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    elif TORCH_FOUND and TORCH_FOUND.cuda:
        notice("CUDA", reason)

setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    # "egg_info" is how a front end asks what to put into an isolated environment; nothing else may start a download.
    setup_requires=[TORCH] if TORCH_FOUND is None and BUILD != "0" and "egg_info" in sys.argv else [],
)
