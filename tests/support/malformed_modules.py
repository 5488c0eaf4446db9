"""Malformed calls of modules, by seed; see malformed_child.py."""

from __future__ import annotations

import contextlib
import random
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from support.malformed import (
    FLOATS,
    changed,
    changed_batch_sizes,
    changed_states,
    changed_weights,
    packs,
    random_batch_sizes,
    random_shapes,
    text_of,
)

ALLOWED = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError, KeyError)
CLASSES = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}
MODES = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}
FACTS = {
    "num_layers": [0, 1, 2, 3, 4, -1, None, 2.0, 10**6],
    "hidden_size": [0, 1, 4, 5, 400, -1, None, 4.0, 2**40],
    "input_size": [0, 1, 3, 7, None],
    "proj_size": [0, 1, 2, 5, -1, None],
    "bidirectional": [True, False, None, 2],
    "bias": [True, False, None],
    "batch_first": [True, False, None],
    "mode": [*MODES, "RNN_GELU", None],
    "dropout": ["much", 1.5, -1.0, None],
    "_flat_weights_names": [[], ["weight_ih_l0"], ["weight_ih_l0", "weight_hh_l0"], ["no_such"]],
}
CELL_FACTS = {name: FACTS[name] for name in ("hidden_size", "input_size", "bias")}
CELL_FACTS["nonlinearity"] = ["tanh", "relu", "gelu", None]


class Attempt:
    """A call that is ready to be made."""

    said: list[str]
    exact = True  # whether a call that is allowed must not be refused, and gives what expected() gives
    values = True  # whether expected() gives values, too, not only shapes
    tolerance = 0.0
    odd = False  # whether its tensors are of kinds that torch alone computes with, or refuses

    def run(self) -> Any:
        raise NotImplementedError

    def expected(self) -> Any:
        """What a correct call gives; asked for only where the call is allowed."""
        raise NotImplementedError

    def allowed(self) -> bool:
        """Whether the shapes are those that are documented."""
        raise NotImplementedError

    def spoil(self, r: random.Random):
        raise NotImplementedError

    def spoil_some(self, r: random.Random):
        for _ in range(r.choice([1, 1, 1, 2, 3])):
            with contextlib.suppress(*ALLOWED):  # a change that what was changed before does not admit
                self.spoil(r)


class Settings:
    """The modes of a call, and the backend that is asked for."""

    def __init__(self, r: random.Random):
        self.grad, self.inference, self.backward = r.random() < 0.6, r.random() < 0.1, r.random() < 0.7
        self.autocast = r.choice([None] * 6 + [torch.bfloat16, torch.float16])
        self.backend = r.choice([None, None, None, "cpu", "cpu", "reference"])

    def __str__(self):
        return f"grad={self.grad} inference={self.inference} autocast={self.autocast} backend={self.backend}"

    @contextlib.contextmanager
    def entered(self, ours: bool = True):
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.inference:
                stack.enter_context(torch.inference_mode())
            if self.autocast is not None:
                stack.enter_context(torch.autocast("cpu", dtype=self.autocast))
            if self.backend is not None and ours:
                stack.enter_context(rnnfast.backend(self.backend))
            yield

    def run_backward(self, result: Any):
        outputs = [t for t in tensors(result) if t.requires_grad] if self.backward else []
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for value in result or () for t in tensors(value)] if isinstance(result, (tuple, list)) else []


def give_weight(module: nn.Module, name: str, value: Any, r: random.Random):
    """As a parameter, or as what it is in the parameter's place."""
    if isinstance(value, Tensor) and r.random() < 0.8:
        setattr(module, name, nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        delattr(module, name)
        setattr(module, name, value)


class ModuleCall(Attempt):
    def __init__(self, seed: int, library: ModuleType = rnnfast):
        self.seed, self.ours = seed, library is rnnfast
        r = random.Random(seed)
        torch.manual_seed(seed)
        self.cell = r.random() < 0.35
        self.shapes = shapes = random_shapes(r, not self.cell)
        self.settings, self.said = Settings(r), []
        self.dtype = r.choice([torch.float32] * 5 + list(FLOATS))
        name, options = CLASSES[shapes.cell] + "Cell" * self.cell, {"bias": shapes.bias}
        if shapes.cell.startswith("rnn"):
            options["nonlinearity"] = shapes.cell[4:]
        if not self.cell:
            options |= {"num_layers": shapes.layers, "bidirectional": shapes.directions == 2}
            options |= {"batch_first": r.random() < 0.3, "dropout": r.choice([0.0, 0.0, 0.3])}
            options |= {"proj_size": shapes.proj_size} if shapes.cell == "lstm" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.module = getattr(library, name)(shapes.input_size, shapes.hidden_size, dtype=self.dtype, **options)
        self.module.train(r.random() < 0.5)
        self.made = {name: getattr(self.module, name, None) for name in ("input_size", "hidden_size", "proj_size")}
        self.make_arguments(r, shapes, options.get("batch_first", False))
        self.spoil_some(r)

    def __str__(self):
        given = text_of(self.input), text_of(self.hx), text_of(self.batch_sizes), text_of(self.lengths)
        return f"{self.module} {self.dtype} train={self.module.training} {self.settings} {self.said} {given}"

    def make_arguments(self, r, shapes, batch_first):
        self.batch_sizes = self.order = self.lengths = None
        batch, steps = r.choice([1, 2, 3]), r.choice([1, 2, 4])
        kind = r.choice(["batched", "batched", "unbatched", "packed", "lengths"])
        if self.cell:
            ahead = () if kind == "unbatched" else (batch,)
            states = [(*ahead, shapes.hidden_size)] * 2
        elif kind == "packed":
            self.batch_sizes = random_batch_sizes(r)
            batch = int(self.batch_sizes[0])
            if r.random() < 0.5:
                self.order = torch.randperm(batch)
            ahead, states = (int(self.batch_sizes.sum()),), shapes.states(batch)
        elif kind == "unbatched":
            ahead, states = (steps,), shapes.states()
        else:
            if kind == "lengths":
                self.lengths = torch.tensor([r.randrange(steps + 1) for _ in range(batch)])
            ahead, states = (batch, steps) if batch_first else (steps, batch), shapes.states(batch)
        self.input = torch.randn(*ahead, shapes.input_size, dtype=self.dtype, requires_grad=r.random() < 0.5)
        self.hx = None
        if r.random() < 0.75:
            states = tuple(torch.randn(shape, dtype=self.dtype) for shape in states)
            self.hx = states if shapes.cell == "lstm" else states[0]

    def spoil(self, r):
        what = r.choice(["input", "hx", "hx", "hx", "weight", "weight", "fact", "rows", "rows"])
        if what == "input":
            self.said.append("input")
            self.input = changed(r, self.input, self.said)
        elif what == "hx" and self.hx is None:
            self.said.append("hx")
            self.hx = r.choice([(), (None, None), torch.zeros(1, 2, 4), 5, (torch.zeros(2, 2),) * 2])
        elif what == "hx":
            self.said.append("hx")
            self.hx = changed_states(r, self.hx, self.said)
        elif what == "weight":
            names = [name for name, _ in self.module.named_parameters()]
            weights = [getattr(self.module, name).detach() for name in names]
            others = changed_weights(r, weights, self.said)
            if len(others) != len(names):
                name = r.choice(names)
                self.said.append(name)
                delattr(self.module, name) if r.random() < 0.5 else setattr(self.module, name, None)
                return
            for name, old, new in zip(names, weights, others, strict=True):
                if new is not old:
                    give_weight(self.module, name, new, r)
        elif what == "fact":
            table = CELL_FACTS if self.cell else FACTS
            name = r.choice(list(table))
            value = r.choice(table[name])
            self.said.append(f"{name}={value}")
            setattr(self.module, name, value)
        elif self.order is not None and r.random() < 0.4:
            self.said.append("order")
            order = self.order
            self.order = r.choice([order + 1, order - 1, order[1:], torch.cat([order, order]), order.float()])
        elif self.batch_sizes is not None:
            self.batch_sizes = changed_batch_sizes(r, self.batch_sizes, self.said)
        elif self.lengths is not None and r.random() < 0.5:
            self.said.append("lengths")
            self.lengths = changed(r, self.lengths, self.said)
        elif self.lengths is not None:
            self.said.append("lengths")
            self.lengths[0] = r.choice([-1, 5, 2**31, 2**62])

    def weights(self) -> list[Any]:
        """Those that torch.nn computes with; None for what is not there."""
        names = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
        return [getattr(self.module, name, None) for name in names] if self.cell else self.module._flat_weights

    def allowed(self) -> bool:
        m, input, mixed = self.module, self.input, True  # torch.nn decides about dtypes
        states = self.hx if self.hx is None or self.shapes.cell == "lstm" else (self.hx,)
        if isinstance(states, Tensor):
            states = tuple(states)  # torch.nn takes both in one tensor
        if not isinstance(states, (tuple, list, type(None))) or not all(isinstance(s, Tensor) for s in states or ()):
            return False
        if not isinstance(input, Tensor):
            return False
        if self.cell:
            cell = f"rnn_{m.nonlinearity}" if isinstance(m, nn.RNNCell) else self.shapes.cell
            weights = [w for w in self.weights() if w is not None]
            if len(weights) == 3:  # torch.nn takes one bias for itself, too
                weights.append(weights[2])
            if cell not in CLASSES or input.dim() not in (1, 2) or any(s.dim() != input.dim() for s in states or ()):
                return False
            ahead = (None,) * (3 - input.dim())  # as a layer's call of one step
            states = None if states is None else [state[ahead] for state in states]
            shapes = self.shapes._replace(cell=cell, bias=len(weights) > 2)
            return shapes.allow(input[ahead], states, weights, mixed=mixed)

        mode = m.mode if isinstance(m, nn.RNN) else self.shapes.cell.upper()  # theirs is read by nothing
        if mode not in MODES or type(m.num_layers) is not int or not 0 < m.num_layers < 100:
            return False
        uses_dropout = m.training and m.num_layers > 1
        if uses_dropout and not (isinstance(m.dropout, float) and 0 <= m.dropout <= 1):
            return False
        # What the weights say: torch.nn reads input_size, hidden_size and proj_size for its checks alone.
        shapes = self.shapes._replace(
            cell=MODES[mode], layers=m.num_layers, directions=2 if m.bidirectional else 1, bias=bool(m.bias)
        )
        if self.batch_sizes is None and input.dim() == 2:
            if states is not None and self.shapes.cell == "lstm":
                states = states[:2]  # torch.nn takes no notice of more
            if any(state.dim() != 2 for state in states or ()):
                return False
            input = input.unsqueeze(0 if m.batch_first else 1)
            states = None if states is None else [state.unsqueeze(1) for state in states]
        if self.order is not None and states is not None:
            states = [state.index_select(1, self.order) for state in states]
        return shapes.allow(
            input,
            states,
            self.weights(),
            self.batch_sizes,
            self.lengths,
            batch_first=bool(m.batch_first) and self.batch_sizes is None,
            mixed=mixed,
            strict=False,
        )

    @property
    def values(self) -> bool:
        return not (self.module.training and getattr(self.module, "dropout", 0)) and self.lengths is None

    @property
    def tolerance(self) -> float:
        return 0.1 if self.dtype.itemsize == 2 or self.settings.autocast else 1e-3

    def run(self) -> Any:
        input, lengths = self.input, {} if self.lengths is None or not self.ours else {"lengths": self.lengths}
        if self.batch_sizes is not None and self.seed % 2:
            input = PackedSequence(input, self.batch_sizes, self.order)
        elif self.batch_sizes is not None:  # past the constructor and its checks
            inverse = None if self.order is None else torch.argsort(self.order)
            input = PackedSequence(torch.randn(1, 1), torch.tensor([1]))._replace(
                data=input, batch_sizes=self.batch_sizes, sorted_indices=self.order, unsorted_indices=inverse
            )
        with self.settings.entered(self.ours):
            result = self.module(input, self.hx, **lengths)
        self.settings.run_backward(result)
        return result

    def expected(self) -> Any:
        stock = ModuleCall(self.seed, nn)
        for name, value in self.made.items():
            if value is not None:  # torch.nn dies of some of the others
                setattr(stock.module, name, value)
        for name in ("batch_first", "bidirectional", "bias"):
            if not self.cell and not isinstance(getattr(stock.module, name), bool):
                setattr(stock.module, name, bool(getattr(stock.module, name)))  # else its operator raises
        if not isinstance(getattr(stock.module, "dropout", 0.0), float):
            stock.module.dropout = 0.0
        stock.input, stock.hx = settled(stock.input), settled(stock.hx)
        if isinstance(stock.batch_sizes, Tensor):
            stock.batch_sizes = stock.batch_sizes.contiguous()  # others are read as if they were
        return stock.run()

    @property
    def exact(self) -> bool:
        as_made = all(getattr(self.module, name, None) == value for name, value in self.made.items())
        if not self.cell:
            as_made = as_made and len(self.module._flat_weights_names) == len(self.shapes.weights())
            kinds = [type(getattr(self.module, name)) for name in ("bias", "batch_first", "bidirectional", "dropout")]
            as_made = as_made and kinds == [bool, bool, bool, float]
        return as_made and (self.batch_sizes is None or packs(self.batch_sizes, len(self.input)))

    @property
    def odd(self) -> bool:
        return is_odd(self.input, self.hx, *self.weights())


def settled(value: Any) -> Any:
    """Tensors of zeros that have no memory get some: torch.nn's LSTM reads what is not there."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(settled, value))
    return value.clone() if isinstance(value, Tensor) and torch._is_zerotensor(value) else value


def is_odd(*values: Any) -> bool:
    found = tensors(values)
    return any(t.layout is not torch.strided or t.is_nested or t.is_quantized or t.is_meta for t in found)
