"""Streaming: a model takes one step at a time as it arrives, with the results of the whole sequence.

Run it: python examples/streaming.py [--small]
"""

import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

import rnnfast

SMALL = "--small" in sys.argv
LENGTH, HIDDEN = (200, 32) if SMALL else (2000, 128)


def frames() -> Iterator[Tensor]:
    """A microphone or a sensor: one frame of 40 numbers after the other."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(LENGTH):
        yield torch.randn(40, generator=generator)


def by_layers(lstm: rnnfast.LSTM) -> Tensor:
    """A stack of layers on sequences of length 1. Its state is all that it remembers."""
    state, outputs = None, []
    for frame in frames():
        output, state = lstm(frame.view(1, 1, -1), state)
        outputs.append(output[0])
    return torch.stack(outputs)


def by_cells(cells: list[rnnfast.LSTMCell]) -> Tensor:
    """One cell per layer. Every cell takes the hidden state of the one below it."""
    states, outputs = [None] * len(cells), []
    for frame in frames():
        hidden = frame[None]
        for i, cell in enumerate(cells):
            states[i] = cell(hidden, states[i])
            hidden = states[i][0]
        outputs.append(hidden)
    return torch.stack(outputs)


def by_chunks(lstm: rnnfast.LSTM, size: int = 20) -> Tensor:
    """The same stack on 20 frames at a time: more delay, less time per frame."""
    state, outputs = None, []
    for chunk in torch.stack(list(frames())).split(size):
        output, state = lstm(chunk.unsqueeze(1), state)
        outputs.append(output)
    return torch.cat(outputs)


def cells_of(lstm: rnnfast.LSTM) -> list[rnnfast.LSTMCell]:
    """Cells with the weights of the layers. Their names differ by the layer's number only."""
    cells = []
    for layer in range(lstm.num_layers):
        suffix = f"_l{layer}"
        weights = {name.removesuffix(suffix): w for name, w in lstm.state_dict().items() if name.endswith(suffix)}
        cell = rnnfast.LSTMCell(weights["weight_ih"].size(1), lstm.hidden_size)
        cell.load_state_dict(weights)
        cells.append(cell)
    return cells


torch.manual_seed(0)
lstm = rnnfast.LSTM(input_size=40, hidden_size=HIDDEN, num_layers=2)
ways = {"layers": (by_layers, lstm), "cells": (by_cells, cells_of(lstm)), "chunks": (by_chunks, lstm)}
with torch.inference_mode():
    whole, _ = lstm(torch.stack(list(frames())).unsqueeze(1))
    for name, (stream, model) in ways.items():
        start = time.perf_counter()
        streamed = stream(model)
        seconds = time.perf_counter() - start
        torch.testing.assert_close(streamed, whole, rtol=1e-4, atol=1e-5)
        print(f"{name:6}  {1e6 * seconds / LENGTH:4.0f} us per frame, ", end="")
        print(f"largest difference to the whole sequence {(streamed - whole).abs().max():.1e}")
