"""Cross-entropy and z-loss on the output logits, computed in chunks so that all logits never exist at once.

Shapes: N positions, d hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from freehold.data.packing import IGNORE
from freehold.model import ops


class Losses(NamedTuple):
    """Sums over the positions that carry loss; `total` carries the gradient."""

    total: Tensor
    """scale * (sum of cross-entropy + z_loss * sum of squared log-partition)"""
    cross_entropy: Tensor
    """sum of -log p(target), in nats"""
    z: Tensor
    """sum of log(sum(exp(logits)))^2"""


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, and only scaled in the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, scale: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        cross_entropy = torch.zeros((), dtype=torch.float64, device=hidden.device)
        z = torch.zeros_like(cross_entropy)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        for start in range(0, len(hidden), chunk):
            h = hidden[start : start + chunk]
            logits = ops.linear(h, weight)
            nll, log_partition = ops.cross_entropy_(logits, targets[start : start + chunk], scale, z_loss)
            cross_entropy += nll.sum(dtype=torch.float64)
            z += log_partition.square().sum(dtype=torch.float64)
            grad_hidden[start : start + chunk], part = ops.linear_backward(logits, h, weight)
            grad_weight = part if grad_weight is None else grad_weight.to(wide).add_(part)
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(cross_entropy, z)
        return ((cross_entropy + z_loss * z) * scale).to(wide), cross_entropy, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad != 1:
            grad_hidden, grad_weight = grad_hidden * grad, grad_weight * grad
        return grad_hidden, grad_weight, None, None, None, None


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float, z_loss: float = 0.0, chunk_tokens: int = 2048
) -> Losses:
    """Return the summed losses of hidden states [N, d] (any leading shape) against targets [N], head weight [V, d].

    Positions whose target is IGNORE are left out before anything is computed. `scale` is 1 / (targets of the whole
    global step), so that micro-batches and ranks simply add up. z-loss: trinity report, section 6.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    kept = targets != IGNORE
    if not bool(kept.all()):
        index = kept.nonzero().squeeze(1)
        hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
    return Losses(*_ChunkedLoss.apply(hidden, weight, targets, z_loss, scale, chunk_tokens))


class _Attached(torch.autograd.Function):
    """The stream as it is; its gradient goes on, and the loss gets a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, loss: Tensor) -> Tensor:  # type: ignore[override]
        ctx.loss = loss.dtype, loss.device
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        dtype, device = ctx.loss
        return dh, torch.ones((), dtype=dtype, device=device)


def attach_loss(h: Tensor, loss: Tensor) -> Tensor:
    """Return h; when its gradient is taken, so is that of `loss` (a scalar), as if it were added to the training loss.

    For losses on what happens inside a stage, which the last stage cannot see.
    """
    return _Attached.apply(h, loss)


@torch.no_grad()
def summed_nll(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int = 2048) -> Tensor:
    """Return -log p of each target [N] in nats, float64, 0 where the target is IGNORE; no gradients."""
    hidden, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    parts = []
    for start in range(0, len(hidden), chunk_tokens):
        logits = torch.mm(hidden[start : start + chunk_tokens], weight.t()).float()
        target = flat[start : start + chunk_tokens, None].clamp_min(0)
        nll = torch.logsumexp(logits, 1) - logits.gather(1, target).squeeze(1)
        parts.append(nll.double() * (flat[start : start + chunk_tokens] != IGNORE))
    return torch.cat(parts).view(targets.shape)
