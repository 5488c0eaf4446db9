"""Tier CTA of csrc/cuda in the emulator: the kernels' own source against the float64 oracle, by the parity rule."""

from __future__ import annotations

import ctypes
import itertools
import shutil

import pytest
import torch
from emulator import build as emulator_build
from support import cuda_layer, cuda_resources
from support.cuda_tiers import (
    PRODUCTS,
    RAGGED,
    Emulated,
    assert_same_bits,
    build_kernels,
    check,
    check_nan_stays_in_its_sequence,
    make_case,
    options_in_turn,
    results_of_variants,
)
from support.harness import Data, make_module

from kernel_build.sources import PASSES, instance

pytestmark = pytest.mark.quick(0)  # it compiles all kernels of its tier; test_cuda_ops.py runs them, compiled before

KINDS = ("rnn_tanh", "rnn_relu", "gru", "lstm", "lstm_projected")
SEEDS = (1, 2)  # of the emulator's schedule


def largest_hidden(product: str, cell: str) -> int:
    """cta_largest_hidden of csrc/cuda/layer.h."""
    return (256 if cell.startswith("rnn") else 128) // (1 if product in ("bf16", "f16") else 2)


@pytest.fixture(scope="module")
def kernels() -> cuda_layer.Kernels:
    return build_kernels("cta")


def sizes():
    """Every H of every kernel, with the other properties in turn; their counts share no factor with each other's."""
    turns = options_in_turn((9, 1, 3, 17, 8), (5, 2, 1))
    for product, kind in itertools.product(PRODUCTS, KINDS):
        for H in (2 if kind == "lstm_projected" else 1, 5, 32, 33, 63, 64, 80, 96, 100, 128, 200, 256):
            if H <= largest_hidden(product, kind):
                options, misaligned = next(turns)
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
        case = make_case(product, kind, 20, T=5, B=11, bidirectional=True, ragged=ragged, hx=hx, seed=seed)
        check(kernels, product, case, seed=seed)


@pytest.mark.parametrize("loss", [("output",), ("h_n",), ("c_n",)])
@pytest.mark.parametrize("kind", ["gru", "lstm", "lstm_projected"])
def test_missing_gradients(kernels, kind, loss):
    """Null pointers in place of the gradients that the loss does not have."""
    if kind != "gru" or loss != ("c_n",):
        check(kernels, "bf16", make_case("bf16", kind, 20, T=3, B=3, loss=loss))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", ["bf16", "exact"])
def test_repeats_bit_for_bit(kernels, product, kind):
    """Whatever the order of warps, the alignment, and where gates are saved."""
    case = make_case(product, kind, 50, T=5, B=9, bidirectional=True, ragged="unsorted")
    assert_same_bits(results_of_variants(kernels, product, case))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_sequence(kernels, kind):
    check_nan_stays_in_its_sequence(kernels, make_case("bf16", kind, 20, T=3, B=9), row=4)


@pytest.mark.parametrize("product", PRODUCTS)
def test_too_large(kernels, product):
    case = make_case(product, "lstm", largest_hidden(product, "lstm") + 1, B=1, T=1)
    with pytest.raises(AssertionError, match="invalid configuration"):
        Emulated(kernels, product, case, Data(case), make_module(torch.nn, case))


@pytest.mark.parametrize("shape", [(0, 40, 40), (1, 33, 33), (2, 33, 33), (2, 40, 17)], ids=str)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitized(sanitizer, shape):
    """No access outside of an array or of shared memory, aligned vectors (ASan, UBSan), no race (TSan)."""
    program = emulator_build.build([emulator_build.program("sanitize_cta.cpp")], sanitizer=sanitizer)
    for rows, seed in (("dense", 1), ("padded", 2), ("packed", 3), ("empty", 4)):
        result = emulator_build.run(program, *shape, 3, 3, rows, seed)
        assert result.returncode == 0 and not result.stderr, result.stderr


def resources(kernels, product: str, kind: str, H: int, backward: bool) -> tuple[int, int]:
    """Threads and bytes of dynamic shared memory of the kernel that serves H."""
    cell = kind.removesuffix("_projected")
    threads, shared_bytes = ctypes.c_int(), ctypes.c_int()
    sizes = (ctypes.c_int64 * 8)(cuda_layer.CELLS[cell], 0, H, H if cell == kind else 1, 1, 1, 1, 1)
    kernels.library.rnnfast_cta_resources(
        cuda_layer.PRODUCTS[product], sizes, int(backward), ctypes.byref(threads), ctypes.byref(shared_bytes)
    )
    return threads.value, shared_bytes.value


def kernel_name(product: str, kind: str, H: int, backward: bool) -> str:
    cell = cuda_layer.CELLS[kind.removesuffix("_projected")]
    arguments = f"(rnnfast::cuda::Arithmetic){cuda_layer.PRODUCTS[product]}, (rnnfast::Cell){cell}, {H}"
    name = "cta_backward" if backward else "cta_forward"
    return f"{name}<{arguments}, {'true' if kind.endswith('_projected') else 'false'}>"


# Exact LSTM of H 64 with a projection: both parts of three quarters of all weights lie in shared memory.
TOO_LARGE = {("sm_80", kernel_name("exact", "lstm_projected", 64, True))}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", list(cuda_resources.SHARED_BYTES))
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("direction", PASSES)
def test_resources(kernels, product, direction, arch):
    """Every kernel fits an SM: no spills, registers for all its threads, shared memory that the architecture has."""
    source = instance("cta", product, direction)
    found = cuda_resources.compile_kernels(source, arch)
    backward, expected = direction == "backward", set()
    for kind in KINDS:
        for H in (32, 64, 96, 128, 256):
            if H > largest_hidden(product, kind) or kind == "rnn_relu" or (H == 96 and product not in ("bf16", "f16")):
                continue
            name = kernel_name(product, kind, H, backward)
            kernel = next(k for k in found if name in k.kernel)
            expected.add(kernel)
            threads, shared_bytes = resources(kernels, product, kind, H, backward)
            assert kernel.spilled_bytes == 0, kernel
            assert kernel.registers * threads <= cuda_resources.REGISTER_FILE, kernel
            fits = kernel.shared_bytes + shared_bytes <= cuda_resources.SHARED_BYTES[arch]
            assert fits == ((arch, name) not in TOO_LARGE), (kernel, shared_bytes)
    assert set(found) == expected
