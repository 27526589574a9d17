"""What a framework must offer to be run through the conformance suite of expert balancing.

This file and `test_balance_conformance.py` know torch and nothing of any framework. Freehold's adapter is
`balance_freehold.py`; another one is named by the environment variable BALANCE_ADAPTER (see docs/balancing.md).

Shapes: B rows, T tokens a row, d width, i expert width, E experts, k experts per token, V vocabulary.
"""

from __future__ import annotations

import unittest
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

IGNORE = -100
PADDING = -1


class Unsupported(unittest.SkipTest):
    """Raised by an adapter for what its framework does not offer: the test is then skipped, with these words."""


@dataclass(frozen=True)
class Setup:
    """A model of `layers` layers, the first `dense_layers` without experts, and how it is to be trained.

    Sigmoid scores, normalised weights times `route_scale`, float32, no dropout, no gradient clipping.
    """

    layers: int = 4
    dense_layers: int = 1
    experts: int = 8
    top_k: int = 2
    width: int = 16
    expert_width: int = 32
    vocabulary: int = 64
    route_scale: float = 2.3
    rule: str = ""
    """One of the adapter's `rules`, or "" for a bias that is left alone."""
    rate: float = 0.01
    sequence_loss: float = 0.0
    z_loss: float = 0.0
    """Weight of the squared log-partition of the output logits, a mean over targets."""
    router_z_loss: float = 0.0
    """Weight of the squared log-partition of the router logits, a mean over tokens."""
    micro_batches: int = 1
    """Parts, of equally many rows, that the rows of a step are run in."""
    recompute: bool = False
    meta: bool = False
    """Build without memory, then allocate it, `poison` it, and initialise as always."""
    muon_lr: float = 0.02
    weight_decay: float = 0.0
    seed: int = 0


class Rows(NamedTuple):
    """The rows of one step; all [B, T]."""

    ids: Tensor
    targets: Tensor
    """IGNORE where there is no loss"""
    documents: Tensor
    """Tokens see only tokens of the same number; PADDING is padding."""


class Routed(NamedTuple):
    """What one router did."""

    inputs: Tensor
    """[B, T, d] what the router read"""
    logits: Tensor
    """[B, T, E] before the sigmoid, without the bias"""
    chosen: Tensor
    """[B, T, k]"""
    weights: Tensor
    """[B, T, k] factor on the output of each chosen expert"""


class Forward(NamedTuple):
    """One forward pass without gradients."""

    hidden: Tensor
    """[B, T, d] what the head is applied to"""
    layers: dict[int, Routed]


class Adapter(Protocol):
    """A framework's trainer, built for one Setup. Layers are numbered from 0, dense ones included.

    Weights and gradients go by `head` [V, d], `router.<layer>` [E, d], and `gate.<layer>.<expert>` [i, d],
    `up.<layer>.<expert>` [i, d], `down.<layer>.<expert>` [d, i]. Equal setups start from equal weights.
    """

    rules: ClassVar[tuple[str, ...]]
    """The rules that move the bias, at least one of: `smebu` (kappa 2, beta 0.5), `sign` (re-centred)."""
    losses: ClassVar[tuple[str, ...]]
    """The losses there are, of: `sequence_loss`, `z_loss`, `router_z_loss`; others are not asked for."""

    def __init__(self, setup: Setup) -> None: ...

    @property
    def moe_layers(self) -> list[int]:
        """The layers that have experts."""

    def step(self, rows: Rows) -> None:
        """Run one optimizer step, bias update included."""

    def evaluate(self, rows: Rows) -> None:
        """Validate on these rows, as the framework does in the middle of training."""

    def gradients(self, rows: Rows) -> dict[str, Tensor]:
        """Return what a step would hand to the optimizer, and change neither weights nor bias."""

    def apply(self, gradients: Mapping[str, Tensor]) -> None:
        """Hand these gradients (those not named: none) to the optimizer for one step at the rate `muon_lr`."""

    def forward(self, rows: Rows) -> Forward:
        """Run the model as `evaluate` does and show what it did."""

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the weights."""

    def counts(self, layer: int) -> Tensor:
        """Return the assignments per expert of the last step, int64 [E]."""

    def bias(self, layer: int) -> Tensor:
        """Return a copy of the selection bias [E]."""

    def set_bias(self, layer: int, values: Tensor) -> None:
        """Set the selection bias [E]."""


def poison(model: nn.Module) -> None:
    """Fill every parameter and buffer with what fresh memory may hold: NaN, and the largest integer."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
