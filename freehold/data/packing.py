"""Rows of a batch, and the packing of whole conversations into rows.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from freehold.core.marks import IGNORE, PADDING


@dataclass(frozen=True)
class Batch:
    """One micro-batch or step: arrays of shape [B, T]."""

    input_ids: np.ndarray
    targets: np.ndarray
    document_ids: np.ndarray

    def rows(self, start: int, stop: int) -> Self:
        """Return rows start..stop of the batch."""
        return self._cut(slice(start, stop))

    def columns(self, part: slice) -> Self:
        """Return a stretch of every row."""
        return self._cut((slice(None), part))

    def _cut(self, part: Any) -> Self:
        # A batch of another loss has more arrays of the same shape.
        return type(self)(**{field.name: getattr(self, field.name)[part] for field in dataclasses.fields(self)})

    @property
    def target_tokens(self) -> int:
        """Return how many positions carry loss."""
        return int((self.targets != IGNORE).sum())


def text_batch(rows: np.ndarray, separator: int, begin: int) -> Batch:
    """Make a batch from rows [B, T+1] of a token stream in which each document ends with `separator`.

    The place of a separator belongs to two documents: as a target it is the end of the one before it, as an input it is
    `begin`, the first token of the one after it. So every document starts from a clean context and from the id that
    every front puts before a text, and no position of a row is spent on it.
    """
    # int64: what torch's embedding and cross-entropy take; shards hold uint16 or uint32.
    inputs = rows[:, :-1].astype(np.int64)  # [B, T]
    starts = inputs == separator  # [B, T]
    inputs[starts] = begin
    return Batch(inputs, rows[:, 1:].astype(np.int64), np.cumsum(starts, axis=1).astype(np.int32))


def cut(ids: Sequence[int], context_tokens: int) -> list[list[int]]:
    """Cut one sequence into windows of at most `context_tokens` predicted tokens and one before them.

    The first token of the sequence is context only. Each later window begins with the last token that the
    one before predicted, so every other token is predicted exactly once.
    """
    # Windows share one token and no context: what a model of this context could not see is not counted as seen.
    return [list(ids[at : at + context_tokens + 1]) for at in range(0, len(ids) - 1, context_tokens)]


@dataclass(frozen=True)
class Example:
    """One conversation as ids with a mask of the positions whose token carries loss."""

    id: str
    source: str
    ids: Sequence[int]
    loss_mask: Sequence[bool]


def pack(lengths: Sequence[int], capacity: int, open_rows: int = 64) -> list[list[int]]:
    """Put items of the given lengths whole into rows of `capacity`, first fit over the newest open rows.

    Returns the item numbers of each row. Raises ValueError for an item longer than a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for item, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"item {item} has {length} tokens, a row holds {capacity}")
        # Only the newest rows are tried: first fit over all of them is quadratic, and full rows never fit again.
        for row in range(max(0, len(rows) - open_rows), len(rows)):
            if free[row] >= length:
                rows[row].append(item)
                free[row] -= length
                break
        else:
            # No open row has room: a new one, which stays open for the next `open_rows`.
            rows.append([item])
            free.append(capacity - length)
    return rows


def conversation_batch(rows: Sequence[Sequence[Example]], context_tokens: int, pad: int) -> Batch:
    """Arrange packed conversations as a batch; loss only where an example's mask says so, never across examples."""
    shape = (len(rows), context_tokens)
    # Padding carries no loss and has a document number of its own, so no token attends to it.
    inputs = np.full(shape, pad, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    documents = np.full(shape, PADDING, dtype=np.int32)
    for r, row in enumerate(rows):
        at = 0
        # Each example is a document of its own to attention: one conversation never reads another.
        for number, example in enumerate(row):
            ids = np.asarray(example.ids, dtype=np.int64)
            mask = np.asarray(example.loss_mask, dtype=bool)
            length = len(ids) - 1
            inputs[r, at : at + length] = ids[:-1]
            # The mask belongs to the token that is predicted, so it is shifted as the targets are.
            targets[r, at : at + length] = np.where(mask[1:], ids[1:], IGNORE)
            documents[r, at : at + length] = number
            at += length
    return Batch(inputs, targets, documents)
