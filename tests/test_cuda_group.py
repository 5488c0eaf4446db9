"""Tier group of csrc/cuda in the emulator: the kernels' own source against the float64 oracle, by the parity rule."""

from __future__ import annotations

import ctypes
import itertools
import shutil

import cuda_layer
import cuda_resources
import pytest
import torch
from cuda_tiers import (
    EMULATOR,
    PRODUCTS,
    RAGGED,
    ROOT,
    Emulated,
    assert_same_bits,
    build_kernels,
    check,
    make_case,
    options_in_turn,
    results_of_variants,
)
from emulator import build as emulator_build
from harness import Data, make_module

KINDS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
SEEDS = (1, 2)  # of the emulator's schedule
RESIDENT_BLOCKS = 1 << 20  # of the pretended device, unless a test says otherwise


@pytest.fixture(scope="module")
def kernels() -> cuda_layer.Kernels:
    return build_kernels("group")


def sizes():
    """Sizes around those of a slice of units and of a warp's depth, with the other properties in turn."""
    turns = options_in_turn((9, 1, 3, 17, 8), (4, 2, 1))
    for product, kind in itertools.product(PRODUCTS, KINDS):
        for H in (1, 15, 33, 64, 96):
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
    results = results_of_variants(kernels, product, case)
    members = 2 if kind.startswith("rnn") else 4
    try:
        for blocks in (members, 2 * members + 1):
            kernels.library.rnnfast_group_device(blocks)
            results.append(Emulated(kernels, product, case, Data(case), make_module(torch.nn, case)).results)
    finally:
        kernels.library.rnnfast_group_device(RESIDENT_BLOCKS)
    assert_same_bits(results)


def test_refuses_a_small_device(kernels):
    """A group that does not fit the device is refused before anything waits."""
    case = make_case("bf16", "lstm", 50, T=2, B=1)
    try:
        kernels.library.rnnfast_group_device(3)
        with pytest.raises(AssertionError, match="too many blocks in cooperative launch"):
            Emulated(kernels, "bf16", case, Data(case), make_module(torch.nn, case))
    finally:
        kernels.library.rnnfast_group_device(RESIDENT_BLOCKS)


@pytest.mark.parametrize(("product", "kind", "H"), [("bf16", "lstm_projected", 50), ("exact", "gru", 513)])
def test_refuses_what_no_kernel_serves(kernels, product, kind, H):
    case = make_case(product, kind, H, T=1, B=1)
    with pytest.raises(AssertionError, match="invalid configuration"):
        Emulated(kernels, product, case, Data(case), make_module(torch.nn, case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_nan_is_a_value(kernels, product, kind):
    """The bits that say "not there yet" are a NaN, and a NaN with those bits reaches the other units like a number."""
    case = make_case(product, kind, 40, T=3, B=2)
    dtype = cuda_layer.DTYPES[product]
    parameters = {name: p.detach().to(dtype) for name, p in make_module(torch.nn, case).named_parameters()}
    h = torch.zeros(1, 2, 40, dtype=dtype)
    h[0, 1] = torch.full((40,), -1, dtype=torch.int16 if dtype.itemsize == 2 else torch.int32).view(dtype)
    c = torch.zeros_like(h)
    options = {"misaligned": False, "in_place": True}
    run = cuda_layer.forward(kernels, product, case, None, parameters, **options)
    with torch.no_grad():
        output = run(torch.zeros(3, 2, case.I, dtype=dtype), (h, c) if kind == "lstm" else h)[0]
    assert output[:, 1].isnan().all() and output[:, 0].isfinite().all()


def sanitize(sanitizer: str | None, kind: str, rows: str, seed: int, members: str = "all"):
    program = emulator_build.build([EMULATOR / "sanitize_group.cpp"], sanitizer=sanitizer)
    return emulator_build.run(program, cuda_layer.CELLS[kind], 40, 3, 3, rows, seed, members)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(sanitizer, kind):
    for rows, seed in (("dense", 1), ("padded", 2), ("packed", 3)):
        result = sanitize(sanitizer, kind, rows, seed)
        assert result.returncode == 0 and not result.stderr, result.stderr


@pytest.mark.parametrize("members", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_missing_member_is_an_error(kind, members):
    """A CTA that never runs ends the launch: the others do not wait for ever."""
    result = sanitize(None, kind, "dense", 1, members)
    assert result.returncode == 1 and "spin budget exceeded" in result.stderr, result.stderr


def resources(kernels, product: str, kind: str, H: int, backward: bool) -> list[int]:
    """Threads and bytes of shared memory of a CTA, CTAs of a group, bytes of the exchange: of one sequence and step."""
    sizes = (ctypes.c_int64 * 8)(cuda_layer.CELLS[kind], 0, H, H, 1, 1, 1, 1)
    result = (ctypes.c_int64 * 4)()
    kernels.library.rnnfast_group_resources(cuda_layer.PRODUCTS[product], sizes, int(backward), result)
    return list(result)


def kernel_sizes(product: str) -> list[int]:
    """Padded sizes of the shipped kernels; the last one is group_largest_hidden of csrc/cuda/tier_group.h."""
    largest = {"bf16": 2048, "f16": 2048, "tf32": 1024, "exact": 512}[product]
    return [H for H in (256, 512, 768, 1024, 1536, 2048) if H <= largest]


def kernel_name(product: str, kind: str, H: int, backward: bool) -> str:
    arguments = f"(rnnfast::cuda::Product){cuda_layer.PRODUCTS[product]}, (rnnfast::Cell){cuda_layer.CELLS[kind]}"
    return f"{'group_backward' if backward else 'group_forward'}<{arguments}, {H}, 8>"


# Half of the weights, or more, lie in shared memory. Of the 16-bit one's 128 CTAs no GPU of sm_80 holds all at once.
TOO_LARGE = {
    ("sm_80", kernel_name(product, "lstm", H, backward))
    for product, H in (("bf16", 2048), ("f16", 2048), ("tf32", 1024), ("exact", 512))
    for backward in (False, True)
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", list(cuda_resources.SHARED_BYTES))
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_resources(kernels, product, direction, arch):
    """Every kernel fits an SM: no spills, registers for all its threads, shared memory that the architecture has."""
    source = ROOT / "csrc" / "cuda" / f"inst_group_{product}_{direction}.cu"
    found = {k.kernel: k for k in cuda_resources.compile_kernels(source, arch)}
    expected = {name for name in found if "clear_exchange" in name}
    for kind, H in itertools.product(("rnn_tanh", "gru", "lstm"), kernel_sizes(product)):
        name = kernel_name(product, kind, H, direction == "bwd")
        (full_name,) = (k for k in found if name in k)
        kernel = found[full_name]
        expected.add(full_name)
        threads, shared_bytes, *_ = resources(kernels, product, kind, H, direction == "bwd")
        fits = kernel.shared_bytes + shared_bytes <= cuda_resources.SHARED_BYTES[arch]
        assert fits == ((arch, name) not in TOO_LARGE), (kernel, shared_bytes)
        assert kernel.spilled_bytes == 0 or not fits, kernel
        assert kernel.registers * threads <= cuda_resources.REGISTER_FILE, kernel
    assert set(found) == expected
