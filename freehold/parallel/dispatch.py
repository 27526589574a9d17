"""Expert parallelism: each token goes to the rank that holds its expert, and its result comes back.

Shapes: R rows here sorted by expert, S rows received, E experts, e experts held here, d model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from freehold.model import ops
from freehold.model.rows import Route, route

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sent(NamedTuple):
    """What brings the rows back: how many went and came by rank, and the way from rank order to expert order."""

    sends: list[int]
    receives: list[int]
    path: Route | None


class AllToAll:
    """The dispatcher of a layer whose experts are sharded over the ranks of `group`, each holding consecutive ones."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def dispatch(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Sent]:
        """Send rows x [R, d] (`counts` [E] of each expert) to their experts; return rows [S, d], counts [e], context.

        Rows of one expert come in the order of the ranks they come from, which is the order of the tokens in the
        batch.
        """
        ranks = self.group.size()
        here = exchange(counts, None, None, self.group).view(ranks, -1)  # [E] -> [ranks, e]
        # The one wait for the device that a layer keeps. NCCL takes the sizes of a ragged exchange from the host; to do
        # without, every rank must receive as if all tokens came to it, `ranks` times the memory and the traffic.
        sends, receives = torch.stack([counts.view(ranks, -1).sum(1), here.sum(1)]).tolist()
        rows, path = exchange(x, receives, sends, self.group), None  # [R, d] -> [S, d]
        if len(rows):
            # Rows come by rank, and by expert within a rank; products want them by expert.
            experts = torch.arange(here.shape[1], device=x.device).repeat(ranks)
            path = route(experts.repeat_interleave(here.flatten(), output_size=len(rows))[:, None])
            rows = ops.gather(rows, path)
        return rows, here.sum(0), Sent(sends, receives, path)

    def combine(self, y: Tensor, context: Sent) -> Tensor:
        """Return the results [S, d] to the ranks their rows came from, in the order they had there: [R, d]."""
        # The inverse of both permutations, in reverse order.
        if context.path is not None:
            order, inverse, _ = context.path
            y = ops.gather(y, Route(inverse, order, inverse))
        return exchange(y, context.sends, context.receives, self.group)


def exchange(x: Tensor, receives: list[int] | None, sends: list[int] | None, group: ProcessGroup) -> Tensor:
    """Send stretches of x's first dimension to each rank of the group and return those received; differentiable.

    Sizes None: all stretches have the same length. These functional collectives are private in PyTorch 2.13; this is
    the one place that calls them.
    """
    # Functional, so that the gradient is an exchange in the other direction.
    return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), receives, sends, group))
