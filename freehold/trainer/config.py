"""What a recipe can say about the training loop itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from freehold.core.config import Config


class TrainerConfig(Config):
    """Precision, loss, checkpoints and reporting of the one loop."""

    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="compute dtype; masters are float32 always")
    threads: int = Field(2, ge=1, le=1024, description="CPU threads; part of the bits, so never taken from the machine")
    z_loss: float = Field(1e-6, ge=0, description="weight of the squared log-partition of the output logits")
    loss_chunk_tokens: int = Field(2048, ge=1, description="tokens whose logits exist at one time")
    recompute: bool = Field(False, description="recompute each block in the backward pass to save memory")
    checkpoint_every_steps: int = Field(100, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="newest step checkpoints kept")
    keep_every_steps: int = Field(0, ge=0, description="also keep checkpoints at multiples of this (0: none)")
    max_skipped_steps: int = Field(10, ge=1, description="give up after so many steps in a row without finite loss")
    log_every_steps: int = Field(10, ge=1, description="steps between lines of metrics")
    validate_every_steps: int = Field(200, ge=0, description="steps between validations (0: only at phase ends)")
    validation_tokens: int = Field(16384, ge=0, description="tokens per source read in a validation (0: all)")
