"""Rows of better and worse answers: the two answers of a pair are neighbours, packed whole.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from freehold.core.errors import DataError
from freehold.data.loader import WHOLE, Piece, generator
from freehold.data.packing import Batch, Example, conversation_batch, pack


@dataclass(frozen=True)
class PairBatch(Batch):
    """A batch of answers: further arrays of shape [B, T]."""

    sequence: np.ndarray
    """Number of the answer in its row."""
    sign: np.ndarray
    """1 for a better answer, -1 for a worse one, 0 for padding."""
    reference: np.ndarray
    """log p of the target under the reference."""
    margins: np.ndarray


@dataclass(frozen=True)
class Answers:
    """What is compared: a better and a worse answer to one prompt, or one answer alone."""

    id: str
    source: str
    examples: tuple[Example, ...]
    signs: tuple[int, ...]
    margin: float = 0.0

    @property
    def tokens(self) -> int:
        """Return how many positions of a row it takes."""
        return sum(len(example.ids) - 1 for example in self.examples)


class PairOrder:
    """The order of a preference phase: pairs packed whole into rows, in another permutation each epoch."""

    def __init__(
        self, answers: Sequence[Answers], *, context_tokens: int, sequences: int, steps: int, seed: int, pad: int,
        first_step: int = 0,
    ) -> None:  # fmt: skip
        # Both answers of a pair must be in one row: a cut pair would compare halves.
        self.answers = [one for one in answers if one.tokens <= context_tokens]
        self.too_long = len(answers) - len(self.answers)
        if not self.answers:
            raise DataError(
                "no pair of answers fits a row", found=f"{len(answers)} pairs", expected=f"<= {context_tokens} tokens"
            )
        self.context_tokens, self.sequences, self.pad, self.first_step = context_tokens, sequences, pad, first_step
        self.reference: Mapping[str, Sequence[np.ndarray]] = {}
        """log p of each answer's targets under the reference, by id; empty: 0."""
        self.rows: list[list[int]] = []
        self.epochs = 0
        while len(self.rows) < steps * sequences:
            order = generator(seed, "pairs", self.epochs).permutation(len(self.answers))
            # A pair is packed as one item, so its answers are neighbours and a micro-batch holds whole pairs.
            packed = pack([self.answers[i].tokens for i in order], context_tokens)
            self.rows += [[int(order[i]) for i in row] for row in packed]
            self.epochs += 1

    def batch(self, step: int, part: slice = WHOLE) -> PairBatch:
        """Return the rows of one optimizer step, or a part of them."""
        return self.arrange([[self.answers[i] for i in row] for row in self._rows(step)[part]])

    def arrange(self, rows: Sequence[Sequence[Answers]]) -> PairBatch:
        """Return rows of answers as a batch."""
        examples = [[example for one in row for example in one.examples] for row in rows]
        plain = conversation_batch(examples, self.context_tokens, self.pad)
        # Per token, as everything that a loss reads: its shape is then that of the batch.
        sign = np.zeros(plain.input_ids.shape, np.int8)
        reference = np.zeros(plain.input_ids.shape, np.float32)
        margins = np.zeros(plain.input_ids.shape, np.float32)
        for r, row in enumerate(rows):
            at = 0
            for one in row:
                # Empty until the reference was run, and for losses that need none.
                known = self.reference.get(one.id)
                for number, (example, which) in enumerate(zip(one.examples, one.signs, strict=True)):
                    length = len(example.ids) - 1
                    sign[r, at : at + length], margins[r, at : at + length] = which, one.margin
                    if known is not None:
                        reference[r, at : at + length] = known[number]
                    at += length
        return PairBatch(
            plain.input_ids, plain.targets, plain.document_ids, plain.document_ids.copy(), sign, reference, margins
        )

    def documents(self, step: int) -> list[Piece]:
        """Return the conversations whose answers one optimizer step compares, in row order."""
        return [Piece(a.id, a.source, a.tokens) for row in self._rows(step) for a in (self.answers[i] for i in row)]

    def _rows(self, step: int) -> list[list[int]]:
        at = (step - self.first_step) * self.sequences
        return self.rows[at : at + self.sequences]
