"""What is measured: a `Case` is a recurrent layer, stack or cell loop in one shape, mode, dtype and thread count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

CELLS = ("LSTM", "GRU", "RNN")
MODES = ("inference", "training")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRID_SEQ_LEN = {"cpu": 100, "cuda": 512}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}

# The speed that the CPU kernels must have on the `goal` grid: geometric mean per (cell, mode), and the least of all.
GOALS = {
    ("GRU", "inference"): 2.5,
    ("RNN", "inference"): 2.0,
    ("LSTM", "inference"): 1.3,
    ("GRU", "training"): 3.0,
    ("RNN", "training"): 2.5,
    ("LSTM", "training"): 1.2,
}
GOAL_MINIMUM = 0.95


@dataclass(frozen=True)
class Case:
    """One thing to time.

    mode: "inference" is a call without gradients; "training" is forward and all gradients, the input's included.

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", self.input_size or self.hidden_size)

    @property
    def name(self) -> str:
        """For example lstm_h256_b16_t100_fp32_infer, then what is special, then the threads where they are not 1."""
        parts = [self.cell.lower() + ("cell" if self.form == "cell" else ""), f"h{self.hidden_size}", f"b{self.batch}"]
        parts += [f"t{self.seq_len}", self.dtype, "train" if self.mode == "training" else "infer"]
        parts += [f"i{self.input_size}"] * (self.input_size != self.hidden_size)
        parts += [f"{self.num_layers}layers"] * (self.num_layers > 1) + ["bidir"] * self.bidirectional
        parts += [f"proj{self.proj_size}"] * bool(self.proj_size) + [self.form] * (self.form in ("packed", "lengths"))
        parts += [f"{self.threads}thr"] * (self.threads > 1)
        return "_".join(parts)

    @property
    def on_grid(self) -> bool:
        """Whether this is a point of the grid: one padded layer, one direction, as many inputs as units."""
        plain = replace(self, num_layers=1, bidirectional=False, proj_size=0, form="padded", input_size=0) == self
        return plain and self.seq_len == GRID_SEQ_LEN[self.device]

    def lengths(self) -> list[int]:
        """Each row's number of steps: all seq_len, or evenly spread over 1..seq_len where rows are unequal."""
        if self.form not in ("packed", "lengths"):
            return [self.seq_len] * self.batch
        return [1 + (self.seq_len - 1) * row // max(1, self.batch - 1) for row in range(self.batch)]

    def flops(self) -> float:
        """Operations of the matrix products (input, recurrent, projection); training has three times as many."""
        gates, hidden, out = GATES[self.cell] * self.hidden_size, self.hidden_size, self.proj_size or self.hidden_size
        directions = 1 + self.bidirectional
        per_row = 0
        for layer in range(self.num_layers):
            inputs = self.input_size if layer == 0 else out * directions
            per_row += directions * (gates * (inputs + out) + (hidden * out if self.proj_size else 0))
        return 2.0 * per_row * sum(self.lengths()) * (3 if self.mode == "training" else 1)


def grid(
    hidden: tuple[int, ...],
    batches: tuple[int, ...],
    cells: tuple[str, ...] = CELLS,
    modes: tuple[str, ...] = MODES,
    **rest,
) -> Iterator[Case]:
    """Every combination, other fields from `rest`; cases of one shape lie together and share their reference."""
    for cell, h, b, mode in product(cells, hidden, batches, modes):
        yield Case(cell, mode, h, b, **rest)


def goal() -> list[Case]:
    """The grid that GOALS speaks of: 1 thread, fp32, T=100."""
    return list(grid((32, 64, 128, 256, 512), (1, 4, 16, 64)))


def special(threads: int) -> Iterator[Case]:
    """What is not in the grid: single steps, cell loops, stacked, bidirectional, projected and unequal rows."""
    for mode, cell in product(MODES, CELLS):
        yield Case(cell, mode, 64, 1, seq_len=1, threads=threads)
        yield Case(cell, mode, 64, 1, form="cell", threads=threads)
    for mode in MODES:
        yield Case("LSTM", mode, 128, 16, bidirectional=True, threads=threads)
        yield Case("GRU", mode, 256, 4, num_layers=2, threads=threads)
        yield Case("LSTM", mode, 256, 16, proj_size=64, threads=threads)
        yield Case("LSTM", mode, 128, 16, form="packed", threads=threads)
        yield Case("GRU", mode, 128, 16, form="packed", threads=threads)
        yield Case("GRU", mode, 128, 16, form="lengths", threads=threads)


def quick() -> list[Case]:
    """At most 5 minutes on 2 cores, with the shapes where rnnfast has the least to win (LSTM with many rows)."""
    cases = list(grid((64, 256, 512), (1, 16, 64)))
    cases += grid((1024,), (64,), cells=("LSTM",), modes=("inference",))
    cases += special(threads=1)
    cases += grid((64,), (1,), dtype="bf16")
    cases += grid((256,), (16,), dtype="bf16")
    cases += grid((256,), (64,), cells=("LSTM",), dtype="bf16")
    cases += grid((64, 512), (1,), threads=2)
    cases += grid((256,), (16,), threads=2)
    return cases


def full() -> list[Case]:
    """The whole CPU grid, with the larger named workloads on random input: speech stack and many-environment batch."""
    hidden = (32, 64, 128, 192, 256, 320, 512, 640, 1024)
    cases: list[Case] = []
    for threads, dtype in product((1, 2), ("fp32", "bf16")):
        cases += grid(hidden, (1, 4, 16, 64), dtype=dtype, threads=threads)
    for threads in (1, 2):
        cases += special(threads)
        for mode in MODES:
            cases.append(
                Case("LSTM", mode, 320, 8, 80, num_layers=4, bidirectional=True, proj_size=160, threads=threads)
            )
            cases += [Case(cell, mode, 256, 1024, seq_len=32, threads=threads) for cell in ("LSTM", "GRU")]
    return sorted(cases, key=lambda case: replace(case, threads=1, mode="").name)


def gpu(quick: bool) -> list[Case]:
    """The grid on the current CUDA device; the quick one has every second size and no 16-bit brain floats."""
    hidden = (64, 256, 512, 1024) if quick else (32, 64, 128, 192, 256, 320, 512, 640, 1024, 2048)
    batches = (1, 16, 64) if quick else (1, 4, 16, 64, 256)
    cases: list[Case] = []
    for dtype in ("fp32", "fp16") if quick else ("fp32", "bf16", "fp16"):
        cases += grid(hidden, batches, dtype=dtype, seq_len=GRID_SEQ_LEN["cuda"], device="cuda")
    cases += [replace(case, device="cuda") for case in special(threads=1)]
    for mode in MODES:
        cases.append(Case("LSTM", mode, 320, 8, 80, num_layers=4, bidirectional=True, proj_size=160, device="cuda"))
        cases += [Case(cell, mode, 256, 1024, seq_len=32, device="cuda") for cell in ("LSTM", "GRU")]
    return cases
