"""One small model with everything that a silent error could hide in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny

from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig


@pytest.fixture
def hard() -> ModelConfig:
    """Irregular layer types, query width 96 over d 32, route_scale far from 1, two shared experts, a narrow window."""
    return tiny.hard()


@pytest.fixture
def model(hard: ModelConfig) -> Afmoe:
    """The hard shape with every gain and bias away from its neutral value, in training mode."""
    return disturbed(hard)


@pytest.fixture
def make() -> Callable[[ModelConfig], Afmoe]:
    """Build a model of any shape, disturbed like `model`."""
    return disturbed


def disturbed(config: ModelConfig) -> Afmoe:
    """Build a model and disturb its gains and expert biases."""
    return tiny.disturb(Afmoe(config))
