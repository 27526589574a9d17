"""Where rows go when tokens are sorted by expert.

Shapes: N tokens, k experts per token, R = N k rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Route(NamedTuple):
    """Where each assignment goes: row r of the sorted form is assignment `order[r]`; `inverse` is the way back."""

    order: Tensor
    inverse: Tensor
    token: Tensor


def route(chosen: Tensor) -> Route:
    """Sort the assignments [N, k] by expert, keeping the order of tokens within one."""
    # Stable: within an expert, rows keep the order of tokens, so bits do not depend on the sort.
    order = chosen.flatten().argsort(stable=True)
    # Half the price of a second argsort, and it is exact.
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return Route(order, inverse, order // chosen.shape[1])  # [R], [R], [R]
