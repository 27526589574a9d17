"""One small model with everything that a silent error could hide in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig


@pytest.fixture
def hard() -> ModelConfig:
    """Irregular layer types, query width 96 over d 32, route_scale far from 1, two shared experts, a narrow window."""
    return ModelConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=5,
        num_dense_layers=1, num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_experts=8,
        num_experts_per_tok=3, num_shared_experts=2, route_scale=2.3, sliding_window=5, max_position_embeddings=64,
        layer_types=("sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"),
    )  # fmt: skip


@pytest.fixture
def model(hard: ModelConfig) -> Afmoe:
    """The hard shape with every gain and bias away from its neutral value, in training mode."""
    return disturbed(hard)


@pytest.fixture
def make() -> Callable[[ModelConfig], Afmoe]:
    """Build a model of any shape, disturbed like `model`."""
    return disturbed


def disturbed(config: ModelConfig, seed: int = 0) -> Afmoe:
    """Build and initialise, then disturb gains and expert biases."""
    result, generator = Afmoe(config), torch.Generator().manual_seed(seed)
    result.init_weights(generator)
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.mul_(3.0)  # so that attention and routing are far from uniform
        for moe in result.moe_layers().values():
            moe.expert_bias.normal_(0, 0.3, generator=generator)
    return result
