"""The order of the data as a pure function of (seed, mixture, step): nothing to save, nothing to lose.

Each source is an endless stream of its documents, permuted anew each epoch, cut into rows of T tokens. A phase takes
from each source the next rows in exact proportion to its weight, and shuffles them. So the rows of any step, and the
documents in them, can be computed for any step at any time: resume needs the step alone, and `trace` needs no log.

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
    """One source's train shard: all its tokens, and where each document lies in them."""

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
    parent checkpoint was made; a branch goes on from there. Raises DataError for a mixture that names no known source,
    or that asks for more of one than `limit` lets it give.
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
        first_step: int = 0,
        consumed: Mapping[str, int] | None = None,
        limit: EpochLimit | None = None,
    ) -> None:
        self.sources = {n: s for n, s in sources.items() if s.total_tokens}
        if not self.sources:
            raise DataError("there is no text to train on", found="no source with tokens")
        self.context_tokens, self.sequences, self.seed, self.separator = context_tokens, sequences, seed, separator
        self.first_step, self.limit = first_step, limit or EpochLimit()
        self.phases: list[tuple[int, int, str, np.ndarray]] = []
        """(first step, end step, name, rows [steps * B, 2] of (lane number, row number in its stream))"""
        self.names = list(self.sources)
        self.lanes = self._lanes()
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
            counts = self._counts(phase)
            rows = self._arrange(list(counts.values()), generator(seed, "rows", phase.name, step))
            self.phases.append((step, step + phase.steps, phase.name, rows))
            for lane, n in self._count(rows).items():
                self.consumed[lane] += n
            step += phase.steps
        self.last_step = step

    def consumed_at(self, step: int) -> dict[str, int]:
        """Return the rows each lane has given when a phase ends after `step` steps (or at the start)."""
        taken = dict(self.consumed)
        for first, _, _, rows in self.phases:
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
                at = (step - first) * self.sequences
                return [(lanes[number], int(row)) for number, row in rows[at : at + self.sequences]]
        raise IndexError(f"step {step} is not in {self.first_step}..{self.last_step - 1}")

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        """Return the rows of one optimizer step, or a part of them; targets are the next tokens."""
        t = self.context_tokens
        rows = [self._read(self.sources[name], row * t, t + 1) for name, row in self.rows(step)[part]]
        return text_batch(np.stack(rows), self.separator)

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
                most_rows = int(Fraction(str(most)) * source.total_tokens / self.context_tokens)
                left[name] = max(most_rows - given[name], 0)
        over = [name for name in asked if asked[name] > left.get(name, total)]
        if over and self.limit.over == "error":
            raise self._too_much(
                phase, over, asked, left, "a mixture asks for more of a source than its limit of epochs"
            )
        counts, full = asked, dict[str, int]()
        while over:
            full |= {name: left[name] for name in over}
            rest = {name: weight for name, weight in weights.items() if name not in full}
            if not any(rest.values()):
                raise self._too_much(phase, list(full), asked, left, "no source is left to give what limits take away")
            counts = full | apportion(rest, total - sum(full.values()))
            over = [name for name in rest if counts[name] > left.get(name, total)]
        whole = sum(source.total_tokens for source in self.sources.values())
        for name, source in self.sources.items():
            tokens = counts[name] * self.context_tokens
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

    def _too_much(
        self, phase: PhaseRows, over: Sequence[str], asked: Mapping[str, int], left: Mapping[str, int], what: str
    ) -> DataError:
        t = self.context_tokens
        described = [
            f"{name}: {asked[name] * t:,} tokens asked for, {left[name] * t:,} left of {self.limit.of(name):g} epochs "
            f"of {self.sources[name].total_tokens:,}"
            for name in over
        ]
        return DataError(
            what,
            where=f"phases.{phase.name}",
            found="\n            ".join(described),
            todo="lower its weight, make the phase shorter, raise batch.epochs"
            + (", or set batch.epochs.over=redistribute" if self.limit.over == "error" else ""),
        )

    def _arrange(self, counts: list[int], rng: np.random.Generator) -> np.ndarray:
        """Return a phase's rows [N, 2] of (lane number, row number): the next `counts` of each source, shuffled."""
        firsts = [self.consumed[name] for name in self.names]
        rows = np.concatenate(
            [
                np.stack([np.full(n, number), np.arange(first, first + n)], axis=1)
                for number, (first, n) in enumerate(zip(firsts, counts, strict=True))
            ]
        )
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
        if phase.mixture:
            return {name: float(phase.mixture.get(name, 0.0)) for name in self.names}
        return {name: float(self.sources[name].total_tokens) for name in self.names}

    def _spans(self, source: Source, start: int, length: int) -> list[Span]:
        """Return the stretches of documents along a stretch of a source's stream."""
        spans = []
        while length > 0:
            epoch, offset = divmod(start, source.total_tokens)
            order, ends = self._epoch(source.name, epoch)
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
            begin = int(source.starts[document]) + inside
            parts.append(source.tokens[begin : begin + taken])
        return np.concatenate(parts)

    @lru_cache(maxsize=64)  # noqa: B019 - one order lives as long as its run
    def _epoch(self, name: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        source = self.sources[name]
        order = generator(self.seed, "documents", name, epoch).permutation(len(source.lengths))
        return order, np.cumsum(source.lengths[order])


def consumed_by(facts: Mapping[str, Any]) -> dict[str, int]:
    """Return the rows each source had given when a checkpoint was made, from its `trainer.json`.

    At the end of a phase they are written there; inside one they follow from seed and phase, as the order itself does.
    Raises DataError when the facts are not those of pre-training.
    """
    step, ends = int(facts["step"]), {int(end): rows for end, rows in facts.get("consumed", {}).items()}
    if step in ends:
        return dict(ends[step])
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
    """The order of supervised fine-tuning: whole conversations, packed into rows, permuted anew each epoch."""

    def __init__(
        self, examples: Sequence[Example], *, context_tokens: int, sequences: int, steps: int, seed: int, pad: int
    ) -> None:
        self.examples = [e for e in examples if len(e.ids) - 1 <= context_tokens]
        self.too_long = len(examples) - len(self.examples)
        if not self.examples:
            raise DataError(
                "no conversation fits a row",
                found=f"{len(examples)} conversations",
                expected=f"<= {context_tokens} tokens",
            )
        self.context_tokens, self.sequences, self.pad = context_tokens, sequences, pad
        self.rows: list[list[int]] = []
        self.epochs = 0
        while len(self.rows) < steps * sequences:
            order = generator(seed, "conversations", self.epochs).permutation(len(self.examples))
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
        return self.rows[step * self.sequences : (step + 1) * self.sequences]


def apportion(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Split `total` rows in proportion to the weights, exactly: largest remainders get the rest.

    The weights are taken as they are written (0.1 is a tenth) and shares are fractions, so nothing is rounded but the
    last row of a source. Raises DataError when no weight is positive or one is negative.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    whole = sum(exact.values())
    if whole <= 0 or any(weight < 0 for weight in exact.values()):
        raise DataError("a mixture needs weights >= 0 of which one is > 0", found=dict(weights))
    shares = {name: weight / whole * total for name, weight in exact.items()}
    counts = {name: int(share) for name, share in shares.items()}
    rest = sorted(shares, key=lambda name: (counts[name] - shares[name], name))
    for name in rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
