"""The kernels that bring ragged batches to the device: nothing out of range leaves them, any number of steps fits."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulator.build import build, program

from kernel_build.sources import Source


@pytest.fixture(scope="module")
def library():
    sources = [Source("csrc/cuda/device/around.cu"), program("run_around.cpp")]
    return ctypes.CDLL(str(build(sources, shared=True)))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_are_clamped(library, dtype):
    values = [0, 1, 7, 8, -1, -(2**31), 2**31 - 1] + ([2**32 + 3, -(2**62)] if dtype == torch.int64 else [])
    lengths, clamped = torch.tensor(values, dtype=dtype), torch.full((len(values),), -9, dtype=torch.int32)
    wide = int(dtype == torch.int64)
    assert library.rnnfast_clamp_lengths(pointer(lengths), wide, pointer(clamped), len(values), 7) == 0
    assert clamped.tolist() == [min(max(value, 0), 7) for value in values]


@pytest.mark.parametrize("steps", [1, 2, 255, 256, 257, 512, 700])
@pytest.mark.parametrize("batch", [1, 3, 300])
def test_schedule(library, steps, batch):
    lengths = torch.randint(1, steps + 1, (batch,)).sort(descending=True).values
    lengths[0] = steps
    batch_sizes = (lengths[None] > torch.arange(steps)[:, None]).sum(1)
    offsets, found = torch.full((steps,), -9), torch.full((batch,), -9, dtype=torch.int32)
    code = library.rnnfast_write_schedule(pointer(batch_sizes), ctypes.c_int64(steps), pointer(offsets), pointer(found))
    assert code == 0
    assert torch.equal(offsets, batch_sizes.cumsum(0) - batch_sizes)
    assert torch.equal(found.long(), lengths)
