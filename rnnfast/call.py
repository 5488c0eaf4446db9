"""One call of a stack of layers: its arguments, and what follows from them alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import SPECS, Sizes

AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts; float64 stays


class Call(NamedTuple):
    """One call of a stack of layers: the arguments of `functional`; `states` is (hx,), (hx, cx), or None for zeros."""

    cell: str
    input: Tensor
    states: Sequence[Tensor] | None
    weights: Sequence[Tensor]
    has_biases: bool = True
    num_layers: int = 1
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    step: bool = False  # a cell module's one step: input [B, I] and states [B, H]
    sizes: tuple[int, int, int] | None = None  # input_size, hidden_size, proj_size or 0, as torch's operators take them


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on this device, None where it is off."""
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def dtype_of(input: Tensor) -> torch.dtype:
    """The dtype that a call with this input computes in: autocast's, where it is on and casts such tensors."""
    low = autocast_dtype(input.device)
    return input.dtype if low is None or input.dtype not in AUTOCAST_DTYPES else low


def batch_of(call: Call) -> int:
    """The number of batch rows, of a packed call too."""
    if call.batch_sizes is not None:
        return int(call.batch_sizes[0])
    return call.input.size(0 if call.batch_first or call.step else 1)


def zeros(call: Call) -> tuple[Tensor, ...]:
    """Initial states of zeros, like torch.nn's in the dtype of the input. States of one size share a tensor."""
    spec, input, gate_rows = SPECS[call.cell], call.input, call.weights[0].size(0)
    sizes = Sizes(input.size(-1), gate_rows, gate_rows // len(spec.gates), call.weights[1].size(1))
    layers = call.num_layers * (2 if call.bidirectional else 1)
    ahead = (batch_of(call),) if call.step else (layers, batch_of(call))
    size, *others = [sizes[state.axis] for state in spec.states]
    hx = torch.zeros(*ahead, size, dtype=input.dtype, device=input.device)
    more = [hx if n == size else torch.zeros(*ahead, n, dtype=input.dtype, device=input.device) for n in others]
    return (hx, *more)
