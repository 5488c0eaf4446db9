"""`stream`: a recurrent layer fed one time step at a time, for audio, control and on-line forecasting."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import frozen_ops
from .frozen import Frozen, FrozenCell
from .ops import is_refusal

State = Tensor | tuple[Tensor, Tensor]


def stream(layer: torch.nn.Module, batch: int = 1) -> "Stream":
    """A stream through an RNN, GRU, LSTM or cell, of torch.nn, of rnnfast, or frozen by `rnnfast.freeze`.

    Args:
        layer: one direction; any number of layers. Frozen ones are the fastest.
        batch: number of sequences that are fed side by side.

    Raises TypeError for another module, ValueError for a bidirectional layer or a batch below 1.
    """
    return Stream(layer, batch)


class Stream:
    """Holds the state between steps. Nothing is differentiable. One thread may use a stream at a time."""

    def __init__(self, layer: torch.nn.Module, batch: int = 1):
        if not isinstance(layer, (torch.nn.RNNBase, torch.nn.RNNCellBase, Frozen)):
            raise TypeError(f"layer: expected an RNN, GRU, LSTM or cell, got {type(layer).__name__}")
        if getattr(layer, "bidirectional", False):
            raise ValueError("a stream has one direction: the other one begins with the last step")
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        of: Any = layer
        self.layer, self.batch = of, batch
        self._is_cell = isinstance(layer, (torch.nn.RNNCellBase, FrozenCell))
        self._lstm = isinstance(layer, (torch.nn.LSTM, torch.nn.LSTMCell)) or getattr(layer, "_states", 1) == 2
        frozen = isinstance(layer, Frozen)
        like = of.packed.new_empty(0, dtype=torch.float32) if frozen else next(of.parameters()).detach()
        layers = 1 if self._is_cell else of.num_layers
        output_size = getattr(layer, "proj_size", 0) or of.hidden_size
        self._h = like.new_zeros(layers, batch, output_size)
        self._c = like.new_zeros(layers, batch, of.hidden_size) if self._lstm else None
        self._step: Any = frozen_ops.stream_step if frozen else None

    def step(self, input: Tensor) -> Tensor:
        """The output [batch, Hout] of one time step. `input`: [batch, I]; with batch 1 also [I], which gives [Hout]."""
        if input.dim() == 1 and self.batch == 1:
            return self.step(input[None])[0]
        if self._step is None:
            return self._step_of_layer(input)
        if input.requires_grad:
            raise RuntimeError("a frozen layer has no gradients; its input must not require grad")
        try:
            return self._step(input, self._h, self._c, self.layer.packed, self.layer.exact)
        except RuntimeError as error:
            if is_refusal(error):
                raise self.layer._refused(error, input[None], None) from None
            raise

    def _step_of_layer(self, input: Tensor) -> Tensor:
        h, c = self._h, self._c
        if self._is_cell:
            h, c = h[0], None if c is None else c[0]
        states: Any = h if c is None else (h, c)
        with torch.no_grad():
            if self._is_cell:
                new = self.layer(input, states)
                output = new[0] if self._lstm else new
                new = tuple(state[None] for state in (new if self._lstm else (new,)))
            else:
                time = 1 if self.layer.batch_first else 0
                output, new = self.layer(input.unsqueeze(time), states)
                output, new = output.squeeze(time), new if self._lstm else (new,)
        self._keep(new)
        return output

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Zero state for all sequences, or for some: their numbers, or a bool mask [batch]."""
        states = [state.clone() for state in self._tensors()]  # an output of a cell is its state: it must not change
        for state in states:
            state[:, slice(None) if rows is None else torch.as_tensor(rows)] = 0
        self._keep(states)

    def _keep(self, states: Sequence[Tensor]) -> None:
        self._h, self._c = states[0], states[1] if self._lstm else None

    def _tensors(self) -> list[Tensor]:
        return [self._h] if self._c is None else [self._h, self._c]

    @property
    def state(self) -> State:
        """h [num_layers, batch, Hout], for an LSTM (h, c). A copy; cells have num_layers 1."""
        copies = [state.clone() for state in self._tensors()]
        return (copies[0], copies[1]) if self._lstm else copies[0]

    @state.setter
    def state(self, value: Any) -> None:
        given = list(value) if self._lstm and isinstance(value, (tuple, list)) else [value]
        own = self._tensors()
        shapes = [tuple(state.shape) for state in own]
        if len(given) != len(own) or [tuple(getattr(state, "shape", ())) for state in given] != shapes:
            raise ValueError(
                f"state: expected tensors of shapes {shapes}, got {[getattr(s, 'shape', s) for s in given]}"
            )
        self._keep([state.clone().copy_(new.detach()) for state, new in zip(own, given, strict=True)])
