"""The GPU architectures that rnnfast builds for, tests and plans with: the one list of them.

Limits are those of NVIDIA's "CUDA C++ Programming Guide", Technical Specifications per Compute Capability.
"""

import re
import sys
from typing import NamedTuple


class Architecture(NamedTuple):
    """One architecture, named by 10 times its compute capability: 90 is sm_90."""

    sm: int
    shared_bytes: int
    """Shared memory that one CTA can ask for."""
    largest_cluster: int
    """CTAs of one cluster; 1: it has no clusters."""


ARCHITECTURES = {
    architecture.sm: architecture
    for architecture in (
        Architecture(75, 64 << 10, 1),
        Architecture(80, 163 << 10, 1),
        Architecture(86, 99 << 10, 1),
        Architecture(89, 99 << 10, 1),
        Architecture(90, 227 << 10, 16),
        Architecture(100, 227 << 10, 16),
        Architecture(120, 99 << 10, 8),
    )
}
BUILD_LIST = ";".join(f"{sm // 10}.{sm % 10}" for sm in ARCHITECTURES) + "+PTX"
"""The default of TORCH_CUDA_ARCH_LIST, without "a" or "f": code of 10.0a does not run on 10.3."""

RESOURCE_TESTS = (80, 90, 100)
"""The tests compile every kernel for these. They differ in PTX, in registers or in shared memory."""


def code_flags(listed: str, ptx_versions: tuple[int, ...]) -> list[str]:
    """nvcc's -gencode flags of a file with these versions of PTX, for a list in the form of TORCH_CUDA_ARCH_LIST.

    Architectures older than all of the file's versions are left out. Ends the program for a malformed list.
    """
    flags = []
    for name in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 12.0+PTX, got {name!r}")
        number = match[1] + match[2]
        version = newest_ptx(ptx_versions, int(number))
        if version is None:
            continue
        flags += [f"-gencode=arch=compute_{version},code=sm_{number}{match[3]}"]
        if match[4]:
            flags += [f"-gencode=arch=compute_{version},code=compute_{version}"]
    # A list of older devices only: the plan never chooses such a kernel there, but the linker wants it.
    return flags or [f"-gencode=arch=compute_{ptx_versions[0]},code=sm_{ptx_versions[0]}"]


def newest_ptx(versions: tuple[int, ...], sm: int) -> int | None:
    """The newest of a file's versions of PTX that an architecture can run, or None."""
    return max((version for version in versions if version <= sm), default=None)
