"""Losses on answers that are better or worse: DPO, IPO, a length-normalised form, and KTO for unpaired answers.

Each is a function of the log-probabilities of sequences; a sequence is one document of a row. The two answers
of a pair are neighbours in one row, so a micro-batch holds whole pairs and sums over micro-batches just add up.

Shapes: B rows, T tokens a row, S sequences of a micro-batch, n positions with a target, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from freehold.core.marks import IGNORE
from freehold.losses.protocol import LossSums, Scale
from freehold.losses.targets import token_logprobs

Kind = Literal["dpo", "ipo", "simpo", "kto"]


@dataclass(frozen=True)
class Preference:
    """The loss of a phase of kind preference, with cross-entropy on the better answers next to it.

    kind: dpo (arXiv 2305.18290), ipo (2310.12036), simpo (2405.14734: mean log-probabilities, no reference), kto
    (2402.01306 with its baseline at 0, where it starts: then answers do not depend on each other). beta: how far the
    policy may move from the reference. margin: SimPO's gamma; a pair's own margin is added. cross_entropy: weight of
    -log p of the better answers a token; without it their likelihood may fall while the loss does.

    Reads the columns `targets`, `sequence` [B, T] (number in its row; pairs are 2k, 2k + 1), `reference` [B, T] (log p
    of the target under the reference), `sign` [B, T] (1 better, -1 worse) and `margins` [B, T].
    """

    kind: Kind = "dpo"
    beta: float = 0.1
    margin: float = 0.0
    cross_entropy: float = 1.0
    chunk_tokens: int = 512

    reports: ClassVar[Mapping[str, str]] = {
        "loss/mean": "answers",
        "loss/cross_entropy": "better_tokens",
        "preference/accuracy": "answers",
        "preference/better": "better",
        "preference/worse": "worse",
        "preference/better_gain": "better",
        "preference/worse_gain": "worse",
    }

    def counts(self, batch: Any) -> dict[str, int]:
        """Return pairs (of unpaired answers: answers), better and worse answers, and tokens of better ones."""
        kept = batch.targets != IGNORE
        rows = np.broadcast_to(np.arange(len(kept))[:, None], kept.shape)[kept]
        # Counted from the batch alone, before the first forward pass: what divides a step is known on every rank.
        found = np.unique(np.stack([rows, batch.sequence[kept], batch.sign[kept]], 1), axis=0)
        better, worse = int((found[:, 2] > 0).sum()), int((found[:, 2] < 0).sum())
        return {
            "answers": better + worse if self.kind == "kto" else min(better, worse),
            "better": better,
            "worse": worse,
            "better_tokens": int((batch.sign[kept] > 0).sum()),
        }

    def __call__(
        self, hidden: Tensor, head: Tensor, columns: Mapping[str, Tensor], scales: Mapping[str, Scale]
    ) -> LossSums:
        """Return the sums for hidden states [B, T, d] and head weight [V, d]."""
        # The prompt carries no loss: only the answer's tokens are compared.
        kept = columns["targets"] != IGNORE  # [B, T]
        logprobs = token_logprobs(hidden[kept], head, columns["targets"][kept], self.chunk_tokens)  # [n]
        if not len(logprobs):
            # A rank without answers still takes part in the backward pass, or the others would wait for it.
            zero = hidden.sum() * 0
            return LossSums(zero, dict.fromkeys(self.reports, zero.detach().double()))
        sums = _Sequences(logprobs, kept, columns, self.kind == "simpo")
        losses, won = self._losses(sums)
        better = columns["sign"][kept] > 0
        # Only of the better answers: DPO alone lets their likelihood fall as long as that of the worse falls faster.
        cross_entropy = -(logprobs * better).sum()
        total = losses.sum() * scales["answers"]
        if self.cross_entropy:
            total = total + self.cross_entropy * cross_entropy * scales["better_tokens"]
        return LossSums(
            total,
            {
                "loss/mean": losses.detach().sum().double(),
                "loss/cross_entropy": cross_entropy.detach().double(),
                "preference/accuracy": won.sum().double(),
                "preference/better": sums.policy.detach()[sums.sign > 0].sum().double(),
                "preference/worse": sums.policy.detach()[sums.sign < 0].sum().double(),
                # Against the reference, which is the policy at the start: both may fall while the loss does.
                "preference/better_gain": sums.gain[sums.sign > 0].sum().double(),
                "preference/worse_gain": sums.gain[sums.sign < 0].sum().double(),
            },
        )

    def _losses(self, sums: _Sequences) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair (kto: of each answer), and whether it is on the right side."""
        # The implicit reward of DPO over beta: how much more probable than under the reference.
        ratio = sums.policy - sums.reference  # [S]
        if self.kind == "kto":
            better = self.beta * ratio * sums.sign
            return 1 - torch.sigmoid(better), better.detach() > 0
        worth = sums.policy if self.kind == "simpo" else ratio
        gap = worth[0::2] - worth[1::2]  # [S / 2]; the better answer comes first
        if self.kind == "ipo":
            # The published loss takes means a token, so that long answers do not have larger gaps.
            mean = ratio / sums.tokens
            gap = mean[0::2] - mean[1::2]
            return (gap - 1 / (2 * self.beta)).square(), gap.detach() > 0
        gamma = self.margin if self.kind == "simpo" else 0.0
        return -logsigmoid(self.beta * gap - gamma - sums.margins[0::2]), gap.detach() > 0


class _Sequences:
    """The log-probabilities of the sequences of a micro-batch, in the order of rows and numbers."""

    def __init__(self, logprobs: Tensor, kept: Tensor, columns: Mapping[str, Tensor], mean: bool) -> None:
        rows = torch.arange(len(kept), device=kept.device)[:, None].expand_as(kept)[kept]
        number = columns["sequence"][kept].long()
        _, place = torch.unique(rows * (int(number.max()) + 1) + number, return_inverse=True)  # [n]
        size = int(place.max()) + 1

        def summed(values: Tensor) -> Tensor:
            return values.new_zeros(size).index_add(0, place, values)

        self.tokens = summed(torch.ones_like(logprobs))
        self.policy = summed(logprobs) / (self.tokens if mean else 1)
        self.reference = summed(columns["reference"][kept].to(logprobs.dtype))
        # 0 where there is no reference.
        known = self.reference != 0
        self.gain = (summed(logprobs.detach()) - self.reference) * known
        # Each token has its answer's sign: the mean is the sign, up to rounding.
        self.sign = (summed(columns["sign"][kept].to(logprobs.dtype)) / self.tokens).round()
        self.margins = summed(columns["margins"][kept].to(logprobs.dtype)) / self.tokens
