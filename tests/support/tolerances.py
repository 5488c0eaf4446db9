"""The one parity rule of the tests (and of the GPU check): how far rnnfast may be from the truth.

Truth is a float64 reference on the very same (already rounded) numbers. With max-norm errors,

    err(rnnfast) <= factor * err(torch, same dtype) + floor      factor 2, for gradients 3
    err(rnnfast) <= ceiling * max|reference|

`floor` is what rounding alone costs: storing the result in its dtype; a plain sum of n terms in the accumulation dtype,
whose error walks as sqrt(n); and, measured where the rest does not suffice, how far the truth itself moves when every
activation is off by a rounding error (harness.conditioning): a gradient of few numbers may cancel to nothing, and then
no ceiling below that holds either. Without a floor a torch that sums in blocks, or is exact by luck on three
numbers, would fail everybody else. Ceilings are tightened by measurement and never loosened.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

FACTOR_VALUE = 2.0
FACTOR_GRADIENT = 3.0
STORE_ULPS = 2.0
# Random walk: rms error 0.2 sqrt(n) ulp of the typical sum; 4 sigma, in a tensor whose maximum is 3 to 4 times that.
SUM_ULPS = 0.25
CEILING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels compute in on tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def max_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """max|actual - reference| in float64; infinite where one is NaN or infinite and the other is not the same."""
    if actual.numel() == 0:
        return 0.0
    actual, reference = actual.detach().double(), reference.detach().double()
    same = (actual == reference) | (actual.isnan() & reference.isnan())
    error = torch.where(same, torch.zeros_like(reference), (actual - reference).abs())
    return float(error.nan_to_num(nan=torch.inf).max())


def allowed_error(
    reference: torch.Tensor, torch_error: float, dtype: torch.dtype, gradient: bool, terms: int = 1, moved: float = 0.0
) -> float:
    """The largest error that the rule permits.

    `reference` is the truth, `terms` the length of the sums behind it, `moved` how far rounding was seen to move it.
    """
    if reference.numel() == 0:
        return 0.0
    # Below the smallest normal number a dtype has a fixed spacing.
    scale = max(float(reference.detach().abs().max()), torch.finfo(dtype).tiny)
    floor = STORE_ULPS * torch.finfo(dtype).eps + SUM_ULPS * terms**0.5 * torch.finfo(accumulation(dtype)).eps
    floor = floor * scale + moved
    if dtype == torch.float64:  # the reference rounds just like torch, so torch's own error does not show
        torch_error = max(torch_error, floor)
    factor = FACTOR_GRADIENT if gradient else FACTOR_VALUE
    return min(factor * torch_error + floor, max(CEILING[dtype] * scale, moved))


def violation(
    name: str,
    actual: torch.Tensor,
    of_torch: torch.Tensor,
    reference: torch.Tensor,
    dtype: torch.dtype,
    terms: int = 1,
    moved: float = 0.0,
) -> str | None:
    """None where `actual` obeys the rule; otherwise a line that says by how much not. Gradients are named "grad_*"."""
    if actual.shape != reference.shape:
        return f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    if actual.dtype != of_torch.dtype:
        return f"{name}: dtype {actual.dtype}, torch gives {of_torch.dtype}"
    error, torch_error = max_error(actual, reference), max_error(of_torch, reference)
    allowed = allowed_error(reference, torch_error, dtype, name.startswith("grad_"), terms, moved)
    if error <= allowed:
        return None
    scale = float(reference.abs().max())
    measured = f"torch {torch_error:.3e}, max|reference| {scale:.3e}, {dtype}"
    return f"{name}: error {error:.3e} > {allowed:.3e} allowed ({measured})"


def assert_parity(
    actual: dict[str, torch.Tensor],
    of_torch: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    value_terms: int = 1,
    gradient_terms: int = 1,
    conditioning: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Applies the rule to each tensor of `reference`: outputs, states, gradients ("grad_*"). All have the same keys.

    `value_terms` and `gradient_terms`: the longest sum behind an output (input_size + hidden_size) and behind a
    gradient (seq_len * batch for a weight's, gates * hidden_size for an input's). `conditioning` measures how far
    rounding moves each tensor; it is asked only if the rule fails without.
    """
    assert actual.keys() == of_torch.keys() == reference.keys(), (actual.keys(), of_torch.keys(), reference.keys())

    def violations(moved: dict[str, float]) -> list[str]:
        lines = []
        for name, truth in reference.items():
            terms = gradient_terms if name.startswith("grad_") else value_terms
            lines.append(violation(name, actual[name], of_torch[name], truth, dtype, terms, moved.get(name, 0.0)))
        return [line for line in lines if line]

    lines = violations({})
    if lines and conditioning is not None:
        lines = violations(conditioning())
    assert not lines, "parity rule broken:\n  " + "\n  ".join(lines)
