"""Freezing: a trained model gets fixed weights as float32, bfloat16 or int8, keeps its accuracy and becomes faster.

Run it: python examples/freeze.py [--small]
"""

import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rnnfast

SMALL = "--small" in sys.argv
HIDDEN, STEPS, ROUNDS = (32, 150, 5) if SMALL else (128, 200, 40)
WORDS, LENGTH, FEATURES = 10, 25, 16
VOCABULARY = torch.randn(WORDS, LENGTH, FEATURES, generator=torch.Generator().manual_seed(1)).cumsum(1) / 3


class Listener(nn.Module):
    """Which word was spoken? An LSTM over frames, then a Linear on its last output."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, HIDDEN, num_layers=2)
        self.head = nn.Linear(HIDDEN, WORDS)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.lstm(frames)[0][-1])


def spoken(count: int) -> tuple[Tensor, Tensor]:
    """Noisy recordings [T, count, features] of random words, and which words they are."""
    words = torch.randint(WORDS, (count,))
    clean = VOCABULARY[words] * (0.7 + 0.6 * torch.rand(count, 1, 1))
    return (clean + 3.5 * torch.randn_like(clean)).transpose(0, 1).contiguous(), words


def trained() -> Listener:
    model = rnnfast.convert(Listener())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        frames, words = spoken(32)
        F.cross_entropy(model(frames), words).backward()
        optimizer.step()
        optimizer.zero_grad()
    return rnnfast.revert(model).eval()


def microseconds(models: dict[str, nn.Module], frames: Tensor) -> dict[str, float]:
    """The median time of a call. The models take turns, so that whatever else the machine does meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            start = time.perf_counter()
            model(frames)
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


torch.manual_seed(0)
torch.set_num_threads(1)  # as a server has it that answers many users at once
model = trained()
models = {"torch.nn": model}
models |= {weights: rnnfast.freeze(model, weights) for weights in ("float32", "bfloat16", "int8")}
frames, words = spoken(500)
with torch.inference_mode():
    right = {name: (one(frames).argmax(1) == words).float().mean().item() for name, one in models.items()}
    times = microseconds(models, frames[:, :1])
for name, one in models.items():
    mebibytes = sum(t.nbytes for t in [*one.lstm.parameters(), *one.lstm.buffers()]) / 2**20
    print(f"{name:9} accuracy {right[name]:.3f}, weights {mebibytes:4.2f} MiB, a word {times[name]:5.0f} us, ", end="")
    print(f"{times['torch.nn'] / times[name]:.1f} times as fast as torch.nn")
