"""The Random Sequential Document Buffer: neighbouring rows from different documents, each document read in order.

A buffer holds documents, each with a read head. A row takes tokens from the head of a document picked at random until
the row is full or the document has ended, then from another. When no more than N documents are left unread, it takes in
new ones until there are `refill` times N. Source: Arcee Trinity Large Technical Report, section 3.2.

Which tokens a row gets follows from integers alone (lengths, heads, draws), so the buffer is played, not stored: a
million documents take about a second. It stays a pure function of (seed, mixture, step), like the order it replaces.

The report does not say what happens when documents run out. Here an epoch is read to its end before the next begins:
every token of a source is read exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from freehold.core.errors import DataError
from freehold.data.config import EpochLimit, TextBatchConfig
from freehold.data.loader import WHOLE, PhaseRows, Piece, Source, Span, TextOrder, generator
from freehold.data.packing import Batch

ROWS_AT_ONCE = 1024
"""Rows played at one go and kept until others are asked for."""
STATES_KEPT = 16
"""States kept to go back to; when there are more, every other one is dropped."""


@dataclass(frozen=True)
class BufferState:
    """All that a buffer is before a row: three integers for each document, stored and taken up again bit for bit."""

    row: int
    epoch: int
    taken: int
    """Documents of the epoch that were taken in."""
    queue: tuple[Span, ...]
    """What is unread of each document that was taken in; the last one is next."""


class DocumentBuffer:
    """The endless rows of one source through one buffer.

    `order(epoch)` returns the document numbers of an epoch; `rng(*parts)` a random generator that depends on the parts
    only. The buffer is filled to `full` documents when no more than `low` are left.

    Picks are drawn beforehand: the documents stand in a queue in random order, and one that was read but not to its end
    goes back to a random place, the one there to the end. So every order of the queue is always as likely as any other,
    and the next document is any of them with the same probability.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        order: Callable[[int], np.ndarray],
        rng: Callable[..., np.random.Generator],
        *,
        row_tokens: int,
        low: int,
        full: int,
    ) -> None:
        self.lengths, self.order, self.rng = lengths, order, rng
        self.row_tokens, self.low, self.full = row_tokens, low, full
        self._start = BufferState(0, 0, 0, ())
        self._rows: list[list[Span]] = []
        """the rows after `_start`"""
        self._states = {0: self._start}

    def row(self, number: int) -> list[Span]:
        """Return the stretches of documents that make up a row, at any time and in any order of asking."""
        while not self._start.row <= number < self._start.row + len(self._rows):
            # Going back is possible from any kept state; going forward plays what is between. Both give the same rows.
            self._start = self._states[max(row for row in self._states if row <= number)]
            self._rows, after = self._play(self._start, ROWS_AT_ONCE - self._start.row % ROWS_AT_ONCE)
            self.restore(after)
        return self._rows[number - self._start.row]

    def state(self, row: int) -> BufferState:
        """Return the state before a row."""
        self.row(row)
        return self._play(self._start, row - self._start.row)[1]

    def restore(self, state: BufferState) -> None:
        """Take up a state of this buffer: rows from there on are then played from it, not from the first row."""
        if len(self._states) >= STATES_KEPT:
            # Every other state is dropped, so memory is bounded while both old and new rows stay within reach.
            self._states = {row: self._states[row] for row in sorted(self._states)[::2]}
        self._states[state.row] = state

    def _play(self, state: BufferState, rows: int) -> tuple[list[list[Span]], BufferState]:
        """Return the next rows after a state, up to a multiple of ROWS_AT_ONCE, and the state after them."""
        epoch, taken, queue = state.epoch, state.taken, list(state.queue)
        order = self.order(epoch)
        # Draws come in blocks with a generator each: row n needs the draws of its block, not those of all rows before.
        block, at = divmod(state.row, ROWS_AT_ONCE)
        places = self.rng("places", block).integers(0, 1 << 32, ROWS_AT_ONCE).tolist()[at : at + rows]
        played = []
        for place in places:
            need, spans = self.row_tokens, []
            # Until the row is full; most rows end inside a document, which then waits in the queue for its next row.
            while need:
                # The report refills at N left; at the end of an epoch the queue runs empty first, so epochs do not mix.
                if len(queue) <= self.low and (taken < len(order) or not queue):
                    if taken == len(order):
                        epoch, taken = epoch + 1, 0
                        order = self.order(epoch)
                    new = order[taken : taken + self.full - len(queue)]
                    if len(new):
                        taken += len(new)
                        queue += zip(new.tolist(), [0] * len(new), self.lengths[new].tolist(), strict=True)
                        # New documents are mixed with those left, else the old ones would always be read last.
                        queue = [queue[i] for i in self.rng("filled", epoch, taken).permutation(len(queue)).tolist()]
                span = queue.pop()
                document, head, left = span
                if left > need:
                    spans.append((document, head, need))
                    # Swapped with a random place: the document is continued later, from where it was read to.
                    queue.append((document, head + need, left - need))
                    # A 32-bit draw scaled to the queue: the same as `integers(len(queue))`, but drawn before the length
                    # is known.
                    other = place * len(queue) >> 32
                    queue[other], queue[-1] = queue[-1], queue[other]
                    break
                spans.append(span)
                need -= left
            played.append(spans)
        return played, BufferState(state.row + rows, epoch, taken, tuple(queue))


class BufferOrder(TextOrder):
    """The order of pre-training through a buffer for each source: a row has one source, and may have many documents.

    How many rows of which source a phase has is as in TextOrder; each source's rows come in the order of its buffer.
    With `workers` W, each step's rows are cut into W equal parts; a source then has W buffers with a W-th of the slots
    and every W-th document each, and each part reads from its own. The order depends on W, not on how many processes
    share the parts: one that reads only some parts plays only their buffers.
    Raises DataError for a source that has fewer documents than there are workers.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        phases: Sequence[PhaseRows],
        *,
        context_tokens: int,
        sequences: int,
        seed: int,
        separator: int,
        begin: int | None = None,
        first_step: int = 0,
        consumed: Mapping[str, int] | None = None,
        limit: EpochLimit | None = None,
        documents: int,
        refill: float = 2.0,
        workers: int = 1,
    ) -> None:
        self.workers, self.low, self.full = workers, documents // workers, int(documents * refill) // workers
        self._buffers: dict[str, DocumentBuffer] = {}
        super().__init__(
            sources,
            phases,
            context_tokens=context_tokens,
            sequences=sequences,
            seed=seed,
            separator=separator,
            begin=begin,
            first_step=first_step,
            consumed=consumed,
            limit=limit,
        )
        for name, source in self.sources.items():
            if len(source.lengths) < workers:
                raise DataError(
                    "a source has fewer documents than the buffer has workers",
                    where=f"batch.order.workers, source {name}",
                    found=f"{len(source.lengths)} documents",
                    expected=f">= {workers}",
                    todo="lower batch.order.workers",
                )

    def spans(self, lane: str, row: int) -> list[Span]:
        """Return (document number, first token within it, tokens) of each stretch of a row."""
        # Made on first use: a rank that reads some parts of a step plays only their buffers.
        if lane not in self._buffers:
            # Lanes are ordered source by source, worker by worker, so the remainder is the worker.
            source, worker = self.sources[self.lanes[lane]], list(self.lanes).index(lane) % self.workers
            self._buffers[lane] = DocumentBuffer(
                source.lengths,
                lambda epoch: self._epoch(source.name, epoch)[0][worker :: self.workers],
                lambda *parts: generator(self.seed, "buffer", lane, *parts),
                row_tokens=self.context_tokens,
                low=self.low,
                full=self.full,
            )
        return self._buffers[lane].row(row)

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        """Return the rows of one optimizer step, or a part of them.

        Targets are a document's tokens, its ending separator included; inputs are the tokens before them, `begin`
        before the first. So an epoch has the same (input, target) pairs as without the buffer. A piece of a document
        sees no other piece of the row; like any row that begins within a document, it does not see what came before.
        """
        rows = self.rows(step)[part]
        batch = Batch(*(np.empty((len(rows), self.context_tokens), kind) for kind in (np.int64, np.int64, np.int32)))
        for r, (lane, row) in enumerate(rows):
            source, at = self.sources[self.lanes[lane]], 0
            for number, (document, first, tokens) in enumerate(self.spans(lane, row)):
                # A piece that starts inside its document reads the true token before it, not a made-up beginning.
                begin, end = int(source.starts[document]) + first, at + tokens
                batch.targets[r, at:end] = source.tokens[begin : begin + tokens]
                batch.input_ids[r, at] = source.tokens[begin - 1] if first else self.begin
                batch.input_ids[r, at + 1 : end] = source.tokens[begin : begin + tokens - 1]
                batch.document_ids[r, at:end] = number
                at = end
        return batch

    def documents(self, step: int) -> list[Piece]:
        """Return the documents whose tokens were targets of a step, in row order."""
        pieces = []
        for lane, row in self.rows(step):
            source = self.sources[self.lanes[lane]]
            pieces += [Piece(source.ids[document], source.name, n) for document, _, n in self.spans(lane, row)]
        return pieces

    def _lanes(self) -> dict[str, str]:
        if self.workers == 1:
            return super()._lanes()
        return {f"{name}/{worker}": name for name in self.names for worker in range(self.workers)}

    def _arrange(self, counts: list[int], rng: np.random.Generator) -> np.ndarray:
        """Return a phase's rows [N, 2] of (lane number, row number): sources shuffled, each lane's rows in order."""
        # Which source each row of the phase comes from: exact counts, shuffled.
        labels = np.repeat(np.arange(len(counts)), counts)[rng.permutation(sum(counts))]
        # The place in its step decides a row's worker: equal parts of every step, whatever the sources.
        worker = np.arange(len(labels)) % self.sequences * self.workers // self.sequences
        lanes = labels * self.workers + worker  # [steps * B]
        taken = np.bincount(lanes, minlength=len(self.lanes))
        # Numbering by a stable sort: the k-th row of a lane in the phase is row consumed + k of its stream.
        firsts = np.array(list(self.consumed.values())) - (np.cumsum(taken) - taken)
        rows = np.stack([lanes, lanes], axis=1)  # [steps * B, 2]
        rows[np.argsort(lanes, kind="stable"), 1] = np.arange(len(lanes)) + np.repeat(firsts, taken)
        return rows


def text_order(
    batch: TextBatchConfig,
    sources: Mapping[str, Source],
    phases: Sequence[PhaseRows],
    *,
    seed: int,
    separator: int,
    begin: int | None = None,
    first_step: int = 0,
    consumed: Mapping[str, int] | None = None,
) -> TextOrder:
    """Return the order of pre-training that a recipe asks for."""
    shape: dict[str, Any] = {
        "context_tokens": batch.context_tokens,
        "sequences": batch.sequences,
        "seed": seed,
        "separator": separator,
        "begin": begin,
    }
    if batch.order.kind == "stream":
        return TextOrder(sources, phases, **shape, first_step=first_step, consumed=consumed, limit=batch.epochs)
    return BufferOrder(
        sources,
        phases,
        **shape,
        first_step=first_step,
        consumed=consumed,
        limit=batch.epochs,
        documents=batch.order.documents,
        refill=batch.order.refill,
        workers=batch.order.workers,
    )
