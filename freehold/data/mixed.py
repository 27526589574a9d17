"""Fine-tuning with replay: in each step some rows are conversations and the others are pre-training text."""

from __future__ import annotations

import dataclasses

import numpy as np

from freehold.data.loader import WHOLE, ConversationOrder, Order, Piece
from freehold.data.packing import Batch


class MixedOrder:
    """The rows of two orders in one step, conversations first: every position with a target counts the same."""

    def __init__(self, talk: ConversationOrder, text: Order) -> None:
        self.talk, self.text = talk, text
        self.sequences = talk.sequences + text.sequences

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        """Return the rows of one optimizer step, or a part of them."""
        # Whole steps of both, cut afterwards: a part of a step is the same rows for any number of ranks.
        both = [self.talk.batch(step), self.text.batch(step)]
        fields = [field.name for field in dataclasses.fields(Batch)]
        return Batch(**{name: np.concatenate([getattr(one, name) for one in both])[part] for name in fields})

    def documents(self, step: int) -> list[Piece]:
        """Return the conversations and documents of one optimizer step, in row order."""
        return [*self.talk.documents(step), *self.text.documents(step)]
