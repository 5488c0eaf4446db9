"""Malformed calls of rnnfast.functional and of the operators, by seed; see malformed_child.py."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from rnnfast import functional, reference
from rnnfast.ops import CELLS
from rnnfast.rows import Rows
from rnnfast.stack import layer_by_layer
from support.malformed import (
    FLOATS,
    changed,
    changed_batch_sizes,
    changed_states,
    changed_weights,
    dense,
    packs,
    random_batch_sizes,
    random_shapes,
    text_of,
)
from support.malformed_modules import FACTS, Attempt, Settings, is_odd


class FunctionCall(Attempt):
    def __init__(self, seed: int):
        r = random.Random(seed)
        torch.manual_seed(seed)
        self.shapes = shapes = random_shapes(r)
        self.settings, self.said = Settings(r), []
        self.batch_sizes = self.lengths = None
        batch_first, batch, steps = r.random() < 0.3, r.choice([1, 2, 3]), r.choice([1, 2, 4])
        ahead = (batch, steps) if batch_first else (steps, batch)
        kind = r.choice(["padded", "padded", "packed", "lengths"])
        if kind == "packed":
            self.batch_sizes = random_batch_sizes(r)
            ahead, batch = (int(self.batch_sizes.sum()),), int(self.batch_sizes[0])
        elif kind == "lengths":
            self.lengths = torch.tensor([r.randrange(steps + 1) for _ in range(batch)])
        self.input = torch.randn(*ahead, shapes.input_size)
        states = tuple(torch.randn(shape) for shape in shapes.states(batch))
        self.hx = None if r.random() < 0.25 else states if len(states) == 2 or r.random() < 0.5 else states[0]
        self.weights = [(0.2 * torch.randn(shape)).requires_grad_(r.random() < 0.5) for shape in shapes.weights()]
        self.options = {
            "has_biases": shapes.bias,
            "num_layers": shapes.layers,
            "bidirectional": shapes.directions == 2,
            "batch_first": batch_first,
            "dropout": 0.0,
            "training": r.random() < 0.5,
        }
        self.spoil_some(r)

    def __str__(self):
        given = map(text_of, (self.input, self.hx, self.weights))
        rows = f"batch_sizes {text_of(self.batch_sizes)} lengths {text_of(self.lengths)}"
        return f"{self.shapes.cell} {self.options} {self.settings} {self.said} {' '.join(given)} {rows}"

    def spoil(self, r):
        what = r.choice(["input", "hx", "hx", "weights", "weights", "option", "rows", "rows"])
        if what == "input":
            self.said.append("input")
            self.input = changed(r, self.input, self.said)
        elif what == "hx":
            self.said.append("hx")
            self.hx = r.choice([(), 5]) if self.hx is None else changed_states(r, self.hx, self.said)
        elif what == "weights":
            self.weights = changed_weights(r, self.weights, self.said)
        elif what == "option":
            name = r.choice(list(self.options))
            self.options[name] = r.choice((FACTS | dict.fromkeys(("has_biases", "training"), FACTS["bias"]))[name])
            self.said.append(f"{name}={self.options[name]}")
        elif r.random() < 0.2:
            self.batch_sizes = torch.tensor(r.choice([[2, 1], [1], [0], [-1]]))
            self.said.append("batch_sizes")
        elif self.batch_sizes is not None:
            self.batch_sizes = changed_batch_sizes(r, self.batch_sizes, self.said)
        elif self.lengths is not None:
            self.said.append("lengths")
            self.lengths = changed(r, self.lengths, self.said)

    def _states(self):
        return (self.hx,) if isinstance(self.hx, Tensor) else self.hx

    def _shapes(self):
        o = self.options
        return self.shapes._replace(
            bias=bool(o["has_biases"]), layers=o["num_layers"], directions=2 if o["bidirectional"] else 1
        )

    def allowed(self) -> bool:
        o = self.options
        if type(o["num_layers"]) is not int or not 0 < o["num_layers"] < 100:
            return False
        if o["training"] and o["num_layers"] > 1 and o["dropout"] != 0:  # only wrong ones are not
            return False
        return self._shapes().allow(
            self.input,
            self._states(),
            self.weights,
            self.batch_sizes,
            self.lengths,
            batch_first=bool(o["batch_first"]) and self.batch_sizes is None,
            mixed=True,
            strict=False,
        )

    @property
    def exact(self) -> bool:
        given = (self.input, *self.weights, *(self._states() or ()))
        if any(t is None for t in given):
            return False
        if not all(isinstance(self.options[name], bool) for name in ("has_biases", "bidirectional", "batch_first")):
            return False
        dtypes = {t.dtype for t in given}
        one_dtype = len(dtypes) == 1 and dtypes < set(FLOATS)
        return one_dtype and (self.batch_sizes is None or packs(self.batch_sizes, len(self.input)))

    @property
    def odd(self) -> bool:
        return is_odd(self.input, self.hx, self.weights)

    @property
    def tolerance(self) -> float:
        return 0.1 if self.settings.autocast or self.input.dtype.itemsize == 2 else 1e-3

    def run(self) -> Any:
        with self.settings.entered():
            rows = {"batch_sizes": self.batch_sizes, "lengths": self.lengths}
            result = getattr(functional, self.shapes.cell)(self.input, self.hx, self.weights, **self.options, **rows)
        self.settings.run_backward(result)
        return result

    def expected(self) -> Any:
        first = bool(self.options["batch_first"]) and self.batch_sizes is None
        x = self.input.transpose(0, 1) if first else self.input
        rest = self._states(), self.weights, self.batch_sizes, self.lengths
        output, *finals = as_documented(self.shapes.cell, self._shapes(), x, *rest)
        return (output.transpose(0, 1) if first else output, *finals)


class OperatorCall(Attempt):
    def __init__(self, seed: int):
        r = random.Random(seed)
        torch.manual_seed(seed)
        self.step, self.name = r.random() < 0.4, r.choice(["infer", "fwd", "bwd", "bwd"])
        shapes = random_shapes(r)._replace(layers=1)
        if self.step:
            shapes = shapes._replace(proj_size=0, directions=1)
        elif self.name == "infer":
            shapes = shapes._replace(layers=r.choice([1, 2]))
        self.shapes, self.op, self.said = shapes, CELLS[shapes.cell], []
        dtype = r.choice([torch.float32] * 3 + list(FLOATS))
        batch, steps, batch_sizes, lengths = r.choice([1, 2, 3]), r.choice([1, 2, 4]), None, None
        kind = "padded" if self.step else r.choice(["padded", "padded", "packed", "lengths"])
        ahead = (batch,) if self.step else (steps, batch)
        if kind == "packed":
            batch_sizes = random_batch_sizes(r)
            ahead, batch = (int(batch_sizes.sum()),), int(batch_sizes[0])
        elif kind == "lengths":
            lengths = torch.tensor([r.randrange(steps + 1) for _ in range(batch)])
        x = torch.randn(*ahead, shapes.input_size).to(dtype)
        states = [torch.randn(shape[self.step :]).to(dtype) for shape in shapes.states(batch)]
        if kind != "packed" and r.random() < 0.2:
            states = [None] * len(states)
        weights = [(0.2 * torch.randn(shape)).to(dtype) for shape in shapes.weights()]
        rest = [*weights, None, None][:4] if self.step else [weights, batch_sizes, lengths]
        args = [x, *states, *rest, *self.op.flags, *([shapes.layers] if shapes.layers > 1 else [])]
        operators = self.op.step if self.step else self.op.layer
        self.function = getattr(operators, self.name)
        self.grads = 0  # so many arguments come before the input
        if self.name == "bwd":
            results = operators.fwd(*args)
            results = [results] if isinstance(results, Tensor) else list(results)
            self.grads = self.op.states + (not self.step)
            saved = results[self.grads :]
            known = saved or results if self.step else [results[0], *saved]
            grads = [torch.randn_like(t) if r.random() < 0.8 else None for t in results[: self.grads]]
            args = [*grads, *args, *known, *(r.random() < 0.8 for _ in range(3))]
            self.known = len(args) - 3 - len(known)
        self.args, self.good = args, list(args)
        self.spoil_some(r)

    def __str__(self):
        return f"{self.function} {self.shapes} {self.said} {' '.join(map(text_of, self.args))}"

    def spoil(self, r):
        k = r.randrange(len(self.args))
        old = self.args[k]
        self.said.append(str(k))
        if isinstance(old, Tensor) and not old.is_floating_point() and r.random() < 0.7:
            self.args[k] = changed_batch_sizes(r, old, self.said)
        elif isinstance(old, Tensor):
            self.args[k] = changed(r, old, self.said)
        elif isinstance(old, list):
            self.args[k] = changed_weights(r, old, self.said)
        elif old is None:
            self.args[k] = r.choice([torch.zeros(1, 2, 3), torch.tensor([2, 1]), torch.zeros(3), 5])
        else:
            self.args[k] = r.choice([True, False, None, 0, -1, 5, 2**62, "text"])

    def allowed(self) -> bool:
        if any(isinstance(value, str) for value in self.args):
            return False
        if self.name == "bwd":
            after = range(self.known, len(self.args) - 3)
            for k in (*range(self.grads), self.grads, *after):
                old, new = self.good[k], self.args[k]
                if new is None and k < self.grads:
                    continue
                if not isinstance(old, Tensor) or not dense(new) or new.shape != old.shape or new.dtype != old.dtype:
                    return False
        x, states, weights, batch_sizes, lengths, layers = self.parts()
        if not isinstance(x, Tensor) or (batch_sizes is not None and states[0] is None) or weights is None:
            return False
        if type(layers) is not int or not 0 < layers < 100:
            return False
        shapes = self.shapes._replace(layers=layers, bias=len(weights) == 4 if self.step else self.shapes.bias)
        return shapes.allow(x, states, weights, batch_sizes, lengths)

    def parts(self):
        """(input, states, weights, batch_sizes, lengths, layers) as of a layer; weights are None if they are none."""
        x, *rest = self.args[self.grads :]
        states, rest = rest[: self.op.states], rest[self.op.states :]
        if not self.step:
            weights, batch_sizes, lengths = rest[:3]
            return x, states, weights, batch_sizes, lengths, rest[3:][-1] if self.shapes.layers > 1 else 1
        weights = rest[:4] if rest[2] is not None or rest[3] is not None else rest[:2]
        return x[None], [s if s is None else s[None] for s in states], weights, None, None, 1

    @property
    def exact(self) -> bool:
        """What forward saved must come back as it was: with other strides it may be refused."""
        return self.name != "bwd" or all(a is b for a, b in zip(self.args, self.good, strict=True))

    @property
    def values(self) -> bool:
        return self.name != "bwd"

    @property
    def tolerance(self) -> float:
        return 0.1 if self.args[self.grads].dtype.itemsize == 2 else 1e-3

    def run(self) -> Any:
        result = self.function(*self.args)
        if self.name != "fwd":
            return result
        outputs = self.op.states + (not self.step)
        return result if isinstance(result, Tensor) else result[:outputs]  # not what is saved

    def expected(self) -> Any:
        if self.name == "bwd":
            return self.function(*self.good[:-3], *self.args[-3:])
        x, states, weights, batch_sizes, lengths, layers = self.parts()
        cell = self.shapes.cell
        if self.op.flags:
            relu = self.args[-2 if self.shapes.layers > 1 else -1]  # the dispatcher takes None and numbers for a bool
            cell = "rnn_relu" if relu else "rnn_tanh"
        shapes = self.shapes._replace(layers=layers)
        output, *finals = as_documented(cell, shapes, x, states, weights, batch_sizes, lengths)
        return [final[0] for final in finals] if self.step else (output, *finals)


def as_documented(cell, shapes, x, states, weights, batch_sizes, lengths):
    """The results of a stack by torch's plain operators, in float32."""
    batch = int(batch_sizes[0]) if batch_sizes is not None else x.size(1)
    zeros = [torch.zeros(shape) for shape in shapes.states(batch)]
    states = [zero if s is None else s.detach().float() for s, zero in zip(states or zeros, zeros, strict=True)]
    weights = [weight.detach().float() for weight in weights]
    x = x.detach().float()
    return layer_by_layer(reference.layer, cell, x, states, weights, shapes.layers, 0.0, Rows(batch_sizes, lengths))
