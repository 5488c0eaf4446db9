"""The launchers' view of one layer: its sizes, checked before any memory is touched, and the places of its rows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells import FAMILIES, PROJECTION, Layout, Sizes, arrangement_of, shapes_of
from ..ops import refusal, require
from ..rows import Rows
from .common import LENGTHS, PACKED, PADDED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layer(NamedTuple):
    """Sizes and rows of one layer with all its directions; notation as in ops.py."""

    cell: str  # "rnn", "gru" or "lstm"
    steps: int
    batch: int
    rows: int  # T*B, or sum(batch_sizes)
    input_size: int
    hidden_size: int
    output_size: int  # proj_size if projected
    directions: int
    layout: Layout  # which weights a direction has
    ragged: int  # PADDED, LENGTHS or PACKED of common.py
    lengths: Tensor | None  # [B] on the device; None where PADDED
    offsets: Tensor | None  # int64 [T], the first row of each step; None where not PACKED

    @property
    def projected(self) -> bool:
        return self.output_size != self.hidden_size

    @property
    def state_shapes(self) -> list[tuple[int, int, int]]:
        """[D, B, size] of h and, for an LSTM, of c."""
        sizes = Sizes(self.input_size, 0, self.hidden_size, self.output_size)
        return [(self.directions, self.batch, sizes[state.axis]) for state in FAMILIES[self.cell].states]

    @property
    def padding(self) -> bool:
        """Whether some rows lie at or after their sequence's length. No kernel touches those."""
        return self.ragged == LENGTHS.value


def _check_tensor(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    require(tensor.device == like.device, f"{name}: expected the device of input ({like.device}), got {tensor.device}")
    require(tensor.dtype == like.dtype, f"{name}: expected the dtype of input ({like.dtype}), got {tensor.dtype}")
    require(tensor.shape == tuple(shape), f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")


def layer_of(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    rows: Rows,
) -> Layer:
    """The layer that these tensors make. Refuses tensors that do not fit together, with what was expected and given."""
    batch_sizes, lengths = rows
    packed = batch_sizes is not None
    hx = states[0]
    require(not packed or lengths is None, "batch_sizes and lengths: expected at most 1 of them, got both")
    require(input.dtype in DTYPES, f"input: expected float32, bfloat16 or float16, got {input.dtype}")
    require(input.layout is torch.strided, f"input: expected a strided tensor, got {input.layout}")
    dims = 2 if packed else 3
    require(input.dim() == dims, f"input: expected {dims} dimensions, got shape {list(input.shape)}")
    require(not packed or hx is not None, "hx: expected a tensor with batch_sizes, got None")
    if hx is not None:
        require(hx.dim() == 3, f"hx: expected 3 dimensions, got shape {list(hx.shape)}")

    spec, gates = FAMILIES[cell], len(FAMILIES[cell].gates)
    arrangement = arrangement_of(spec, weights)
    if arrangement is None:
        expected = "2 or 4 tensors per direction (3 or 5 with an LSTM's projection)"
        raise refusal(f"weights: expected {expected}, got {len(weights)}")
    layout, directions = arrangement.layout, arrangement.directions
    for name, weight in zip(("weight_ih", "weight_hh"), weights, strict=False):
        require(weight.dim() == 2, f"{name}: expected 2 dimensions, got shape {list(weight.shape)}")
    gate_rows = weights[0].size(0)
    require(gate_rows % gates == 0, f"weight_ih: expected {gates} * hidden_size rows, got {gate_rows}")
    hidden_size, input_size = gate_rows // gates, input.size(-1)
    output_size = hidden_size
    if PROJECTION in layout.options:
        narrow = weights[1].size(1) < hidden_size
        require(narrow, f"weight_hr: expected a proj_size below hidden_size {hidden_size}, got {weights[1].size(1)}")
        output_size = weights[1].size(1) if hx is None else hx.size(2)
    batch, steps = input.size(1), input.size(0)
    if batch_sizes is not None and hx is not None:
        batch, steps = hx.size(1), batch_sizes.numel()
    require(packed or steps > 0, f"input: expected at least one time step, got shape {list(input.shape)}")
    least = min(input_size, hidden_size, output_size)
    require(least > 0, f"expected input_size, hidden_size and proj_size above zero, got {least}")
    sizes = Sizes(input_size, gate_rows, hidden_size, output_size)
    for i, (weight, shape) in enumerate(zip(weights, shapes_of(layout, sizes) * directions, strict=True)):
        _check_tensor(f"weights[{i}]", weight, shape, input)
    for of_spec, state in zip(spec.states, states, strict=True):
        if state is not None:
            _check_tensor(f"{of_spec.letter}x", state, (directions, batch, sizes[of_spec.axis]), input)

    ragged, lengths_of_rows, offsets = PADDED, None, None
    if batch_sizes is not None:
        ragged = PACKED
        offsets, lengths_of_rows = _packed_rows(batch_sizes, batch, input)
    elif lengths is not None:
        require(lengths.dtype in (torch.int32, torch.int64), f"lengths: expected int32 or int64, got {lengths.dtype}")
        require(lengths.device == input.device, f"lengths: expected {input.device}, got {lengths.device}")
        require(lengths.shape == (batch,), f"lengths: expected shape {[batch]}, got {list(lengths.shape)}")
        if lengths.device.type == "cpu" and batch:
            low, high = int(lengths.min()), int(lengths.max())
            require(low >= 0 and high <= steps, f"lengths: expected values from 0 to {steps}, got {low} to {high}")
        ragged, lengths_of_rows = LENGTHS, lengths.contiguous()
    count = input.size(0) if packed else steps * batch
    return Layer(
        cell, steps, batch, count, input_size, hidden_size, output_size, directions, layout,
        ragged.value, lengths_of_rows, offsets,
    )  # fmt: skip


def _packed_rows(batch_sizes: Tensor, batch: int, input: Tensor) -> tuple[Tensor, Tensor]:
    """(offsets [T], lengths [B]), int64 on the device of input. One copy, and nobody waits for it."""
    kind = f"{batch_sizes.dtype} {list(batch_sizes.shape)} on {batch_sizes.device}"
    good = batch_sizes.dtype is torch.int64 and batch_sizes.dim() == 1 and batch_sizes.device.type == "cpu"
    require(good and batch_sizes.numel() > 0, f"batch_sizes: expected int64 [T] on the CPU, T > 0, got {kind}")
    sizes = batch_sizes.tolist()
    descending = sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    require(descending, f"batch_sizes: expected positive descending values, got {sizes}")
    require(sum(sizes) == input.size(0), f"batch_sizes: expected a sum of {input.size(0)} rows, got {sum(sizes)}")
    require(sizes[0] == batch, f"batch_sizes: expected hx of batch {sizes[0]}, got {batch}")
    ends = batch_sizes.cumsum(0)
    lengths = (batch_sizes[:, None] > torch.arange(batch)).sum(0)
    both = torch.cat([ends - batch_sizes, lengths])
    if input.is_cuda:
        captured = torch.cuda.is_current_stream_capturing()
        require(
            not captured, "packed calls cannot be captured in a CUDA graph (batch_sizes are on the CPU): use lengths"
        )
        both = both.pin_memory().to(input.device, non_blocking=True)
    return both[: len(sizes)], both[len(sizes) :]


def check_results(
    layer: Layer, input: Tensor, grads: Sequence[Tensor | None], output: Tensor, saved: Sequence[Tensor]
) -> None:
    """Refuses tensors of forward, or gradients, that do not fit a backward operator."""
    output_shape = (*input.shape[:-1], layer.directions * layer.output_size)
    _check_tensor("output", output, output_shape, input)
    require(output.is_contiguous(), "output: expected the contiguous tensor of forward")
    names = ("output", "h_n", "c_n")
    for name, grad, shape in zip(names, grads, (output_shape, *layer.state_shapes), strict=False):
        if grad is not None:
            _check_tensor(f"grad_{name}", grad, shape, input)
    for i, (tensor, of_spec) in enumerate(zip(saved, FAMILIES[layer.cell].saved, strict=True)):
        planes_shape = [layer.directions, layer.rows, of_spec.planes * layer.hidden_size]
        dtype = torch.float32 if of_spec.wide else input.dtype
        good = tensor.dtype == dtype and list(tensor.shape) == planes_shape and tensor.is_contiguous()
        kind = f"{tensor.dtype} {list(tensor.shape)}"
        good = good and tensor.device == input.device
        require(good, f"saved_{i}: expected {dtype} {planes_shape} of forward, got {kind}")


def zero_padding(layer: Layer, rows: Tensor) -> Tensor:
    """`rows` [T, B, N] or [T*B, N] with zeros at and after each row's length, because 0 * NaN is not 0."""
    if not layer.padding or layer.lengths is None:
        return rows
    valid = torch.arange(layer.steps, device=rows.device)[:, None] < layer.lengths
    return torch.where(valid[..., None], rows.reshape(layer.steps, layer.batch, -1), 0).view(rows.shape)


def previous_h(layer: Layer, output: Tensor, hx: Tensor, direction: int) -> Tensor:
    """[rows, P]: the h before each row in one direction; zero in padding."""
    size = layer.output_size
    output = output.view(layer.rows, -1)[:, direction * size : (direction + 1) * size]
    if layer.ragged == PACKED.value:
        return torch.cat([output, hx]).index_select(0, _previous_row(layer, direction))
    if direction == 0:
        return zero_padding(layer, torch.cat([hx, output[: layer.rows - layer.batch]]))
    later = torch.cat([output[layer.batch :], hx])
    if layer.lengths is None:
        return later
    last = torch.arange(layer.steps, device=output.device)[:, None] == layer.lengths - 1
    later = torch.where(last[..., None], hx, later.view(layer.steps, layer.batch, size))
    return zero_padding(layer, later.view(layer.rows, size))


def _previous_row(layer: Layer, direction: int) -> Tensor:
    """int64 [rows] of a packed layer: the row of the step before, or rows + b where hx comes before."""
    assert layer.offsets is not None and layer.lengths is not None
    sizes = torch.diff(layer.offsets, append=layer.offsets.new_full((1,), layer.rows))
    step = torch.repeat_interleave(sizes, output_size=layer.rows)  # the step of each row
    b = torch.arange(layer.rows, device=sizes.device) - layer.offsets[step]
    begins = torch.eq(step, 0 if direction == 0 else layer.lengths[b] - 1)
    before = (step + (1 if direction else -1)).clamp(0, layer.steps - 1)
    return torch.where(begins, layer.rows + b, layer.offsets[before] + b)
