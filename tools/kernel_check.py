"""`make kernel-test` and `make kernel-bench`: unit tests and micro-benchmarks of the CPU kernels' parts.

Builds one C++ program per instruction set of this machine from tests/kernels, with the flags that the kernels have in
kernel_build/sources.py, and runs it. Needs GoogleTest or Google Benchmark, and no torch.

    python3 tools/kernel_check.py test [--isa avx2] [-- --gtest_filter=Products*]
    python3 tools/kernel_check.py bench [--isa avx2] [-- --benchmark_filter=tile]
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernel_build.commands import FLAGS  # noqa: E402
from kernel_build.sources import CPU_SOURCES, Source  # noqa: E402

SOURCES = ROOT / "tests" / "kernels"
OUT = ROOT / "build" / "kernels"


class Framework(NamedTuple):
    name: str
    header: str
    package: str
    link: tuple[str, ...]
    sources: str


FRAMEWORKS = {
    "test": Framework("GoogleTest", "gtest/gtest.h", "libgtest-dev", ("-lgtest_main", "-lgtest"), "test_*.cpp"),
    "bench": Framework("Google Benchmark", "benchmark/benchmark.h", "libbenchmark-dev", ("-lbenchmark",), "bench.cpp"),
}


def compiler() -> list[str]:
    return [*shlex.split(os.environ.get("CXX", "c++")), *shlex.split(os.environ.get("CXXFLAGS", ""))]


def missing(framework: Framework) -> str | None:
    """Why the framework cannot be used, and which package brings it."""
    program = f"#include <{framework.header}>"
    found = subprocess.run([*compiler(), "-E", "-x", "c++", "-"], input=program, text=True, capture_output=True)
    if found.returncode == 0:
        return None
    return f"{framework.name} is missing: no <{framework.header}> (Debian: apt-get install {framework.package})"


def instruction_sets() -> dict[str, Source]:
    """By name, those that this machine can run."""
    machine = subprocess.check_output([*compiler(), "-dumpmachine"], text=True).split("-")[0]
    info = Path("/proc/cpuinfo")
    features = set(info.read_text().replace("_", "").split()) if info.exists() else set()
    return {
        Path(source.path).stem.removeprefix("isa_"): source
        for source in CPU_SOURCES
        if "/isa_" in source.path
        and source.machine in (None, machine)
        and all(flag.removeprefix("-m") in features for flag in source.flags)
    }


def newest(*folders: Path) -> float:
    return max(file.stat().st_mtime for folder in folders for file in folder.rglob("*") if file.is_file())


def build(what: str, isa: str, source: Source) -> Path:
    """The program of one instruction set; built again where a kernel, a test or this file is newer."""
    framework, program = FRAMEWORKS[what], OUT / f"{what}_{isa}"
    changed = newest(ROOT / "csrc" / "common", ROOT / "csrc" / "cpu", SOURCES, ROOT / "kernel_build")
    if program.exists() and program.stat().st_mtime > max(changed, Path(__file__).stat().st_mtime):
        return program
    OUT.mkdir(parents=True, exist_ok=True)
    isa_source = f'-DRNNFAST_ISA_SOURCE="{Path(source.path).relative_to("csrc")}"'
    # gcc's own AVX-512 intrinsics use a variable that they do not set.
    command = [*compiler(), *FLAGS, *source.flags, "-fopenmp", "-Wno-uninitialized", isa_source]

    def compiled(file: Path) -> str:
        target = OUT / f"{file.stem}_{isa}.o"
        print("compiling", target.stem, flush=True)
        subprocess.run([*command, "-c", str(file), "-o", str(target)], check=True, cwd=ROOT)
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compiled, sorted(SOURCES.glob(framework.sources))))
    subprocess.run([*compiler(), "-fopenmp", *objects, "-o", str(program), *framework.link, "-lpthread"], check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=FRAMEWORKS)
    parser.add_argument("--isa", help="one instruction set; default: all of this machine")
    own = sys.argv[1:]
    end = own.index("--") if "--" in own else len(own)
    arguments = parser.parse_args(own[:end])
    reason = missing(FRAMEWORKS[arguments.what])
    if reason:
        print(reason, file=sys.stderr)
        return 1
    sets = instruction_sets()
    if arguments.isa and arguments.isa not in sets:
        print(f"{arguments.isa}: this machine has {', '.join(sets)}", file=sys.stderr)
        return 1
    failed = []
    for isa in [arguments.isa] if arguments.isa else sets:
        program = build(arguments.what, isa, sets[isa])
        print(f"--- {isa}", flush=True)
        if subprocess.run([str(program), *options(arguments.what), *own[end + 1 :]]).returncode:
            failed.append(isa)
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return bool(failed)


def options(what: str) -> list[str]:
    if what == "test":
        return ["--gtest_brief=1"]
    return ["--benchmark_repetitions=5", "--benchmark_min_time=0.02"]


if __name__ == "__main__":
    sys.exit(main())
