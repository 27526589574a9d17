"""Cross-entropy and z-loss on the output logits, in chunks, so that the logits of a whole batch never exist together.

Shapes: N positions, n positions of a chunk, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from freehold.core.marks import IGNORE
from freehold.kernels import cpu
from freehold.losses.logprob import token_logprobs
from freehold.losses.protocol import LossSums, Scale


@dataclass(frozen=True)
class CrossEntropy:
    """-log p of each target plus z-loss: the loss of pre-training and of supervised fine-tuning.

    z_loss: weight of the squared log-partition (trinity report, section 6). chunk_tokens: positions whose logits exist
    at the same time.
    """

    z_loss: float = 0.0
    chunk_tokens: int = 2048

    reports: ClassVar[Mapping[str, str]] = {"loss/mean": "targets", "loss/z": "targets"}

    def counts(self, batch: Any) -> dict[str, int]:
        """Return how many positions carry loss."""
        return {"targets": batch.target_tokens}

    def __call__(
        self, hidden: Tensor, head: Tensor, columns: Mapping[str, Tensor], scales: Mapping[str, Scale]
    ) -> LossSums:
        """Return the sums for hidden states [B, T, d], head weight [V, d] and the column `targets` [B, T]."""
        found = chunked_loss(
            hidden,
            head,
            columns["targets"],
            scale=scales["targets"],
            z_loss=self.z_loss,
            chunk_tokens=self.chunk_tokens,
        )
        return LossSums(found.total, {"loss/mean": found.cross_entropy, "loss/z": found.z})


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
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, scale: Scale, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Sums of gradients in float32 at least: chunks of bfloat16 would lose their small parts.
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        cross_entropy = torch.zeros((), dtype=torch.float64, device=hidden.device)
        z = torch.zeros_like(cross_entropy)
        # Gradients are made now, while the logits exist: to keep logits for later takes V / d times the memory.
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        for start in range(0, len(hidden), chunk):
            h = hidden[start : start + chunk]
            logits = head_logits(h, weight)  # [n, V]
            nll, log_partition = cross_entropy_(logits, targets[start : start + chunk], scale, z_loss)
            cross_entropy += nll.sum(dtype=torch.float64)
            z += log_partition.square().sum(dtype=torch.float64)
            # `logits` holds their gradient now: [n, V] -> [n, d] and [V, d].
            grad_hidden[start : start + chunk], part = head_backward(logits, h, weight)
            grad_weight = part if grad_weight is None else grad_weight.to(wide).add_(part)
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        # Reported sums: a gradient through them would count the loss twice.
        ctx.mark_non_differentiable(cross_entropy, z)
        # Asking for the gradient's value would wait for the device, so there it is multiplied with in any case.
        ctx.may_read = not isinstance(scale, Tensor)
        return ((cross_entropy + z_loss * z) * scale).to(wide), cross_entropy, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if not ctx.may_read or grad != 1:
            grad_hidden, grad_weight = grad_hidden * grad, grad_weight * grad
        return grad_hidden, grad_weight, None, None, None, None


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: Scale, z_loss: float = 0.0, chunk_tokens: int = 2048
) -> Losses:
    """Return the summed losses of hidden states [N, d] (any leading shape) against targets [N], head weight [V, d].

    Positions whose target is IGNORE do not count. With a number for `scale` they are dropped before anything is
    computed; with a tensor, where nothing may wait for the device, they are computed and masked. `scale` is
    1 / (targets of the whole global step), so that micro-batches and ranks add up. z-loss: trinity report, section 6.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if not isinstance(scale, Tensor):
        kept = targets != IGNORE
        if not bool(kept.all()):
            # Fine-tuning learns from assistant tokens only: the head need not see the others.
            index = kept.nonzero().squeeze(1)
            hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
    return Losses(*_ChunkedLoss.apply(hidden, weight, targets, z_loss, scale, chunk_tokens))


@torch.no_grad()
def summed_nll(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int = 2048) -> Tensor:
    """Return -log p of each target [N] in nats, float64, 0 where the target is IGNORE; no gradients."""
    hidden, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    parts = []
    for start in range(0, len(hidden), chunk_tokens):
        logits = head_logits(hidden[start : start + chunk_tokens], weight)  # [n, V]
        target = flat[start : start + chunk_tokens]
        parts.append(-token_logprobs(logits, target.clamp_min(0)).double() * (target != IGNORE))
    return torch.cat(parts).view(targets.shape)


# -- the head and its loss ---------------------------------------------------------------------------------------------


def _takes_kernel(h: Tensor, weight: Tensor) -> bool:
    # Never by the number of rows: a token's bits would depend on its batch.
    return cpu.available(h, *weight.shape)


def head_logits(h: Tensor, weight: Tensor) -> Tensor:
    """Return h weight^T: h [n, d], weight [V, d] -> [n, V]."""
    return cpu.linear(h, weight) if _takes_kernel(h, weight) else torch.nn.functional.linear(h, weight)


def head_backward(dlogits: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of h [n, d] and weight [V, d] for dlogits [n, V]."""
    if _takes_kernel(h, weight):
        return cpu.linear_backward(dlogits, h, weight)
    return torch.mm(dlogits, weight), torch.mm(dlogits.t(), h)


# Few enough rows of logits to stay in a CPU's cache over all passes. A GPU takes all rows it is given: each pass over
# few rows would cost a launch.
LOGIT_ROWS = 128


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float | Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Replace logits [n, V] by the gradient of scale * (nll + z_loss * log_partition^2), for targets [n].

    Returns nll = log_partition - logit of the target, and log_partition = log(sum(exp(logits))), both [n], in fp32 or
    finer. With a tensor for `scale` targets may be IGNORE: gradient, nll and log_partition are 0 there.
    """
    if not isinstance(scale, Tensor) and cpu.available(logits, logits.shape[-1]):
        return cpu.cross_entropy_(logits, targets, scale, z_loss)
    rows = LOGIT_ROWS if logits.device.type == "cpu" else max(len(logits), 1)
    nll, log_partition = [], []
    for start in range(0, len(logits), rows):
        block, target = logits[start : start + rows], targets[start : start + rows, None]  # [m, V], [m, 1]
        x = block.to(torch.promote_types(block.dtype, torch.float32), copy=True)
        factor: float | Tensor = scale
        if isinstance(scale, Tensor):
            counts = target != IGNORE
            target, factor = target.clamp_min(0), counts * scale.to(x.dtype)  # [m, 1]
        chosen, largest = x.gather(1, target), x.amax(1, keepdim=True)
        # The largest logit becomes exp(0): no overflow whatever the logits are.
        x.sub_(largest).exp_()
        total = x.sum(1, keepdim=True)
        partition = total.log() + largest
        # d/dlogits of nll + z log_partition^2 is softmax (1 + 2 z log_partition) minus one at the target.
        x.mul_((1 + 2 * z_loss * partition) * (factor / total))
        x.scatter_add_(1, target, torch.ones_like(chosen) * -factor)
        block.copy_(x)
        if isinstance(scale, Tensor):
            partition, chosen = partition * counts, chosen * counts
        nll.append((partition - chosen).squeeze(1))
        log_partition.append(partition.squeeze(1))
    return torch.cat(nll), torch.cat(log_partition)
