"""Triton kernels for NVIDIA GPUs; Triton's interpreter runs them on CPU tensors. They need no nvcc.

Importing this package does not import Triton, which takes a second. The first call does.
"""

import os

interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether kernels run in Triton's interpreter. Fixed, because Triton reads the variable when a kernel is defined."""
