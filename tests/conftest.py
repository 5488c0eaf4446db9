"""Every test starts from the same seed, one thread and poisoned memory, and leaves the process as it found it."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on CPU tensors

import pytest
import torch

import rnnfast

# Both must give the same numbers as torch.nn on every case; "aten" is torch.nn.
BACKENDS = ("cpu", "reference")


@pytest.fixture(autouse=True)
def _fixed_state():
    """Seed and threads fixed; torch.empty and its relatives, called from Python or C++, return NaN."""
    torch.manual_seed(0)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # with torch.utils.deterministic.fill_uninitialized_memory, on by default
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test once per backend, strictly: a silent fallback to another one is an error."""
    with rnnfast.backend(request.param, strict=True):
        yield request.param
