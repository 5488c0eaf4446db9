"""Tier cluster of csrc/cuda in the emulator: the kernels' own source against the float64 oracle, by the parity rule."""

from __future__ import annotations

import ctypes
import itertools
import shutil

import pytest
from emulator import build as emulator_build
from support import cuda_layer, cuda_resources
from support.cuda_tiers import (
    PRODUCTS,
    RAGGED,
    assert_same_bits,
    build_kernels,
    check,
    check_nan_stays_in_its_sequence,
    make_case,
    options_in_turn,
    results_of_variants,
)

from kernel_build.sources import PASSES, instance

pytestmark = pytest.mark.quick(0)  # it compiles all kernels of its tier; test_cuda_ops.py runs them, compiled before

KINDS = ("rnn_tanh", "rnn_relu", "gru", "lstm", "lstm_projected")


def padded_sizes(product: str, kind: str) -> tuple[int, ...]:
    """What cluster_tile of csrc/cuda/tiers/cluster/cluster.h pads H to."""
    if product in ("bf16", "f16"):
        sizes = (384, 512) if kind.startswith("rnn") else (192, 256, 384, 512)
    else:
        sizes = (192, 256) if kind.startswith("rnn") else (128, 192, 256)
    return tuple(size for size in sizes if size != 192) if kind == "lstm_projected" else sizes


@pytest.fixture(scope="module")
def kernels() -> cuda_layer.Kernels:
    return build_kernels("cluster")


def sizes():
    """Sizes of every kernel, with the other properties in turn; their counts share no factor with each other's."""
    turns = options_in_turn((3, 1, 9), (4, 3, 3, 1, 2))
    for product, kind in itertools.product(PRODUCTS, KINDS):
        both = product in ("bf16", "exact")  # float16 and TF32 differ from those in an instruction
        all_sizes = dict.fromkeys((5, 100, 130, 192, 200, 256, 300, 511) if both else (130, 255, 400))
        if kind == "lstm_projected":
            all_sizes = {5: 1, 100: 99, 130: 7, 256: 255, 300: 101, 511: 498} if both else {130: 129, 255: 30, 400: 160}
        for H, P in all_sizes.items():
            if H <= padded_sizes(product, kind)[-1]:
                options, misaligned = next(turns)
                if H >= 200:
                    options |= {"B": min(options["B"], 3), "T": min(options["T"], 3), "bidirectional": False}
                yield product, kind, H, P, options, misaligned


@pytest.mark.parametrize(
    ("product", "kind", "H", "P", "options", "misaligned"),
    [pytest.param(*case, id="-".join(map(str, case[:3]))) for case in sizes()],
)
def test_sizes(kernels, product, kind, H, P, options, misaligned):
    check(kernels, product, make_case(product, kind, H, P, **options), misaligned=misaligned, in_place=H % 4 == 0)


@pytest.mark.parametrize("ragged", RAGGED)
@pytest.mark.parametrize("kind", KINDS)
def test_rows(kernels, kind, ragged):
    """Both directions, more than one batch tile, every form of rows; with and without initial states."""
    for seed, product, hx in ((1, "bf16", True), (2, "tf32", False)):
        case = make_case(product, kind, 20, T=4, B=10, bidirectional=True, ragged=ragged, hx=hx, seed=seed)
        check(kernels, product, case, seed=seed)


@pytest.mark.parametrize(
    ("kind", "loss"),
    [*itertools.product(("gru", "lstm", "lstm_projected"), [("output",), ("h_n",)]), ("lstm_projected", ("c_n",))],
)
def test_missing_gradients(kernels, kind, loss):
    check(kernels, "bf16", make_case("bf16", kind, 20, T=3, B=3, loss=loss))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", ["bf16", "exact"])
def test_repeats_bit_for_bit(kernels, product, kind):
    """Whatever the order of warps and arrivals, the alignment, and where gates are saved."""
    case = make_case(product, kind, 130, T=3, B=3, ragged="unsorted")
    assert_same_bits(results_of_variants(kernels, product, case))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_sequence(kernels, kind):
    check_nan_stays_in_its_sequence(kernels, make_case("bf16", kind, 130, T=3, B=9), row=4)


@pytest.mark.parametrize(("kind", "H", "P"), [("lstm", 513, 513), ("lstm", 513, 5), ("gru", 130, 129), ("lstm", 20, 0)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_refused(kernels, direction, kind, H, P):
    """By the launch, before it looks at any pointer."""
    with pytest.raises(AssertionError, match="invalid"):
        kernels.call(direction, "bf16", [cuda_layer.CELLS[kind], 0, H, P, 1, 1, 1, 1], [None] * 20)


def layer_sizes(kind: str, H: int):
    """The sizes of a layer with one row, as the C entry points take them."""
    cell = kind.removesuffix("_projected")
    return (ctypes.c_int64 * 8)(cuda_layer.CELLS[cell], 0, H, H if cell == kind else 1, 1, 1, 1, 1)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
def test_fits(kernels, product, backward):
    for kind in KINDS:
        for H in padded_sizes(product, kind):
            sizes = layer_sizes(kind, H)
            assert kernels.library.rnnfast_cluster_fits(cuda_layer.PRODUCTS[product], sizes, int(backward)) == 1


@pytest.mark.parametrize("shape", [(0, 33, 33), (1, 33, 33), (2, 100, 100), (2, 100, 39)], ids=str)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitized(sanitizer, shape):
    """No access outside of an array or of shared memory, aligned vectors (ASan, UBSan), no race (TSan)."""
    program = emulator_build.build([emulator_build.program("sanitize_cluster.cpp")], sanitizer=sanitizer)
    for rows, seed in (("dense", 1), ("padded", 2), ("packed", 3), ("empty", 4)):
        result = emulator_build.run(program, *shape, 3, 3, rows, seed)
        assert result.returncode == 0 and not result.stderr, result.stderr


def resources(kernels, product: str, kind: str, H: int, backward: bool) -> tuple[int, int]:
    """Threads and bytes of dynamic shared memory of the kernel that serves H."""
    threads, shared_bytes = ctypes.c_int(), ctypes.c_int()
    found = ctypes.byref(threads), ctypes.byref(shared_bytes)
    kernels.library.rnnfast_cluster_resources(cuda_layer.PRODUCTS[product], layer_sizes(kind, H), int(backward), *found)
    return threads.value, shared_bytes.value


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("direction", PASSES)
def test_resources(kernels, product, direction, arch):
    """Every kernel fits an SM: no spills, registers for all its threads, shared memory that the architecture has."""
    source = instance("cluster", product, direction)
    found = cuda_resources.compile_kernels(source, arch)
    backward, expected = direction == "backward", set()
    name = "cluster_backward" if backward else "cluster_forward"
    for kind in ("rnn_tanh", "gru", "lstm", "lstm_projected"):
        cell = kind.removesuffix("_projected")
        for H in padded_sizes(product, kind):
            product_number, cell_number = cuda_layer.PRODUCTS[product], cuda_layer.CELLS[cell]
            arguments = f"(rnnfast::cuda::Arithmetic){product_number}, (rnnfast::Cell){cell_number}, {H}"
            arguments += ", false" if cell == kind else ", true"
            kernel = next(k for k in found if f"{name}<{arguments}>" in k.kernel)
            expected.add(kernel)
            threads, shared_bytes = resources(kernels, product, kind, H, backward)
            print(arch, name, product, kind, H, threads, kernel.registers, shared_bytes)
            assert kernel.spilled_bytes == 0, kernel
            assert kernel.registers * threads <= cuda_resources.REGISTER_FILE, kernel
            assert kernel.shared_bytes + shared_bytes <= cuda_resources.SHARED_BYTES[arch], (kernel, shared_bytes)
    assert set(found) == expected
