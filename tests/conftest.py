"""Every test starts from the same seed, one thread and poisoned memory, and leaves the process as it found it."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on CPU tensors

import pytest
import torch
from support import selection

import rnnfast

collect_ignore = ["bench"]  # unless it is asked for: a process of its own, see the Makefile

# Both must give the same numbers as torch.nn on every case; "aten" is torch.nn.
BACKENDS = ("cpu", "reference")

# Files that take longest, most of it in compilers. They come first, so that workers (see the Makefile) end together.
LONGEST = (
    "test_cuda_cta",
    "test_cuda_group",
    "test_cuda_cluster",
    "test_triton_compile",
    "test_compile",
    "test_emulator",
    "test_cuda_step",
    "test_triton_ops",
    "test_triton_group",
    "test_triton",
)


def pytest_addoption(parser):
    about = "tests to run: `make test` has the quick ones, `make test-full` all (default: full)"
    parser.addoption("--select", choices=selection.SELECTIONS, default="full", help=about)


def pytest_collection_modifyitems(config, items):
    selected = selection.select(items, config.getoption("select"))
    names = {item.nodeid for item in selected}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in names])
    items[:] = selected
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


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
