"""Small programs around a layer, run on torch.nn's class and on rnnfast's: equal values and gradients, or one error.

A row is a name and a program, a function of one module that ends with what is to be compared. The gradients that the
module's parameters have by then are compared too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from support.twins import assert_same, gradients, state_of, tensors, total, twins

LAYERS = ("rnn_tanh", "gru", "lstm", "lstm_proj")
CELLS = ("rnncell_tanh", "grucell", "lstmcell")
KINDS = (*LAYERS, *CELLS)

Program = Callable[[nn.Module], Any]


class Own(Exception):
    """An error that is nobody else's."""


class Row(NamedTuple):
    program: Program
    kinds: Iterable[str]
    options: dict[str, Any]


class Rows(dict[str, Row]):
    """The table of a file: rows[name] = program, or @rows.add(...) above a program that takes more than a line.

    `better` says why rnnfast may give a result where torch.nn raises. It is compared with what torch.nn gives after
    `prepare(module)`.
    """

    def __init__(self, kinds: Iterable[str] = KINDS, better: str = "", prepare: Program | None = None, **options: Any):
        super().__init__()
        self.kinds, self.better, self.prepare, self.options = kinds, better, prepare, options

    def __setitem__(self, name: str, program: Program) -> None:
        self.put(name, program)

    def put(self, name: str, program: Program, kinds: Iterable[str] | None = None, **options) -> None:
        """A row for some of the kinds, with options of the constructor beside those of the table."""
        assert name not in self, f"two rows are called {name}"
        super().__setitem__(name, Row(program, self.kinds if kinds is None else kinds, {**self.options, **options}))

    def add(self, **kwargs) -> Callable[[Program], Program]:
        """`put` as a decorator, with the program's own name."""

        def put(program: Program) -> Program:
            self.put(program.__name__, program, **kwargs)
            return program

        return put

    def parametrize(self):
        """A decorator for test(name, kind), which hands both to `check`."""
        return pytest.mark.parametrize("name, kind", [(name, kind) for name, row in self.items() for kind in row.kinds])

    def check(self, name: str, kind: str) -> None:
        """Runs a row on both classes; fails where they differ, or where there is nothing to compare."""
        row = self[name]
        ours, theirs = twins(kind, **row.options)
        before = copy.deepcopy(theirs.state_dict())
        actual, expected = (outcome(row.program, module) for module in (ours, theirs))
        if self.better and isinstance(expected, Exception) and not isinstance(actual, Exception):
            _, theirs = twins(kind, **row.options)
            theirs.load_state_dict(before)
            self.prepare(theirs)
            expected = outcome(row.program, theirs)
        compare(actual, expected)


def outcome(program: Program, module: nn.Module) -> Any:
    """What the program ends with and the module's gradients, or the exception."""
    torch.manual_seed(1)
    try:
        return program(module), gradients(module)
    except Exception as error:
        return error


def compare(actual: Any, expected: Any) -> None:
    """Equal values of all that is in them, or exceptions of one class."""
    if isinstance(expected, Exception):
        assert type(actual) is type(expected), f"torch.nn raises {expected!r}, ours ends with {actual!r}"
        return
    if isinstance(actual, Exception):
        raise AssertionError(f"torch.nn gives a result, ours raises {actual!r}") from actual
    assert tensors_in(expected), "the program ends with nothing to compare"
    assert_equal(actual, expected)


def assert_equal(actual: Any, expected: Any, what: str = "result") -> None:
    """`assert_same`, with anything that has == among the tensors."""
    if isinstance(expected, torch.Tensor):
        assert actual.requires_grad == expected.requires_grad, f"{what}: requires_grad"
        assert_same(actual, expected, what)
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected), what
        for key, value in expected.items():
            assert_equal(actual[key], value, f"{what}[{key!r}]")
    elif isinstance(expected, (tuple, list)):
        assert type(actual) is type(expected) and len(actual) == len(expected), what
        for i, value in enumerate(expected):
            assert_equal(actual[i], value, f"{what}[{i}]")
    else:
        assert actual == expected, f"{what}: {actual!r}, expected {expected!r}"


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in a nest that may hold other things too."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for one in value for tensor in tensors_in(one)]


# ------------------------------------------------ what programs are made of


def is_cell(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNCellBase)


def sample(module: nn.Module, batch: int = 2, steps: int = 5, **factory) -> torch.Tensor:
    """An input of a layer [T, B, 3] or of a cell [B, 3], in the module's dtype; the same at every call."""
    shape = (batch, 3) if is_cell(module) else (steps, batch, 3)
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(**{"dtype": next(module.parameters()).dtype, **factory})


def leaf(module: nn.Module, **kwargs) -> torch.Tensor:
    return sample(module, **kwargs).requires_grad_()


def leaves(module: nn.Module, batch: int = 2) -> list[torch.Tensor]:
    """Input and states, all of which ask for gradients."""
    torch.manual_seed(6)
    states = tensors(state_of(module, batch, dtype=next(module.parameters()).dtype))
    return [leaf(module, batch=batch), *(state.requires_grad_() for state in states)]


def call(module: nn.Module, x: torch.Tensor, *states: torch.Tensor) -> Any:
    return module(x, tuple(states) if len(states) == 2 else states[0] if states else None)


def trained(module: nn.Module, run: Callable[..., Any] | None = None) -> tuple[Any, list[torch.Tensor]]:
    """A result, of the module or of `run(*inputs)`, and the gradients of input and states."""
    inputs = leaves(module)
    result = run(*inputs) if run else call(module, *inputs)
    total(result).backward()
    return result, [value.grad for value in inputs]


def packed_of(module: nn.Module) -> PackedSequence:
    """An input of two sequences, the shorter one first."""
    return pack_padded_sequence(sample(module), torch.tensor([2, 5]), enforce_sorted=False)


def first(result: Any) -> torch.Tensor:
    """The output of a layer, the new h of a cell."""
    return tensors(result)[0]


def weight_name(module: nn.Module) -> str:
    return "weight_hh" if hasattr(module, "weight_hh") else "weight_hh_l0"


def weight(module: nn.Module) -> torch.Tensor:
    return getattr(module, weight_name(module))


def train(module: nn.Module, x: torch.Tensor | None = None) -> Any:
    """(result, gradient of the input) of one forward and backward; the parameters' stay on the module."""
    x = leaf(module) if x is None else x
    result = module(x)
    total(result).backward()
    return result, x.grad


class Model(nn.Module):
    """The module between two others; forward gives one tensor."""

    def __init__(self, module: nn.Module):
        super().__init__()
        width = getattr(module, "proj_size", 0) or module.hidden_size
        self.before, self.module, self.after = nn.Linear(3, 3), module, nn.Linear(width, 2)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in (*self.before.parameters(), *self.after.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.to(next(module.parameters()).dtype)

    def forward(self, x):
        result = self.module(self.before(x))
        while not isinstance(result, torch.Tensor):
            result = result[0]
        return self.after(result)


def assert_plant_is_caught(rows: Rows) -> None:
    """A program that gives rnnfast's class another value, another error or nothing at all fails `check`."""
    planted = Rows(kinds=rows.kinds)

    def of_ours(module):
        return type(module).__module__.startswith("rnnfast")

    def raises(module):
        raise (ValueError if of_ours(module) else RuntimeError)("planted")

    def raises_for_ours(module):
        return raises(module) if of_ours(module) else train(module)

    def succeeds_for_ours(module):
        return train(module) if of_ours(module) else raises(module)

    def scaled_training(module):
        total(first(module(leaf(module))) * (1.001 if of_ours(module) else 1.0)).backward()

    planted["value"] = lambda module: first(module(sample(module))) * (1.001 if of_ours(module) else 1.0)
    planted["gradient"] = lambda module: (sample(module), scaled_training(module))
    planted["graph"] = lambda module: first(module(sample(module))).detach().requires_grad_(of_ours(module))
    planted["text"] = lambda module: (sample(module), "ours" if of_ours(module) else "theirs")
    planted["nothing"] = lambda module: None
    planted["class"] = raises
    planted["error"] = raises_for_ours
    planted["success"] = succeeds_for_ours
    for kind in rows.kinds:
        for name in planted:
            with pytest.raises(AssertionError):
                planted.check(name, kind)
