"""The parity rule over shapes, dtypes, projection, layers, directions and both thread plans."""

from __future__ import annotations

import pytest
import torch
from support.harness import CELLS, Case, check

F64, BF16, F16 = torch.float64, torch.bfloat16, torch.float16

# (T, B, I, H): sizes that are no multiple of any vector or tile, and I != H throughout.
SHAPES = [
    (1, 1, 2, 1),
    (2, 3, 1, 5),
    (129, 3, 7, 63),
    (1, 65, 33, 100),
    (2, 65, 5, 130),
    (1000, 1, 3, 5),
    (1000, 3, 2, 1),
    (13, 2, 130, 640),
    (7, 33, 63, 16),
]
# Projected LSTM: (T, B, I, H, proj).
PROJECTED = [
    (1, 1, 2, 2, 1),
    (2, 3, 4, 5, 1),
    (129, 3, 7, 63, 5),
    (2, 65, 5, 130, 100),
    (9, 1, 40, 640, 63),
    (5, 33, 3, 17, 16),
]
# (layers, bidirectional, bias): each pair of them at least once.
STACKS = [(1, True, False), (2, False, False), (3, True, True), (2, True, False), (3, False, True)]


@pytest.mark.parametrize(
    "case", [Case(cell, *shape, seed=i) for cell in CELLS for i, shape in enumerate(SHAPES)], ids=str
)
def test_shapes_fp32(case):
    check(case)


@pytest.mark.parametrize("case", [Case("lstm", *shape, seed=i) for i, shape in enumerate(PROJECTED)], ids=str)
def test_projection_fp32(case):
    check(case)


STACK_CASES = [
    Case(cell, 6, 5, 11, 9, layers=layers, bidirectional=bidirectional, bias=bias, seed=layers)
    for cell in CELLS
    for layers, bidirectional, bias in STACKS
]
STACK_CASES += [
    Case("lstm", 6, 5, 11, 9, proj=4, layers=layers, bidirectional=bidirectional, bias=bias, seed=layers)
    for layers, bidirectional, bias in STACKS
]


@pytest.mark.parametrize("case", STACK_CASES, ids=str)
def test_stacks(case):
    check(case)


# Inference that two threads share, where a layer is too little for them: a wavefront (cpu/kernels/wavefront.inl.h).
WAVES = [
    Case(cell, 120, 2, 9, 70, layers=3, threads=2, dtype=dtype) for cell in CELLS for dtype in (torch.float32, BF16)
]
WAVES += [Case("lstm", 120, 2, 9, 71, proj=33, layers=4, threads=3, hx=False, dtype=dtype) for dtype in (F64, F16)]


@pytest.mark.quick(2)
@pytest.mark.parametrize("case", WAVES, ids=str)
def test_stacks_of_several_threads(case):
    check(case)


# Rows enough for several stretches of backward and three blocks of the weights' gradients, of odd numbers; odd sizes
# everywhere.
MANY_ROWS = {"T": 33, "B": 65, "I": 5, "H": 13, "seed": 9}
MANY_ROWS_CASES = [Case(cell, **MANY_ROWS, dtype=dtype) for cell in CELLS for dtype in (torch.float32, BF16)]
MANY_ROWS_CASES += [
    Case("lstm", **MANY_ROWS, proj=7, bidirectional=True, dtype=BF16),
    Case("lstm", **MANY_ROWS, proj=7, threads=2),
    Case("lstm", **MANY_ROWS, proj=7, ragged="sorted", dtype=BF16),
    *(Case(cell, **MANY_ROWS, ragged="lengths", threads=2) for cell in CELLS),
    *(Case(cell, T=5, B=rows, I=3, H=5, seed=9) for cell in CELLS for rows in (300, 600)),
    Case("gru", **(MANY_ROWS | {"I": 35, "H": 71}), bidirectional=True, ragged="lengths", threads=2, dtype=BF16),
]


@pytest.mark.quick(2)
@pytest.mark.parametrize("case", MANY_ROWS_CASES, ids=str)
def test_many_rows(case):
    check(case)


DTYPE_SHAPES = [(1, 1, 2, 1), (2, 3, 1, 5), (7, 65, 5, 20), (40, 3, 7, 63), (3, 2, 100, 130), (129, 4, 3, 33)]
DTYPE_CASES = [
    Case(cell, *shape, dtype=dtype, seed=i)
    for dtype in (F64, BF16, F16)
    for cell in CELLS
    for i, shape in enumerate(DTYPE_SHAPES)
]
DTYPE_CASES += [
    Case(cell, *shape, dtype=dtype, layers=2, bidirectional=True, bias=False, hx=False, seed=3)
    for dtype in (F64, BF16, F16)
    for cell, shape in [(cell, (4, 6, 5, 7)) for cell in CELLS if cell != "rnn_relu"] + [("rnn_relu", (2, 24, 5, 3))]
]
DTYPE_CASES += [
    Case("lstm", 9, 6, 5, 21, proj=6, dtype=dtype, bidirectional=True, seed=4) for dtype in (F64, BF16, F16)
]
DTYPE_CASES += [Case("lstm", 7, 5, 4, 19, proj=3, dtype=dtype, ragged="lengths", seed=5) for dtype in (F64, BF16, F16)]
DTYPE_CASES += [
    Case(cell, 7, 5, 4, 18, dtype=dtype, bidirectional=True, ragged="unsorted", seed=5)
    for dtype in (F64, BF16, F16)
    for cell in ("gru", "rnn_tanh")
]


@pytest.mark.parametrize("case", DTYPE_CASES, ids=str)
def test_dtypes(case):
    check(case)


# Large enough for several threads: many rows (split over the batch), few rows and many units (split over the units).
PLANS = [(17, 65, 40, 130), (9, 1, 64, 640), (12, 3, 30, 256), (5, 70, 130, 63)]
PLAN_CASES = [
    Case(cell, *shape, threads=threads, bidirectional=shape[1] == 3, seed=threads)
    for cell in CELLS
    for shape in PLANS
    for threads in (1, 2)
]
PLAN_CASES += [
    Case("lstm", 8, 66, 40, 130, proj=33, threads=2),
    Case("lstm", 8, 1, 40, 512, proj=100, threads=2),
    Case("gru", 12, 40, 30, 128, threads=2, bidirectional=True, ragged="unsorted", layers=2),
    Case("lstm", 12, 40, 30, 128, threads=2, bidirectional=True, ragged="lengths"),
    Case("gru", 9, 1, 64, 512, threads=2, ragged="lengths", bidirectional=True),
    Case("lstm", 9, 48, 33, 130, threads=2, dtype=BF16),
    Case("gru", 9, 2, 33, 512, threads=2, dtype=BF16),
    Case("gru", 9, 48, 33, 130, threads=2, dtype=F64),
]


@pytest.mark.parametrize("case", PLAN_CASES, ids=str)
def test_thread_plans(case):
    check(case)


REFERENCE_CASES = [
    Case("rnn_tanh", 5, 3, 4, 6),
    Case("rnn_relu", 5, 3, 4, 6, layers=2, bidirectional=True, bias=False),
    Case("gru", 6, 5, 4, 6, layers=2, bidirectional=True, ragged="unsorted"),
    Case("gru", 6, 5, 4, 6, bidirectional=True, ragged="lengths", hx=False),
    Case("lstm", 6, 5, 4, 6, proj=3, layers=2, bidirectional=True, ragged="lengths"),
    Case("lstm", 6, 5, 4, 6, ragged="sorted", dtype=F64),
    Case("lstm", 6, 5, 4, 6, batch_first=True, dtype=BF16),
    Case("gru", 6, 5, 4, 6, bias=False, dtype=F16),
]


@pytest.mark.parametrize("case", REFERENCE_CASES, ids=str)
def test_reference_backend(case):
    check(case, backend="reference")
