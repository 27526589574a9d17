"""What a recipe can configure of the training loop itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from freehold.core.config import Config
from freehold.core.errors import ConfigError
from freehold.optim.config import BalanceConfig, NoBalanceConfig
from freehold.parallel.config import ParallelConfig


class CollapseConfig(Config):
    """When routing counts as collapsing, and what is done then (docs/collapse.md)."""

    action: Literal["none", "raise_rate", "reinitialise", "roll_back"] = Field(
        "none",
        description="after the warning: none; a larger balance step for a while; draw the experts' routing again; or "
        "go back to a checkpoint from before it and skip the batches since",
    )
    warmup_steps: int = Field(100, ge=0, description="first steps of a run that are not watched: loads start uneven")
    window_steps: int = Field(32, ge=6, description="steps over which the slope is taken")
    rise_bits: float = Field(
        1.0,
        gt=0,
        description="alarm when the busiest expert's load grows 2**this fold within a window "
        "(never more than half the way from balance to all tokens on one expert)",
    )


class SpikeConfig(Config):
    """When a loss counts as a spike, and what is done then (docs/never-lose-a-step.md)."""

    action: Literal["none", "skip", "roll_back"] = Field(
        "none",
        description="after the warning: none; skip the batch before it changes anything; or that, and roll back "
        "to a checkpoint from before when it does not help",
    )
    warmup_steps: int = Field(100, ge=0, description="first steps of a run that are not judged")
    window_steps: int = Field(64, ge=8, description="steps of the same phase a loss is compared with")
    rise_nats: float = Field(1.0, gt=0, description="a spike is this far above their median")
    sigmas: float = Field(8.0, gt=0, description="and this many times their standard deviation")


class TrainerConfig(Config):
    """Precision, loss, checkpoints and reporting of the one loop."""

    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="compute dtype; masters are float32 always")
    threads: int = Field(2, ge=1, le=1024, description="CPU threads; part of the bits, so never taken from the machine")
    z_loss: float = Field(1e-6, ge=0, description="weight of the squared log-partition of the output logits")
    loss_chunk_tokens: int = Field(2048, ge=1, description="tokens whose logits exist at one time")
    recompute: bool = Field(False, description="recompute each block in the backward pass to save memory")
    compile: bool = Field(
        False, description="torch.compile each layer: for CUDA, where it fuses what the kernels fuse on CPU"
    )
    checkpoint_every_steps: int = Field(100, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="newest step checkpoints kept")
    keep_every_steps: int = Field(0, ge=0, description="also keep checkpoints at multiples of this (0: none)")
    background_save: bool = Field(False, description="write step checkpoints while training continues, from a copy")
    collapse: CollapseConfig = Field(default_factory=CollapseConfig, description="alarm for routing that collapses")
    spike: SpikeConfig = Field(default_factory=SpikeConfig, description="alarm for a loss that jumps")
    deterministic: Literal["auto"] | bool = Field(
        "auto", description="deterministic algorithms only; auto: on a CPU, where they cost nothing"
    )
    tf32: bool = Field(False, description="CUDA: let float32 products use TF32")
    callbacks: tuple[str, ...] = Field(
        (), description="where metrics go in addition to metrics.jsonl: tensorboard, wandb, or an entry point's name"
    )
    log_every_steps: int = Field(10, ge=1, description="steps between lines of metrics")
    validate_every_steps: int = Field(200, ge=0, description="steps between validations (0: only at phase ends)")
    validation_tokens: int = Field(16384, ge=0, description="tokens per source read in a validation (0: all)")


def check_guards(collapse: CollapseConfig, balance: BalanceConfig, parallel: ParallelConfig, stage: str) -> None:
    """Raise ConfigError for an action that the rest of the recipe makes impossible."""
    where = f"{stage}.trainer.collapse.action"
    if collapse.action == "raise_rate" and isinstance(balance, NoBalanceConfig):
        raise ConfigError(
            "raise_rate needs a balancing rule",
            where=where,
            found="raise_rate with balance.kind none",
            expected="another action, or balance.kind smebu or sign",
        )
    if collapse.action == "reinitialise" and parallel.pipeline > 1:
        raise ConfigError(
            "reinitialise cannot reach a layer that another pipeline stage holds",
            where=where,
            found=f"reinitialise with {stage}.parallel.pipeline={parallel.pipeline}",
            expected="another action, or parallel.pipeline=1",
        )
