"""Tier step in the emulator: the parity rule for every cell, type, direction and form of rows, at awkward sizes."""

from __future__ import annotations

import shutil

import pytest
import torch
from emulator import build as emulator_build
from support import cuda_resources
from support.emulated import NAMESPACE, check, check_tf32, needs_emulator
from support.harness import CELLS, Case

from kernel_build.sources import ARITHMETICS, instance
from rnnfast import _ext

pytestmark = needs_emulator
THREADS = 128
TYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (None, "lengths", "sorted")
# (T, B, I, H): single numbers, rows that are not aligned, several tiles of units and of the batch, several chunks of K.
SIZES = ((1, 1, 1, 1), (3, 5, 3, 20), (4, 3, 5, 33), (2, 17, 4, 40), (2, 2, 8, 130))
LARGE = (2, 65, 3, 72)  # fills the emulator's small device with large tiles


@pytest.fixture(autouse=True)
def _tier(monkeypatch):
    monkeypatch.setenv("RNNFAST_TIER", "step")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_sizes(cell, dtype):
    for sizes in SIZES:
        check(Case(cell, *sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_and_directions(cell, dtype):
    for ragged in ROWS:
        for bidirectional in (False, True):
            check(Case(cell, 4, 5, 3, 24, bidirectional=bidirectional, ragged=ragged, dtype=dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_large_tiles(cell, dtype):
    for backward in (False, True):
        plan = _ext.cuda_plan(cell.partition("_")[0], dtype, 72, 0, 65, 2, backward, namespace=NAMESPACE)
        assert plan.startswith(f"tier step: {64 if backward or 'rnn' in cell else 32} units x 64 rows")
    check(Case(cell, *LARGE, bidirectional=True, ragged="lengths", dtype=dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_projection(dtype):
    for sizes, proj in (((3, 5, 3, 20), 7), ((2, 3, 4, 33), 16), ((1, 1, 2, 5), 1)):
        for ragged in ROWS:
            check(Case("lstm", *sizes, proj=proj, ragged=ragged, bidirectional=True, dtype=dtype))
    check(Case("lstm", *LARGE, proj=40, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
def test_tf32(cell):
    for sizes in SIZES:
        check_tf32(Case(cell, *sizes, bidirectional=True, ragged="lengths"))
    check_tf32(Case(cell, *LARGE))


@pytest.mark.parametrize("cell", CELLS)
def test_without_states_or_biases(cell):
    check(Case(cell, 3, 4, 3, 18, hx=False))
    check(Case(cell, 3, 4, 3, 18, bias=False, bidirectional=True))
    check(Case(cell, 3, 4, 3, 18, hx=False, bias=False, ragged="lengths"))


@pytest.mark.parametrize(
    "cell, loss", [(cell, loss) for cell in CELLS for loss in ("output", "h_n")] + [("lstm", "c_n")]
)
def test_gradients_that_are_missing(cell, loss):
    check(Case(cell, 3, 4, 3, 18, bidirectional=True, ragged="lengths", loss=(loss,)))


def run_sanitized(sanitizer: str, *arguments) -> None:
    program = emulator_build.build([emulator_build.program("sanitize_step.cpp")], sanitizer=sanitizer)
    result = emulator_build.run(program, *arguments)
    assert result.returncode == 0 and not result.stderr, result.stderr


@pytest.mark.quick(0)
@pytest.mark.parametrize("large", [0, 1])
@pytest.mark.parametrize("shape", [(0, 40, 40), (1, 33, 33), (2, 24, 24), (2, 40, 17)], ids=str)  # cell, H, P
def test_accesses(shape, large):
    """None outside of an array or of shared memory, vectors aligned (ASan, UBSan)."""
    for seed, rows in enumerate(("dense", "padded", "packed")):
        run_sanitized("address", *shape, 3, 66 if large else 18, rows, large, seed)


@pytest.mark.quick(0)
@pytest.mark.parametrize("arguments", [(1, 33, 33, 2, 17, "padded", 0), (2, 40, 17, 1, 65, "dense", 1)], ids=str)
def test_races(arguments):
    """None (TSan). Few cases: each takes seconds, and all cells share the product, where threads meet."""
    run_sanitized("thread", *arguments, 1)


@pytest.mark.quick(0)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("arch", list(cuda_resources.SHARED_BYTES))
def test_resources(arithmetic, arch):
    """Nothing is spilled, and two CTAs fit an SM's registers. Shared memory: test_cuda_plan.py."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is missing")
    found = cuda_resources.compile_kernels(instance("step", arithmetic), arch)
    assert len(found) == 2 * (3 + 1) * 2  # tiles, (cells and the kernel for P), directions
    for kernel in found:
        assert kernel.spilled_bytes == 0 and kernel.shared_bytes == 0, kernel
        assert 2 * THREADS * kernel.registers <= cuda_resources.REGISTER_FILE, kernel
