"""How fast this machine multiplies: the best rate of torch's matrix product and convolution, both near the peak."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .timing import new_clock

SAMPLES = 8


def peak_gflops(dtype: torch.dtype, threads: int, device: str) -> float:
    """GFLOP/s of the faster of a square matrix product and a 3x3 convolution in `dtype`."""
    torch.set_num_threads(threads)
    clock = new_clock(device, threads)
    side, channels, width = (8192, 256, 64) if device == "cuda" else (384, 128, 28)
    a, b = (torch.randn(side, side).to(device, dtype) for _ in range(2))
    image, kernel = (
        torch.randn(*shape).to(device, dtype, memory_format=torch.channels_last)
        for shape in ((8, channels, width, width), (channels, channels, 3, 3))
    )
    convolved = 8 * channels * (width - 2) ** 2
    best = 0.0
    with torch.no_grad():
        for flops, call in (
            (2.0 * side**3, lambda: torch.mm(a, b)),
            (2.0 * convolved * channels * 9, lambda: F.conv2d(image, kernel)),
        ):
            best = max(best, *(flops / clock.measure(call, 1).clock for _ in range(SAMPLES)))
    return best
