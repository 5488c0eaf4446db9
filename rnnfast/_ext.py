"""Finds and loads the compiled kernels, rnnfast/_C.so; a failure is kept as a sentence and never breaks the import.

The library is plain C++ on torch's stable ABI: no Python module, loaded by path, one file for every torch >= 2.11.
"""

import os
from pathlib import Path

import torch

LIBRARY = Path(os.environ.get("RNNFAST_C_LIBRARY") or Path(__file__).with_name("_C.so"))  # another build, for tests
OLDEST_TORCH = (2, 11)  # the first release whose stable ABI has all that csrc/ uses


def _load() -> str | None:
    if os.environ.get("RNNFAST_SKIP_EXT", "0") not in ("", "0"):
        return "the extension was skipped because RNNFAST_SKIP_EXT is set"
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"the extension needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, this is {torch.__version__}"
    if not LIBRARY.exists():
        return f"the extension is not built: {LIBRARY.name} is missing in {LIBRARY.parent} (no C++ compiler?)"
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"the extension could not be loaded: {error}"
    return None


failure = _load()
"""Why the compiled kernels are absent, or None when they are loaded."""


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run on here: "base", "avx2", "avx512", "avx512_bf16" or "neon".

    Raises RuntimeError where RNNFAST_CPU_ISA names one that this machine lacks.
    """
    return torch.ops.rnnfast._cpu_isa()
