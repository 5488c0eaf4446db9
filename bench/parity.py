"""The parity check that comes before every timing: no speed-up is reported on a wrong result.

The rule and its numbers are the tests' own (tests/support/tolerances.py): against float64, rnnfast's error may be at
most 2 times torch's (3 times for gradients) plus a rounding floor, below a ceiling per dtype.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from .cases import DTYPES, GATES, Case
from .providers import Problem, Runner


def _load_tolerances() -> ModuleType:
    """tests/support/tolerances.py by its path: an installed package named "tests" must not come in its place."""
    path = Path(__file__).parent.parent / "tests" / "support" / "tolerances.py"
    spec = importlib.util.spec_from_file_location("rnnfast_tolerances", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tolerances = _load_tolerances()


@dataclass(frozen=True)
class Parity:
    """Errors relative to max|reference| of the result that comes nearest to its limit."""

    result: str
    err: float
    torch_err: float
    limit: float
    failure: str | None  # what broke the rule, in one line


@functools.lru_cache(maxsize=2)
def reference(case: Case) -> dict[str, Tensor]:
    """Every result of the case by torch.nn in float64, on the same rounded numbers."""
    return {name: result.detach() for name, result in Runner(nn, Problem(case).double()).run().items()}


def check(case: Case, of_torch: dict[str, Tensor], of_rnnfast: dict[str, Tensor]) -> Parity:
    """Holds all results of a case against the rule; the reference is shared by cases that differ in threads only."""
    truth = reference(replace(case, threads=1))
    return judge(truth, of_torch, of_rnnfast, working_dtype(case), longest_sums(case))


def check_ceiling(case: Case, results: dict[str, Tensor]) -> str | None:
    """What is wrong with another provider's results, or None: each must come within the dtype's ceiling of float64."""
    truth = reference(replace(case, threads=1))
    ceiling = tolerances.CEILING[working_dtype(case)]
    for name, result in results.items():
        if result.shape != truth[name].shape:
            return f"{name}: shape {tuple(result.shape)}, expected {tuple(truth[name].shape)}"
        error = tolerances.max_error(result, truth[name]) / (float(truth[name].abs().max()) or 1.0)
        if error > ceiling:
            return f"{name}: error {error:.1e} > {ceiling:.0e} of the largest value"
    return None


def longest_sums(case: Case) -> tuple[int, int]:
    """How many terms stand behind an output and behind a gradient: their rounding is part of what the rule allows."""
    return case.input_size + case.hidden_size, max(sum(case.lengths()), GATES[case.cell] * case.hidden_size)


def working_dtype(case: Case) -> torch.dtype:
    """The dtype whose rounding counts: TensorFloat-32, torch's default for GPU layers in float32, has float16's."""
    dtype = DTYPES[case.dtype]
    tf32 = case.device == "cuda" and dtype is torch.float32 and torch.backends.cudnn.rnn.fp32_precision == "tf32"
    return torch.float16 if tf32 else dtype


def judge(
    truth: dict[str, Tensor],
    of_torch: dict[str, Tensor],
    of_rnnfast: dict[str, Tensor],
    dtype: torch.dtype,
    terms: tuple[int, int],
) -> Parity:
    """The rule for named results; gradients are named "grad_*". `terms`: see longest_sums."""
    failures, worst = [], (-1.0,)
    for name, expected in truth.items():
        scale = float(expected.abs().max()) or 1.0
        error = tolerances.max_error(of_rnnfast[name], expected)
        torch_error = tolerances.max_error(of_torch[name], expected)
        gradient = name.startswith("grad_")
        limit = tolerances.allowed_error(expected, torch_error, dtype, gradient, terms[gradient])
        failures.append(tolerances.violation(name, of_rnnfast[name], of_torch[name], expected, dtype, terms[gradient]))
        worst = max(worst, (error / limit if limit else 0.0, name, error / scale, torch_error / scale, limit / scale))
    return Parity(*worst[1:], next(filter(None, failures), None))


def check_curve(truth: list[float], of_torch: list[float], of_rnnfast: list[float]) -> Parity:
    """The same rule for loss curves of trainings that differ only in who computes; `truth` is the one in float64.

    The largest deviation of any step counts, with the factor for gradients: every loss but the first depends on them.
    """
    expected, torch_curve, curve = (torch.tensor(c, dtype=torch.float64) for c in (truth, of_torch, of_rnnfast))
    error, torch_error = tolerances.max_error(curve, expected), tolerances.max_error(torch_curve, expected)
    limit = tolerances.allowed_error(expected, torch_error, torch.float32, gradient=True)
    failure = (
        None if error <= limit else f"loss curve: deviation {error:.3e} > {limit:.3e} allowed (torch {torch_error:.3e})"
    )
    scale = float(expected.abs().max())
    return Parity("loss curve", error / scale, torch_error / scale, limit / scale, failure)
