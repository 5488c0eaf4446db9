"""Builds programs and libraries that run csrc/cuda on the CPU: a kernel's source and the emulator, through g++.

The result lies in build/emulator/ under a name made of everything that went into it, and is made
again only if that changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from kernel_build.sources import EMULATOR_SOURCES, Source

PROGRAMS = Path(__file__).parent
ROOT = PROGRAMS.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulator"

# No contraction: a test may compare bits with a host loop. Uninitialised locals get a pattern, not what lay there.
FLAGS = ["-std=c++20", "-fPIC", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += [f"-I{CSRC}"]
KERNEL_FLAGS = ["-DRNNFAST_EMULATOR", "-ftrivial-auto-var-init=pattern"]
# "address" also finds what the hardware traps on and a CPU does not: vectors at addresses that are no multiple of them.
SANITIZERS = {
    None: [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def digest(files: list[Path], words: list[str]) -> str:
    """Of the files' names and contents, and of the command's words."""
    found = hashlib.sha256("\0".join([compiler(), *words]).encode())
    for file in sorted(files):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def made(target: Path, command: list[str]) -> Path:
    """`target`, by `command` if it is not there, what that says in a .log file beside it.

    Complete or absent, and made once even when two processes ask for it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f"{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                partial = Path(folder) / target.name
                command = [*command, "-o", str(partial)]
                result = subprocess.run(command, capture_output=True, text=True, timeout=600)
                if result.returncode:
                    raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
                target.with_name(f"{target.name}.log").write_text(result.stderr)
                partial.rename(target)
    return target


def _object(source: Source, flags: list[str], headers: list[Path]) -> Path:
    # Relative names inside the flags would not show a moved repository, so the flags count as they are.
    path, flags = ROOT / source.path, [*flags, *source.flags]
    target = BUILD / f"{path.parent.name}-{path.stem}{source.suffix}-{digest([path, *headers], flags)}.o"
    return made(target, [compiler(), "-x", "c++", *flags, "-c", str(path)])


def program(name: str) -> Source:
    """A source file of this folder."""
    return Source(f"tests/emulator/{name}")


def build(
    sources: list[Source], sanitizer: str | None = None, shared: bool = False, flags: tuple[str, ...] = ()
) -> Path:
    """A program (or, if `shared`, a library) of `sources`, csrc's headers and the runtime.

    `sanitizer`: None, "address" or "thread"; the runtime is never built with -fsanitize=thread (see fiber.h).
    """
    emulator = sorted((CSRC / "emulator").glob("*.h"))
    headers = [*PROGRAMS.glob("*.*h"), *(CSRC / "common").glob("*.h"), *(CSRC / "cuda").rglob("*.*h"), *emulator]
    sanitize = SANITIZERS[sanitizer]
    runtime_flags = [*FLAGS, *(["-O1", "-fsanitize=address"] if sanitizer == "address" else ["-O2"]), *flags]
    objects = [_object(source, runtime_flags, emulator) for source in EMULATOR_SOURCES]
    kernel_flags = [*FLAGS, *KERNEL_FLAGS, "-O1", *sanitize, *flags]
    objects += [_object(source, kernel_flags, headers) for source in sources]
    link = [*sanitize, *(["-shared"] if shared else [])]
    name = f"{Path(sources[0].path).stem}-{digest(objects, link)}{'.so' if shared else ''}"
    return made(BUILD / name, [compiler(), *link, *map(str, objects)])


def run(program: Path, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs a program of build(); what sanitizers report is in stderr, and the exit status is not 0."""
    command = [str(program), *map(str, arguments)]
    # Kernels that an error stopped leave their locals behind: no leak check.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": timeout}
    result = subprocess.run(command, **options)
    if "unexpected memory mapping" in result.stderr:  # TSan of older compilers, where addresses are random
        result = subprocess.run(["setarch", "-R", *command], **options)
    return result
