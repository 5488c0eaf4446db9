"""Real input that is already there: the source text of Python's standard library, and scikit-learn's bundled digits.

Nothing is downloaded. The text differs a little between Python versions, so curves are compared within one run only.
"""

from __future__ import annotations

import functools
import io
import keyword
import sysconfig
import tokenize
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(CHARACTERS) + 1  # every other character shares the last id
TAGS = ("keyword", "operator", "number", "string", "definition", "call", "attribute", "argument", "name")
OPENING, CLOSING = set("([{"), set(")]}")


@functools.cache
def library_sources() -> tuple[str, ...]:
    """The text of the top-level modules of the standard library, in alphabetical order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise RuntimeError("this Python has no source files of its standard library, which the text workloads train on")
    return tuple(file.read_text(encoding="utf-8", errors="replace") for file in files)


def characters(count: int) -> Tensor:
    """The first `count` characters of the standard library as ids [count] in 0..VOCABULARY-1."""
    ids = {character: i for i, character in enumerate(CHARACTERS)}
    text, length = [], 0
    for source in library_sources():
        text.append(source)
        length += len(source)
        if length >= count:
            return torch.tensor([ids.get(character, VOCABULARY - 1) for character in "".join(text)[:count]])
    raise RuntimeError(f"the standard library's modules have {length} characters, {count} are needed")


def streams(ids: Tensor, batch: int, seq_len: int) -> list[tuple[Tensor, Tensor]]:
    """Cuts a text into `batch` parallel streams: (input, next character), each [seq_len, batch], in reading order."""
    steps = (len(ids) - 1) // (batch * seq_len)
    used = steps * batch * seq_len
    x, y = (part.view(batch, steps * seq_len).t() for part in (ids[:used], ids[1 : used + 1]))
    return [
        (x[i : i + seq_len].contiguous(), y[i : i + seq_len].contiguous()) for i in range(0, steps * seq_len, seq_len)
    ]


def tagged_sentences(count: int, longest: int) -> list[list[tuple[str, str]]]:
    """The first `count` logical lines of source code with 3..`longest` tokens, as (word, tag) pairs.

    A word is a token of Python's tokenize; its tag is one of TAGS. The tag of a NAME follows from its neighbours
    on both sides ("call" before a parenthesis, "attribute" after a dot, "argument" before "=" in brackets), so the
    task needs both directions.
    """
    sentences: list[list[tuple[str, str]]] = []
    for source in library_sources():
        tokens: list[tokenize.TokenInfo] = []
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NEWLINE:
                if 3 <= len(tokens) <= longest:
                    sentences.append([(t.string, tag) for t, tag in zip(tokens, _tags(tokens), strict=True)])
                    if len(sentences) == count:
                        return sentences
                tokens = []
            elif token.string.strip() and token.type != tokenize.COMMENT:
                tokens.append(token)
    raise RuntimeError(f"the standard library's modules have {len(sentences)} sentences, {count} are needed")


def _tags(tokens: list[tokenize.TokenInfo]) -> list[str]:
    tags, depth = [], 0
    for i, token in enumerate(tokens):
        text = token.string
        before = tokens[i - 1].string if i else ""
        after = tokens[i + 1].string if i + 1 < len(tokens) else ""
        depth += (text in OPENING) - (text in CLOSING)
        if token.type == tokenize.NUMBER:
            tag = "number"
        elif token.type == tokenize.OP:
            tag = "operator"
        elif token.type != tokenize.NAME:
            tag = "string"  # from Python 3.12 on also the pieces of an f-string
        elif keyword.iskeyword(text):
            tag = "keyword"
        elif before in ("def", "class"):
            tag = "definition"
        elif after == "(":
            tag = "call"
        elif before == ".":
            tag = "attribute"
        elif after == "=" and depth:
            tag = "argument"
        else:
            tag = "name"
        tags.append(tag)
    return tags


def tagger_batches(count: int, batch: int, vocabulary: int, longest: int) -> list[tuple[PackedSequence, Tensor]]:
    """Batches of `batch` sentences in reading order: packed word ids, and the tags [sum of lengths] in packed order.

    Ids are by frequency; id vocabulary-1 is any rarer word.
    """
    sentences = tagged_sentences(count, longest)
    frequency = Counter(word for sentence in sentences for word, _ in sentence)
    ids = {word: i for i, (word, _) in enumerate(frequency.most_common(vocabulary - 1))}
    batches = []
    for start in range(0, count - batch + 1, batch):
        group = sentences[start : start + batch]
        words = [torch.tensor([ids.get(word, vocabulary - 1) for word, _ in sentence]) for sentence in group]
        tags = [torch.tensor([TAGS.index(tag) for _, tag in sentence]) for sentence in group]
        batches.append((pack_sequence(words, enforce_sorted=False), pack_sequence(tags, enforce_sorted=False).data))
    return batches


def digit_batches(batch: int) -> list[tuple[Tensor, Tensor]]:
    """scikit-learn's 1797 handwritten digits, row by row: (pixels [8, batch, 8] in 0..1, digit [batch])."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.as_tensor(digits.images, dtype=torch.float32).div(16).transpose(0, 1)
    labels = torch.as_tensor(digits.target)
    return [
        (pixels[:, i : i + batch].contiguous(), labels[i : i + batch]) for i in range(0, len(labels) - batch + 1, batch)
    ]
