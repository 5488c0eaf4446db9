"""What must hold of a call before anything runs: for the kernels, and for torch's own operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._torch_internals import TRACED_TYPES, has_code_of_its_own, is_any_autocast_enabled
from .autocast import AUTOCAST_DTYPES, autocast_dtype
from .call import Call, batch_of
from .cells import BIAS, PROJECTION, SPECS, Layout, Sizes, layout_with

ORDINARY_TYPES = frozenset((Tensor, torch.nn.Parameter))


def fits(call: Call) -> bool:
    """Whether the kernels can take a call: ordinary tensors, documented shapes, one dtype and device, no size of 0.

    The batch may have size 0. All other calls go to torch, which runs them or raises its own errors.
    """
    input, weights, batch_sizes = call.input, call.weights, call.rows.batch_sizes
    packed, compiling = batch_sizes is not None, torch.compiler.is_compiling()
    if not compiling and not all(map(is_ordinary, (input, *weights, *(call.states or ())))):
        return False
    if input.dim() != (2 if packed or call.step else 3) or input.size(-1) == 0:
        return False
    if not call.step and input.size(1 if call.batch_first and not packed else 0) == 0:
        return False
    if call.step and not compiling and torch.is_grad_enabled() and weights[0].is_inference():
        return False  # autograd cannot save it, and torch's cells need not
    device: torch.device = input.device
    dtypes: tuple[torch.dtype, ...] = (input.dtype,)
    if is_any_autocast_enabled() and input.dtype in AUTOCAST_DTYPES and autocast_dtype(device) is not None:
        dtypes = AUTOCAST_DTYPES

    found = _layout_and_sizes(call)
    if found is None:
        return False
    layout, sizes = found
    for weight, shape in zip(weights, _weight_shapes(call, layout, sizes), strict=True):
        if weight.shape != shape or weight.dtype not in dtypes or weight.device != device:
            return False

    if batch_sizes is not None and not compiling and not descending(batch_sizes, input.size(0)):
        return False  # in a compiled graph the values are unknown; the operator checks them itself
    states = call.states
    if states is None:
        return True
    batch = states[0].size(1) if packed and compiling else batch_of(call)
    for state, shape in zip(states, _state_shapes(call, sizes, batch), strict=True):
        if state.shape != shape or state.dtype not in dtypes or state.device != device:
            return False
    return states[-1].dtype is states[0].dtype


def _layout_and_sizes(call: Call) -> tuple[Layout, Sizes] | None:
    """The layout and sizes by the number of weights and the shape of weight_hh; None if these do not fit together."""
    spec, weights = SPECS[call.cell], call.weights
    layers = call.num_layers * (2 if call.bidirectional else 1)
    for layout in spec.layouts:
        if len(layout.axes) * layers == len(weights) and (BIAS in layout.options) == bool(call.has_biases):
            break
    else:
        return None
    if layers <= 0 or weights[1].dim() != 2:
        return None
    gates, projected = len(spec.gates), PROJECTION in layout.options
    rows, output_size = weights[1].shape
    hidden_size = rows // gates
    if hidden_size == 0 or output_size == 0 or projected != (output_size < hidden_size):
        return None
    sizes = Sizes(call.input.size(-1), gates * hidden_size, hidden_size, output_size if projected else hidden_size)
    return layout, sizes


def _weight_shapes(call: Call, layout: Layout, sizes: Sizes) -> list[tuple[int, ...]]:
    """The documented shapes of all weights, in torch.nn's flat order; `sizes` are those of the first layer."""
    directions = 2 if call.bidirectional else 1
    shapes = [tuple([sizes[axis] for axis in axes]) for axes in layout.axes] * directions
    if call.num_layers > 1:
        later = Sizes(directions * sizes.output, *sizes[1:])
        of_later = [tuple([later[axis] for axis in axes]) for axes in layout.axes] * directions
        shapes += of_later * (call.num_layers - 1)
    return shapes


def _state_shapes(call: Call, sizes: Sizes, batch: int) -> list[tuple[int, ...]]:
    """The documented shapes of the states."""
    ahead = (batch,) if call.step else (call.num_layers * (2 if call.bidirectional else 1), batch)
    return [(*ahead, sizes[state.axis]) for state in SPECS[call.cell].states]


def states_of(cell: str, hx: Any) -> Sequence[Tensor] | None:
    """hx as (hx,) or (hx, cx); None if it is not a tensor, or for an LSTM not a pair of tensors."""
    count = len(SPECS[cell].states)
    if count == 1:
        return (hx,) if isinstance(hx, Tensor) else None
    if isinstance(hx, (tuple, list)) and len(hx) == count and all(isinstance(state, Tensor) for state in hx):
        return hx
    return None


def usual_states(count: int, hx: Any) -> Sequence[Tensor] | None:
    """`states_of` for the fast path: None where hx, which should hold `count` states, needs another look."""
    if count == 1:
        return (hx,) if type(hx) in ORDINARY_TYPES else None
    if isinstance(hx, (tuple, list)) and len(hx) == count and ORDINARY_TYPES.issuperset(map(type, hx)):
        return hx
    return None


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is strided, and its class has no code of its own for calls on it."""
    cls = type(tensor)
    if cls not in ORDINARY_TYPES and not issubclass(cls, TRACED_TYPES) and has_code_of_its_own(cls):
        return False
    return tensor.layout is torch.strided and not tensor.is_nested


def descending(batch_sizes: Tensor, rows: int) -> bool:
    """Whether `batch_sizes` can be a PackedSequence's of so many rows."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype is not torch.int64 or batch_sizes.device.type != "cpu":
        return False
    sizes = batch_sizes.tolist()
    return bool(sizes) and sum(sizes) == rows and sizes[-1] > 0 and sizes == sorted(sizes, reverse=True)


def check_what_torch_trusts(call: Call, names: Sequence[str]) -> None:
    """Raises RuntimeError where torch's operators might read memory outside their arguments.

    They do not check all shapes of weights, and a packed LSTM does not check how many layers its states have.
    `names` are those of the weights.
    """
    layers = call.num_layers * (2 if call.bidirectional else 1)
    for i, state in enumerate(call.states or ()):
        if call.rows.batch_sizes is not None and state.dim() == 3 and state.size(0) != layers:
            expected = (layers, *state.shape[1:])
            raise RuntimeError(f"Expected hidden[{i}] size {expected}, got {list(state.shape)}")
    input_size, hidden_size, proj_size = call.sizes or (0, 0, 0)
    if not is_ordinary(call.input) or call.input.shape[-1:] != (input_size,):
        return
    layout = layout_with(SPECS[call.cell], call.has_biases, proj_size not in (0, hidden_size))
    if layout is None or len(layout.weights) * layers != len(call.weights):
        return
    sizes = Sizes(input_size, len(SPECS[call.cell].gates) * hidden_size, hidden_size, proj_size or hidden_size)
    shapes = _weight_shapes(call, layout, sizes)
    for name, weight, shape in zip(names, call.weights, shapes, strict=False):
        trusted = is_ordinary(weight) and weight.dtype is call.input.dtype
        if call.step and len(shape) == 2:
            trusted = False  # torch's cells check their matrices, not their biases
        if trusted and weight.shape != shape:
            raise RuntimeError(f"{name}: expected shape {list(shape)}, got {list(weight.shape)}")


def check_states(call: Call, hidden_size: int, output_size: int) -> None:
    """Raises RuntimeError for states of another shape than documented, in the words of torch.nn's modules."""
    sizes = Sizes(0, 0, hidden_size, output_size)
    shapes = _state_shapes(call, sizes, batch_of(call))
    for i, (state, shape) in enumerate(zip(call.states or (), shapes, strict=False)):
        if state.shape != shape:
            name = f"hidden[{i}]" if len(shapes) > 1 else "hidden"
            raise RuntimeError(f"Expected {name} size {shape}, got {list(state.shape)}")


LENGTHS_NEED = "lengths needs an input, states and weights of one dtype and device that fit together as documented"


def check_rows(call: Call) -> None:
    """Raises for `lengths` of a wrong kind. The kernels check their range, because it lies in device memory."""
    (batch_sizes, lengths), input = call.rows, call.input
    if lengths is None:
        return
    if batch_sizes is not None:
        raise ValueError("lengths is for padded input; a packed sequence has its own batch_sizes")
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise RuntimeError(f"Expected lengths to be an int32 or int64 tensor, got {kind}")
    if lengths.device != input.device:
        raise RuntimeError(f"Expected lengths on {input.device}, got {lengths.device}")
    batch = input.size(0 if call.batch_first else 1) if input.dim() == 3 else 1
    if lengths.shape != (batch,):
        raise RuntimeError(f"Expected lengths of shape {(batch,)}, got {tuple(lengths.shape)}")
