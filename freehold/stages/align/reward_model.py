"""Scores answers with a reward model: one number each, the same alone, in a batch, and padded on either side.

Shapes: B answers, T ids a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from freehold.checkpoint import dcp
from freehold.core.errors import CheckpointError
from freehold.losses.reward import scores
from freehold.model.afmoe import Afmoe
from freehold.stages.align import forgetting
from freehold.tokenizer.bpe import SPECIALS

TOKEN = SPECIALS.index("<|reserved_special_18|>")
"""The token whose row of the head scores: no text has it."""
FACT = "reward_token"
"""The key of `trainer.json` that makes a checkpoint a reward model."""


class RewardModel:
    """A checkpoint of a phase of kind reward."""

    def __init__(self, model: Afmoe, token: int = TOKEN) -> None:
        self.model, self.token = model, token

    @classmethod
    def open(cls, folder: Path, dtype: str) -> RewardModel:
        """Open a checkpoint; CheckpointError when it is no reward model."""
        facts = dcp.check(folder)
        if FACT not in facts:
            raise CheckpointError(
                "the checkpoint is no reward model", where=folder, expected="one of a phase of kind reward"
            )
        return cls(forgetting.open_for_use(folder, dtype), int(facts[FACT]))

    def score(self, answers: Sequence[Sequence[int]]) -> list[float]:
        """Return the score of each answer, ids of prompt and answer; the last id ends it and is not read."""
        longest, device = max(len(ids) for ids in answers) - 1, self.model.lm_head.weight.device
        rows = torch.zeros(len(answers), longest, dtype=torch.long)
        documents = torch.full((len(answers), longest), -1, dtype=torch.int32)
        for row, ids in enumerate(answers):
            # Every answer begins at position 0: angles, and with them bits, are those of the answer alone.
            rows[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            documents[row, : len(ids) - 1] = 0
        with torch.no_grad():
            hidden = self.model.eval().hidden(rows.to(device), document_ids=documents.to(device))
            # By place, never by the id of a token: padding may be the token that ends a turn.
            last = hidden[torch.arange(len(answers)), torch.tensor([len(ids) - 2 for ids in answers])]
            found: list[float] = scores(last, self.model.lm_head.weight[self.token]).tolist()
        return found

    def score_padded(self, ids: Tensor, real: Tensor) -> list[float]:
        """Return the scores of padded rows: ids [B, T], real [B, T] says what is no padding, on whichever side."""
        return self.score([row[mask].tolist() for row, mask in zip(ids, real.bool(), strict=True)])
