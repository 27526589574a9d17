"""The order of the data as a pure function of (seed, mixture, step): nothing to save, nothing to lose.

Each source is an endless stream of its documents, permuted again each epoch, cut into rows of T tokens. A phase takes
from each source the next rows in exact proportion to its weight, and shuffles them. So the rows of any step, and the
documents in them, can be computed for any step at any time: resume needs the step alone, and `trace` needs no log.

Worked example (`tests/data/test_golden_order.py` runs it): source a has documents a0 (tokens 10 to 12) and a1 (13 to
16), source b has b0 (20 to 24). Rows hold 3 tokens, a step 2 rows, the phase 4 steps and equal weights: 4 rows each.

    lane a   10 11 12 | 13 14 15 | 16 10 11 | 12 13 14     the second epoch begins inside row 2
    lane b   20 21 22 | 23 24 20 | 21 22 23 | 24 20 21

Shuffled with seed 0, the steps read rows (a2, b0), (b3, b1), (a0, b2), (a3, a1). Step 2 alone is computed just so:
`batch(2)` needs no step before it.

Shapes: B rows a step, T tokens a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from freehold.core.errors import DataError
from freehold.data.config import EpochLimit
from freehold.data.packing import Batch, Example, conversation_batch, pack, text_batch

Span = tuple[int, int, int]
"""A stretch of a document: (document number, first token within it, tokens)."""
WHOLE = slice(None)


def generator(*parts: object) -> np.random.Generator:
    """Return a random generator that depends on nothing but the parts given (seed, names, numbers)."""
    # A hash, not `seed + epoch`: neighbouring seeds would share streams. The zero byte keeps ("a", "bc") from ("ab",
    # "c").
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


@dataclass(frozen=True)
class Piece:
    """A document's share of a step: how many of its tokens were read (0: one was a target only)."""

    document_id: str
    source: str
    tokens: int


class Order(Protocol):
    """What the training loop and the ledger ask of a data order."""

    sequences: int
    """Rows of one optimizer step."""

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        """Return the rows of one optimizer step, or a part of them."""

    def documents(self, step: int) -> list[Piece]:
        """Return the documents of one optimizer step."""


@dataclass(frozen=True)
class Source:
    """One source's train shard: all its tokens, and where each document is in them."""

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    ids: Sequence[str]

    @cached_property
    def total_tokens(self) -> int:
        """Return the tokens of one epoch."""
        return int(self.lengths.sum())


@dataclass(frozen=True)
class PhaseRows:
    """What one phase needs to know: its name, its steps, and the weight of each source (empty: by tokens)."""

    name: str
    steps: int
    mixture: Mapping[str, float]


@dataclass(frozen=True)
class Share:
    """What one source gives to one phase: what the mixture asked for, and what it got."""

    phase: str
    source: str
    asked_rows: int
    rows: int
    """Fewer than asked when its limit of epochs was reached, more when another's was."""
    tokens: int
    epochs: float
    """How often the phase reads the source."""
    upsampled: float
    """Its share of the phase over its share of all tokens: above 1 it is read more often than the others."""


class TextOrder:
    """The order of pre-training: phases over weighted sources.

    A lane is an endless stream of rows; here each source is one. `consumed` are the rows each lane had given when a
    parent checkpoint was made; a branch continues from there. `separator` is the token that ends each document in the
    shards, `begin` the one that a model reads before its first (None: the separator, as before checkpoints said it).
    Raises DataError for a mixture that names no known source, or that asks for more of one than `limit` lets it give.
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
    ) -> None:
        # A source whose documents all went to validation, or were taken out, gives no rows and must not be divided by.
        self.sources = {n: s for n, s in sources.items() if s.total_tokens}
        if not self.sources:
            raise DataError("there is no text to train on", found="no source with tokens")
        self.context_tokens, self.sequences, self.seed, self.separator = context_tokens, sequences, seed, separator
        self.begin = separator if begin is None else begin
        self.first_step, self.limit = first_step, limit or EpochLimit()
        self.phases: list[tuple[int, int, str, np.ndarray]] = []
        """(first step, end step, name, rows [steps * B, 2] of (lane number, row number in its stream))"""
        self.names = list(self.sources)
        self.lanes = self._lanes()
        # A source that is new in this run starts at its first row; the others continue where the parent stopped.
        self.consumed = {lane: int((consumed or {}).get(lane, 0)) for lane in self.lanes}
        unknown = sorted(self.limit.sources.keys() - sources.keys())
        if unknown:
            raise DataError(
                "a limit of epochs names a source that is not there",
                where=f"batch.epochs.sources.{unknown[0]}",
                expected=", ".join(sources),
            )
        self.shares: list[Share] = []
        step = first_step
        for phase in phases:
            # All rows of a phase are placed before its first step: counts are then exact over the phase, not in the
            # mean.
            counts = self._counts(phase)
            rows = self._arrange(list(counts.values()), generator(seed, "rows", phase.name, step))
            self.phases.append((step, step + phase.steps, phase.name, rows))
            for lane, n in self._count(rows).items():
                self.consumed[lane] += n
            step += phase.steps
        self.last_step = step

    def consumed_at(self, step: int) -> dict[str, int]:
        """Return the rows each lane has given when a phase ends after `step` steps (or at the start)."""
        # Counted backwards from the end: `consumed` is where the last phase stops.
        taken = dict(self.consumed)
        for first, _, _, rows in self.phases:
            # Whole phases only: a phase that has begun is shuffled, so its lanes are not at one place inside it.
            if first >= step:
                for lane, n in self._count(rows).items():
                    taken[lane] -= n
        return taken

    def epochs(self) -> dict[str, float]:
        """Return how often each source has been read once all phases are done."""
        rows = self._given()
        return {name: n * self.context_tokens / self.sources[name].total_tokens for name, n in rows.items()}

    def summary(self) -> list[str]:
        """Return the lines that say what each source gives: tokens, epochs, how upsampled, and what its limit did."""
        lines = []
        for name, epochs in self.epochs().items():
            shares = [share for share in self.shares if share.source == name]
            line = f"{name}: {sum(share.tokens for share in shares):,} tokens, {epochs:.2f} epochs"
            more = [f"x{share.upsampled:.1f} in {share.phase}" for share in shares if share.upsampled > 1.05]
            line += f", upsampled {', '.join(more)}" if more else ""
            for share in shares:
                moved = (share.rows - share.asked_rows) * self.context_tokens
                if moved < 0:
                    line += f"; its limit of {self.limit.of(name):g} epochs takes {-moved:,} tokens from it"
                elif moved > 0:
                    line += f"; {moved:,} tokens more in the place of limited sources"
                line += f" in {share.phase}" if moved else ""
            lines.append(line)
        return lines

    def rows(self, step: int) -> list[tuple[str, int]]:
        """Return (lane, row number in its stream) of each row of a step."""
        lanes = list(self.lanes)
        for first, end, _, rows in self.phases:
            if first <= step < end:
                # The shuffled rows of the phase are taken B at a time; step s takes rows s*B to (s+1)*B.
                at = (step - first) * self.sequences
                return [(lanes[number], int(row)) for number, row in rows[at : at + self.sequences]]
        raise IndexError(f"step {step} is not in {self.first_step}..{self.last_step - 1}")

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        """Return the rows of one optimizer step, or a part of them; targets are the next tokens."""
        t = self.context_tokens
        # One token more than a row: rows overlap by it, so the last input has a target and every token is a target
        # once.
        rows = [self._read(self.sources[name], row * t, t + 1) for name, row in self.rows(step)[part]]
        return text_batch(np.stack(rows), self.separator, self.begin)

    def documents(self, step: int) -> list[Piece]:
        """Return the documents a step learned from, in row order, with the tokens that were inputs.

        A document whose first token is only the last target of a row has a piece of 0 tokens: the step learned to
        predict it, so a take-down must know.
        """
        t = self.context_tokens
        pieces = []
        for name, row in self.rows(step):
            source = self.sources[name]
            spans = self._spans(source, row * t, t + 1)
            for number, (document, _, tokens) in enumerate(spans, 1):
                # The last token of the span is a target only; it is an input in the next row of the lane.
                pieces.append(Piece(source.ids[document], name, tokens - (number == len(spans))))
        return pieces

    def _lanes(self) -> dict[str, str]:
        """Return each lane's name and source."""
        return {name: name for name in self.names}

    def _given(self) -> dict[str, int]:
        """Return the rows each source has given so far."""
        rows = dict.fromkeys(self.names, 0)
        for lane, name in self.lanes.items():
            rows[name] += self.consumed[lane]
        return rows

    def _counts(self, phase: PhaseRows) -> dict[str, int]:
        """Return the rows each source gives to a phase, within the limits, and note its shares."""
        weights, total = self._weights(phase), phase.steps * self.sequences
        asked = apportion(weights, total)
        given, left = self._given(), {}
        for name, source in self.sources.items():
            most = self.limit.of(name)
            if most is not None:
                # A fraction of the decimal as written: with a float, 0.1 epochs of 10 rows could be no row at all.
                most_rows = int(Fraction(str(most)) * source.total_tokens / self.context_tokens)
                left[name] = max(most_rows - given[name], 0)
        over = [name for name in asked if asked[name] > left.get(name, total)]
        if over and self.limit.over == "error":
            raise _over_limit(
                self, phase, over, asked, left, "a mixture asks for more of a source than its limit of epochs"
            )
        counts, full = asked, dict[str, int]()
        # Rows taken from a limited source go to the others by weight, which may push another over its own limit. Each
        # round removes at least one source, so this ends.
        while over:
            full |= {name: left[name] for name in over}
            rest = {name: weight for name, weight in weights.items() if name not in full}
            if not any(rest.values()):
                raise _over_limit(
                    self, phase, list(full), asked, left, "no source is left to give what limits take away"
                )
            counts = full | apportion(rest, total - sum(full.values()))
            over = [name for name in rest if counts[name] > left.get(name, total)]
        whole = sum(source.total_tokens for source in self.sources.values())
        for name, source in self.sources.items():
            tokens = counts[name] * self.context_tokens
            # What its share would be if each token were read equally often.
            natural = source.total_tokens / whole
            self.shares.append(
                Share(
                    phase.name,
                    name,
                    asked[name],
                    counts[name],
                    tokens,
                    tokens / source.total_tokens,
                    counts[name] / total / natural,
                )
            )
        return {name: counts[name] for name in self.names}

    def _arrange(self, counts: list[int], rng: np.random.Generator) -> np.ndarray:
        """Return a phase's rows [N, 2] of (lane number, row number): the next `counts` of each source, shuffled."""
        # A lane continues where the phase before left it: a source is read to its end before it is read again.
        firsts = [self.consumed[name] for name in self.names]
        rows = np.concatenate(
            [
                np.stack([np.full(n, number), np.arange(first, first + n)], axis=1)
                for number, (first, n) in enumerate(zip(firsts, counts, strict=True))
            ]
        )
        # Shuffled over the whole phase: no step is all of one source, and the mixture holds at any point in the mean.
        return rows[rng.permutation(len(rows))]

    def _count(self, rows: np.ndarray) -> dict[str, int]:
        return dict(zip(self.lanes, np.bincount(rows[:, 0], minlength=len(self.lanes)).tolist(), strict=True))

    def _weights(self, phase: PhaseRows) -> dict[str, float]:
        unknown = sorted(set(phase.mixture) - set(self.names))
        if unknown:
            raise DataError(
                "the mixture names a source that has no tokens",
                where=f"phases.{phase.name}.mixture.{unknown[0]}",
                expected=", ".join(self.names),
            )
        # A source that a mixture does not name gives nothing; without a mixture each token weighs the same.
        if phase.mixture:
            return {name: float(phase.mixture.get(name, 0.0)) for name in self.names}
        return {name: float(self.sources[name].total_tokens) for name in self.names}

    def _spans(self, source: Source, start: int, length: int) -> list[Span]:
        """Return the stretches of documents along a stretch of a source's stream."""
        spans = []
        # A row crosses documents, and at the end of an epoch it crosses into the next one.
        while length > 0:
            # The stream is endless; epoch e of a source is a permutation of its own, so its rows differ from epoch 0.
            epoch, offset = divmod(start, source.total_tokens)
            order, ends = self._epoch(source.name, epoch)
            # "right": an offset equal to an end is the first token of the next document.
            at = int(np.searchsorted(ends, offset, side="right"))
            document = int(order[at])
            inside = offset - (int(ends[at - 1]) if at else 0)
            taken = min(int(source.lengths[document]) - inside, length)
            spans.append((document, inside, taken))
            start += taken
            length -= taken
        return spans

    def _read(self, source: Source, start: int, length: int) -> np.ndarray:
        parts = []
        for document, inside, taken in self._spans(source, start, length):
            # Documents stay in shard order on disk; only their numbers are permuted, so a read is one slice of the map.
            begin = int(source.starts[document]) + inside
            parts.append(source.tokens[begin : begin + taken])
        return np.concatenate(parts)

    @lru_cache(maxsize=64)  # noqa: B019 - one order lives as long as its run
    def _epoch(self, name: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        source = self.sources[name]
        # The name is part of the seed: two sources of equal length are not permuted in the same way.
        order = generator(self.seed, "documents", name, epoch).permutation(len(source.lengths))
        return order, np.cumsum(source.lengths[order])


def _over_limit(
    order: TextOrder,
    phase: PhaseRows,
    over: Sequence[str],
    asked: Mapping[str, int],
    left: Mapping[str, int],
    what: str,
) -> DataError:
    """Return the error that names the sources of which a phase asks for more than their limit leaves."""
    t = order.context_tokens
    described = [
        f"{name}: {asked[name] * t:,} tokens asked for, {left[name] * t:,} left of {order.limit.of(name):g} epochs "
        f"of {order.sources[name].total_tokens:,}"
        for name in over
    ]
    return DataError(
        what,
        where=f"phases.{phase.name}",
        found="\n            ".join(described),
        todo="lower its weight, make the phase shorter, raise batch.epochs"
        + (", or set batch.epochs.over=redistribute" if order.limit.over == "error" else ""),
    )


def consumed_by(facts: Mapping[str, Any]) -> dict[str, int]:
    """Return the rows each source had given when a checkpoint was made, from its `trainer.json`.

    At the end of a phase they are written there; inside one they follow from seed and phase, as the order itself does.
    Raises DataError when the facts are not those of pre-training.
    """
    step, ends = int(facts["step"]), {int(end): rows for end, rows in facts.get("consumed", {}).items()}
    if step in ends:
        return dict(ends[step])
    # Inside a phase the rows are not stored. They follow from the same shuffle that `_arrange` made.
    steps, end = facts["phases"][facts["phase"]]["steps"], min((e for e in ends if e > step), default=0)
    if facts["phase"] in facts.get("lengthened", {}):
        # Arranged in segments; each one's end is among the ends.
        steps = end - max((e for e in ends if e <= step), default=0)
    first, split = end - steps, facts.get("order", {}).get("workers", 1) > 1  # then rows are counted by worker
    if end and not split and (first == 0 or first in ends):
        counts = {name: n - ends.get(first, {}).get(name, 0) for name, n in ends[end].items()}
        numbers = np.repeat(np.arange(len(counts)), list(counts.values()))
        shuffled = numbers[generator(facts["seed"], "rows", facts["phase"], first).permutation(len(numbers))]
        given = np.bincount(shuffled[: (step - first) * (len(numbers) // steps)], minlength=len(counts))
        return {name: ends.get(first, {}).get(name, 0) + int(n) for name, n in zip(counts, given, strict=True)}
    raise DataError(
        "the checkpoint does not say how far its data was read", found=f"step {step}", expected=sorted(ends) or None
    )


class ConversationOrder:
    """The order of supervised fine-tuning: whole conversations, packed into rows, permuted again each epoch."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        context_tokens: int,
        sequences: int,
        steps: int,
        seed: int,
        pad: int,
        first_step: int = 0,
    ) -> None:
        # A conversation is never cut: half an answer would teach to stop in mid-sentence. What is too long is counted.
        self.examples = [e for e in examples if len(e.ids) - 1 <= context_tokens]
        self.too_long = len(examples) - len(self.examples)
        if not self.examples:
            raise DataError(
                "no conversation fits a row",
                found=f"{len(examples)} conversations",
                expected=f"<= {context_tokens} tokens",
            )
        self.context_tokens, self.sequences, self.pad, self.first_step = context_tokens, sequences, pad, first_step
        self.rows: list[list[int]] = []
        self.epochs = 0
        # Packed epoch by epoch: a conversation is not read again before every other one was read.
        while len(self.rows) < steps * sequences:
            order = generator(seed, "conversations", self.epochs).permutation(len(self.examples))
            # The last token of a conversation is a target only, so it takes one place less than it has tokens.
            packed = pack([len(self.examples[i].ids) - 1 for i in order], context_tokens)
            self.rows += [[int(order[i]) for i in row] for row in packed]
            self.epochs += 1

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        """Return the rows of one optimizer step, or a part of them."""
        rows = [[self.examples[i] for i in row] for row in self._rows(step)[part]]
        return conversation_batch(rows, self.context_tokens, self.pad)

    def documents(self, step: int) -> list[Piece]:
        """Return the conversations of one optimizer step, in row order."""
        examples = [self.examples[i] for row in self._rows(step) for i in row]
        return [Piece(e.id, e.source, len(e.ids) - 1) for e in examples]

    def _rows(self, step: int) -> list[list[int]]:
        at = (step - self.first_step) * self.sequences
        return self.rows[at : at + self.sequences]


def apportion(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Split `total` rows in proportion to the weights, exactly: largest remainders get the rest.

    The weights are taken as they are written (0.1 is a tenth) and shares are fractions, so nothing is rounded but the
    last row of a source. Raises DataError when no weight is positive or one is negative.
    """
    # str first: Fraction(0.1) is the binary number nearest to a tenth, Fraction("0.1") is a tenth.
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    whole = sum(exact.values())
    if whole <= 0 or any(weight < 0 for weight in exact.values()):
        raise DataError("a mixture needs weights >= 0 of which one is > 0", found=dict(weights))
    shares = {name: weight / whole * total for name, weight in exact.items()}
    counts = {name: int(share) for name, share in shares.items()}
    # Largest remainder first; equal remainders by name, so that the order of a recipe does not decide.
    rest = sorted(shares, key=lambda name: (counts[name] - shares[name], name))
    # At most one more row each: fewer rows are missing than there are sources.
    for name in rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
