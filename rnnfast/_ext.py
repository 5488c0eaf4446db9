"""Finds and loads the compiled kernels. A failure is kept as a sentence and never breaks the import.

The libraries are plain C++ on torch's stable ABI: no Python module, loaded by path, one file for every torch >= 2.11.

    _C.so           CPU kernels
    _C_cuda.so      CUDA kernels
    _C_emulator.so  the CUDA kernels on CPU tensors, run by csrc/emulator; there only after `make emulator`
"""

import os
from pathlib import Path

import torch

from . import ops

LIBRARY = Path(os.environ.get("RNNFAST_C_LIBRARY") or Path(__file__).with_name("_C.so"))  # another build, for tests
CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.so")
EMULATOR_LIBRARY = Path(__file__).with_name("_C_emulator.so")
EMULATOR_NAMESPACE = "rnnfast_emulator"  # its operators, on CPU tensors like those of _C.so
OLDEST_TORCH = (2, 11)  # the first release whose stable ABI has all that csrc/ uses


def _load(library: Path, why_missing: str) -> str | None:
    if os.environ.get("RNNFAST_SKIP_EXT", "0") not in ("", "0"):
        return "the extension was skipped because RNNFAST_SKIP_EXT is set"
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"the extension needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, this is {torch.__version__}"
    if not library.exists():
        return f"the extension is not built: {library.name} is missing in {library.parent} ({why_missing})"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"the extension could not be loaded: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"this torch, {torch.__version__}, was built without CUDA"
    return _load(CUDA_LIBRARY, f"it is built where nvcc of CUDA {torch.version.cuda.split('.')[0]} is found")


def _load_emulator() -> str | None:
    if EMULATOR_LIBRARY.exists():
        ops.OPERATORS[EMULATOR_NAMESPACE] = ops.define(EMULATOR_NAMESPACE)
    return _load(EMULATOR_LIBRARY, "`make emulator` builds it")


failure = _load(LIBRARY, "no C++ compiler?")
"""Why the compiled kernels for the CPU are absent; None if they are loaded."""

cuda_failure = _load_cuda()
"""Why the CUDA kernels are absent, or None. It says nothing about devices: see `cuda_refuses`."""

emulator_failure = _load_emulator()
"""Why the emulated CUDA kernels are absent, or None."""


def cuda_plan(
    cell: str,
    dtype: torch.dtype,
    hidden_size: int,
    proj_size: int = 0,
    batch: int = 1,
    directions: int = 1,
    backward: bool = False,
    device: int = 0,
    namespace: str = "rnnfast",
) -> str:
    """How the CUDA kernels run such a layer, with the reasons against the tiers before: "tier step: ...".

    "refused: " and a reason, if they do not run it. `cell` is "rnn", "gru" or "lstm". With `namespace`
    EMULATOR_NAMESPACE the emulator answers for its own device.
    """
    plan = getattr(torch.ops, namespace)._cuda_plan
    return plan(cell, str(dtype).removeprefix("torch."), hidden_size, proj_size, batch, directions, backward, device)


def cuda_refuses(*layer, **options) -> str | None:
    """Why the CUDA kernels cannot run a layer on its device, or None. Takes the arguments of `cuda_plan`."""
    plan = cuda_plan(*layer, **options)
    return plan.removeprefix("refused: ") if plan.startswith("refused: ") else None


def allow_tf32(allow: bool, namespace: str = "rnnfast") -> None:
    """Sets whether CUDA kernels multiply float32 in TF32, in the whole process (default: yes; emulator: no)."""
    getattr(torch.ops, namespace)._cuda_allow_tf32(allow)


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run on here: "base", "avx2", "avx512", "avx512_bf16" or "neon".

    Raises RuntimeError if RNNFAST_CPU_ISA names one that this machine lacks.
    """
    return torch.ops.rnnfast._cpu_isa()
