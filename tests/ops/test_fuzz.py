"""Random small configurations over all features, by the parity rule; RNNFAST_FUZZ=<count>[:<first seed>] runs more."""

from __future__ import annotations

import os
import random

import pytest
import torch
from support.harness import CELLS, Case, check

COUNT, _, FIRST = os.environ.get("RNNFAST_FUZZ", "150").partition(":")
SEEDS = range(int(FIRST or 0), int(FIRST or 0) + int(COUNT))
PER_TEST = 10
SIZES = [1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 48, 65]
DTYPES = [torch.float32] * 5 + [torch.float64, torch.bfloat16, torch.float16]


def random_case(seed: int) -> Case:
    r = random.Random(seed)
    cell = r.choice(CELLS)
    dtype = r.choice(DTYPES)
    hidden_size = r.choice(SIZES)
    proj = r.randrange(1, hidden_size) if cell == "lstm" and hidden_size > 1 and r.random() < 0.4 else 0
    bias = r.random() < 0.7
    seq_len, batch, layers = r.choice(SIZES[:8]), r.choice([1, 2, 3, 5, 8, 9, 17, 33]), r.choice([1, 1, 2, 3])
    if dtype.itemsize == 2:  # a gradient of one number may cancel to less than the ceiling of its dtype can tell
        hidden_size = max(hidden_size, 5)
    if cell == "rnn_relu":  # several rows, or all have a pre-activation at relu's kink
        batch, bias = max(batch, 5), bias or dtype.itemsize == 2
        if dtype.itemsize == 2:
            seq_len, layers, batch = min(seq_len, 3), min(layers, 2), max(batch, 17)
    layout = r.choice(["contiguous", "contiguous", "transposed", "strided", "expanded"])
    loss = r.choice([("output", "h_n", "c_n"), ("output", "h_n", "c_n"), ("output",), ("h_n",), ("output", "c_n")])
    wrt = r.choice([("input", "hx", "cx", "weights")] * 3 + [("input",), ("weights",), ("input", "hx", "cx")])
    return Case(
        cell,
        seq_len,
        batch,
        r.choice(SIZES),
        hidden_size,
        proj=proj,
        layers=layers,
        bidirectional=r.random() < 0.5,
        bias=bias,
        hx=r.random() < 0.6,
        batch_first=r.random() < 0.3,
        ragged=r.choice([None, None, "sorted", "unsorted", "lengths"]),
        dtype=dtype,
        layout=layout,
        loss=loss,
        grads=r.choice(["random", "sum", "transposed"]),
        wrt=wrt,
        threads=r.choice([1, 1, 2]),
        seed=seed,
    )


@pytest.mark.parametrize("first", SEEDS[::PER_TEST])
def test_random_configurations(first):
    failures = []
    for seed in range(first, min(first + PER_TEST, SEEDS.stop)):
        case = random_case(seed)
        try:
            check(case)
        except Exception as error:
            failures.append(f"seed {seed}, {case}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)
