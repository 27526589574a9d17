"""A loss on what happens inside a pipeline stage, attached to the stream that leaves the stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Attached(torch.autograd.Function):
    """The stream unchanged; backward passes its gradient on and gives the loss a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, loss: Tensor) -> Tensor:  # type: ignore[override]
        ctx.loss = loss.dtype, loss.device
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        dtype, device = ctx.loss
        return dh, torch.ones((), dtype=dtype, device=device)


def attach_loss(h: Tensor, loss: Tensor) -> Tensor:
    """Return h [B, T, d]; the backward pass treats the scalar `loss` as if it were added to the training loss.

    The last stage of a pipeline computes the training loss and cannot see what happens in the stages before it.
    """
    return _Attached.apply(h, loss)
