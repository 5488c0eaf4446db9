"""A stack of layers, run one after the other by a function for one layer: training, dropout, Triton, the reference.

Inference on the compiled kernels needs none of this: the operators `infer` take a whole stack.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cells import SPECS, Sizes, arrangement_of, shapes_of
from .ops import refusal, require
from .rows import PADDED, Rows


def layer_by_layer(
    layer: Callable[..., tuple[Tensor, ...]],
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    num_layers: int,
    dropout: float = 0.0,
    rows: Rows = PADDED,
) -> tuple[Tensor, ...]:
    """(output, *final states) of a stack, each layer by `layer`.

    Args:
        layer: takes (cell, input, states, weights, rows) of one layer, as `reference.layer` does.
        states: hx [L*D, B, Hout], and for the LSTM cx [L*D, B, H]; None for zeros.
        weights: those of all layers, in torch.nn's flat order.
        dropout: the probability that an element of the output between two layers becomes zero.
    """
    if num_layers == 1:
        return layer(cell, input, states, weights, rows)
    per_layer = len(weights) // num_layers
    each = [(None,) * num_layers if state is None else state.split(state.size(0) // num_layers) for state in states]
    output, finals = input, []
    for k, *own_states in zip(range(num_layers), *each, strict=True):
        if k > 0 and dropout != 0:
            output = torch.dropout(output, dropout, True)
        own_weights = weights[k * per_layer : (k + 1) * per_layer]
        output, *final = layer(cell, output, own_states, own_weights, rows)
        finals.append(final)
    return (output, *map(torch.cat, zip(*finals, strict=True)))


@functools.cache
def _later_shapes(
    cell: str, count: int, directions: int, weight_ih: torch.Size, weight_hh: torch.Size, layers: int
) -> list[tuple[int, ...]]:
    """The shapes of the weights of `layers` layers after a first one, whose first two weights have the given shapes."""
    spec, gate_rows, output_size = SPECS[cell], weight_ih[0], weight_hh[1]
    layout = next(one.layout for one in spec.arrangements[count] if one.directions == directions)
    sizes = Sizes(directions * output_size, gate_rows, gate_rows // len(spec.gates), output_size)
    return shapes_of(layout, sizes) * (directions * layers)


def require_later_layers(
    cell: str, states: Sequence[Tensor | None], weights: Sequence[Tensor], num_layers: int
) -> None:
    """Refuses a stack whose later layers have other shapes than its first layer asks for.

    Operators check only the layer that they run. Whoever calls them layer by layer asks here first, so that nothing
    is computed before a refusal.
    """
    count, rest = divmod(len(weights), num_layers) if num_layers > 0 else (0, 0)
    arrangement = arrangement_of(SPECS[cell], weights[:count]) if count and not rest else None
    if arrangement is None or weights[0].dim() != 2 or weights[1].dim() != 2:
        raise refusal(f"weights: expected as many for each of {num_layers} layers, got {len(weights)}")
    directions = arrangement.directions
    shapes = _later_shapes(cell, count, directions, weights[0].shape, weights[1].shape, num_layers - 1)
    given = [weight.shape for weight in weights[count:]]
    if given != shapes:
        require(False, f"weights of layers 1 to {num_layers - 1}: expected shapes {shapes}, got {given}")
    for name, state in zip(("hx", "cx"), states, strict=False):
        if state is not None and (state.dim() != 3 or state.size(0) != num_layers * directions):
            require(False, f"{name}: expected [{num_layers * directions}, batch, size], got {list(state.shape)}")
