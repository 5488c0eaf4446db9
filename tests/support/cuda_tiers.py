"""What the tests of the tiers of csrc/cuda share: a tier's kernels in the emulator, cases, and the questions to all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from emulator import build as emulator_build

from kernel_build.sources import CUDA_KERNEL_SOURCES
from support import cuda_layer
from support.harness import Case, Data, conditioning, make_module, run, run_oracle, run_stock, run_values
from support.tolerances import assert_parity

PRODUCTS = tuple(cuda_layer.PRODUCTS)
RAGGED = (None, "lengths", "sorted", "unsorted")


def build_kernels(tier: str) -> cuda_layer.Kernels:
    """All shipped kernels of a tier."""
    kernels = [source for source in CUDA_KERNEL_SOURCES if f"/tiers/{tier}/" in source.path]
    sources = [emulator_build.program(f"run_{tier}.cpp"), *kernels]
    return cuda_layer.Kernels(str(emulator_build.build(sources, shared=True)), tier)


def options_in_turn(batches: tuple[int, ...], steps: tuple[int, ...]) -> Iterator[tuple[dict, bool]]:
    """Options of a case, and whether its tensors are misaligned, without end.

    The counts of the choices share no factor with each other's where `batches` and `steps` see to it.
    """
    names = ("B", "T", "bidirectional", "ragged", "hx")
    choices = (batches, steps, (True, False), RAGGED + RAGGED[:3], (True,) * 7 + (False,) * 4)
    turns = zip(*map(itertools.cycle, choices), strict=False)
    for values, misaligned in zip(turns, itertools.cycle((False,) * 7 + (True,) * 6), strict=False):
        yield dict(zip(names, values, strict=True)), misaligned


def make_case(product: str, kind: str, H: int, P: int | None = None, **options) -> Case:
    """`P`: of a projected kind; 0.4 H without."""
    # tf32 has the mantissa of float16: its numbers are float16's, and so is the rule that it must obey.
    dtype = torch.float16 if product == "tf32" else cuda_layer.DTYPES[product]
    cell = kind.removesuffix("_projected")
    proj = (P or max(1, H * 2 // 5)) if cell != kind else 0
    return Case(cell=cell, H=H, proj=proj, I=5, dtype=dtype, **options)


class Emulated:
    """A case's results through the kernels; `inferred` without gradients."""

    def __init__(self, kernels, product, case, data, module, seed=1, misaligned=False, in_place=True):
        dtype = cuda_layer.DTYPES[product]
        parameters = {name: p.detach().to(dtype) for name, p in module.named_parameters()}
        kernels.set_seed(seed)
        options = {"misaligned": misaligned, "in_place": in_place}
        forward = cuda_layer.forward(kernels, product, case, data.lengths, parameters, **options)
        results, inferred = run(case, data, forward, parameters, dtype), run_values(case, data, forward, dtype)
        self.results, self.inferred = ({n: t.to(case.dtype) for n, t in d.items()} for d in (results, inferred))


def check(kernels, product: str, case: Case, **options) -> None:
    data, stock = Data(case), make_module(torch.nn, case)
    reference, of_torch = run_oracle(case, data, stock), run_stock(case, data, stock)
    actual = Emulated(kernels, product, case, data, stock, **options)
    assert_parity(
        actual.results,
        of_torch,
        reference,
        case.dtype,
        value_terms=case.I + case.H,
        gradient_terms=max(case.T * case.B, cuda_layer.GATES[case.cell] * case.H),
        conditioning=lambda: conditioning(case, data, stock),
    )
    for name, value in actual.inferred.items():  # one kernel: what it saves does not change what it computes
        assert torch.equal(value, actual.results[name]), name


def results_of_variants(kernels, product: str, case: Case) -> list[dict[str, torch.Tensor]]:
    """The same case with another order of warps, another alignment, and gates saved elsewhere."""
    data, stock = Data(case), make_module(torch.nn, case)
    variants = ({"seed": 1}, {"seed": 2}, {"seed": 3, "misaligned": True}, {"seed": 4, "in_place": False})
    return [Emulated(kernels, product, case, data, stock, **options).results for options in variants]


def assert_same_bits(results: list[dict[str, torch.Tensor]]) -> None:
    first, *others = results
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


def check_nan_stays_in_its_sequence(kernels, case: Case, row: int) -> None:
    """`case`: padded, of bfloat16, more rows than `row`."""
    data, stock = Data(case), make_module(torch.nn, case)
    clean = Emulated(kernels, "bf16", case, data, stock).inferred
    data.input[1, row] = torch.nan
    poisoned = Emulated(kernels, "bf16", case, data, stock).inferred
    rest = torch.arange(case.B) != row
    assert poisoned["output"][1:, row].isnan().all()
    for name, value in clean.items():
        assert torch.equal(value[:, rest], poisoned[name][:, rest]), name
