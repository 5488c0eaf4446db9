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
  RNNFAST_EMULATOR  1: builds rnnfast/_C_emulator.so and nothing else: _C_cuda's source for the CPU (csrc/emulator).
  RNNFAST_DEBUG     1: -O1 -g and the standard library's assertions.
  RNNFAST_SANITIZE  what -fsanitize= takes, "address,undefined" say; the build is a debug build then.
  TORCH_CUDA_ARCH_LIST   as torch's: "8.0;9.0a+PTX". CUDA_HOME: the toolkit, else the one of the nvcc on the PATH.
  MAX_JOBS          how many files to compile at a time (default: one per core).   CXX, CXXFLAGS, LDFLAGS: as usual.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"building rnnfast needs setuptools >= 77.0.3, this is {setuptools.__version__}")
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))  # pip runs this file without its folder
from kernel_build.commands import COMMANDS, link_command  # noqa: E402
from kernel_build.find import TORCH, cuda_missing, find_toolkit, find_torch  # noqa: E402

BUILD = os.environ.get("RNNFAST_BUILD", "auto")
CUDA = os.environ.get("RNNFAST_CUDA", "auto")
EMULATOR = os.environ.get("RNNFAST_EMULATOR") == "1"


def notice(what: str, reason: str) -> None:
    print("*" * 100, f"rnnfast: no {what} kernels in this build: {reason}", "*" * 100, sep="\n", file=sys.stderr)


def up_to_date(target: Path, command: str) -> bool:
    """Whether an object file is what `command` would make: same command, and no source or header has changed since.

    The record beside it holds the command and the time of the last change of each file that the compiler read.
    """
    record = target.with_suffix(".record")
    if not target.exists() or not record.exists():
        return False
    known, *files = record.read_text().splitlines()
    return known == command and files == changes([line.rpartition(" ")[0] for line in files])


def changes(files: list[str]) -> list[str]:
    """One line for each file: its name, and when it changed; 0 for a file that is gone."""
    return [f"{file} {os.stat(file).st_mtime_ns if os.path.exists(file) else 0}" for file in files]


def dependencies(source: str, listed: Path) -> list[str]:
    """The source and its headers, from what -MMD wrote."""
    text = listed.read_text().replace("\\\n", " ") if listed.exists() else f": {source}"
    return text.partition(":")[2].split()


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
        commands, needed = COMMANDS[ext.name](compiler, TORCH_FOUND, TOOLKIT)

        def compiled(source) -> str:
            """The object file, made anew where it is not up to date."""
            target = Path(self.build_temp, ext.name, f"{source.name}.o")
            listed = target.with_suffix(".d")
            command = [*commands[source], "-MMD", "-MF", str(listed), "-c", source.path, "-o", str(target)]
            text = shlex.join(command)
            if not up_to_date(target, text):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.with_suffix(".record").unlink(missing_ok=True)
                print(f"compiling {source.name}\n", end="", flush=True)  # one write: threads print at the same time
                subprocess.run(command, check=True)
                lines = [text, *changes(dependencies(source.path, listed))]
                target.with_suffix(".record").write_text("\n".join(lines))
            return str(target)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compiled, commands))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # never write into a file that a running program has mapped
        print("linking", library, flush=True)
        subprocess.run(link_command(compiler, TORCH_FOUND, objects, str(library), needed), check=True)


class PlatformWheel(bdist_wheel):
    """Any Python, one platform: py3-none-linux_x86_64 (py3-none-any without the library)."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# setuptools sees no source files: MANIFEST.in names them for the source distribution, kernel_build for the compiler.
TORCH_FOUND = find_torch() if BUILD != "0" else None
TOOLKIT = find_toolkit() if TORCH_FOUND and TORCH_FOUND.cuda and CUDA != "0" else None
ASKED_WHAT_IT_NEEDS = "egg_info" in sys.argv  # a front end asks what to put into an isolated environment
EXTENSIONS = []
if BUILD == "0":
    notice("compiled", "RNNFAST_BUILD=0")
elif TORCH_FOUND is None:
    notice("compiled", f"there is no {TORCH} to build against")
    if BUILD == "1" and not ASKED_WHAT_IT_NEEDS:
        sys.exit("RNNFAST_BUILD=1, but the compiled kernels cannot be built")
elif EMULATOR:
    EXTENSIONS = [Extension("rnnfast._C_emulator", [])]
else:
    EXTENSIONS = [Extension("rnnfast._C", [], optional=BUILD != "1")]
if CUDA != "0" and not EMULATOR:
    reason = "RNNFAST_BUILD=0" if BUILD == "0" else cuda_missing(TORCH_FOUND, TOOLKIT)
    if reason is None:
        EXTENSIONS += [Extension("rnnfast._C_cuda", [], optional=CUDA != "1")]
    elif CUDA == "1" and not ASKED_WHAT_IT_NEEDS:
        sys.exit(f"RNNFAST_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    elif TORCH_FOUND and TORCH_FOUND.cuda:
        notice("CUDA", reason)

setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    # Only the question what a build needs may start a download, and only where there is no torch.
    setup_requires=[TORCH] if TORCH_FOUND is None and BUILD != "0" and ASKED_WHAT_IT_NEEDS else [],
)
