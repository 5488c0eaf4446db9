"""Trains a workload with torch.nn and with rnnfast, step by step in turn, and once in float64 as the measure of both.

Adam with the usual learning rates keeps float32 training within 1e-6 of float64 over the first steps: there the curves
are compared; docs/benchmarking.md has the measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast

from . import data, parity
from .cases import DTYPES, Case
from .providers import backend_of
from .timing import Round, Sample, Timing, interleave, new_clock, summarise, turn
from .workloads import Workload

STREAMED = 64  # characters per timed call of the streaming model


@dataclass(frozen=True)
class Trained:
    """What a training gave: times per epoch, the three loss curves and the rule's verdict on them."""

    timing: Timing
    parity: parity.Parity
    backend: str
    losses: dict[str, list[float]]


class Training:
    """One model with its optimizer; `step()` trains on the next batch and keeps the loss."""

    def __init__(self, namespace: ModuleType, workload: Workload, batches: list[tuple], dtype: torch.dtype) -> None:
        device = workload.case.device
        torch.manual_seed(0)
        self.model = workload.build(namespace).to(device, dtype)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=workload.learning_rate)
        self.batches = [tuple(_moved(part, device, dtype) for part in batch) for batch in batches]
        self.losses: list[Tensor] = []
        self.state: tuple | None = None

    def step(self) -> None:
        index = len(self.losses) % len(self.batches)
        loss, self.state = self.model.loss(self.batches[index], self.state if index else None)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())

    def curve(self) -> list[float]:
        return torch.stack(self.losses).double().tolist()


def _moved(part: Tensor | PackedSequence, device: str, dtype: torch.dtype) -> Tensor | PackedSequence:
    return part.to(device, dtype) if part.data.is_floating_point() else part.to(device)


def train(workload: Workload) -> tuple[Trained, Training]:
    """Trains both from one seed on the workload's thread count; returns also torch's side, for what comes after."""
    batches, dtype, case = workload.batches(), DTYPES[workload.case.dtype], workload.case
    sides = [Training(namespace, workload, batches, dtype) for namespace in (nn, rnnfast)]
    clock = new_clock(case.device, case.threads)
    epochs: list[Round] = []
    for _ in range(workload.epochs):
        epoch = [Sample(0.0, 0.0), Sample(0.0, 0.0)]
        for index in range(len(batches)):
            for side in turn(index):
                epoch[side] += clock.measure(sides[side].step, 1)
        epochs.append(epoch)

    curves = {"torch": sides[0].curve(), "rnnfast": sides[1].curve(), "float64": _float64_curve(workload, batches)}
    compared = len(curves["float64"])
    verdict = parity.check_curve(curves["float64"], curves["torch"][:compared], curves["rnnfast"][:compared])
    backend = backend_of(*sides[1].model.recurrent_call(sides[1].batches[0]))
    return Trained(summarise(epochs, clock.name), verdict, backend, curves), sides[0]


def _float64_curve(workload: Workload, batches: list[tuple]) -> list[float]:
    """The first steps of the same training by torch.nn in float64, not timed."""
    training = Training(nn, workload, batches, torch.float64)
    for _ in range(min(workload.compared, workload.epochs * len(batches))):
        training.step()
    return training.curve()


def stream(workload: Workload, trained: Training) -> tuple[Case, Timing, parity.Parity, str]:
    """The trained model at work: one character per call, one row, no gradients; both sides have torch's weights."""
    device = workload.case.device
    case = Case("GRU", "inference", workload.case.hidden_size, 1, seq_len=1, form="cell", threads=1, device=device)
    text = data.characters(STREAMED).to(device)
    sides = []
    for namespace in (nn, rnnfast, nn):
        model = workload.build(namespace).to(device)
        model.load_state_dict(trained.model.state_dict())
        sides.append(model)
    sides[2].double()
    results = [{"logits": model.stream(text)} for model in sides]
    verdict = parity.judge(results[2], results[0], results[1], torch.float32, parity.longest_sums(case))
    calls = {"torch": lambda: sides[0].stream(text), "rnnfast": lambda: sides[1].stream(text)}
    timing = interleave(calls, new_clock(device, case.threads), seconds=2.0)
    with torch.no_grad():
        backend = backend_of(*sides[1].recurrent_call((text[:1, None],)))
    return case, timing.per(STREAMED), verdict, backend
