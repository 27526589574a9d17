"""The router's choice as an operator with a gradient. Ties go to the lower index; `weights` are in the order of choice.

Shapes: N tokens, E experts, k chosen by each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freehold.kernels.cpu import call, gradient, operator


def _shapes(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), k), logits.new_empty(len(logits), k, dtype=torch.int64)


@operator("choose(Tensor logits, Tensor bias, int k, float scale) -> (Tensor, Tensor)", _shapes)
def choose(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return weights fp32 [N, k] and chosen int64 [N, k]: the k largest sigmoid(logits) + bias, fp32 [N, E] and [E]."""
    logits = logits.contiguous()
    weights, chosen = _shapes(logits, bias, k, scale)
    call("choose", logits, logits, bias, scale, chosen, weights, *logits.shape, k)
    return weights, chosen


@operator(
    "choose_backward(Tensor dweights, Tensor logits, Tensor chosen, float scale) -> Tensor",
    lambda dweights, logits, chosen, scale: torch.empty_like(logits),
)
def choose_backward(dweights: Tensor, logits: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Return the gradient of the weights by the logits."""
    dweights, logits = dweights.contiguous(), logits.contiguous()
    dlogits = torch.empty_like(logits)
    call("choose_backward", logits, dweights, logits, chosen, scale, dlogits, *logits.shape, chosen.shape[1])
    return dlogits


def _gradients(ctx: Any, dweights: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    logits, chosen = ctx.saved_tensors
    if dweights is None:
        return None, None, None, None
    return choose_backward(dweights, logits, chosen, ctx.inputs[3]), None, None, None


gradient("choose", lambda i, o: (i[0], o[1]), _gradients)
