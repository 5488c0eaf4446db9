"""Tier group of csrc/cuda in the emulator: the kernels' own source against the float64 oracle, by the parity rule."""

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
    make_case,
    options_in_turn,
    results_of_variants,
)
from support.harness import Data, make_module

from kernel_build.sources import PASSES, instance

pytestmark = pytest.mark.quick(0)  # it compiles all kernels of its tier; test_cuda_ops.py runs them, compiled before

KINDS = ("rnn_tanh", "rnn_relu", "gru", "lstm", "lstm_projected")
SEEDS = (1, 2)  # of the emulator's schedule
RESIDENT_BLOCKS = 1 << 20  # of the pretended device, unless a test says otherwise


@pytest.fixture(scope="module")
def kernels() -> cuda_layer.Kernels:
    return build_kernels("group")


def sizes():
    """Sizes around those of a slice of units and of a warp's depth, with the other properties in turn."""
    turns = options_in_turn((9, 1, 3, 17, 8), (4, 2, 1))
    for product, kind in itertools.product(PRODUCTS, KINDS):
        for H, P in ((2, 1), (15, 14), (33, 16), (64, 63), (96, 41)):
            options, misaligned = next(turns)
            projected = kind == "lstm_projected"
            yield product, kind, H if projected or H > 2 else 1, {**options, "P": P}, misaligned


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


@pytest.mark.parametrize(
    ("product", "H", "P"),
    [("bf16", 300, 120), ("bf16", 1040, 513), ("f16", 300, 120), ("tf32", 300, 120)]
    + [("exact", 250, 100), ("exact", 300, 120), ("exact", 300, 140)],
)
def test_shipped_projected_kernels(kernels, product, H, P):
    """The same of a projection: every size that a kernel is compiled for, of exact products; the largest of bf16."""
    check(kernels, product, make_case(product, "lstm_projected", H, P, T=2, B=3))


@pytest.mark.parametrize("loss", [("output",), ("h_n",), ("c_n",)])
@pytest.mark.parametrize("kind", ["gru", "lstm", "lstm_projected"])
def test_missing_gradients(kernels, kind, loss):
    """Null pointers in place of the gradients that the loss does not have."""
    if kind != "gru" or loss != ("c_n",):
        check(kernels, "bf16", make_case("bf16", kind, 20, T=3, B=3, loss=loss))


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


@pytest.mark.parametrize(
    ("product", "kind", "H", "P"),
    [
        ("exact", "gru", 513, None),
        ("exact", "lstm_projected", 513, 5),
        ("exact", "lstm_projected", 300, 257),
        ("bf16", "lstm_projected", 2048, 1025),
    ],
)
def test_refuses_what_no_kernel_serves(kernels, product, kind, H, P):
    case = make_case(product, kind, H, P, T=1, B=1)
    with pytest.raises(AssertionError, match="invalid configuration"):
        Emulated(kernels, product, case, Data(case), make_module(torch.nn, case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_nan_is_a_value(kernels, product, kind):
    """The bits that say "not there yet" are a NaN, and a NaN with those bits reaches the other units like a number."""
    case = make_case(product, kind, 40, T=3, B=2)
    dtype, P = cuda_layer.DTYPES[product], case.proj or case.H
    parameters = {name: p.detach().to(dtype) for name, p in make_module(torch.nn, case).named_parameters()}
    missing = torch.full((P,), -1, dtype=torch.int16 if dtype.itemsize == 2 else torch.int32).view(dtype)
    x, c = torch.zeros(3, 2, case.I, dtype=dtype), torch.zeros(1, 2, case.H, dtype=dtype)
    forward = cuda_layer.forward(kernels, product, case, None, parameters, misaligned=False, in_place=True)

    def output_from(h):
        return forward(x, (h, c) if case.cell == "lstm" else h)[0]

    h = torch.zeros(1, 2, P, dtype=dtype, requires_grad=True)
    output = output_from(h)
    grad_output = torch.zeros_like(output)
    grad_output[:, 1] = missing
    (grad_h,) = torch.autograd.grad(output, h, grad_output)
    with torch.no_grad():
        h[0, 1] = missing
        output = output_from(h)
    for result in (output, grad_h):
        assert result[:, 1].isnan().all() and result[:, 0].isfinite().all()


def sanitize(sanitizer: str | None, kind: str, rows: str, seed: int, members: str = "all"):
    """Of a projection only some members own units of h; units of others lie beyond the padded P."""
    program = emulator_build.build([emulator_build.program("sanitize_group.cpp")], sanitizer=sanitizer)
    cell = kind.removesuffix("_projected")
    H, P = (40, 40) if cell == kind else (70, 17)
    return emulator_build.run(program, cuda_layer.CELLS[cell], H, P, 3, 3, rows, seed, members)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "lstm_projected"])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(sanitizer, kind):
    # A projection has more CTAs, which take TSan longer, and asks nothing new of rows.
    rows_and_seeds = ("dense", 1), ("padded", 2), ("packed", 3), ("empty", 4)
    for rows, seed in rows_and_seeds[2:3] if kind == "lstm_projected" else rows_and_seeds:
        result = sanitize(sanitizer, kind, rows, seed)
        assert result.returncode == 0 and not result.stderr, result.stderr


@pytest.mark.parametrize("members", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "lstm_projected"])
def test_missing_member_is_an_error(kind, members):
    """A CTA that never runs ends the launch: the others do not wait for ever."""
    result = sanitize(None, kind, "dense", 1, members)
    assert result.returncode == 1 and "spin budget exceeded" in result.stderr, result.stderr


def resources(kernels, product: str, kind: str, H: int, P: int, backward: bool) -> list[int]:
    """Threads and bytes of shared memory of a CTA, CTAs of a group, bytes of the exchange: of one sequence and step."""
    cell = kind.removesuffix("_projected")
    # With P = H there is no projection; another unit less is as large.
    sizes = (ctypes.c_int64 * 8)(cuda_layer.CELLS[cell], 0, H, H if cell == kind else min(P, H - 1), 1, 1, 1, 1)
    result = (ctypes.c_int64 * 4)()
    kernels.library.rnnfast_group_resources(cuda_layer.PRODUCTS[product], sizes, int(backward), result)
    return list(result)


LARGEST = {
    "bf16": 2048,
    "f16": 2048,
    "tf32": 1024,
    "exact": 512,
}  # group_largest_hidden of csrc/cuda/tiers/group/group.h


def kernel_sizes(product: str, kind: str, backward: bool) -> list[tuple[int, int]]:
    """Padded H and P of the shipped kernels; P is 0 without a projection."""
    largest = LARGEST[product]
    half, quarter = largest // 2, largest // 4
    if kind == "lstm_projected":
        return [(half, half), (largest, half)] if backward else [(half, quarter), (largest, quarter), (largest, half)]
    return [(H, 0) for H in (256, 512, 768, 1024, 1536, 2048) if H <= largest]


def kernel_name(product: str, kind: str, H: int, P: int, backward: bool) -> str:
    cell = cuda_layer.CELLS[kind.removesuffix("_projected")]
    arguments = f"(rnnfast::cuda::Arithmetic){cuda_layer.PRODUCTS[product]}, (rnnfast::Cell){cell}, {H}, {P}, 8"
    return f"{'group_backward' if backward else 'group_forward'}<{arguments}>"


# Half of the weights, or more, lie in shared memory. Of the 16-bit ones' 128 CTAs no GPU of sm_80 holds all at once.
TOO_LARGE = {
    ("sm_80", kernel_name(product, kind, H, P, backward))
    for product, H in LARGEST.items()
    for kind, P, backward in (("lstm", 0, False), ("lstm", 0, True), ("lstm_projected", H // 2, True))
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", list(cuda_resources.SHARED_BYTES))
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("direction", PASSES)
def test_resources(kernels, product, direction, arch):
    """Every kernel fits an SM: no spills, registers for all its threads, shared memory that the architecture has."""
    source = instance("group", product, direction)
    found = {k.kernel: k for k in cuda_resources.compile_kernels(source, arch)}
    expected = {name for name in found if "clear_exchange" in name}
    backward = direction == "backward"
    for kind in ("rnn_tanh", "gru", "lstm", "lstm_projected"):
        for H, P in kernel_sizes(product, kind, backward):
            name = kernel_name(product, kind, H, P, backward)
            (full_name,) = (k for k in found if name in k)
            kernel = found[full_name]
            expected.add(full_name)
            threads, shared_bytes, *_ = resources(kernels, product, kind, H, P, backward)
            fits = kernel.shared_bytes + shared_bytes <= cuda_resources.SHARED_BYTES[arch]
            assert fits == ((arch, name) not in TOO_LARGE), (kernel, shared_bytes)
            assert kernel.spilled_bytes == 0 or not fits, kernel
            assert kernel.registers * threads <= cuda_resources.REGISTER_FILE, kernel
    assert set(found) == expected
