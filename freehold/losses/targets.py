"""The log-probability of each target with a gradient, in chunks: what every loss on answers is computed from.

Shapes: n positions, d hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freehold.losses.cross_entropy import head_backward, head_logits
from freehold.losses.logprob import token_logprobs as logprobs_of


class _TokenLogprobs(torch.autograd.Function):
    """log p of targets, chunk by chunk; logits are computed again for the backward pass and never kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, temperature: float
    ) -> Tensor:
        # Logits of a vocabulary of 200,192 in fp32 are 0.8 MB a token; hidden states are 6 kB.
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk, ctx.temperature = chunk, temperature
        found = [
            # The head and the function that the engine uses: where kernels compute, the bits are those of sampling.
            logprobs_of(_cooled(hidden[at : at + chunk], weight, temperature), targets[at : at + chunk])
            for at in range(0, len(hidden), chunk)
        ]
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets = ctx.saved_tensors
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden)
        # Summed over the chunks in fp32: in bf16 the later chunks would be rounded away.
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        for at in range(0, len(hidden), ctx.chunk):
            part = slice(at, at + ctx.chunk)
            # d log p(target) / d logits is one at the target minus the softmax.
            slope = _cooled(hidden[part], weight, ctx.temperature).to(wide).softmax(1).neg_()  # [m, V]
            slope.scatter_add_(1, targets[part, None], torch.ones_like(slope[:, :1]))
            slope = (slope * (grad[part, None] / ctx.temperature)).to(hidden.dtype)
            grad_hidden[part], of_weight = head_backward(slope, hidden[part], weight)
            grad_weight += of_weight
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _cooled(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = head_logits(hidden, weight)
    # At 1 nothing is multiplied, so that the bits stay those of the engine.
    return logits if temperature == 1 else logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int = 512, temperature: float = 1.0
) -> Tensor:
    """Return log p of each target [n], fp32 or finer, with a gradient, for hidden states [n, d], head weight [V, d].

    temperature: of the softmax; the distribution that a policy draws from.
    """
    found: Tensor = _TokenLogprobs.apply(hidden, weight, targets, chunk_tokens, temperature)
    return found
