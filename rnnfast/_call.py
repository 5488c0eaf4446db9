"""One call of a stack of layers, and what can be asked of it before anything runs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .ops import CELLS

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


def fits(call: Call) -> bool:
    """Whether all are plain tensors of the documented shapes, one dtype and one device.

    What torch makes of other calls, and in which words it refuses them, is its own affair: those go to it.
    """
    input, weights, batch_sizes = call.input, call.weights, call.batch_sizes
    packed = batch_sizes is not None
    if input.dim() != (2 if packed or call.step else 3):
        return False
    if not call.step and input.size(1 if call.batch_first and not packed else 0) == 0:
        return False
    compiling = torch.compiler.is_compiling()
    if not compiling and not all(_plain(tensor) for tensor in (input, *weights, *(call.states or ()))):
        return False
    device, dtypes = input.device, (input.dtype,)
    if input.dtype in AUTOCAST_DTYPES and autocast_dtype(device) is not None:
        dtypes = AUTOCAST_DTYPES

    directions = 2 if call.bidirectional else 1
    per_direction, rest = divmod(len(weights), call.num_layers * directions)
    projected = per_direction % 2 == 1
    if rest or per_direction - projected != (4 if call.has_biases else 2) or weights[1].dim() != 2:
        return False
    rows, output_size = weights[1].shape
    hidden_size = rows // CELLS[call.cell].gates
    if projected != (output_size != hidden_size) or (projected and call.cell != "lstm"):
        return False
    recurrent = ((rows, output_size), (rows,), (rows,)) if call.has_biases else ((rows, output_size),)
    recurrent = (*recurrent, (output_size, hidden_size)) if projected else recurrent
    first = ((rows, input.size(-1)), *recurrent) * directions
    others = ((rows, directions * output_size), *recurrent) * (directions * (call.num_layers - 1))
    for weight, shape in zip(weights, first + others, strict=True):
        if weight.shape != shape or weight.dtype not in dtypes or weight.device != device:
            return False

    if packed and not compiling and not _descending(batch_sizes, input.size(0)):
        return False  # in a compiled graph the values are unknown; the operator checks them itself
    states = call.states
    if states is None:
        return True
    batch = states[0].size(1) if packed and compiling else batch_of(call)
    ahead = (batch,) if call.step else (call.num_layers * directions, batch)
    shape = (*ahead, output_size)
    for state in states:
        if state.shape != shape or state.dtype not in dtypes or state.device != device:
            return False
        shape = (*ahead, hidden_size)
    return states[-1].dtype is states[0].dtype


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on this device, None where it is off."""
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def dtype_of(input: Tensor) -> torch.dtype:
    """The dtype that a call with this input computes in: autocast's, where it is on and casts such tensors."""
    low = autocast_dtype(input.device)
    return input.dtype if low is None or input.dtype not in AUTOCAST_DTYPES else low


def _plain(tensor: Tensor) -> bool:
    own_rules = getattr(type(tensor), "__torch_dispatch__", None) is not Tensor.__torch_dispatch__
    return tensor.layout is torch.strided and (not own_rules or isinstance(tensor, FakeTensor | FunctionalTensor))


def _descending(batch_sizes: Tensor, rows: int) -> bool:
    if batch_sizes.dim() != 1 or batch_sizes.dtype is not torch.int64 or batch_sizes.device.type != "cpu":
        return False
    sizes = batch_sizes.tolist()
    return bool(sizes) and sum(sizes) == rows and sizes[-1] > 0 and sizes == sorted(sizes, reverse=True)


def batch_of(call: Call) -> int:
    """The number of batch rows, of a packed call too."""
    if call.batch_sizes is not None:
        return int(call.batch_sizes[0])
    return call.input.size(0 if call.batch_first or call.step else 1)


def zeros(call: Call) -> tuple[Tensor, ...]:
    """Initial states of zeros, like torch.nn's in the dtype of the input."""
    input, directions = call.input, 2 if call.bidirectional else 1
    batch = batch_of(call)
    rows, output_size = call.weights[0].size(0), call.weights[1].size(1)
    hidden_size = rows // CELLS[call.cell].gates
    shape = (batch,) if call.step else (call.num_layers * directions, batch)
    hx = torch.zeros(*shape, output_size, dtype=input.dtype, device=input.device)
    if CELLS[call.cell].states == 1:
        return (hx,)
    if output_size == hidden_size:
        return (hx, hx)  # nothing writes them
    return (hx, torch.zeros(*shape, hidden_size, dtype=input.dtype, device=input.device))


LENGTHS_NEED = "lengths needs an input, states and weights of one dtype and device that fit together as documented"


def check_lengths(call: Call) -> None:
    """Raises for `lengths` of a wrong kind; their range is the kernels' to check, for it lies in device memory."""
    lengths, input = call.lengths, call.input
    if lengths is None:
        return
    if call.batch_sizes is not None:
        raise ValueError("lengths is for padded input; a packed sequence has its own batch_sizes")
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise RuntimeError(f"Expected lengths to be an int32 or int64 tensor, got {kind}")
    if lengths.device != input.device:
        raise RuntimeError(f"Expected lengths on {input.device}, got {lengths.device}")
    batch = input.size(0 if call.batch_first else 1) if input.dim() == 3 else 1
    if lengths.shape != (batch,):
        raise RuntimeError(f"Expected lengths of shape {(batch,)}, got {tuple(lengths.shape)}")
