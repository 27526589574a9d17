"""Policy gradients over sampled tokens: one loss, whose kinds differ in what a token's ratio may do.

ratio = p under the weights that train / p under those that drew. Where the engine is exact and each rollout is used
once, every ratio is 1, and all kinds have the same gradient, bit for bit.

Shapes: B rows, T tokens a row, S sequences of a micro-batch, n sampled tokens, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from freehold.core.marks import IGNORE
from freehold.losses.protocol import LossSums, Scale
from freehold.losses.targets import token_logprobs

Kind = Literal["pg", "clip", "cispo", "dppo", "gspo"]
Normalise = Literal["tokens", "sequences", "constant"]
Guard = Literal["none", "icepop", "tis"]

ICEPOP = (0.5, 5.0)
"""Ratios outside are dropped (arXiv 2510.18855)."""
TIS = 2.0
"""Ratios are cut here (truncated importance sampling)."""


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a phase of kind rl.

    kind: pg (REINFORCE), clip (PPO's with two bounds: DAPO, arXiv 2503.14476), cispo (MiniMax-M1, 2506.13585: the
    ratio is cut, no token loses its gradient), dppo (2602.04879: a token whose probability moved too far, and would
    move further, is dropped), gspo (2507.18071: one ratio a sequence). normalise: sum over tokens / tokens of the step
    (DAPO); mean of each sequence's mean (GRPO); sum / (sequences * constant_tokens) (Dr. GRPO). guard: repairs a gap
    between engine and trainer, and counts the tokens it touches. kl: weight of k3 to the reference, with the ratio as
    a weight, which makes it unbiased off policy (DeepSeek-V3.2, 2512.02556).

    Reads the columns `targets`, `behaviour` (log p under the policy that drew), `advantage`, `reference` (log p under
    the reference) and `sequence` (number in its row), all [B, T].
    """

    kind: Kind = "clip"
    normalise: Normalise = "tokens"
    low: float = 0.2
    high: float = 0.28
    cap: float = 5.0
    distance: float = 0.2
    guard: Guard = "none"
    kl: float = 0.0
    constant_tokens: int = 1
    temperature: float = 1.0
    chunk_tokens: int = 512

    reports: ClassVar[Mapping[str, str]] = {
        "policy/loss": "loss_units",
        "policy/ratio": "sampled_tokens",
        "policy/k3": "sampled_tokens",
        "policy/differs": "sampled_tokens",
        "policy/gap": "sampled_tokens",
        "policy/held": "sampled_tokens",
        "policy/guarded": "sampled_tokens",
        "policy/entropy": "sampled_tokens",
        "policy/reference_kl": "sampled_tokens",
        "policy/sequence_ratio": "sequences",
    }

    def counts(self, batch: Any) -> dict[str, int]:
        """Return sampled tokens, sequences with one, and what divides the loss."""
        kept = batch.targets != IGNORE
        rows = np.broadcast_to(np.arange(len(kept))[:, None], kept.shape)[kept]
        sequences = len(np.unique(np.stack([rows, batch.sequence[kept]], 1), axis=0))
        tokens = int(kept.sum())
        units = {"tokens": tokens, "sequences": sequences, "constant": sequences * self.constant_tokens}
        return {"sampled_tokens": tokens, "sequences": sequences, "loss_units": units[self.normalise]}

    def __call__(
        self, hidden: Tensor, head: Tensor, columns: Mapping[str, Tensor], scales: Mapping[str, Scale]
    ) -> LossSums:
        """Return the sums for hidden states [B, T, d] and head weight [V, d]."""
        kept = columns["targets"] != IGNORE  # [B, T]
        if not bool(kept.any()):
            # A rank without sampled tokens still takes part in the backward pass.
            zero = hidden.sum() * 0
            return LossSums(zero, dict.fromkeys(self.reports, zero.detach().double()))
        logprobs = token_logprobs(hidden[kept], head, columns["targets"][kept], self.chunk_tokens, self.temperature)
        return self.of(logprobs, kept, columns, scales)

    def of(
        self, logprobs: Tensor, kept: Tensor, columns: Mapping[str, Tensor], scales: Mapping[str, Scale]
    ) -> LossSums:
        """Return the sums for log-probabilities [n] of the targets at `kept` [B, T]: all that a replay needs."""
        place, lengths = _places(kept, columns["sequence"])
        behaviour = columns["behaviour"][kept].to(logprobs.dtype)
        advantage = columns["advantage"][kept].to(logprobs.dtype)
        reference = columns["reference"][kept].to(logprobs.dtype)
        log_ratio = logprobs - behaviour  # [n]
        mean_log_ratio = _summed(log_ratio, place, lengths) / lengths  # [S]
        if self.kind == "gspo":
            # Each token stands for its sequence: the gradient reaches it through the mean.
            log_ratio = mean_log_ratio[place]
        terms, held = self._terms(logprobs, log_ratio, behaviour, advantage)
        terms, guarded = self._guarded(terms, log_ratio.detach())
        fixed = log_ratio.detach()
        gap = (logprobs - behaviour).detach()
        away = reference - logprobs
        k3 = away.exp() - away - 1
        if self.kl:
            terms = terms + self.kl * fixed.exp() * k3
        if self.normalise == "sequences":
            terms = terms / lengths[place]
        loss = terms.sum()
        sums = {
            "policy/loss": loss.detach(),
            "policy/ratio": gap.exp().sum(),
            # Schulman's estimator of KL(drew || trains), for the tokens that were drawn.
            "policy/k3": (gap.exp() - gap - 1).sum(),
            "policy/differs": (gap != 0).sum(),
            "policy/gap": gap.abs().sum(),
            "policy/held": held.sum(),
            "policy/guarded": guarded.sum(),
            "policy/entropy": -logprobs.detach().sum(),
            "policy/reference_kl": k3.detach().sum(),
            "policy/sequence_ratio": mean_log_ratio.detach().exp().sum(),
        }
        return LossSums(loss * scales["loss_units"], {name: value.double() for name, value in sums.items()})

    def _terms(
        self, logprobs: Tensor, log_ratio: Tensor, behaviour: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what each token adds to the loss [n], and which tokens the kind holds back [n]."""
        ratio = log_ratio.exp()
        if self.kind == "pg":
            return -advantage * logprobs, torch.zeros_like(ratio, dtype=torch.bool)
        if self.kind == "cispo":
            cut = ratio.detach().clamp_max(self.cap)
            return -cut * advantage * logprobs, cut < ratio.detach()
        if self.kind == "dppo":
            # p, not log p: a rare token may change its ratio a lot and still hardly matter.
            moved = logprobs.detach().exp() - behaviour.exp()
            dropped = (moved.abs() > self.distance) & (moved * advantage > 0)
            return -ratio * advantage * ~dropped, dropped
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        terms = torch.minimum(ratio * advantage, clipped * advantage)
        return -terms, (clipped * advantage < ratio * advantage).detach()

    def _guarded(self, terms: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms after the guard, and which tokens it changed."""
        ratio = log_ratio.exp()
        if self.guard == "icepop":
            low, high = ICEPOP
            dropped = (ratio < low) | (ratio > high)
            return terms * ~dropped, dropped
        if self.guard == "tis":
            # The other kinds carry the ratio already: only what is above the bound is taken back.
            dropped = ratio > TIS
            return terms * torch.where(dropped, TIS / ratio, torch.ones_like(ratio)), dropped
        return terms, torch.zeros_like(ratio, dtype=torch.bool)


def _places(kept: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of each kept token's sequence in the micro-batch [n], and the tokens of each sequence [S]."""
    rows = torch.arange(len(kept), device=kept.device)[:, None].expand_as(kept)[kept]
    number = sequence[kept].long()
    _, place, lengths = torch.unique(rows * (int(number.max()) + 1) + number, return_inverse=True, return_counts=True)
    return place, lengths


def _summed(values: Tensor, place: Tensor, lengths: Tensor) -> Tensor:
    return values.new_zeros(len(lengths)).index_add(0, place, values)
