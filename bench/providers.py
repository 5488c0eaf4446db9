"""Who is measured: a provider turns a problem (a case with its weights and input) into a call to time."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import _ext
from rnnfast._backends import requested
from rnnfast.freeze import freeze

from .cases import DTYPES, Case, new_module

GPU_BACKENDS = ("cuda", "triton")  # none is a default yet, so the suites on a GPU ask for each
TIER_SECTION = "tier "  # of the CUDA kernels; a section of this name and the tier's has rnnfast run that tier alone


def gpu_backends() -> list[str]:
    """The backends of rnnfast that are measured on this GPU: the first counts as rnnfast, others take turns with it.

    All that there are, or the one that RNNFAST_BACKEND names. Raises RuntimeError with the reasons where there is none.
    """
    wanted = (requested(),) if requested() else GPU_BACKENDS
    found = rnnfast.backends()
    usable = [name for name in wanted if found[name] == "available"]
    if not usable:
        reasons = ", ".join(f"{name}: {found[name]}" for name in wanted)
        raise RuntimeError(f"no backend of rnnfast runs on this GPU ({reasons})")
    return usable


def tier_of(section: str) -> str | None:
    """The tier of the CUDA kernels that a section measures alone, or None."""
    return section.removeprefix(TIER_SECTION) if section.startswith(TIER_SECTION) else None


@contextmanager
def forced_tier(section: str) -> Iterator[None]:
    """Within the block the CUDA kernels take the section's tier, where it is of one, or raise."""
    tier, before = tier_of(section), os.environ.get("RNNFAST_TIER")
    if tier is None:
        yield
        return
    os.environ["RNNFAST_TIER"] = tier
    try:
        yield
    finally:
        if before is None:
            del os.environ["RNNFAST_TIER"]
        else:
            os.environ["RNNFAST_TIER"] = before


def tier_refuses(section: str, case: Case) -> str | None:
    """Why the tier of a section cannot run the case here; None: it can, or the section is not of a tier.

    float32 counts as TF32, which the kernels take until they are told otherwise.
    """
    if tier_of(section) is None:
        return None
    if _ext.cuda_failure is not None:
        return _ext.cuda_failure
    size = case.cell.lower(), DTYPES[case.dtype], case.hidden_size, case.proj_size, case.batch, 1 + case.bidirectional
    with forced_tier(section):
        reasons = (_ext.cuda_refuses(*size, backward=backward) for backward in (False, case.has_gradients))
        return next((reason for reason in reasons if reason), None)


class Problem:
    """A case's numbers, the same for every provider: weights, input [T, B, I] and the gradient of the output.

    All are rounded to the case's dtype; `double()` gives the same rounded numbers in float64 for the reference.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        dtype = DTYPES[case.dtype]
        self.case = case
        self.state = {name: w.to(case.device, dtype) for name, w in new_module(nn, case).state_dict().items()}
        self.input = torch.randn(case.seq_len, case.batch, case.input_size, device=case.device).to(dtype)
        self.lengths = torch.tensor(case.lengths())
        directions, out = 1 + case.bidirectional, case.proj_size or case.hidden_size
        width = out * directions
        rows = (sum(case.lengths()),) if case.form == "packed" else (case.seq_len, case.batch)
        self.grad_output = torch.randn(*rows, width, device=case.device).to(dtype)
        sizes = (out, case.hidden_size)[: (2 if case.cell == "LSTM" else 1) * case.hx]
        states = [torch.rand(case.num_layers * directions, case.batch, size, device=case.device) for size in sizes]
        self.states = tuple((2 * state - 1).to(dtype) for state in states)

    def double(self) -> Problem:
        problem = copy.copy(self)
        problem.state = {name: w.double() for name, w in self.state.items()}
        problem.input, problem.grad_output = self.input.double(), self.grad_output.double()
        problem.states = tuple(state.double() for state in self.states)
        return problem


@dataclass
class Runner:
    """One provider on one problem. `run()` returns every result, named, for the parity check; `timed` is the same work
    without the names. Both expect gradients to be enabled unless the case's mode is "inference".

    requested: the backend of rnnfast that its calls ask for; None: whatever is asked for around them. frozen: the
    weights' format, where the module is frozen."""

    namespace: ModuleType
    problem: Problem
    requested: str | None = None
    frozen: str | None = None

    def __post_init__(self) -> None:
        case, problem = self.problem.case, self.problem
        self.module = new_module(self.namespace, case).to(problem.input)
        self.module.load_state_dict(problem.state)
        if self.frozen:
            self.module = freeze(self.module, self.frozen)
        self.parameters = list(self.module.parameters())
        # So small a rate leaves the loss where it is over hundreds of steps; every weight is written all the same.
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-6) if case.mode == "step" else None
        self.single_cell = case.form == "cell" and case.seq_len == 1  # one bare call: no loop, no torch.stack
        self.leaf = (problem.input[0] if self.single_cell else problem.input).clone().requires_grad_(case.has_gradients)
        self.takes_lengths = self.namespace is rnnfast
        self.states = problem.states[0] if len(problem.states) == 1 else problem.states or None
        self.lengths = problem.lengths.to(case.device)
        if case.form == "packed":
            packed = pack_padded_sequence(problem.input, problem.lengths, enforce_sorted=False)
            self.leaf = packed.data.clone().requires_grad_(case.has_gradients)
            self.input = PackedSequence(self.leaf, *packed[1:])
        else:
            self.input = self.leaf
        self.forward = {"cell": self._cell_loop, "lengths": self._unequal_rows}.get(case.form, self._layer)
        if self.single_cell:
            self.forward = self._layer

    @property
    def timed(self) -> Callable[[], object]:
        call = self._gradients if self.problem.case.has_gradients else self.forward
        return call if self.requested is None else lambda: self._on_request(call)

    def run(self) -> dict[str, Tensor]:
        results = self.timed()
        if not self.problem.case.has_gradients:
            return self._named(results)
        result, gradients = results
        names = ["grad_input", *(f"grad_{name}" for name, _ in self.module.named_parameters())]
        return self._named(result) | dict(zip(names, gradients, strict=True))

    def _on_request(self, call: Callable[[], object]) -> object:
        with rnnfast.backend(self.requested, strict=True):
            return call()

    def _gradients(self) -> tuple[object, tuple[Tensor, ...]]:
        result = self.forward()
        output = self._output(result)
        grad_output = self.problem.grad_output.view_as(output)
        gradients = torch.autograd.grad(output, [self.leaf, *self.parameters], grad_output)
        if self.optimizer:
            for parameter, gradient in zip(self.parameters, gradients[1:], strict=True):
                parameter.grad = gradient
            self.optimizer.step()
        return result, gradients

    def _layer(self) -> object:
        return self.module(self.input, self.states)

    def _unequal_rows(self) -> object:
        if self.takes_lengths:
            return self.module(self.input, lengths=self.lengths)
        packed = pack_padded_sequence(self.input, self.problem.lengths, enforce_sorted=False)
        packed, hx = self.module(packed)
        return pad_packed_sequence(packed, total_length=self.problem.case.seq_len)[0], hx

    def _cell_loop(self) -> object:
        hx, output = None, []
        for x in self.input.unbind(0):
            hx = self.module(x, hx)
            output.append(hx[0] if isinstance(hx, tuple) else hx)
        return torch.stack(output), hx

    def _output(self, result: object) -> Tensor:
        output = result[0] if isinstance(result, tuple) else result
        return output.data if isinstance(output, PackedSequence) else output

    def _named(self, result: object) -> dict[str, Tensor]:
        """The results of any form: (output, h_n), (output, (h_n, c_n)), or a single cell's h or (h, c)."""
        hx = result if self.single_cell else result[1]
        states = hx if isinstance(hx, tuple) else (hx,)
        return {"output": self._output(result), **dict(zip(("h_n", "c_n"), states, strict=False))}

    def backend(self) -> str:
        """The implementation that a call takes: "torch", or what rnnfast says of itself."""
        if self.namespace is not rnnfast or self.frozen:
            return "frozen" if self.frozen else "torch"
        one_of_many = self.problem.case.form == "cell" and not self.single_cell
        return backend_of(self.module, self.input[0] if one_of_many else self.input)


def backend_of(module: nn.Module, *arguments: object) -> str:
    return rnnfast.explain(module, *arguments).backend
