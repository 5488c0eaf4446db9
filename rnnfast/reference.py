"""The three cells as differentiable loops of torch's operators: any device, any dtype, every order of derivative.

This is a backend of its own, slow and always there. It is the only one that takes `lengths` where no kernel of ours
runs. Double backward differentiates it. Notation and gate order are torch.nn's.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import SPECS, CellSpec, Sizes, arrangement_of
from .rows import PADDED, Rows

States = tuple[Tensor, ...]  # (h,) or (h, c)
Weights = dict[str, Tensor]  # of one direction, by role


def _rnn_tanh(x: Tensor, states: States, weights: Weights) -> States:
    return (torch.tanh(x + _of_h(states[0], weights)),)


def _rnn_relu(x: Tensor, states: States, weights: Weights) -> States:
    return (torch.relu(x + _of_h(states[0], weights)),)


def _gru(x: Tensor, states: States, weights: Weights) -> States:
    (h,) = states
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = _of_h(h, weights).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (n + z * (h - n),)


def _lstm(x: Tensor, states: States, weights: Weights) -> States:
    h, c = states
    i, f, g, o = (x + _of_h(h, weights)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (F.linear(h, weights["weight_hr"]) if "weight_hr" in weights else h, c)


def _of_h(h: Tensor, weights: Weights) -> Tensor:
    return F.linear(h, weights["weight_hh"], weights.get("bias_hh"))


STEPS = {"rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu, "gru": _gru, "lstm": _lstm}
"""Cell -> one step: from W_ih x + b_ih [B, G*H], the states [B, ...] and a direction's weights to the next states."""


def _direction(step, input: Tensor, states: States, weights: Weights, mask: Tensor | None, reverse: bool):
    """One direction over padded input [T, B, I]: (output [T, B, Hout], final states [B, ...]).

    Where `mask` [T, B, 1] is False a row keeps its states, so a reversed row begins at its own last step.
    """
    gates = F.linear(input, weights["weight_ih"], weights.get("bias_ih"))
    steps = range(input.size(0))
    outputs = []
    for t in reversed(steps) if reverse else steps:
        new = step(gates[t], states, weights)
        states = new if mask is None else tuple(torch.where(mask[t], *pair) for pair in zip(new, states, strict=True))
        outputs.append(states[0])
    output = torch.stack(outputs[::-1] if reverse else outputs)
    return (output if mask is None else torch.where(mask, output, 0)), states


def _zeros(spec: CellSpec, input: Tensor, weights: Sequence[Tensor], directions: int) -> States:
    gate_rows = weights[0].size(0)
    sizes = Sizes(input.size(-1), gate_rows, gate_rows // len(spec.gates), weights[1].size(1))
    return tuple(input.new_zeros(directions, input.size(1), sizes[state.axis]) for state in spec.states)


def _within(lengths: Tensor, steps: int) -> bool:
    return all(0 <= length <= steps for length in lengths.tolist())


def layer(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    rows: Rows = PADDED,
) -> tuple[Tensor, ...]:
    """One layer with all its directions, the arguments and results of the operators of `ops.py`.

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        input: [T, B, I], or [sum(batch_sizes), I] where packed.
        states: hx [D, B, Hout], and for the LSTM cx [D, B, H]; None for zeros, unless packed.
        weights: per direction weight_ih, weight_hh, then bias_ih and bias_hh if any, then weight_hr if projected.
        rows: batch_sizes of packed input, or lengths of padded input.

    Returns:
        output [T, B, D*Hout] (packed: [sum(batch_sizes), D*Hout]), h_n, and for the LSTM c_n.
    """
    batch_sizes, lengths = rows
    mask, spec = None, SPECS[cell]
    arrangement = arrangement_of(spec, weights)
    if arrangement is None:
        raise RuntimeError(f"weights: expected those of 1 or 2 directions of {cell}, got {len(weights)}")
    names, directions = arrangement.layout.names, arrangement.directions
    given = tuple(state for state in states if state is not None) or _zeros(spec, input, weights, directions)
    batch = given[0].size(1)
    if batch_sizes is not None:
        there = batch_sizes.to(input.device)[:, None] > torch.arange(batch, device=input.device)  # [T, B]
        places = there.nonzero(as_tuple=True)
        input = input.new_zeros(*there.shape, input.size(-1)).index_put(places, input)
        mask = there[..., None]
    elif lengths is not None:
        steps = input.size(0)
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and not _within(lengths, steps):
            raise RuntimeError(f"lengths: expected values from 0 to {steps}, got {lengths.tolist()}")
        mask = (torch.arange(steps, device=input.device)[:, None] < lengths)[..., None]
        input = torch.where(mask, input, 0)  # what lies in the padding, NaN included, reaches no gradient

    outputs, finals = [], []
    for d in range(directions):
        own = dict(zip(names, weights[d * len(names) : (d + 1) * len(names)], strict=True))
        output, final = _direction(STEPS[cell], input, tuple(state[d] for state in given), own, mask, reverse=d == 1)
        outputs.append(output)
        finals.append(final)
    output = torch.cat(outputs, -1) if directions == 2 else outputs[0]
    if batch_sizes is not None:
        output = output[places]
    return (output, *map(torch.stack, zip(*finals, strict=True)))


def step(cell: str, input: Tensor, states: Sequence[Tensor | None], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One step of a cell module: input [B, I], hx and cx [B, H] or None for zeros, weights of one direction.

    Returns h_n, and for the LSTM c_n, [B, H].
    """
    states = [state if state is None else state[None] for state in states]
    return tuple(final[0] for final in layer(cell, input[None], states, weights)[1:])
