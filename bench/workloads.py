"""Named workloads: small models on real input, built from torch.nn and from rnnfast; training.py trains both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import data
from .cases import Case


class Model(nn.Module, ABC):
    """What training.py asks of a model."""

    @abstractmethod
    def loss(self, batch: tuple, state: tuple | None) -> tuple[Tensor, tuple | None]:
        """The batch's loss, and what is carried to the next batch of the epoch (None where batches stand alone)."""

    @abstractmethod
    def recurrent_call(self, batch: tuple) -> tuple[nn.Module, object]:
        """The recurrent module and its input, for rnnfast.explain."""


class CharacterModel(Model):
    """The next character of one long text: embedding, 2-layer LSTM whose state is carried from batch to batch."""

    def __init__(self, namespace: ModuleType, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(data.VOCABULARY, 128)
        self.rnn = namespace.LSTM(128, hidden_size, num_layers=2)
        self.head = nn.Linear(hidden_size, data.VOCABULARY)

    def loss(self, batch: tuple[Tensor, Tensor], state: tuple | None) -> tuple[Tensor, tuple | None]:
        output, state = self.rnn(self.embedding(batch[0]), state)
        return F.cross_entropy(self.head(output).flatten(0, 1), batch[1].flatten()), tuple(s.detach() for s in state)

    def recurrent_call(self, batch: tuple) -> tuple[nn.Module, object]:
        return self.rnn, self.embedding(batch[0])


class Tagger(Model):
    """The role of every token in a line of Python: embedding, bidirectional 2-layer LSTM on packed sentences."""

    def __init__(self, namespace: ModuleType, hidden_size: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.rnn = namespace.LSTM(64, hidden_size, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * hidden_size, len(data.TAGS))

    def loss(self, batch: tuple[PackedSequence, Tensor], state: tuple | None) -> tuple[Tensor, tuple | None]:
        output, _ = self.rnn(self._embed(batch[0]))
        return F.cross_entropy(self.head(output.data), batch[1]), None

    def recurrent_call(self, batch: tuple) -> tuple[nn.Module, object]:
        return self.rnn, self._embed(batch[0])

    def _embed(self, words: PackedSequence) -> PackedSequence:
        return PackedSequence(self.embedding(words.data), *words[1:])


class DigitReader(Model):
    """The digit of an image that is read row by row: RNN over 8 rows of 8 pixels, the last output classified."""

    def __init__(self, namespace: ModuleType, hidden_size: int) -> None:
        super().__init__()
        self.rnn = namespace.RNN(8, hidden_size)
        self.head = nn.Linear(hidden_size, 10)

    def loss(self, batch: tuple[Tensor, Tensor], state: tuple | None) -> tuple[Tensor, tuple | None]:
        output, _ = self.rnn(batch[0])
        return F.cross_entropy(self.head(output[-1]), batch[1]), None

    def recurrent_call(self, batch: tuple) -> tuple[nn.Module, object]:
        return self.rnn, batch[0]


class StreamingModel(Model):
    """The next character, one call each: embedding and a GRUCell. Trained over short pieces, used at T=1, B=1."""

    def __init__(self, namespace: ModuleType, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(data.VOCABULARY, hidden_size)
        self.cell = namespace.GRUCell(hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, data.VOCABULARY)

    def loss(self, batch: tuple[Tensor, Tensor], state: tuple | None) -> tuple[Tensor, tuple | None]:
        hx, output = state[0] if state else None, []
        for x in self.embedding(batch[0]).unbind(0):
            hx = self.cell(x, hx)
            output.append(hx)
        logits = self.head(torch.stack(output))
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()), (hx.detach(),)

    def recurrent_call(self, batch: tuple) -> tuple[nn.Module, object]:
        return self.cell, self.embedding(batch[0])[0]

    @torch.no_grad()
    def stream(self, characters: Tensor) -> Tensor:
        """The logits [count, vocabulary] after each of `characters` [count], one call each."""
        hx, logits = None, []
        for character in characters.split(1):
            hx = self.cell(self.embedding(character), hx)
            logits.append(self.head(hx))
        return torch.cat(logits)


@dataclass(frozen=True)
class Workload:
    """A training: `case` goes into the record; `build(namespace)` makes the model, `batches()` the epoch's input."""

    name: str
    case: Case
    build: Callable[[ModuleType], Model]
    batches: Callable[[], list[tuple]]
    epochs: int
    learning_rate: float
    compared: int  # how many steps are compared with float64: then float32 trainings part (docs/benchmarking.md)
    streams: bool = False  # whether the trained model is also timed at one character per call


def workloads(full: bool, threads: int, device: str) -> list[Workload]:
    """The four trainings; the quick ones read less text and fewer sentences, with the same models."""
    suffix = f", {threads} threads" if threads > 1 else ""

    def case(cell: str, hidden_size: int, batch: int, input_size: int, seq_len: int, **rest) -> Case:
        rest |= {"seq_len": seq_len, "threads": threads, "device": device}
        return Case(cell, "training", hidden_size, batch, input_size, **rest)

    steps = 60 if full else 8
    sentences = 6400 if full else 640
    longest = 60
    return [
        Workload(
            "character LM" + suffix,
            case("LSTM", 512, 16, 128, 32, num_layers=2),
            lambda namespace: CharacterModel(namespace, 512),
            lambda: data.streams(data.characters(16 * 32 * steps + 1), 16, 32),
            epochs=3,
            learning_rate=2e-3,
            compared=24,
        ),
        Workload(
            "packed tagger" + suffix,
            case("LSTM", 128, 32, 64, longest, num_layers=2, bidirectional=True, form="packed"),
            lambda namespace: Tagger(namespace, 128, 1000),
            lambda: data.tagger_batches(sentences, 32, 1000, longest),
            epochs=3,
            learning_rate=3e-3,
            compared=60,
        ),
        Workload(
            "digits by rows" + suffix,
            case("RNN", 128, 64, 8, 8),
            lambda namespace: DigitReader(namespace, 128),
            lambda: data.digit_batches(64),
            epochs=10,
            learning_rate=3e-3,
            compared=280,
        ),
        Workload(
            "streaming cell" + suffix,
            case("GRU", 128, 8, 128, 32, form="cell"),
            lambda namespace: StreamingModel(namespace, 128),
            lambda: data.streams(data.characters(8 * 32 * 2 * steps + 1), 8, 32),
            epochs=3,
            learning_rate=3e-3,
            compared=48,
            streams=True,
        ),
    ]
