"""Tier group of csrc/cuda in the emulator: the kernels' own source against the float64 oracle, by the parity rule."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
from pathlib import Path

import cuda_layer
import cuda_resources
import pytest
import torch
from emulator import build as emulator_build
from harness import Data, make_module
from test_cuda_cta import Emulated, check, make_case

ROOT = Path(__file__).parent.parent
EMULATOR = ROOT / "tests" / "emulator"
PRODUCTS = tuple(cuda_layer.PRODUCTS)
KINDS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
RAGGED = (None, "lengths", "sorted", "unsorted")
SEEDS = (1, 2)  # of the emulator's schedule
RESIDENT_BLOCKS = 1 << 20  # of the pretended device, unless a test says otherwise


@pytest.fixture(scope="module")
def kernels() -> cuda_layer.Kernels:
    sources = [EMULATOR / "run_group.cpp", *sorted((ROOT / "csrc" / "cuda").glob("inst_group_*.cu"))]
    return cuda_layer.Kernels(str(emulator_build.build(sources, shared=True)), "group")


def sizes():
    """Sizes around those of a slice of units and of a warp's depth, with the other properties in turn."""
    turns = zip(
        itertools.cycle((9, 1, 3, 17, 8)),  # B
        itertools.cycle((4, 2, 1)),  # T
        itertools.cycle((True, False)),  # bidirectional
        itertools.cycle(RAGGED + (None, "lengths", "sorted")),
        itertools.cycle((True,) * 7 + (False,) * 4),  # hx
        itertools.cycle((False,) * 7 + (True,) * 6),  # misaligned
        strict=False,
    )
    for product, kind in itertools.product(PRODUCTS, KINDS):
        for H in (1, 15, 33, 64, 96):
            B, T, bidirectional, ragged, hx, misaligned = next(turns)
            options = {"B": B, "T": T, "bidirectional": bidirectional, "ragged": ragged, "hx": hx}
            yield product, kind, H, options, misaligned


@pytest.mark.parametrize(
    ("product", "kind", "H", "options", "misaligned"),
    [pytest.param(*case, id="-".join(map(str, case[:3]))) for case in sizes()],
)
def test_sizes(kernels, product, kind, H, options, misaligned):
    check(kernels, product, make_case(product, kind, H, **options), misaligned=misaligned, in_place=H % 2 == 0)


@pytest.mark.parametrize("ragged", RAGGED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_rows(kernels, product, kind, ragged):
    """Both directions, more than one batch tile, every form of rows; with and without initial states."""
    for seed, hx in zip(SEEDS, (True, False), strict=True):
        case = make_case(product, kind, 20, T=4, B=11, bidirectional=True, ragged=ragged, hx=hx, seed=seed)
        check(kernels, product, case, seed=seed)


@pytest.mark.parametrize("H", [250, 300])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_shipped_kernels(kernels, product, kind, H):
    """8 warps per CTA, all pieces of the padded size and some that do not exist."""
    check(kernels, product, make_case(product, kind, H, T=2, B=3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", ["bf16", "exact"])
def test_repeats_bit_for_bit(kernels, product, kind):
    """Whatever the order of warps, the alignment, where gates are saved, and how many groups run at once."""
    case = make_case(product, kind, 50, T=4, B=17, bidirectional=True, ragged="unsorted")
    data, stock = Data(case), make_module(torch.nn, case)
    variants = ({"seed": 1}, {"seed": 2}, {"seed": 3, "misaligned": True}, {"seed": 4, "in_place": False})
    first, *others = [Emulated(kernels, product, case, data, stock, **options).results for options in variants]
    members = 2 if kind.startswith("rnn") else 4
    try:
        for blocks in (members, 2 * members + 1):
            kernels.library.rnnfast_group_device(blocks)
            others.append(Emulated(kernels, product, case, data, stock).results)
    finally:
        kernels.library.rnnfast_group_device(RESIDENT_BLOCKS)
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


def test_refuses_a_small_device(kernels):
    """A group that does not fit the device is refused before anything waits."""
    case = make_case("bf16", "lstm", 50, T=2, B=1)
    try:
        kernels.library.rnnfast_group_device(3)
        with pytest.raises(AssertionError, match="too many blocks in cooperative launch"):
            Emulated(kernels, "bf16", case, Data(case), make_module(torch.nn, case))
    finally:
        kernels.library.rnnfast_group_device(RESIDENT_BLOCKS)
