"""Expert balancing: what moves the selection bias, and what acts on the router through the gradient.

A rule (`build_balance`) reads how many tokens each expert got in a whole optimizer step, over micro-batches and ranks,
and moves the bias outside the gradient. `router_losses` is added to the training loss. A recipe chooses one rule and
the weight of each loss.

Shapes: B rows, T tokens a row, N = B T tokens, k experts per token, E experts; n_i tokens routed to expert i; n-bar
their mean.

One SMEBU step by hand, E = 4 experts, 40 assignments, the first expert busy (rate 0.001, momentum 0.5):

    >>> from freehold.optim.config import SmebuConfig
    >>> rule, bias = Smebu(SmebuConfig(rate=1e-3)), torch.zeros(4)
    >>> counts = torch.tensor([25, 5, 5, 5])  # n-bar = 10, so v = (-1.5, 0.5, 0.5, 0.5)
    >>> rule.update("layer", bias, counts)  # tanh(2 v) = (-0.995, 0.762, 0.762, 0.762), mean 0.323
    >>> [round(x, 6) for x in bias.tolist()]  # half of 0.001 * (tanh - mean)
    [-0.000659, 0.00022, 0.00022, 0.00022]
    >>> round(max_violation(counts).item(), 3)  # (25 - 10) / 10
    1.5
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from freehold.optim.config import BalanceConfig, NoBalanceConfig, RouterLossConfig, SignConfig, SmebuConfig

# Steepness of SMEBU's clamp, as published (trinity report, section 2.2).
KAPPA = 2.0


class BalanceRule(Protocol):
    """What the training loop needs of a rule."""

    def update(self, layer: str, bias: Tensor, counts: Tensor) -> None:
        """Move `bias` [E] (float32, in place) of one layer, given `counts` [E] of one optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what must be in a checkpoint in addition to the biases."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


class Smebu:
    """Soft-clamped Momentum Expert Bias Updates (trinity report, section 2.2).

    v = (n-bar - n) / n-bar; step = lambda * tanh(kappa v), centred; m = beta m + (1 - beta) step; b += m.
    A step is bounded by 2 lambda, depends on shares only, and is 0 at balance.
    """

    def __init__(self, config: SmebuConfig) -> None:
        self.config = config
        self.momentum: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, layer: str, bias: Tensor, counts: Tensor) -> None:
        """Move one layer's bias; a step in which no token was routed moves nothing."""
        # Decided on the device: asking whether any token was routed would wait for it, once a layer and step.
        routed = counts.any()
        mean = counts.float().mean().clamp_min(1 / len(counts))  # of integers: no smaller mean but 0
        step = self.config.rate * torch.tanh(KAPPA * (mean - counts) / mean)  # [E]
        # Centred: a shift of all biases changes no choice and would only drift.
        step -= step.mean()
        before = self.momentum.setdefault(layer, torch.zeros_like(bias))
        # Momentum first, then the bias moves by it: the order of the published rule.
        after = before.mul(self.config.momentum).add_(step, alpha=1 - self.config.momentum)
        before.copy_(torch.where(routed, after, before))
        # In place: the model, and a checkpoint, hold this very tensor.
        bias.copy_(torch.where(routed, bias + before, bias))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the momentum of each layer."""
        return dict(self.momentum)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the momentum of each layer."""
        self.momentum = {layer: tensor.clone() for layer, tensor in state.items()}


class _Memoryless:
    """A rule whose biases are all its state."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Accept the empty state; ValueError for the state of another rule."""
        if state:
            raise ValueError(f"this balancing rule has no state, found {sorted(state)}")


class Sign(_Memoryless):
    """The sign rule of auxiliary-loss-free balancing (Wang et al. 2024, algorithm 1), as in Trinity Nano and Mini.

    b += gamma * sign(n-bar - n); b -= mean(b) (trinity report, section 2.2).
    """

    def __init__(self, config: SignConfig) -> None:
        self.config = config

    @torch.no_grad()
    def update(self, layer: str, bias: Tensor, counts: Tensor) -> None:
        """Move one layer's bias by the sign of its violation, then subtract its mean; nothing when none was routed."""
        load = counts.float()
        after = bias.add(torch.sign(load.mean() - load), alpha=self.config.rate)
        bias.copy_(torch.where(counts.any(), after - after.mean(), bias))


class NoBalance(_Memoryless):
    """Leave the bias as it is."""

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


class Routing(Protocol):
    """What the losses read of one layer: router logits [N, E] in the graph, chosen experts [N, k]."""

    @property
    def logits(self) -> Tensor:
        """Router logits before the sigmoid, without the bias."""

    @property
    def chosen(self) -> Tensor:
        """Experts each token uses, chosen with the bias."""


class RouterLosses(NamedTuple):
    """Sums over layers and over the tokens that count; `total` carries the gradient."""

    total: Tensor
    """scale * (alpha * sequence + weight * z)"""
    sequence: Tensor
    """sum of T_s * sum_i f_i P_i over sequences s: 1 a token at perfect balance"""
    z: Tensor
    """sum of log(sum(exp(router logits)))^2"""


def router_losses(
    config: RouterLossConfig,
    routings: Iterable[Routing],
    real: Tensor,
    *,
    scale: float | Tensor,
    row_sum: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> RouterLosses:
    """Return the losses on the routing of some rows; `real` [B, T] bool is False where a token is padding.

    `scale` is 1 / (real tokens of the whole global step), so that micro-batches and ranks simply add up. A row is a
    sequence, however many documents are packed into it: of a document shorter than E / k tokens no load can be even.
    Layers are summed: each router gets the published weight. A term of weight 0 is not computed. Where T tokens are a
    part of each row, `row_sum` adds up counts over the parts.
    """
    # Of weight 0 a term is not computed at all.
    sequence = z = torch.zeros((), device=real.device)
    for routing in routings:
        if config.sequence_loss:
            sequence = sequence + sequence_loss(routing.logits, routing.chosen, real, row_sum)
        if config.router_z_loss:
            z = z + router_z_loss(routing.logits, real)
    # Weights once, for the sum over layers: each router gets the published one.
    total = scale * (config.sequence_loss * sequence + config.router_z_loss * z)
    return RouterLosses(total, sequence.detach(), z.detach())


def sequence_loss(
    logits: Tensor, chosen: Tensor, real: Tensor, row_sum: Callable[[Tensor], Tensor] = lambda counts: counts
) -> Tensor:
    """Return the sum of T * L over the rows, L the complementary sequence-wise loss of one layer without its alpha.

    L = sum_i f_i P_i (DeepSeek-V3 report, equations 17 to 20; trinity report, section 2.2), with
    f_i = E / (k T) * (tokens of the row that chose i, bias included) and P_i = mean over the row's tokens of
    s_i / sum_j s_j, s the sigmoid scores without the bias. The gradient goes through P only. T counts real tokens.
    """
    (rows, tokens), experts, k = real.shape, logits.shape[-1], chosen.shape[-1]
    # The scores of the router, without the bias: the loss must not undo what the bias does.
    scores = logits.sigmoid().view(rows, tokens, experts)
    # Normalised for each token, then the mean over the row: P of the paper.
    share = ((scores / scores.sum(-1, keepdim=True)) * real.unsqueeze(-1)).sum(1)
    # Integers in a fixed number of slots: no shape depends on values, so nothing waits for the device.
    slot = chosen.view(rows, tokens * k)  # [B, T k]
    counted = real.repeat_interleave(k, dim=1).long()  # [B, T k]
    load = row_sum(torch.zeros(rows, experts, dtype=torch.int64, device=chosen.device).scatter_add_(1, slot, counted))
    return experts / k * ((load * share).sum(1) / row_sum(real.sum(1)).clamp_min(1)).sum()


def router_z_loss(logits: Tensor, real: Tensor) -> Tensor:
    """Return the sum over real tokens of the squared log-partition of the logits (ST-MoE, Zoph et al. 2022, eq. 5).

    Sigmoid scores have no partition; the term is kept as published, for what it does: it holds the logits down.
    """
    # Padding is masked, not selected: a selection has a size that the host would have to ask for.
    squares = torch.logsumexp(logits, -1).square()  # [N]
    return torch.where(real.flatten(), squares, torch.zeros_like(squares)).sum()


def max_violation(counts: Tensor) -> Tensor:
    """Return MaxVio = (largest load - mean load) / mean load of one layer [E], a scalar; 0 when none was routed."""
    mean = counts.float().mean().clamp_min(1 / len(counts))
    return torch.where(counts.any(), (counts.max() - mean) / mean, torch.zeros_like(mean))
