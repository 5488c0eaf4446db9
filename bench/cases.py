"""What is measured: a `Case` is a recurrent layer, stack or cell loop in one shape, mode, dtype and thread count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import ModuleType

import torch
from torch import nn

CELLS = ("LSTM", "GRU", "RNN")
MODES = ("inference", "training")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# On a GPU float32 is two things: products of tensor cores, which round to TF32, or exact ones.
DTYPES |= {"fp32-tf32": torch.float32, "fp32-ieee": torch.float32}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
NAME_OF_MODE = {"inference": "infer", "training": "train", "forward": "forward", "step": "step"}


@dataclass(frozen=True)
class Case:
    """One thing to time.

    mode: "inference" is a call without gradients; "forward", a call with gradients on; "training", forward and all
    gradients, the input's included; "step", the same and a step of SGD, which changes the weights.

    form: "padded" [T, B, I]; "packed", a PackedSequence of unequal lengths; "lengths", the padded layer with the same
    lengths (torch packs and unpacks); "cell", a loop of seq_len calls of the LSTMCell, GRUCell or RNNCell.
    """

    cell: str
    mode: str
    hidden_size: int
    batch: int
    input_size: int = 0  # 0: hidden_size
    dtype: str = "fp32"
    seq_len: int = 100
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    form: str = "padded"
    threads: int = 1
    device: str = "cpu"
    hx: bool = False  # whether the initial states are given, as they are in a stream

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", self.input_size or self.hidden_size)

    @property
    def name(self) -> str:
        """For example lstm_h256_b16_t100_fp32_infer, then what is special, then the threads where they are not 1."""
        parts = [self.cell.lower() + ("cell" if self.form == "cell" else ""), f"h{self.hidden_size}", f"b{self.batch}"]
        parts += [f"t{self.seq_len}", self.dtype, NAME_OF_MODE[self.mode]]
        parts += [f"i{self.input_size}"] * (self.input_size != self.hidden_size)
        parts += [f"{self.num_layers}layers"] * (self.num_layers > 1) + ["bidir"] * self.bidirectional
        parts += [f"proj{self.proj_size}"] * bool(self.proj_size) + [self.form] * (self.form in ("packed", "lengths"))
        parts += ["hx"] * self.hx
        parts += [f"{self.threads}thr"] * (self.threads > 1)
        return "_".join(parts)

    @property
    def has_gradients(self) -> bool:
        """Whether gradients are computed, not only whether they could be."""
        return self.mode in ("training", "step")

    def lengths(self) -> list[int]:
        """Each row's number of steps: all seq_len, or evenly spread over 1..seq_len where rows are unequal."""
        if self.form not in ("packed", "lengths"):
            return [self.seq_len] * self.batch
        return [1 + (self.seq_len - 1) * row // max(1, self.batch - 1) for row in range(self.batch)]

    def flops(self) -> float:
        """Operations of the matrix products (input, recurrent, projection); gradients take twice as many again."""
        products = sum(layer_inputs + self.recurrent_weights() for layer_inputs in self._input_weights())
        return 2.0 * products * sum(self.lengths()) * (3 if self.has_gradients else 1)

    def weights_read(self) -> int:
        """Elements of the weights that must be read, again for the gradient: the recurrent ones at every step, because
        its h is the last step's result; those of the input once for all steps, but at every call of a cell."""
        input_passes = self.seq_len if self.form == "cell" else 1
        per_pass = (w * input_passes + self.recurrent_weights() * self.seq_len for w in self._input_weights())
        return sum(per_pass) * (2 if self.has_gradients else 1)

    def recurrent_weights(self) -> int:
        """Elements of W_hh, and of the projection W_hr, in one direction of one layer."""
        out = self.proj_size or self.hidden_size
        return self.hidden_size * out * (GATES[self.cell] + bool(self.proj_size))

    def _input_weights(self) -> Iterator[int]:
        """Elements of each W_ih: of every layer and direction."""
        directions = 1 + self.bidirectional
        for layer in range(self.num_layers):
            inputs = (self.proj_size or self.hidden_size) * directions if layer else self.input_size
            yield from [GATES[self.cell] * self.hidden_size * inputs] * directions


@contextmanager
def float32_products(case: Case) -> Iterator[None]:
    """Sets torch's switches for float32 products on a GPU, which rnnfast follows, where the case's dtype names them."""
    switches = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        if case.dtype.startswith("fp32-"):
            switch.fp32_precision = case.dtype.removeprefix("fp32-")
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def grid(
    hidden: tuple[int, ...],
    batches: tuple[int, ...],
    cells: tuple[str, ...] = CELLS,
    modes: tuple[str, ...] = MODES,
    threads: tuple[int, ...] = (1,),
    **rest,
) -> Iterator[Case]:
    """Every combination, other fields from `rest`; cases that differ in threads only lie together: one reference."""
    for cell, h, b, mode, count in product(cells, hidden, batches, modes, threads):
        yield Case(cell, mode, h, b, threads=count, **rest)


def new_module(namespace: ModuleType, case: Case) -> nn.Module:
    """The case's layer or cell from `namespace` (torch.nn, or rnnfast which has the same constructors)."""
    if case.form == "cell":
        return getattr(namespace, case.cell + "Cell")(case.input_size, case.hidden_size)
    options = {"num_layers": case.num_layers, "bidirectional": case.bidirectional}
    if case.proj_size:
        options["proj_size"] = case.proj_size
    return getattr(namespace, case.cell)(case.input_size, case.hidden_size, **options)
