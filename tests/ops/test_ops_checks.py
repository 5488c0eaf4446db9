"""What the C++ operators refuse by themselves, before touching memory: RuntimeError that names the argument."""

from __future__ import annotations

import os

import pytest
import torch
from support.harness import CELLS, Case
from test_ops import SMALL, arguments, backward_arguments, step_arguments, step_backward_arguments
from torch._subclasses import FakeTensorMode

from rnnfast.ops import CELLS as OPS

pytestmark = pytest.mark.skipif(
    os.environ.get("RNNFAST_SKIP_EXT", "0") != "0",
    reason="RNNFAST_SKIP_EXT is set: the operators have no implementation",
)
NAMES = {
    1: ["input", "hx", "weights", "batch_sizes", "lengths"],
    2: ["input", "hx", "cx", "weights", "batch_sizes", "lengths"],
}


def changed(case: Case, **changes) -> tuple:
    """The forward arguments with some replaced; a change is a value or a function of the old one."""
    args = list(arguments(case))
    names = NAMES[OPS[case.cell].states]
    for name, change in changes.items():
        place = names.index(name)
        args[place] = change(args[place]) if callable(change) else change
    return tuple(args)


def weight(index: int, change):
    return lambda weights: [change(w) if i == index else w for i, w in enumerate(weights)]


def long(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# name -> (case options, changes, what the message must hold)
BAD = {
    "input-1d": ({}, {"input": lambda x: x[0, 0]}, "input"),
    "input-4d": ({}, {"input": lambda x: x[None]}, "input"),
    "input-packed-3d": ({"ragged": "sorted"}, {"input": lambda x: x[None]}, "input"),
    "input-width": ({}, {"input": lambda x: x[..., :1]}, ""),
    "input-dtype": ({}, {"input": lambda x: x.double()}, ""),
    "input-int": ({}, {"input": lambda x: x.long()}, ""),
    "hx-2d": ({}, {"hx": lambda h: h[0]}, "hx"),
    "hx-batch": ({}, {"hx": lambda h: h[:, :2]}, "hx|input"),
    "hx-hidden": ({}, {"hx": lambda h: h[..., :3]}, ""),
    "hx-three-directions": ({}, {"hx": lambda h: h.repeat(3, 1, 1)}, ""),
    "hx-two-directions": ({}, {"hx": lambda h: h.repeat(2, 1, 1)}, ""),
    "hx-dtype": ({}, {"hx": lambda h: h.half()}, "hx"),
    "weights-none": ({}, {"weights": lambda w: []}, "weight"),
    "weights-one": ({}, {"weights": lambda w: w[:1]}, "weight"),
    "weights-uneven": ({"bidirectional": True}, {"weights": lambda w: w[:-1]}, "weight"),
    "weights-six": ({}, {"weights": lambda w: w + w[:2]}, "weight"),
    "weight_ih-rows": ({}, {"weights": weight(0, lambda w: w[:-1])}, ""),
    "weight_ih-width": ({}, {"weights": weight(0, lambda w: w[:, :1])}, ""),
    "weight_ih-1d": ({}, {"weights": weight(0, lambda w: w[0])}, "weight_ih"),
    "weight_hh-width": ({}, {"weights": weight(1, lambda w: w[:, :-1])}, r"weights\[1\]"),
    "weight_hh-rows": ({}, {"weights": weight(1, lambda w: w[1:])}, r"weights\[1\]"),
    "weight_hh-dtype": ({}, {"weights": weight(1, lambda w: w.double())}, r"weights\[1\]"),
    "bias_ih-size": ({}, {"weights": weight(2, lambda w: w[:-1])}, r"weights\[2\]"),
    "bias_hh-2d": ({}, {"weights": weight(3, lambda w: w[None])}, r"weights\[3\]"),
    "bias_hh-dtype": ({}, {"weights": weight(3, lambda w: w.bfloat16())}, r"weights\[3\]"),
    "second-direction": ({"bidirectional": True}, {"weights": weight(5, lambda w: w[:, 1:])}, r"weights\[5\]"),
    "batch_sizes-sum": ({"ragged": "sorted"}, {"batch_sizes": long(3, 3, 3, 3)}, "batch_sizes"),
    "batch_sizes-rising": ({"ragged": "sorted"}, {"batch_sizes": lambda b: b.flip(0)}, "batch_sizes"),
    "batch_sizes-zero": ({"ragged": "sorted"}, {"batch_sizes": lambda b: torch.cat([b, long(0)])}, "batch_sizes"),
    "batch_sizes-negative": (
        {"ragged": "sorted"},
        {"batch_sizes": lambda b: torch.cat([b, long(1, -1)])},
        "batch_sizes",
    ),
    "batch_sizes-int32": ({"ragged": "sorted"}, {"batch_sizes": lambda b: b.int()}, "batch_sizes"),
    "batch_sizes-2d": ({"ragged": "sorted"}, {"batch_sizes": lambda b: b[None]}, "batch_sizes"),
    "batch_sizes-empty": ({"ragged": "sorted"}, {"batch_sizes": lambda b: b[:0]}, "batch_sizes"),
    "lengths-size": ({}, {"lengths": long(1, 2)}, "lengths"),
    "lengths-2d": ({}, {"lengths": long(1, 2, 3)[None]}, "lengths"),
    "lengths-above-T": ({}, {"lengths": long(1, 5, 2)}, "lengths"),
    "lengths-negative": ({}, {"lengths": long(1, -1, 2)}, "lengths"),
    "lengths-huge": ({}, {"lengths": long(1, 2**32 + 1, 2)}, "lengths"),
    "lengths-float": ({}, {"lengths": torch.ones(3)}, "lengths"),
    "lengths-and-batch_sizes": ({"ragged": "sorted"}, {"lengths": long(1, 1, 1)}, "lengths"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("cell", CELLS)
def test_forward_refuses(cell, name):
    options, changes, word = BAD[name]
    args = changed(Case(cell, **SMALL, **options), **changes)
    for op in (OPS[cell].layer.infer, OPS[cell].layer.fwd):
        with pytest.raises(RuntimeError, match=f"(?s){word}.*") as caught:
            op(*args)
        assert any(digit in str(caught.value) for digit in "0123456789") or "dtype" in str(caught.value).lower(), (
            caught.value
        )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: c[..., :2], "cx"),
        (lambda c: c[:, :1], "cx"),
        (lambda c: c.double(), "cx"),
        (lambda c: c[0], "cx"),
    ],
)
def test_lstm_refuses_cx(change, word):
    args = changed(Case("lstm", **SMALL), cx=change)
    for op in (OPS["lstm"].layer.infer, OPS["lstm"].layer.fwd):
        with pytest.raises(RuntimeError, match=word):
            op(*args)


def test_projection_shapes_are_checked():
    case = Case("lstm", proj=2, **SMALL)
    for index, change, word in [
        (1, lambda w: w[:, :1], r"weights\[1\]"),
        (4, lambda w: w[:1], ""),
        (4, lambda w: w[:, :3], r"weights\[4\]"),
    ]:
        with pytest.raises(RuntimeError, match=word):
            OPS["lstm"].layer.fwd(*changed(case, weights=weight(index, change)))
    for cell in ("gru", "rnn_tanh"):  # five tensors mean a projection, which these cells have not
        with pytest.raises(RuntimeError, match="weight"):
            OPS[cell].layer.infer(*changed(Case(cell, **SMALL), weights=lambda w: [*w, torch.zeros(2, 5)]))


@pytest.mark.parametrize("cell", CELLS)
def test_backward_refuses(cell):
    op, case = OPS[cell], Case(cell, **SMALL)
    good = backward_arguments(case)
    op.layer.bwd(*good)
    output_at = 1 + op.states + len(arguments(case))
    bad = [(i, lambda g: g[..., :-1]) for i in range(1 + op.states)]
    bad += [(i, lambda g: g.double()) for i in range(1 + op.states)]
    bad += [(0, lambda g: g[:-1]), (output_at, lambda out: out[:-1]), (output_at, lambda out: out.double())]
    bad += [(1 + op.states, lambda x: x[:-1]), (2 + op.states, lambda h: h[:, 1:])]
    if cell in ("gru", "lstm"):
        bad += [(output_at + 1, change) for change in (lambda s: s[:, 1:], lambda s: s[0], lambda s: s.double())]
        bad += [(output_at + 1, change) for change in (lambda s: s[..., 1:], lambda s: s.mT.contiguous().mT)]
    for place, change in bad:
        args = list(good)
        args[place] = change(args[place])
        with pytest.raises(RuntimeError):
            op.layer.bwd(*args)


@pytest.mark.parametrize("cell", CELLS)
def test_other_devices_and_layouts_are_refused(cell):
    op, case = OPS[cell], Case(cell, **SMALL)
    with pytest.raises(RuntimeError):
        op.layer.infer(*changed(case, input=lambda x: x.to_sparse()))
    with pytest.raises(RuntimeError):
        op.layer.infer(*changed(case, hx=lambda h: h.to("meta")))


@pytest.mark.parametrize("cell", CELLS)
def test_stack_refuses(cell):
    case = Case(cell, **SMALL, layers=3)
    infer, good = OPS[cell].layer.infer, arguments(case)
    for num_layers in (-3, 0, 2, 5):
        with pytest.raises(RuntimeError, match="weights|hx"):
            infer(*good[:-1], num_layers)
    for change, word in [
        ({"weights": weight(4, lambda w: w[:, 1:])}, "weights"),
        ({"weights": weight(9, lambda w: w.double())}, "weights"),
        ({"weights": weight(10, lambda b: b[1:])}, "weights"),
        ({"hx": lambda h: h[:2]}, "hx"),
        ({"hx": lambda h: h[:0]}, "hx"),
        ({"hx": lambda h: h[0, 0, 0]}, "hx"),
        ({"hx": lambda h: h[..., 1:]}, "hx"),
    ]:
        with pytest.raises(RuntimeError, match=word):
            infer(*changed(case, **change))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="num_layers"):
        infer(*good[:-1], 0)


@pytest.mark.parametrize("cell", CELLS)
def test_step_refuses(cell):
    op, case = OPS[cell], Case(cell, **SMALL)
    good = step_arguments(case)
    weight_ih = 1 + op.states
    bad = {
        "input": [(0, lambda x: x[0]), (0, lambda x: x[None]), (0, lambda x: x[:0].expand(0, 2)[None])],
        "hx": [(1, lambda h: h[0]), (1, lambda h: h[:2]), (1, lambda h: h[:, 1:]), (1, lambda h: h.double())],
        "weight": [(weight_ih, lambda w: w[0]), (weight_ih + 1, lambda w: w[0]), (weight_ih + 2, lambda b: b[1:])],
        "biases": [(weight_ih + 2, lambda b: None), (weight_ih + 3, lambda b: None)],
    }
    for word, changes in bad.items():
        for place, change in changes:
            args = list(good)
            args[place] = change(args[place])
            for function in (op.step.infer, op.step.fwd):
                with pytest.raises(RuntimeError, match=word):
                    function(*args)
    backward = list(step_backward_arguments(case))
    for place in (0, -4):  # grad_h_n, and h_n or saved
        with pytest.raises(RuntimeError):
            op.step.bwd(*[arg[..., 1:] if i == place % len(backward) else arg for i, arg in enumerate(backward)])
