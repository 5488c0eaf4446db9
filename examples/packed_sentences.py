"""Sentences of different lengths: a tagger takes them packed or padded with `lengths=`, with the same numbers.

Run it: python examples/packed_sentences.py [--small]
"""

import random
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import rnnfast

SMALL = "--small" in sys.argv
HIDDEN, STEPS = (16, 60) if SMALL else (48, 120)
PADDING = -100  # the label that cross_entropy ignores
WORDS = {  # "watch" and "visit" are nouns and verbs: only the context tells which
    "DET": ["the", "a"],
    "ADJ": ["old", "red"],
    "NOUN": ["dog", "garden", "watch", "visit"],
    "VERB": ["sees", "likes", "watch", "visit"],
    "CONJ": ["and", "while"],
}
VOCABULARY, TAGS = sorted({word for words in WORDS.values() for word in words}), list(WORDS)


def random_tags() -> list[str]:
    """The tags of one sentence: DET NOUN VERB DET ADJ NOUN, and longer ones."""
    nouns = [["DET", *["ADJ"] * random.randint(0, 2), "NOUN"] for _ in range(2)]
    clause = [*nouns[0], "VERB", *nouns[1]]
    return clause if random.random() < 0.6 else [*clause, "CONJ", *random_tags()]


def make_batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words and tags as numbers, padded to the longest sentence: both [N, T]; and the lengths [N]."""
    tagged = [random_tags() for _ in range(size)]
    words = [torch.tensor([VOCABULARY.index(random.choice(WORDS[tag])) for tag in tags]) for tags in tagged]
    labels = [torch.tensor([TAGS.index(tag) for tag in tags]) for tags in tagged]
    return pad_sequence(words, True), pad_sequence(labels, True, PADDING), torch.tensor([len(row) for row in words])


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), 16)
        self.lstm = rnnfast.LSTM(16, HIDDEN, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, len(TAGS))

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.lstm(self.embedding(words), lengths=lengths)
        return self.head(output)


random.seed(0)
torch.manual_seed(0)
model = Tagger()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(STEPS):
    words, labels, lengths = make_batch(32)
    optimizer.zero_grad()
    F.cross_entropy(model(words, lengths).flatten(0, 1), labels.flatten(), ignore_index=PADDING).backward()
    optimizer.step()

words, labels, lengths = make_batch(256)
tags = model(words, lengths).argmax(2)
accuracy = (tags == labels)[labels != PADDING].float().mean()
print(f"{lengths.min()} to {lengths.max()} words; accuracy on new sentences: {accuracy:.3f}")
print(*(f"{VOCABULARY[words[0, i]]}/{TAGS[tags[0, i]]}" for i in range(lengths[0])))

# Packing needs three calls, `lengths=` one argument. Outputs and final states are the same.
embedded = model.embedding(words)
packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
packed_output, packed_states = model.lstm(packed)
from_packed, _ = pad_packed_sequence(packed_output, batch_first=True)
from_lengths, states = model.lstm(embedded, lengths=lengths)
torch.testing.assert_close((from_lengths, states), (from_packed, packed_states))
print(f"largest difference of packed and lengths=: {(from_lengths - from_packed).abs().max():.1e}")
