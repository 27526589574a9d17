"""Expert balancing outside the gradient: one rule reads how many tokens each expert got, and moves its bias.

Counts are those of a whole optimizer step: over micro-batches, and over all ranks once there are several.
Shapes: E experts; n_i tokens routed to expert i; n-bar their mean.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from freehold.optim.config import BalanceConfig, NoBalanceConfig, SignConfig, SmebuConfig


class BalanceRule(Protocol):
    """What the training loop needs of a rule."""

    def update(self, layer: str, bias: Tensor, counts: Tensor) -> None:
        """Move `bias` [E] (float32, in place) of one layer, given `counts` [E] of one optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what must be in a checkpoint besides the biases."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


class Smebu:
    """Soft-clamped Momentum Expert Bias Updates (trinity report, section 2.2).

    v = (n-bar - n) / n-bar; step = lambda * tanh(kappa v), centred; m = beta m + (1 - beta) step; b += m.
    """

    def __init__(self, config: SmebuConfig) -> None:
        self.config = config
        self.momentum: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, layer: str, bias: Tensor, counts: Tensor) -> None:
        """Move one layer's bias; a step in which no token was routed moves nothing."""
        mean = counts.float().mean()
        if mean == 0:
            return
        step = self.config.rate * torch.tanh(self.config.kappa * (mean - counts) / mean)
        step -= step.mean()
        momentum = self.momentum.setdefault(layer, torch.zeros_like(bias))
        momentum.mul_(self.config.momentum).add_(step, alpha=1 - self.config.momentum)
        bias.add_(momentum)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the momentum of each layer."""
        return dict(self.momentum)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the momentum of each layer."""
        self.momentum = {layer: tensor.clone() for layer, tensor in state.items()}


class Sign:
    """The sign rule of auxiliary-loss-free balancing (Wang et al. 2024), re-centred as in Trinity Nano and Mini."""

    def __init__(self, config: SignConfig) -> None:
        self.config = config

    @torch.no_grad()
    def update(self, layer: str, bias: Tensor, counts: Tensor) -> None:
        """Move one layer's bias by the sign of its violation, then take the mean off."""
        load = counts.float()
        bias.add_(torch.sign(load.mean() - load), alpha=self.config.rate)
        bias.sub_(bias.mean())

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: the rule has no memory."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Accept the empty state of the rule."""
        if state:
            raise ValueError(f"the sign rule has no state, found {sorted(state)}")


class NoBalance(Sign):
    """Leave the bias alone."""

    def __init__(self) -> None:
        super().__init__(SignConfig())

    def update(self, layer: str, bias: Tensor, counts: Tensor) -> None:
        """Do nothing."""


def build_balance(config: BalanceConfig) -> BalanceRule:
    """Return the rule a recipe asks for."""
    match config:
        case SmebuConfig():
            return Smebu(config)
        case SignConfig():
            return Sign(config)
        case NoBalanceConfig():
            return NoBalance()


def max_violation(counts: Tensor) -> float:
    """Return MaxVio = (largest load - mean load) / mean load of one layer; 0 when nothing was routed."""
    mean = counts.float().mean()
    return float((counts.max() - mean) / mean) if mean > 0 else 0.0
