"""A character language model: a GRU learns Python's own help texts and writes some of its own.

Run it: python examples/character_language_model.py [--small]
"""

import sys
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rnnfast

SMALL = "--small" in sys.argv
HIDDEN, BATCH, STEPS = (64, 16, 60) if SMALL else (192, 24, 240)
WINDOW = 64  # characters between two steps of the optimizer


class LanguageModel(nn.Module):
    """Predicts every next character from all that came before."""

    def __init__(self, characters: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.gru = rnnfast.GRU(64, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, characters)

    def forward(self, text: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, h_n = self.gru(self.embedding(text), hx)
        return self.head(output), h_n


def train(model: LanguageModel, text: Tensor) -> None:
    """Reads BATCH places of the text side by side; the state goes on from window to window."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    rows = text[: text.numel() // BATCH * BATCH].view(BATCH, -1)
    hx = None
    for step in range(STEPS):
        start = step * WINDOW
        inputs, targets = rows[:, start : start + WINDOW], rows[:, start + 1 : start + WINDOW + 1]
        logits, hx = model(inputs, hx)
        hx = hx.detach()  # gradients end at the start of the window
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % (STEPS // 6) == 0 or step == STEPS - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")


@torch.inference_mode()
def sample(model: LanguageModel, prompt: Tensor, length: int, temperature: float = 0.6) -> Tensor:
    """The characters that follow the prompt, drawn one at a time."""
    logits, hx = model(prompt[None])
    drawn = []
    for _ in range(length):
        probabilities = F.softmax(logits[0, -1] / temperature, dim=0)
        drawn.append(torch.multinomial(probabilities, 1))
        logits, hx = model(drawn[-1][None], hx)
    return torch.cat(drawn)


torch.manual_seed(0)
text = "\n".join(topics.values())
characters = sorted(set(text))
index = {character: i for i, character in enumerate(characters)}
print(f"{len(text)} characters, {len(characters)} different ones")

model = LanguageModel(len(characters))
train(model, torch.tensor([index[character] for character in text]))

prompt = "The statement "
drawn = sample(model, torch.tensor([index[character] for character in prompt]), 240)
print("sample:", prompt + "".join(characters[i] for i in drawn.tolist()))
