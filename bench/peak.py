"""What this machine can do at best: its rate of arithmetic, and of reading weights again and again."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from . import floors
from .cases import DTYPES, GATES, Case
from .timing import new_clock

SAMPLES = 8
SAMPLE_BYTES = 400e6  # what one sample reads: some milliseconds
# Formats of frozen weights: whose rate of arithmetic, and bytes of a weight.
FORMATS = {"float32": ("fp32", 4), "bfloat16": ("bf16", 2), "int8": ("int8", 1)}


@functools.cache
def peak_gflops(dtype_name: str, threads: int, device: str) -> float:
    """GFLOP/s of the faster of a square matrix product and a 3x3 convolution; on a GPU, and in int8, of the product."""
    if dtype_name == "int8":
        return _peak_of_int8(threads)
    dtype = DTYPES[dtype_name]
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
        )[: 1 if device == "cuda" else 2]:
            best = max(best, *(flops / clock.measure(call, 1).clock for _ in range(SAMPLES)))
    return best


def _peak_of_int8(threads: int) -> float:
    """oneDNN's product of int8 with sums in int32, which torch's private name for it gives."""
    torch.set_num_threads(threads)
    clock, side = new_clock("cpu", threads), 384
    a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8) for _ in range(2))
    return max(2.0 * side**3 / clock.measure(lambda: torch._int_mm(a, b), 1).clock for _ in range(SAMPLES))


@functools.cache
def read_gbs(size: int) -> float:
    """GB/s at which one core sums a buffer of `size` bytes that it has just read: from L1, L2, L3 or memory.

    The buffer is expanded to many rows without a copy, so one call of torch.sum reads it many times.
    """
    torch.set_num_threads(1)
    clock, elements = new_clock("cpu", 1), max(1, size // 4)
    rows = max(2, round(SAMPLE_BYTES / (4 * elements)))
    weights = torch.ones(elements).expand(rows, elements)
    return max(rows * elements * 4 / clock.measure(lambda: weights.sum(1), 1).clock for _ in range(SAMPLES))


def limits(case: Case) -> dict[str, float | str | None]:
    """The least time that the machine's measured limits allow: of arithmetic, or of reading the weights.

    Threads share the weights, and each reads as fast as one core alone: beyond the caches that is an upper limit.
    """
    peak, width = peak_gflops(case.dtype, case.threads, case.device), DTYPES[case.dtype].itemsize
    arithmetic_ms, reading_ms, bandwidth = case.flops() / peak / 1e6, 0.0, None
    if case.device == "cpu":
        bandwidth = case.threads * read_gbs(case.recurrent_weights() * width // case.threads)
        reading_ms = case.weights_read() * width / bandwidth / 1e6
    step_us = floors.step_us(case) if case.device == "cuda" and _is_hopper() else None
    steps_ms = 0.0 if step_us is None else step_us * case.seq_len / 1e3 + _other_flops(case) / peak / 1e6
    bounds = {"arithmetic": arithmetic_ms, "weights": reading_ms, "steps": steps_ms}
    bound_by = max(bounds, key=bounds.get)
    return {
        "floor_us_per_step": step_us,
        "peak_gflops": peak,
        "bandwidth_gbs": bandwidth,
        "flops_per_byte": case.flops() / (case.weights_read() * width),
        "bound_ms": bounds[bound_by],
        "bound_by": bound_by,
    }


def frozen_limits(case: Case) -> dict[str, float]:
    """By format of frozen weights the least milliseconds: the larger of arithmetic, and of reading the weights."""
    found = {}
    for weights, (dtype_name, size) in FORMATS.items():
        arithmetic_ms = case.flops() / peak_gflops(dtype_name, case.threads, "cpu") / 1e6
        bandwidth = case.threads * read_gbs(case.recurrent_weights() * size // case.threads)
        found[weights] = max(arithmetic_ms, case.weights_read() * size / bandwidth / 1e6)
    return found


def _is_hopper() -> bool:
    """Whether the GPU is the chip that the floors are of."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return (properties.major, properties.multi_processor_count) == (9, 132)


def _other_flops(case: Case) -> float:
    """Operations of one plain layer outside the recurrence: of the input, and the gradients of input and weights."""
    of_input = GATES[case.cell] * case.hidden_size * case.input_size
    products = 3 * of_input + case.recurrent_weights() if case.has_gradients else of_input
    return 2.0 * products * sum(case.lengths())
