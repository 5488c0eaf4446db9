"""Triton kernels for NVIDIA GPUs, and in Triton's interpreter for CPU tensors: a pure-Python install needs no nvcc.

Importing this package imports no Triton, which takes a second; the first call does.
"""

import os

interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether kernels run in Triton's interpreter; Triton reads the variable when a kernel is defined, so it is fixed."""
