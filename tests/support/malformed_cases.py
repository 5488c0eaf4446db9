"""Malformed calls one by one, with what the error must say; run like malformed_child.py, by their place in CASES."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, randn, zeros
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast import functional
from rnnfast.ops import CELLS
from support import malformed_child
from support.malformed import freed

NAMED = r"(?is)expected.*got|got.*expected"  # what was expected, and what was given


class Case(NamedTuple):
    name: str
    run: Callable[[], Any]
    message: str = NAMED

    def __str__(self):
        return self.name


def pair(*shape: int, c: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    return zeros(*shape), zeros(*(c or shape))


def packed() -> PackedSequence:
    return PackedSequence(randn(7, 3), torch.tensor([2, 2, 1, 1, 1]))


def weights(name: str, *sizes: int, **options: Any) -> list[Tensor]:
    return [parameter.detach() for parameter in getattr(rnnfast, name)(*sizes, **options).parameters()]


def given(name: str, sizes: tuple[int, ...], weight: str, value: Any, input: Any = None, **options: Any):
    """A call, forward and backward, of a module one of whose weights is a function of what it was."""
    module = getattr(rnnfast, name)(*sizes, **options)
    setattr(module, weight, nn.Parameter(value(getattr(module, weight).detach()).clone()))
    if input is None:
        input = randn(2, sizes[0]) if name.endswith("Cell") else randn(5, 2, sizes[0])
    result = module(input)
    output = result if isinstance(result, Tensor) else result[0]
    output = output.data if isinstance(output, PackedSequence) else output
    if output.requires_grad:
        output.sum().backward()


def short(t: Tensor) -> Tensor:
    return t[: 32 * len(t) // 36]


def cells() -> Iterator[Case]:
    for name in ("RNNCell", "GRUCell", "LSTMCell"):
        cell = getattr(rnnfast, name)
        for grad in (True, False):

            def call(input: Tensor, *state: int, sizes=(3, 3), cell=cell, lstm=name == "LSTMCell", grad=grad):
                with torch.set_grad_enabled(grad):
                    cell(*sizes)(input, pair(*state) if lstm else zeros(*state))

            ahead = f"{name}, grad {grad}: "
            yield Case(f"{ahead}[3] and states [2, 3]", lambda call=call: call(randn(3), 2, 3))
            yield Case(f"{ahead}[3] and states [3, 3]", lambda call=call: call(randn(3), 3, 3), f"{NAMED}|1D.*2D")
            yield Case(f"{ahead}[5] and states [3, 3]", lambda call=call: call(randn(5), 3, 3, sizes=(5, 3)))
            yield Case(f"{ahead}[3] and states [2, 3, 3]", lambda call=call: call(randn(3), 2, 3, 3))
            yield Case(f"{ahead}[2, 3] and states [3]", lambda call=call: call(randn(2, 3), 3), ".")
            yield Case(f"{ahead}[2, 3] and states [1, 3]", lambda call=call: call(randn(2, 3), 1, 3), "(?i)batch|got")
            yield Case(f"{ahead}[1, 3] and states [2, 3]", lambda call=call: call(randn(1, 3), 2, 3), "(?i)batch|got")
        yield Case(f"{name}, a bias of one", lambda name=name: given(name, (3, 4), "bias_ih", lambda b: b[:1]))


def layers() -> Iterator[Case]:
    for h, c in ((4, 4), (4, 3), (3, 4), (2, 3), (3, 2)):
        yield Case(
            f"packed LSTM of 3 layers, states of {h} and {c}",
            lambda h=h, c=c: rnnfast.LSTM(3, 4, 3)(packed(), pair(h, 2, 4, c=(c, 2, 4))),
            r"(?s)xpected.*\(3, 2, 4\).*got.*\[[24], 2, 4\]",
        )
    yield Case("packed GRU, states of 4", lambda: rnnfast.GRU(3, 4, 3)(packed(), zeros(4, 2, 4)))
    for weight in ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1_reverse", "weight_hh_l1_reverse"):
        for how, input in (("padded", None), ("packed", packed)):
            yield Case(
                f"LSTM, {weight} with 32 of 36 rows, {how}",
                lambda weight=weight, input=input: given(
                    "LSTM", (3, 9, 2), weight, short, input and input(), bidirectional=True
                ),
                r"(?s)xpected.*36.*got.*32" if input is None else NAMED + "|size|shape",
            )

    def of_three_states(weight: str):
        module = rnnfast.LSTM(3, 9, 2)  # of unbatched input torch.nn takes no notice of the third
        setattr(module, weight, nn.Parameter(short(getattr(module, weight).detach()).clone()))
        module(randn(5, 3), (zeros(2, 9),) * 3)[0].sum().backward()

    for weight in ("weight_ih_l0", "weight_hh_l1"):
        row = f"LSTM, {weight} with 32 of 36 rows, three states"
        yield Case(row, lambda weight=weight: of_three_states(weight), r"(?s)xpected.*36.*got.*32")
    yield Case("LSTM, weight_ih with 2 of 3 columns", lambda: given("LSTM", (3, 4), "weight_ih_l0", lambda w: w[:, :2]))
    for name in ("RNN", "GRU", "LSTM"):
        row = f"{name}, hidden_size 1, weight_hh with one row fewer"
        yield Case(row, lambda name=name: given(name, (3, 1), "weight_hh_l0", lambda w: w[1:]), f"{NAMED}|size|shape")
        for rows in (0, 1, 2):

            def in_inference(name=name, rows=rows):
                with torch.no_grad():
                    given(name, (2, 1), "weight_hh_l0", lambda w: torch.ones(rows, 1), randn(1, 2, 2), bias=False)

            if rows != 1 or name != "RNN":
                yield Case(f"{name}, hidden_size 1, weight_hh with {rows} rows, no_grad", in_inference, f"{NAMED}|size")
        yield Case(f"{name}, a bias of one", lambda name=name: given(name, (3, 4), "bias_hh_l0", lambda b: b[:1]))
        yield Case(f"{name}, a bias of rank 0", lambda name=name: given(name, (3, 4), "bias_hh_l0", lambda b: b[0]))

        def without_a_bias(name=name):
            module = getattr(rnnfast, name)(3, 4)
            del module.bias_hh_l0  # torch.nn goes on with what it was
            module(randn(5, 2, 3), lengths=torch.tensor([-1, 99]))

        yield Case(f"{name}, wrong lengths, a bias deleted", without_a_bias, "lengths")


def functions() -> Iterator[Case]:
    f, gru, projected = functional, weights("GRU", 3, 4), weights("LSTM", 3, 4, proj_size=2)
    empty = torch.tensor([], dtype=torch.int64)
    hr = [*projected[:4], randn(3, 4)]
    table: dict[str, tuple[Callable[[], Any], str]] = {
        "empty batch_sizes": (
            lambda: f.lstm(randn(3, 3), pair(1, 3, 4), weights("LSTM", 3, 4), batch_sizes=empty),
            ".",
        ),
        "batch_sizes [[1]]": (lambda: f.gru(randn(1, 3), zeros(1, 1, 4), gru, batch_sizes=torch.tensor([[1]])), "."),
        "cx of no layer": (lambda: f.lstm(randn(1, 1, 3), pair(1, 1, 2, c=(0, 1, 4)), projected), NAMED),
        "weight_hr with a row more": (lambda: f.lstm(randn(1, 2, 3), pair(1, 2, 2, c=(1, 2, 4)), hr), "."),
        "weight_hr alone with a row more": (lambda: f.lstm(randn(1, 2, 3), None, hr), "."),
        "two directions of one": (lambda: f.gru(randn(5, 2, 3), None, gru, bidirectional=True), "."),
        "biases that are denied": (lambda: f.gru(randn(5, 2, 3), None, gru, has_biases=False), "."),
        "no layers": (lambda: f.gru(randn(5, 2, 3), None, gru, num_layers=0), "."),
        "states of 3 rows for 1": (lambda: f.gru(randn(5, 1, 3), zeros(1, 3, 4), gru), NAMED),
        "input of rank 2": (lambda: f.gru(randn(5, 3), None, gru), "."),
        "weight_hh of no rows": (lambda: f.gru(randn(5, 2, 3), None, [gru[0], gru[1][:0], *gru[2:]]), "."),
    }
    for name, (run, message) in table.items():
        yield Case(f"functional, {name}", run, message)


def operator_arguments(cell: str, kind: str) -> Iterator[tuple[str, Any, list]]:
    """(name, operator, arguments) of a cell's infer, fwd and bwd, as a layer (of lengths, or packed) or as a step."""
    op = CELLS[cell]
    operators = op.step if kind == "step" else op.layer
    own = weights({"rnn_tanh": "RNN", "gru": "GRU", "lstm": "LSTM"}[cell], 3, 4)
    if kind == "step":
        args = [randn(2, 3), *[zeros(2, 4)] * op.states, *own, *op.flags]
    else:
        rows = (torch.tensor([2, 2, 1]), None) if kind == "packed" else (None, torch.tensor([2, 3]))
        input = randn(5, 3) if kind == "packed" else randn(3, 2, 3)
        args = [input, *[zeros(1, 2, 4)] * op.states, own, *rows, *op.flags]
    yield f"{cell} {kind} infer", operators.infer, args
    yield f"{cell} {kind} fwd", operators.fwd, args
    results = operators.fwd(*args)
    results = [results] if isinstance(results, Tensor) else list(results)
    outputs = op.states + (kind != "step")
    known = results[outputs:] or results if kind == "step" else [results[0], *results[outputs:]]
    yield f"{cell} {kind} bwd", operators.bwd, [*results[:outputs], *args, *known, True, True, True]


def operators() -> Iterator[Case]:
    """Each tensor of each operator on the meta device, and without its memory, or half of it."""
    changes = {
        "on meta": (lambda t: t.to("meta"), "(?i)device|meta|backend"),
        "freed": (freed, "(?i)storage|memory|data"),
        "half freed": (lambda t: freed(t, 2), "(?i)storage|memory|data"),
    }
    for cell in ("rnn_tanh", "gru", "lstm"):
        for kind in ("lengths", "packed", "step"):
            for name, operator, args in operator_arguments(cell, kind):
                for how, (change, message) in changes.items():
                    for k, value in enumerate(args):
                        if isinstance(value, Tensor):
                            bad = [*args[:k], change(value), *args[k + 1 :]]
                            yield Case(f"{name}, {k} {how}", lambda bad=bad, f=operator: f(*bad), message)
                        for i, weight in enumerate(value) if isinstance(value, list) else ():
                            own = [*value[:i], change(weight), *value[i + 1 :]]
                            bad = [*args[:k], own, *args[k + 1 :]]
                            yield Case(f"{name}, weight {i} {how}", lambda bad=bad, f=operator: f(*bad), message)


def freed_modules() -> Iterator[Case]:
    for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"):
        for grad in (True, False):
            for what in ("input", "hx", "weight_hh"):
                for part in (0, 2):

                    def call(name=name, grad=grad, what=what, part=part):
                        cell = name.endswith("Cell")
                        module, input = getattr(rnnfast, name)(3, 4), randn(2, 3) if cell else randn(5, 2, 3)
                        hx = zeros(2, 4) if cell else zeros(1, 2, 4)
                        if what == "input":
                            input = freed(input, part)
                        elif what == "hx":
                            hx = freed(hx, part)
                        else:
                            weight = getattr(module, what if cell else f"{what}_l0")
                            weight.untyped_storage().resize_(part and weight.untyped_storage().nbytes() // part)
                        with torch.set_grad_enabled(grad):
                            module(input, (hx, hx) if "LSTM" in name else hx)

                    row = f"{name}, grad {grad}, {what} {'half ' * (part == 2)}freed"
                    yield Case(row, call, "(?i)storage|memory|data|primitive")


GROUPS = ("on meta", " half freed", " freed")  # by the last word of a name; all others are one more


def group_of(case: Case) -> str:
    return next((group for group in GROUPS if case.name.endswith(group)), "")


CASES = sorted([*cells(), *layers(), *functions(), *operators(), *freed_modules()], key=group_of)


def make(place: int):
    torch.manual_seed(place)
    malformed_child.make(place, CASES.__getitem__, lambda *outcome: None)


if __name__ == "__main__":
    malformed_child.main(int(sys.argv[1]), int(sys.argv[2]), make)
