"""Who is measured: a provider turns a problem (a case with its weights and input) into a call to time."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast

from .cases import DTYPES, Case


def new_module(namespace: ModuleType, case: Case) -> nn.Module:
    """The case's layer or cell from `namespace` (torch.nn, or rnnfast which has the same constructors)."""
    if case.form == "cell":
        return getattr(namespace, case.cell + "Cell")(case.input_size, case.hidden_size)
    options = {"num_layers": case.num_layers, "bidirectional": case.bidirectional}
    if case.proj_size:
        options["proj_size"] = case.proj_size
    return getattr(namespace, case.cell)(case.input_size, case.hidden_size, **options)


class Problem:
    """A case's numbers, the same for every provider: weights, input [T, B, I] and the gradient of the output.

    All are rounded to the case's dtype; `double()` gives the same rounded numbers in float64 for the reference.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        dtype = DTYPES[case.dtype]
        self.case = case
        self.state = {name: w.to(case.device, dtype) for name, w in new_module(nn, case).state_dict().items()}
        self.input = torch.randn(case.seq_len, case.batch, case.input_size).to(case.device, dtype)
        self.lengths = torch.tensor(case.lengths())
        width = (case.proj_size or case.hidden_size) * (1 + case.bidirectional)
        rows = (sum(case.lengths()),) if case.form == "packed" else (case.seq_len, case.batch)
        self.grad_output = torch.randn(*rows, width).to(case.device, dtype)

    def double(self) -> Problem:
        problem = copy.copy(self)
        problem.state = {name: w.double() for name, w in self.state.items()}
        problem.input, problem.grad_output = self.input.double(), self.grad_output.double()
        return problem


@dataclass
class Runner:
    """One provider on one problem. `run()` is what is timed; it returns every result, named, for the parity check."""

    namespace: ModuleType
    problem: Problem

    def __post_init__(self) -> None:
        case, problem = self.problem.case, self.problem
        self.training = case.mode == "training"
        self.module = new_module(self.namespace, case).to(problem.input)
        self.module.load_state_dict(problem.state)
        self.parameters = list(self.module.parameters())
        self.leaf = problem.input.clone().requires_grad_(self.training)
        self.takes_lengths = self.namespace is rnnfast
        self.lengths = problem.lengths.to(case.device)
        if case.form == "packed":
            packed = pack_padded_sequence(problem.input, problem.lengths, enforce_sorted=False)
            self.leaf = packed.data.clone().requires_grad_(self.training)
            self.input = PackedSequence(self.leaf, *packed[1:])
        else:
            self.input = self.leaf
        self.forward = {"cell": self._cell_loop, "lengths": self._unequal_rows}.get(case.form, self._layer)

    def run(self) -> dict[str, Tensor]:
        if not self.training:
            with torch.no_grad():
                return self.forward()
        results = self.forward()
        wanted = [self.leaf, *self.parameters]
        gradients = torch.autograd.grad(results["output"], wanted, self.problem.grad_output)
        names = ["grad_input", *(f"grad_{name}" for name, _ in self.module.named_parameters())]
        return results | dict(zip(names, gradients, strict=True))

    def _layer(self) -> dict[str, Tensor]:
        output, hx = self.module(self.input)
        return self._named(output.data if isinstance(output, PackedSequence) else output, hx)

    def _unequal_rows(self) -> dict[str, Tensor]:
        if self.takes_lengths:
            return self._named(*self.module(self.input, lengths=self.lengths))
        packed = pack_padded_sequence(self.input, self.problem.lengths, enforce_sorted=False)
        packed, hx = self.module(packed)
        return self._named(pad_packed_sequence(packed, total_length=self.problem.case.seq_len)[0], hx)

    def _cell_loop(self) -> dict[str, Tensor]:
        hx, output = None, []
        for x in self.input.unbind(0):
            hx = self.module(x, hx)
            output.append(hx[0] if isinstance(hx, tuple) else hx)
        return self._named(torch.stack(output), hx)

    @staticmethod
    def _named(output: Tensor, hx: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        states = hx if isinstance(hx, tuple) else (hx,)
        return {"output": output, **dict(zip(("h_n", "c_n"), states, strict=False))}

    def backend(self) -> str:
        """The implementation that a call takes: "torch", or what rnnfast says of itself."""
        if self.namespace is not rnnfast:
            return "torch"
        if self.problem.case.form == "cell":
            return backend_of(self.module, self.input[0])
        with torch.set_grad_enabled(self.training):
            return backend_of(self.module, self.input)


def backend_of(module: nn.Module, *arguments: object) -> str:
    return rnnfast.explain(module, *arguments).backend
