"""The order of a longer context: documents sampled by length, joined within a source, some rows with needle tasks.

Rows come from buffers as in `BufferOrder`, but over a pool: each document is kept with a probability that grows with
its length, and what is kept of one source is joined until it fills a row, so that a row is one text to attention.
Source of the sampling: Arcee Trinity Large Technical Report, section 3.5 (1 % of short documents, 90 % of long ones).

Shapes: B rows a step, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from freehold.core.errors import DataError
from freehold.core.marks import IGNORE
from freehold.data.buffer import BufferOrder
from freehold.data.config import LongConfig
from freehold.data.loader import WHOLE, Piece, Source, Span, generator
from freehold.data.needles import SHORTEST_TASK, Encode, Task, training_task
from freehold.data.packing import Batch


@dataclass(frozen=True)
class Pool:
    """What was kept of one source, and how it is joined."""

    source: Source
    members: np.ndarray
    """Numbers of the kept documents, in the source's order."""
    firsts: np.ndarray
    """Place in `members` where each joined document begins, and their end."""

    def joined(self) -> Source:
        """Return the joined documents as a source; only its lengths mean something."""
        lengths = np.add.reduceat(self.source.lengths[self.members], self.firsts[:-1])
        ids = [self.source.ids[self.members[first]] for first in self.firsts[:-1]]
        return replace(self.source, starts=np.zeros_like(lengths), lengths=lengths, ids=ids)

    def spans(self, joined: int, first: int, tokens: int) -> list[Span]:
        """Return the stretches of real documents along a stretch of a joined one."""
        members = self.members[self.firsts[joined] : self.firsts[joined + 1]]
        ends, found = np.cumsum(self.source.lengths[members]), []
        at = int(np.searchsorted(ends, first, side="right"))
        while tokens > 0:
            inside = first - (int(ends[at - 1]) if at else 0)
            taken = min(int(self.source.lengths[members[at]]) - inside, tokens)
            found.append((int(members[at]), inside, taken))
            first, tokens, at = first + taken, tokens - taken, at + 1
        return found

    def read(self, joined: int, first: int, tokens: int) -> np.ndarray:
        """Return the tokens of a stretch of a joined document."""
        starts = self.source.starts
        parts = [
            self.source.tokens[starts[document] + inside : starts[document] + inside + taken]
            for document, inside, taken in self.spans(joined, first, tokens)
        ]
        return np.concatenate(parts).astype(np.int64)


def keep_probability(lengths: np.ndarray, context_tokens: int, settings: LongConfig) -> np.ndarray:
    """Return how likely each document is kept: from `keep_short` up to `keep_long` at a document that fills a row."""
    share = np.minimum(lengths / context_tokens, 1.0)
    return settings.keep_short + (settings.keep_long - settings.keep_short) * share


def pool_of(source: Source, context_tokens: int, settings: LongConfig, seed: int) -> Pool | None:
    """Return the pool of a source; None when no document is kept."""
    draws = generator(seed, "length", source.name).random(len(source.lengths))
    members = np.flatnonzero(draws < keep_probability(source.lengths, context_tokens, settings))
    if not len(members):
        return None
    firsts, filled = [0], 0
    for place, length in enumerate(source.lengths[members].tolist()):
        # A joined document ends once it fills a row: longer ones would only mix more of the source.
        if place and (not settings.join or filled >= context_tokens):
            firsts.append(place)
            filled = 0
        filled += length
    return Pool(source, members, np.array([*firsts, len(members)]))


class LongOrder(BufferOrder):
    """The order of a phase of longer rows: buffers over pools, and a share of rows with needle tasks in their text.

    A needle row is made from the very text that the row would have had, cut to make room: so which documents a step
    read is computed as for any other row. Only its answers carry loss.
    Raises DataError when no document is kept.
    """

    def __init__(
        self, sources: Mapping[str, Source], phases: Any, *, settings: LongConfig, encode: Encode, **shape: Any
    ) -> None:
        self.settings, self.encode = settings, lru_cache(maxsize=4096)(encode)
        context, seed = shape["context_tokens"], shape["seed"]
        pools = {name: pool_of(s, context, settings, seed) for name, s in sources.items() if s.total_tokens}
        self.pools = {name: pool for name, pool in pools.items() if pool is not None}
        if not self.pools:
            raise DataError(
                "no document is kept for the longer context",
                found=f"{sum(len(s.lengths) for s in sources.values())} documents, keep_short {settings.keep_short:g}",
                todo="raise pretrain.extension.keep_short",
            )
        super().__init__({name: pool.joined() for name, pool in self.pools.items()}, phases, **shape)

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        """Return the rows of one optimizer step, or a part of them."""
        numbers = range(self.sequences)[part]
        rows = self.rows(step)[part]
        batch = Batch(*(np.empty((len(rows), self.context_tokens), kind) for kind in (np.int64, np.int64, np.int32)))
        for r, (number, (lane, row)) in enumerate(zip(numbers, rows, strict=True)):
            pool, spans = self.pools[self.lanes[lane]], self.spans(lane, row)
            tasks = self._tasks(step, number, lane, row)
            if tasks:
                self._fill_tasks(batch, r, tasks)
            else:
                self._fill_text(batch, r, pool, spans)
        return batch

    def documents(self, step: int) -> list[Piece]:
        """Return the documents a step read, in row order, each once for each of its stretches."""
        pieces = []
        for number, (lane, row) in enumerate(self.rows(step)):
            pool, tasks = self.pools[self.lanes[lane]], self._tasks(step, number, lane, row)
            left = sum(task.text_tokens for task in tasks) if tasks else self.context_tokens
            for joined, first, tokens in self.spans(lane, row):
                tokens, left = min(tokens, left), left - min(tokens, left)
                for document, _, taken in pool.spans(joined, first, tokens):
                    pieces.append(Piece(pool.source.ids[document], pool.source.name, taken))
        return pieces

    def _tasks(self, step: int, number: int, lane: str, row: int) -> list[Task]:
        """Return the tasks of a row; none for a row of text."""
        rng = generator(self.seed, "needles", step, number)
        if rng.random() >= self.settings.needles:
            return []
        pool = self.pools[self.lanes[lane]]
        text = np.concatenate([pool.read(*span) for span in self.spans(lane, row)])  # [T]
        # Short tasks too: the association is learned there first, and many short ones have more answers than one.
        most = max(0, int(np.log2(self.context_tokens / SHORTEST_TASK)) - 1)
        count = 1 << int(rng.integers(most + 1))
        length, tasks, at = self.context_tokens // count, list[Task](), 0
        for place in range(count):
            # The last task takes what does not divide.
            size = length if place < count - 1 else self.context_tokens - length * (count - 1)
            keys = 1 + int(rng.integers(self.settings.keys))
            tasks.append(training_task(rng, self.encode, text[at:], size, keys, self.settings.wordings))
            at += tasks[-1].text_tokens
        return tasks

    def _fill_tasks(self, batch: Batch, r: int, tasks: list[Task]) -> None:
        at = 0
        for number, task in enumerate(tasks):
            end = at + len(task.ids)
            batch.input_ids[r, at], batch.input_ids[r, at + 1 : end] = self.begin, task.ids[:-1]
            # What surrounds a fact is no harder to predict than other text, but the fact itself is random.
            batch.targets[r, at:end] = np.where(task.answers, task.ids, IGNORE)
            batch.document_ids[r, at:end] = number
            at = end

    def _fill_text(self, batch: Batch, r: int, pool: Pool, spans: list[Span]) -> None:
        at = 0
        for number, (joined, first, tokens) in enumerate(spans):
            end, ids = at + tokens, pool.read(joined, first, tokens)
            batch.targets[r, at:end] = ids
            batch.input_ids[r, at] = pool.read(joined, first - 1, 1)[0] if first else self.begin
            batch.input_ids[r, at + 1 : end] = ids[:-1]
            batch.document_ids[r, at:end] = number
            at = end
