"""The three cells as plain differentiable torch loops: any device, any dtype, every order of derivative, no kernels.

It is a backend of its own (slow, always there), the only one that takes `lengths` where no kernel of ours runs, and the
re-expression that double backward differentiates. Notation and gate order are torch.nn's.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import directions_of

States = tuple[Tensor, ...]  # (h,) or (h, c)


def _rnn_tanh(x: Tensor, states: States, weight_hh: Tensor, bias_hh: Tensor | None, weight_hr: None) -> States:
    return (torch.tanh(x + F.linear(states[0], weight_hh, bias_hh)),)


def _rnn_relu(x: Tensor, states: States, weight_hh: Tensor, bias_hh: Tensor | None, weight_hr: None) -> States:
    return (torch.relu(x + F.linear(states[0], weight_hh, bias_hh)),)


def _gru(x: Tensor, states: States, weight_hh: Tensor, bias_hh: Tensor | None, weight_hr: None) -> States:
    (h,) = states
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, weight_hh, bias_hh).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (n + z * (h - n),)


def _lstm(x: Tensor, states: States, weight_hh: Tensor, bias_hh: Tensor | None, weight_hr: Tensor | None) -> States:
    h, c = states
    i, f, g, o = (x + F.linear(h, weight_hh, bias_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if weight_hr is None else F.linear(h, weight_hr), c)


_STEPS = {"rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu, "gru": _gru, "lstm": _lstm}


def _direction(step, input: Tensor, states: States, weights: Sequence[Tensor], mask: Tensor | None, reverse: bool):
    """One direction over padded input [T, B, I]: (output [T, B, Hout], final states [B, ...]).

    Where `mask` [T, B, 1] is False a row keeps its states, so a reversed row begins at its own last step.
    """
    weight_ih, weight_hh, *rest = weights
    bias_ih, bias_hh = rest[:2] if len(rest) > 1 else (None, None)
    weight_hr = rest[-1] if len(rest) % 2 else None
    gates = F.linear(input, weight_ih, bias_ih)
    steps = range(input.size(0))
    outputs = []
    for t in reversed(steps) if reverse else steps:
        new = step(gates[t], states, weight_hh, bias_hh, weight_hr)
        states = new if mask is None else tuple(torch.where(mask[t], *pair) for pair in zip(new, states, strict=True))
        outputs.append(states[0])
    output = torch.stack(outputs[::-1] if reverse else outputs)
    return (output if mask is None else torch.where(mask, output, 0)), states


def _zeros(cell: str, input: Tensor, weights: Sequence[Tensor]) -> States:
    directions, output_size = directions_of(weights), weights[1].size(1)
    hidden_size = weights[0].size(0) // 4 if cell == "lstm" else output_size
    h = input.new_zeros(directions, input.size(1), output_size)
    return (h, input.new_zeros(directions, input.size(1), hidden_size)) if cell == "lstm" else (h,)


def _within(lengths: Tensor, steps: int) -> bool:
    return all(0 <= length <= steps for length in lengths.tolist())


def layer(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One layer with all its directions, the arguments and results of the operators of `ops.py`.

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        input: [T, B, I], or [sum(batch_sizes), I] with `batch_sizes`.
        states: hx [D, B, Hout], and for the LSTM cx [D, B, H]; None for zeros, unless with `batch_sizes`.
        weights: per direction weight_ih, weight_hh, then bias_ih and bias_hh if any, then weight_hr if projected.

    Returns:
        output [T, B, D*Hout] (packed: [sum(batch_sizes), D*Hout]), h_n, and for the LSTM c_n.
    """
    mask = None
    if states[0] is None:
        states = _zeros(cell, input, weights)
    batch = states[0].size(1)
    if batch_sizes is not None:
        rows = batch_sizes.to(input.device)[:, None] > torch.arange(batch, device=input.device)  # [T, B]
        places = rows.nonzero(as_tuple=True)
        input = input.new_zeros(*rows.shape, input.size(-1)).index_put(places, input)
        mask = rows[..., None]
    elif lengths is not None:
        steps = input.size(0)
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and not _within(lengths, steps):
            raise RuntimeError(f"lengths: expected values from 0 to {steps}, got {lengths.tolist()}")
        mask = (torch.arange(steps, device=input.device)[:, None] < lengths)[..., None]
        input = torch.where(mask, input, 0)  # what lies in the padding, NaN included, reaches no gradient

    directions = states[0].size(0)
    per_direction = len(weights) // directions
    outputs, finals = [], []
    for d in range(directions):
        own = weights[d * per_direction : (d + 1) * per_direction]
        output, final = _direction(_STEPS[cell], input, tuple(s[d] for s in states), own, mask, reverse=d == 1)
        outputs.append(output)
        finals.append(final)
    output = torch.cat(outputs, -1) if directions == 2 else outputs[0]
    if batch_sizes is not None:
        output = output[places]
    return (output, *map(torch.stack, zip(*finals, strict=True)))


def stack(
    layer: Callable[..., tuple[Tensor, ...]],
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    num_layers: int,
    dropout: float = 0.0,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(output, *final states) of a stack, each layer by `layer`; weights and states (None: zeros) are those of all."""
    if num_layers == 1:
        return layer(cell, input, states, weights, batch_sizes, lengths)
    per_layer = len(weights) // num_layers
    each = [(None,) * num_layers if state is None else state.split(state.size(0) // num_layers) for state in states]
    output, finals = input, []
    for k, *own_states in zip(range(num_layers), *each, strict=True):
        if k > 0 and dropout != 0:
            output = torch.dropout(output, dropout, True)
        own_weights = weights[k * per_layer : (k + 1) * per_layer]
        output, *final = layer(cell, output, own_states, own_weights, batch_sizes, lengths)
        finals.append(final)
    return (output, *map(torch.cat, zip(*finals, strict=True)))


def step(cell: str, input: Tensor, states: Sequence[Tensor | None], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One step of a cell module: input [B, I], hx and cx [B, H] or None for zeros, weights of one direction.

    Returns h_n, and for the LSTM c_n, [B, H].
    """
    states = [state if state is None else state[None] for state in states]
    return tuple(final[0] for final in layer(cell, input[None], states, weights)[1:])
