"""python -m rnnfast.env_report: versions, devices, loaded libraries and reasons for missing ones, for bug reports."""

import importlib.metadata
import os
import platform

import torch

import rnnfast

from . import _dynamo, _ext

_VARIABLES = (
    "RNNFAST_AUTOTUNE",
    "RNNFAST_BACKEND",
    "RNNFAST_CACHE_DIR",
    "RNNFAST_C_LIBRARY",
    "RNNFAST_CPU_ISA",
    "RNNFAST_FLOAT32_PRODUCTS",
    "RNNFAST_SKIP_EXT",
    "RNNFAST_TIER",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "GOMP_CPU_AFFINITY",
)


def _isa() -> str:
    if _ext.failure:
        return f"none: {_ext.failure}"
    try:
        return _ext.cpu_isa()
    except RuntimeError as error:
        return f"none: {error}"


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def report() -> str:
    """The report as text, one fact per line."""
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "rnnfast": rnnfast.__version__,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "triton": _triton_version(),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch's CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
        "GPUs": ", ".join(cuda) or "none",
        "CPU kernels": _isa(),
        "torch.compile": _dynamo.state,
        **{f"backend {name}": state for name, state in rnnfast.backends().items()},
        **{name: os.environ.get(name, "not set") for name in _VARIABLES},
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


if __name__ == "__main__":
    print(report())
