"""Settings of alignment."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from freehold.core.config import Config
from freehold.data.config import BatchConfig
from freehold.optim.config import BalanceConfig, NoBalanceConfig, OptimConfig, PhaseConfig, check_names
from freehold.parallel.config import ParallelConfig, check_divisible
from freehold.trainer.config import TrainerConfig, check_guards


class AlignConfig(Config):
    """Supervised fine-tuning on conversations, loss on assistant tokens only."""

    checkpoint: str = Field("base", description="named checkpoint of pretrain to start from")
    batch: BatchConfig = Field(default_factory=BatchConfig, description="rows and tokens of a step")
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(matrices="adamw", lr=5e-4), description="optimizer of the fine-tuning"
    )
    balance: BalanceConfig = Field(
        default_factory=NoBalanceConfig, description="expert balancing; none keeps the routing that Base learnt"
    )
    trainer: TrainerConfig = Field(default_factory=TrainerConfig, description="precision, loss, checkpoints, reports")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="degrees of parallelism")
    phases: dict[str, PhaseConfig] = Field(
        default_factory=lambda: {
            "sft": PhaseConfig(
                steps=100, warmup_steps=5, shape="linear", end=0.0, checkpoint="preview", stage_type="Preview"
            )
        },
        min_length=1,
        description="named phases",
    )

    @field_validator("phases")
    @classmethod
    def _names(cls, phases: dict[str, PhaseConfig]) -> dict[str, PhaseConfig]:
        return check_names(phases)

    @model_validator(mode="after")
    def _fits(self) -> AlignConfig:  # the model is that of the checkpoint: `run` looks at the rest
        batch = self.batch
        check_divisible(self.parallel, sequences=batch.sequences, micro_sequences=batch.micro_sequences, stage="align")
        check_guards(self.trainer.collapse, self.balance, self.parallel, "align")
        return self


def plan(config: AlignConfig) -> list[str]:
    """Return what the config implies, for --dry-run."""
    steps = sum(phase.steps for phase in config.phases.values())
    return [
        *([f"sharded: {config.parallel.product} processes"] if config.parallel.devices > 1 else []),
        f"fine-tuning: {steps:,} steps of up to {config.batch.step_tokens:,} tokens from {config.checkpoint}",
    ]
