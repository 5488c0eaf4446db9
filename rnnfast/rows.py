"""Which steps each sequence of a batch has: one object on its way from a module to an operator."""

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """The rows of a batch; the operators take its fields one by one. Both None: every sequence has all steps."""

    batch_sizes: Tensor | None = None
    """Of a PackedSequence: int64 [T] on the CPU, descending; the sequences that have each step."""
    lengths: Tensor | None = None
    """Of padded input: int32 or int64 [B], unsorted; the steps that each sequence has."""


PADDED = Rows()
"""Every sequence has all steps. A constant, so that the fast path makes no object."""
