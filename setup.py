"""Builds the shared library rnnfast/_C.so; everything else about the package is in pyproject.toml.

The library uses LibTorch's stable ABI and no Python ABI: one file serves every torch >= 2.11 and every Python.
From the environment:
  RNNFAST_BUILD     0: no library, pure Python. 1: fail if it cannot be built. Unset: build it, or say loudly why not.
  RNNFAST_DEBUG     1: -O1 -g and the standard library's assertions.
  RNNFAST_SANITIZE  what -fsanitize= takes, "address,undefined" say; the build is a debug build then.
  MAX_JOBS          how many files to compile at a time (default: one per core).   CXX, CXXFLAGS, LDFLAGS: as usual.
"""

import glob
import importlib.util
import os
import runpy
import shlex
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
SOURCES = {
    "csrc/cpu/ops_cpu.cpp": (None, []),
    "csrc/cpu/layers.cpp": (None, []),
    "csrc/cpu/dispatch.cpp": (None, []),
    "csrc/cpu/isa_base.cpp": (None, []),
    "csrc/cpu/isa_neon.cpp": ("aarch64", []),
    "csrc/cpu/isa_avx2.cpp": ("x86_64", AVX2),
    "csrc/cpu/isa_avx512.cpp": ("x86_64", AVX512),
    "csrc/cpu/isa_avx512_bf16.cpp": ("x86_64", [*AVX512, "-mavx512bf16"]),
}
HEADERS = sorted(glob.glob("csrc/*/*.h"))
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-maybe-uninitialized"]  # gcc's own AVX-512 intrinsics set it off
FLAGS += ["-DTORCH_TARGET_VERSION=0x020B000000000000ULL"]  # 2.11, the oldest torch: newer functions don't compile
SANITIZE = os.environ.get("RNNFAST_SANITIZE")
if SANITIZE or os.environ.get("RNNFAST_DEBUG") == "1":
    FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
BUILD = os.environ.get("RNNFAST_BUILD", "auto")
TORCH = "torch>=2.11"


def notice(reason: str) -> None:
    print("*" * 100, f"rnnfast: no compiled kernels in this build: {reason}", "*" * 100, sep="\n", file=sys.stderr)


def find_torch() -> Path | None:
    """The folder of a torch >= 2.11 to build against, or None.

    pip's build isolation hides the torch that the user has, and naming torch in build-system.requires would download
    another one, on Linux gigabytes of CUDA, to read some headers. The stable ABI makes every torch >= 2.11 the right
    one, so take the hidden one from its folder; only where there is none does a front end fetch one (setup_requires).
    """
    spec = importlib.util.find_spec("torch")
    folders = spec.submodule_search_locations if spec else None
    hidden = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    for root in map(Path, folders or [f"{folder}/torch" for folder in hidden]):
        if (root / "version.py").exists() and (root / "include").exists():
            version = runpy.run_path(str(root / "version.py"))["__version__"]
            if tuple(map(int, version.split(".")[:2])) >= (2, 11):
                return root
    return None


class BuildLibrary(build_ext):
    """Compiles each file with its own flags, which setuptools and torch's BuildExtension cannot do."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            self.compile_and_link(library)
        except (OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            if ext.optional:
                notice(str(error))
            raise CompileError(str(error)) from error

    def compile_and_link(self, library: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        machine = subprocess.check_output([*compiler, "-dumpmachine"], text=True).split("-")[0]
        newest_header = max(map(os.path.getmtime, HEADERS), default=0.0)
        flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), "-isystem", f"{TORCH_ROOT}/include"]

        def compiled(source: str) -> str:
            """The object file, made anew when what lies beside it, its command and the age of its sources, changed."""
            target = Path(self.build_temp, source).with_suffix(".o")
            command = [*compiler, *flags, *SOURCES[source][1], "-c", source, "-o", str(target)]
            record = target.with_suffix(".command")
            text = f"{shlex.join(command)}\n{max(newest_header, os.path.getmtime(source))}\n"
            if not record.exists() or record.read_text() != text:
                target.parent.mkdir(parents=True, exist_ok=True)
                record.unlink(missing_ok=True)
                print("compiling", source, *SOURCES[source][1], flush=True)
                subprocess.run(command, check=True)
                record.write_text(text)
            return str(target)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compiled, [s for s, (only, _) in SOURCES.items() if only in (None, machine)]))
        link = [*compiler, *flags, "-shared", *objects, "-o", str(library)]
        # libtorch_cpu must be named: Python loads torch privately, so nothing is found that is not a dependency.
        link += [*shlex.split(os.environ.get("LDFLAGS", "")), f"-L{TORCH_ROOT}/lib", "-ltorch_cpu"]
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # never write into a file that a running program has mapped
        print("linking", library, flush=True)
        subprocess.run(link, check=True)


class PlatformWheel(bdist_wheel):
    """Any Python, one platform: py3-none-linux_x86_64 (py3-none-any without the library)."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


TORCH_ROOT = find_torch() if BUILD != "0" else None
if BUILD == "0":
    notice("RNNFAST_BUILD=0")
elif TORCH_ROOT is None:
    notice(f"there is no {TORCH} to build against")
    if BUILD == "1" and "egg_info" not in sys.argv:
        sys.exit("RNNFAST_BUILD=1, but the compiled kernels cannot be built")

setup(
    ext_modules=[Extension("rnnfast._C", list(SOURCES), depends=HEADERS, optional=BUILD != "1")] if TORCH_ROOT else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    # "egg_info" is how a front end asks what to put into an isolated environment; nothing else may start a download.
    setup_requires=[TORCH] if TORCH_ROOT is None and BUILD != "0" and "egg_info" in sys.argv else [],
)
