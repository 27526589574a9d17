"""Settings of what reshapes a model: pruning, growing, dense layers to experts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from freehold.core.config import Config


class PruneConfig(Config):
    """Which experts stay, and what the report compares them with."""

    keep: int = Field(gt=0, description="experts that stay in each layer")
    score: Literal["mass", "saliency", "tokens"] = Field(
        "mass", description="mass is best inside the domain, saliency (REAP) gentler outside it"
    )
    seed: int = Field(0, ge=0, description="decides the random control")
    tokens: int = Field(32_768, gt=0, description="most tokens of each text that are read")


class GrowConfig(Config):
    """How a model gets more experts."""

    experts: int = Field(gt=0, description="experts of each layer afterwards")
    bias: float = Field(
        -2.0,
        lt=0,
        description="added to the selection bias of the copies; below the range of the scores none is chosen at first, "
        "and balancing lets them in one by one",
    )
    noise: float = Field(0.01, ge=0, description="noise on the copies' router rows, of the norm of each row")
    top_k: int = Field(0, ge=0, description="experts a token uses; 0: as before. Of a dense model: all of the slices")
    seed: int = Field(0, ge=0, description="decides the noise")
