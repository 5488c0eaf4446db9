"""Convert a pretrained model: a checkpoint of torch.nn runs on rnnfast with the same numbers.

Run it: python examples/convert_pretrained.py [--small]
"""

import sys
import tempfile
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rnnfast

SMALL = "--small" in sys.argv
LENGTH, HIDDEN, STEPS = (20, 32, 40) if SMALL else (30, 64, 60)


class Classifier(nn.Module):
    """Says whether the numbers of a sequence sum to more than zero."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(input_size=4, hidden_size=HIDDEN, num_layers=2, batch_first=True)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, h_n = self.gru(x)
        return self.head(h_n[-1])


def make_data(batch: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, LENGTH, 4)
    return x, (x.sum((1, 2)) > 0).long()


def pretrain(path: str) -> None:
    """Trains with torch.nn alone and saves the weights."""
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        x, labels = make_data(32)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    torch.save(model.state_dict(), path)


def run(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...], float]:
    """The outputs, the gradients, and the milliseconds that both took."""
    start = time.perf_counter()
    logits = model(x)
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
    return logits.detach(), gradients, 1e3 * (time.perf_counter() - start)


torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    pretrain(f"{folder}/classifier.pt")
    weights = torch.load(f"{folder}/classifier.pt", weights_only=True)

stock, fast = Classifier(), Classifier()
stock.load_state_dict(weights)
fast.load_state_dict(weights)
rnnfast.convert(fast)  # changes the class of fast.gru; parameters, names and hooks stay
print(f"convert made it rnnfast's GRU: {type(fast.gru) is rnnfast.GRU}")

x, labels = make_data(128)
expected, expected_gradients, stock_ms = run(stock, x, labels)
actual, gradients, fast_ms = run(fast, x, labels)
torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)
print(f"largest difference of the outputs: {(actual - expected).abs().max():.1e}")
print(f"accuracy of the converted model: {(actual.argmax(1) == labels).float().mean():.3f}")
print(f"forward and backward: torch.nn {stock_ms:.0f} ms, rnnfast {fast_ms:.0f} ms")
stock.load_state_dict(fast.state_dict())  # both libraries give the weights the same names and shapes
rnnfast.revert(fast)
print(f"revert gave torch.nn's GRU back: {type(fast.gru) is nn.GRU}")
