"""Distillation: the whole distribution of a teacher at each position, forward or reverse.

Shapes: B rows, T tokens a row, n positions with a target, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from freehold.core.marks import IGNORE
from freehold.losses.cross_entropy import head_logits
from freehold.losses.protocol import LossSums, Scale

Teacher = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(input_ids, document_ids) -> hidden states [B, T, d'] and head weight [V, d'], without gradients."""


@dataclass(frozen=True)
class Distill:
    """KL between teacher and student over the full vocabulary, at each position that has a target.

    reverse: KL(student || teacher), for text that the student wrote (on policy); else KL(teacher || student) (GKD,
    arXiv 2306.13649). temperature: of both distributions; the loss is multiplied with its square, as the gradient
    shrinks with it.
    """

    teacher: Teacher
    reverse: bool = False
    temperature: float = 1.0
    chunk_tokens: int = 512

    reports: ClassVar[Mapping[str, str]] = {
        "loss/mean": "targets",
        "loss/cross_entropy": "targets",
        "distill/agrees": "targets",
    }

    def counts(self, batch: Any) -> dict[str, int]:
        """Return how many positions carry loss."""
        return {"targets": batch.target_tokens}

    def __call__(
        self, hidden: Tensor, head: Tensor, columns: Mapping[str, Tensor], scales: Mapping[str, Scale]
    ) -> LossSums:
        """Return the sums for hidden states [B, T, d] and head weight [V, d]."""
        kept = columns["targets"] != IGNORE
        zero = hidden.sum() * 0
        sums = dict.fromkeys(self.reports, zero.detach().double())
        if not bool(kept.any()):
            return LossSums(zero, sums)
        with torch.no_grad():
            states, teachers_head = self.teacher(columns["input_ids"], columns["document_ids"])
        mine, theirs, targets = hidden[kept], states[kept], columns["targets"][kept]
        total = zero
        for at in range(0, len(targets), self.chunk_tokens):
            part = slice(at, at + self.chunk_tokens)
            # Logits of one chunk at a time: they are made again for the backward pass.
            divergence, nll, agrees = checkpoint(
                self._chunk, mine[part], head, theirs[part], teachers_head, targets[part], use_reentrant=False
            )
            total = total + divergence
            sums["loss/mean"] = sums["loss/mean"] + divergence.detach().double()
            sums["loss/cross_entropy"] = sums["loss/cross_entropy"] + nll.double()
            sums["distill/agrees"] = sums["distill/agrees"] + agrees.double()
        return LossSums(total * scales["targets"], sums)

    def _chunk(
        self, hidden: Tensor, head: Tensor, states: Tensor, teachers_head: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, teachers = _wide(torch.nn.functional.linear(hidden, head)), _wide(head_logits(states, teachers_head))
        student = (logits / self.temperature).log_softmax(1)  # [n, V]
        teacher = (teachers / self.temperature).log_softmax(1)
        p, q = (student, teacher) if self.reverse else (teacher, student)
        # The full vocabulary: reverse KL on the best few alone lets the mass collapse onto them.
        divergence = (p.exp() * (p - q)).sum() * self.temperature**2
        with torch.no_grad():
            nll = -logits.log_softmax(1).gather(1, targets[:, None]).sum()
            agrees = (logits.argmax(1) == teachers.argmax(1)).sum()
        return divergence, nll, agrees


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
