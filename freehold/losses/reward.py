"""The loss of a reward model: which of two answers is better, by one number an answer.

The head is one row of the output head, that of a reserved token: a reward model is then a checkpoint like any other.
The score is computed in fp32 whatever the model computes in.

Shapes: B rows, T tokens a row, S answers, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from freehold.core.marks import PADDING
from freehold.losses.protocol import LossSums, Scale


def scores(hidden: Tensor, row: Tensor) -> Tensor:
    """Return the score of each hidden state [S] in fp32 or finer: hidden [S, d], row [d]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # Products and their sum row by row: a matrix product would round by the number of rows.
    return (hidden.to(wide) * row.to(wide)).sum(1)


@dataclass(frozen=True)
class RewardLoss:
    """-log sigmoid(better - worse - margin) + centre * (better + worse)^2, Bradley-Terry with scores held around 0.

    Reads `document_ids`, `sequence`, `margins` and `targets` [B, T] of rows of pairs: 2k is better than 2k + 1. token:
    the reserved token whose row of the head scores.
    """

    token: int
    centre: float = 0.01

    reports: ClassVar[Mapping[str, str]] = {
        "loss/mean": "pairs",
        "reward/accuracy": "pairs",
        "reward/better": "pairs",
        "reward/worse": "pairs",
    }

    def counts(self, batch: Any) -> dict[str, int]:
        """Return the number of pairs."""
        kept = batch.document_ids != PADDING
        rows = np.broadcast_to(np.arange(len(kept))[:, None], kept.shape)[kept]
        return {"pairs": len(np.unique(np.stack([rows, batch.sequence[kept]], 1), axis=0)) // 2}

    def __call__(
        self, hidden: Tensor, head: Tensor, columns: Mapping[str, Tensor], scales: Mapping[str, Scale]
    ) -> LossSums:
        """Return the sums for hidden states [B, T, d] and head weight [V, d]."""
        last = last_places(columns["document_ids"])  # [B, T]
        if not bool(last.any()):
            zero = hidden.sum() * 0
            return LossSums(zero, dict.fromkeys(self.reports, zero.detach().double()))
        found = scores(hidden[last], head[self.token])  # [S], in the order of rows and numbers
        margins = columns["margins"][last].to(found.dtype)[0::2]
        better, worse = found[0::2], found[1::2]
        losses = -logsigmoid(better - worse - margins) + self.centre * (better + worse).square()
        sums = {
            "loss/mean": losses.detach().sum(),
            "reward/accuracy": (better > worse).sum(),
            "reward/better": better.detach().sum(),
            "reward/worse": worse.detach().sum(),
        }
        return LossSums(losses.sum() * scales["pairs"], {name: value.double() for name, value in sums.items()})


def last_places(document_ids: Tensor) -> Tensor:
    """Return where the last real token of each document is, bool [B, T]: by place, never by the id of a token."""
    following = torch.full_like(document_ids, PADDING)
    following[:, :-1] = document_ids[:, 1:]
    return (document_ids != PADDING) & (document_ids != following)
