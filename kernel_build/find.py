"""Finds what a build needs on this machine: the headers of torch, and the CUDA toolkit."""

import importlib.util
import os
import re
import runpy
import shutil
import site
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

TORCH = "torch>=2.11"


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
