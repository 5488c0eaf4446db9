"""The C++ unit tests of the CPU kernels' parts (tests/kernels), for each instruction set of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kernel_check
import pytest

ROOT = Path(__file__).parents[2]

MISSING = kernel_check.missing(kernel_check.FRAMEWORKS["test"])
SETS = kernel_check.instruction_sets()


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.quick(1)  # each set compiles all kernels once more
@pytest.mark.parametrize("isa", SETS)
def test_parts_of_the_kernels(isa):
    command = [sys.executable, str(ROOT / "tools" / "kernel_check.py"), "test", "--isa", isa]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_a_missing_framework_is_named():
    none = kernel_check.Framework("Nothing", "no/such/header.h", "libnothing-dev", (), "")
    assert kernel_check.missing(none) == (
        "Nothing is missing: no <no/such/header.h> (Debian: apt-get install libnothing-dev)"
    )


def test_the_sets_have_the_flags_of_the_build():
    assert "base" in SETS
    assert all(source in kernel_check.CPU_SOURCES for source in SETS.values())
