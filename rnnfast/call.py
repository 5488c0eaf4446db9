"""One call of a stack of layers: its arguments, and what follows from them alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import OUTPUT, SPECS
from .rows import PADDED, Rows


class Call(NamedTuple):
    """The arguments of one call of `functional`, or of one step of a cell module."""

    cell: str
    input: Tensor
    states: Sequence[Tensor] | None  # (hx,) or (hx, cx); None for zeros
    weights: Sequence[Tensor]
    has_biases: bool = True
    num_layers: int = 1
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    rows: Rows = PADDED
    step: bool = False  # a cell module's one step: input [B, I] and states [B, H]
    sizes: tuple[int, int, int] | None = None  # input_size, hidden_size, proj_size or 0, as torch's operators take them


def batch_of(call: Call) -> int:
    """The number of sequences in the batch, of a packed call too."""
    if call.rows.batch_sizes is not None:
        return int(call.rows.batch_sizes[0])
    return call.input.size(0 if call.batch_first or call.step else 1)


def zeros(call: Call) -> tuple[Tensor, ...]:
    """Initial states of zeros, like torch.nn's in the dtype of the input. States of one size share a tensor."""
    spec, input, batch = SPECS[call.cell], call.input, batch_of(call)
    hidden_size, output_size = call.weights[0].size(0) // len(spec.gates), call.weights[1].size(1)
    ahead = (batch,) if call.step else (call.num_layers * (2 if call.bidirectional else 1), batch)
    hx = torch.zeros(*ahead, output_size, dtype=input.dtype, device=input.device)
    if hidden_size == output_size:
        return (hx,) * len(spec.states)
    wide = torch.zeros(*ahead, hidden_size, dtype=input.dtype, device=input.device)
    return tuple([hx if state.axis == OUTPUT else wide for state in spec.states])
