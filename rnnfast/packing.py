"""The packed form of frozen weights, which csrc/cpu/frozen.h describes: written from plain weights, and read back.

One block of bytes holds a whole stack of layers. It is the same for every machine.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import SPECS

MAGIC = 0x317A72665F6E72
FORMATS = ("float32", "bfloat16", "int8")
MATRICES = ("weight_ih", "weight_hh", "weight_hr")
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_CELL_NUMBERS = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 1, "lstm": 2}
_LANES, _MOST_VECTORS, _ALIGNMENT, _HEADER_WORDS = 16, 4, 64, 16
_STEP_DEPTHS = (1, 2, 4)  # of k that one step multiplies, by format


class Weights(NamedTuple):
    """One direction of one layer in plain form. G*H rows: torch.nn's gate order."""

    weight_ih: Tensor
    """[G*H, I], float32, bfloat16 or int8."""
    weight_hh: Tensor
    """[G*H, Hout], of the same dtype; so is weight_hr."""
    weight_hr: Tensor | None
    """[Hout, H] with a projection."""
    scales: tuple[Tensor, ...]
    """int8 only: float32 of each row of weight_ih, weight_hh and weight_hr. W = scale * weight."""
    bias_ih: Tensor | None
    """[G*H], float32. None, as bias_hh: no biases."""
    bias_hh: Tensor | None


class Sizes(NamedTuple):
    """What describes a packed stack."""

    cell: str
    weights: str
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    directions: int

    @property
    def output_size(self) -> int:
        return self.proj_size or self.hidden_size


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [R, K] and float32 scales [R] of a weight [R, K], symmetric for each row: the largest value becomes 127."""
    largest = weight.abs().amax(1)
    scale = torch.where(largest == 0, 1.0, largest / 127)  # NaN or infinite where the row is, and so is every sum
    return torch.round(weight / scale[:, None]).nan_to_num_(0).clamp_(-127, 127).to(torch.int8), scale


def pack(sizes: Sizes, weights: Iterable[Weights]) -> Tensor:
    """The packed block, uint8. `weights`: of every layer's directions in turn.

    They are taken one by one and written into the block at once, so that little more memory than its own is needed.
    """
    parts = list(_parts(sizes))
    length = parts[-1].end
    block = torch.zeros(length, dtype=torch.uint8)
    block[: 8 * _HEADER_WORDS] = _bytes(_header(sizes, length))
    place = iter(parts)
    for own in weights:
        bias, bias_hidden = _biases(sizes, own)
        values: dict[str, Tensor | None] = {"bias": bias, "bias_hidden": bias_hidden}
        for i, name in enumerate(MATRICES):
            matrix = getattr(own, name)
            if matrix is None:
                continue
            values[name] = matrix
            if own.scales:
                values |= {f"{name}_scale": own.scales[i], f"{name}_sum": matrix.sum(1, dtype=torch.int32)}
        for _ in range(len(parts) // (sizes.num_layers * sizes.directions)):
            part = next(place)
            value = values[part.name]
            if value is None:
                raise ValueError(f"{part.name}: expected a tensor, got None")
            in_order = _panel(value, part.gates, part.format) if part.name in MATRICES else _vectors(value, part.gates)
            block[part.first : part.first + part.bytes] = _bytes(in_order)
    return block


def unpack(sizes: Sizes, packed: Tensor, has_biases: bool) -> list[Weights]:
    """The plain weights of a packed block, which `pack` would make into the same block.

    The kernels need the sum of the biases only, and so the block has it as bias_ih; bias_hh keeps GRU's b_hn alone.
    """
    parts = list(_parts(sizes))
    each = len(parts) // (sizes.num_layers * sizes.directions)
    found = []
    for first in range(0, len(parts), each):
        values = {part.name: _read(part, packed) for part in parts[first : first + each]}
        bias, hidden = values["bias"], torch.zeros_like(values["bias"])
        if sizes.cell == "gru":
            hidden[2 * sizes.hidden_size :] = values["bias_hidden"]
        scales = tuple(values[f"{name}_scale"] for name in MATRICES if f"{name}_scale" in values)
        biases = (bias, hidden) if has_biases else (None, None)
        found.append(Weights(values["weight_ih"], values["weight_hh"], values.get("weight_hr"), scales, *biases))
    return found


class _Part(NamedTuple):
    """One array of the block: a matrix, the scales or sums of its rows, or a bias."""

    name: str
    units: int
    depth: int  # of a matrix; else 0
    gates: int
    format: int
    dtype: torch.dtype
    first: int  # its first byte in the block
    bytes: int

    @property
    def end(self) -> int:
        """Where the next part begins."""
        return self.first + -(-self.bytes // _ALIGNMENT) * _ALIGNMENT


def _parts(sizes: Sizes) -> Iterator[_Part]:
    """All arrays of the block in order; csrc/cpu/host/frozen.cpp takes them in the same order."""
    gates, kind = len(SPECS[sizes.cell].gates), FORMATS.index(sizes.weights)
    first = 8 * _HEADER_WORDS

    def part(name: str, units: int, depth: int, count: int, dtype: torch.dtype) -> _Part:
        nonlocal first
        rows = -(-units // _LANES) * count * _LANES
        steps = -(-depth // _STEP_DEPTHS[kind]) if depth else 1
        made = _Part(name, units, depth, count, kind, dtype, first, rows * steps * 4)
        first = made.end
        return made

    for layer in range(sizes.num_layers):
        width = sizes.input_size if layer == 0 else sizes.directions * sizes.output_size
        shapes = [("weight_ih", sizes.hidden_size, width, gates)]
        shapes += [("weight_hh", sizes.hidden_size, sizes.output_size, gates)]
        shapes += [("weight_hr", sizes.proj_size, sizes.hidden_size, 1)] if sizes.proj_size else []
        for _ in range(sizes.directions):
            for name, units, depth, count in shapes:
                yield part(name, units, depth, count, DTYPES[kind])
                if sizes.weights == "int8":
                    yield part(f"{name}_scale", units, 0, count, torch.float32)
                    yield part(f"{name}_sum", units, 0, count, torch.int32)
            yield part("bias", sizes.hidden_size, 0, gates, torch.float32)
            if sizes.cell == "gru":
                yield part("bias_hidden", sizes.hidden_size, 0, 1, torch.float32)


def _read(part: _Part, packed: Tensor) -> Tensor:
    """A part of the block in plain form."""
    values = packed[part.first : part.first + part.bytes].clone().view(part.dtype)
    if part.name in MATRICES:
        return _matrix(values, part.units, part.depth, part.gates, part.format)
    by_gate = values.view(-1, part.gates, _LANES).transpose(0, 1).flatten(1)
    return by_gate[:, : part.units].flatten()


def _header(sizes: Sizes, length: int) -> Tensor:
    words = [MAGIC, FORMATS.index(sizes.weights), _CELL_NUMBERS[sizes.cell], int(sizes.cell == "rnn_relu")]
    words += [sizes.input_size, sizes.hidden_size, sizes.proj_size, sizes.directions, sizes.num_layers, length]
    return torch.tensor(words + [0] * (_HEADER_WORDS - len(words)), dtype=torch.int64)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _vectors(values: Tensor, gates: int) -> Tensor:
    """[gates * units] as [vector of units][gate][lane], zeros behind the last unit."""
    units = values.numel() // gates
    return F.pad(values.view(gates, units), (0, -units % _LANES)).view(gates, -1, _LANES).transpose(0, 1)


def _biases(sizes: Sizes, own: Weights) -> tuple[Tensor, Tensor | None]:
    """(what is added to W_ih x, GRU's b_hn)."""
    H = sizes.hidden_size
    if own.bias_ih is None or own.bias_hh is None:
        bias, hidden = own.weight_ih.new_zeros(own.weight_ih.size(0), dtype=torch.float32), None
        return bias, bias[:H] if sizes.cell == "gru" else None
    bias, hidden = own.bias_ih + own.bias_hh, None
    if sizes.cell == "gru":
        bias, hidden = torch.cat([bias[: 2 * H], own.bias_ih[2 * H :]]), own.bias_hh[2 * H :]
    return bias, hidden


def _blocks(units: int, gates: int) -> Iterator[tuple[int, int]]:
    """First and last vector of units of each block of a panel. With gates, a block is one vector of units."""
    vectors = -(-units // _LANES)
    blocks = vectors if gates > 1 else -(-vectors // _MOST_VECTORS)
    for block in range(blocks):
        yield block * vectors // blocks, (block + 1) * vectors // blocks


def _panel(weight: Tensor, gates: int, kind: int) -> Tensor:
    """[gates * units, depth] as [block][step of k][vector][lane][k of the step]."""
    step = _STEP_DEPTHS[kind]
    units, depth = weight.size(0) // gates, weight.size(1)
    padded = F.pad(weight.view(gates, units, depth), (0, -depth % step, 0, -units % _LANES))
    lanes = padded.view(gates, -1, _LANES, padded.size(2) // step, step)  # [gate, vector, lane, step, k]
    if gates > 1:
        return _bytes(lanes.permute(1, 3, 0, 2, 4))
    return torch.cat([_bytes(lanes[0, first:last].permute(2, 0, 1, 3)) for first, last in _blocks(units, 1)])


def _matrix(values: Tensor, units: int, depth: int, gates: int, kind: int) -> Tensor:
    """The reverse of `_panel`."""
    step = _STEP_DEPTHS[kind]
    steps = -(-depth // step)
    if gates > 1:
        lanes = values.view(-1, steps, gates, _LANES, step).permute(2, 0, 3, 1, 4)
    else:
        sizes = [(last - first) * steps * _LANES * step for first, last in _blocks(units, 1)]
        blocks = [part.view(steps, -1, _LANES, step).permute(1, 2, 0, 3) for part in values.split(sizes)]
        lanes = torch.cat(blocks)[None]
    return lanes.reshape(gates, -1, steps * step)[:, :units, :depth].reshape(gates * units, depth).contiguous()


def check_header(sizes: Sizes, packed: Tensor) -> None:
    """Raises RuntimeError for a block that is cut, or of other sizes or another version."""
    expected = _header(sizes, packed.numel())
    given = packed[: 8 * _HEADER_WORDS].clone().view(torch.int64) if packed.numel() >= 8 * _HEADER_WORDS else None
    if given is None or not torch.equal(given.cpu(), expected):
        what = "a truncated block" if given is None else given.tolist()[:10]
        raise RuntimeError(
            f"packed weights: expected the header {expected.tolist()[:10]}, got {what}; freeze the model again"
        )
