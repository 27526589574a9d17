"""Settings of pre-training."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from freehold.core.config import Config
from freehold.data.config import LongConfig, TextBatchConfig
from freehold.model.config import ModelConfig, flops_per_token, parameter_counts
from freehold.optim.config import BalanceConfig, OptimConfig, PhaseConfig, SmebuConfig, check_names
from freehold.parallel.config import ParallelConfig, validate_layout
from freehold.trainer.config import TrainerConfig, check_guards


class TextPhaseConfig(PhaseConfig):
    """A phase of pre-training."""

    context_tokens: int = Field(
        0, ge=0, description="length of a row in this phase, to extend the context of `parent`; 0: batch.context_tokens"
    )


class ExtensionConfig(LongConfig):
    """How a branch with `phases.<name>.context_tokens` learns to use more context."""

    target_tokens: int = Field(
        0,
        ge=0,
        description="context that the checkpoint will state, in every form; less than the rows it was trained on is "
        "safer. 0: the length of its rows",
    )
    global_q_gain: float = Field(
        1.0,
        gt=0,
        le=4,
        description="factor on the query norm of the global layers before the first step; sharpens attention over many "
        "keys",
    )


class PretrainConfig(Config):
    """Train an AFMoE model from scratch, or branch off an earlier checkpoint."""

    model: ModelConfig = Field(
        default_factory=lambda: ModelConfig.model_validate({"preset": "laptop"}), description="the shape"
    )
    batch: TextBatchConfig = Field(default_factory=TextBatchConfig, description="rows and tokens of a step")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="Muon and AdamW")
    balance: BalanceConfig = Field(default_factory=SmebuConfig, description="expert balancing: smebu, sign or none")
    trainer: TrainerConfig = Field(default_factory=TrainerConfig, description="precision, loss, checkpoints, reports")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="degrees of parallelism")
    phases: dict[str, TextPhaseConfig] = Field(
        default_factory=lambda: {
            "stable": TextPhaseConfig(steps=600, warmup_steps=20, checkpoint="truebase", stage_type="TrueBase"),
            "anneal": TextPhaseConfig(steps=400, shape="linear", end=0.0, checkpoint="base", stage_type="Base"),
        },
        description="named phases, one after another; the last is the decay branch. None, with a parent: the parent "
        "is kept as it is",
    )
    extension: ExtensionConfig = Field(
        default_factory=ExtensionConfig, description="text and needles of phases with a longer context"
    )
    parent: str = Field(
        "",
        description="folder of a checkpoint to branch from: phases then continue from its step, optimizer and data "
        "position (e.g. another anneal from runs/laptop/pretrain/truebase)",
    )

    fresh_optimizer: bool = Field(
        False,
        description="take the parent's weights alone: moments and balancing start from nothing, as after a download",
    )
    parent_settled: str = Field(
        "",
        pattern=r"^$|\S",
        description="why a parent without a record of its rights may be used, in the words of who looked into it",
    )
    quarantine: str = Field(
        "", description="file of documents to exclude: ids, one a line, or another run's log/quarantine.jsonl"
    )

    @model_validator(mode="after")
    def _something_to_do(self) -> PretrainConfig:
        if not self.phases and not self.parent:
            raise ValueError("without a parent there must be at least one phase")
        return self

    @field_validator("phases")
    @classmethod
    def _names(cls, phases: dict[str, TextPhaseConfig]) -> dict[str, TextPhaseConfig]:
        check_names(phases)
        return phases

    @model_validator(mode="after")
    def _one_length(self) -> PretrainConfig:
        lengths = {phase.context_tokens for phase in self.phases.values()}
        if lengths - {0} and (len(lengths) > 1 or not self.parent):
            # Short rows come first, in a run of their own: their checkpoint is what a longer context starts from.
            raise ValueError(
                "phases.<name>.context_tokens extends a parent: name one (pretrain.parent), and give every phase the "
                f"same length, not {', '.join(map(str, sorted(lengths)))}"
            )
        return self

    @property
    def extended_tokens(self) -> int:
        """Return the length of a row where phases extend the context, or 0."""
        return max((phase.context_tokens for phase in self.phases.values()), default=0)

    @model_validator(mode="after")
    def _fits(self) -> PretrainConfig:
        self.batch.check_fits(self.model.max_position_embeddings, "pretrain")
        validate_layout(
            self.parallel,
            self.model,
            context_tokens=self.batch.context_tokens,
            sequences=self.batch.sequences,
            micro_sequences=self.batch.micro_sequences,
            stage="pretrain",
        )
        check_guards(self.trainer.collapse, self.balance, self.parallel, "pretrain")
        return self


def plan(config: PretrainConfig) -> list[str]:
    """Return what the config implies, for --dry-run."""
    counts = parameter_counts(config.model)
    steps = sum(phase.steps for phase in config.phases.values())
    tokens = steps * config.batch.step_tokens
    context = config.extended_tokens or config.batch.context_tokens
    flops = tokens * flops_per_token(config.model, context)
    return [
        f"model: {counts['total']:,} parameters, {counts['active_with_head']:,} computed with for a token, the head "
        f"included (with the embedding table too: {counts['active']:,})",
        *([f"sharded: {config.parallel.product} processes"] if config.parallel.devices > 1 else []),
        f"training: {steps:,} steps of {config.batch.step_tokens:,} tokens = {tokens:,} tokens, {flops:.2e} FLOPs",
        *([f"rows of {context:,} tokens: the global layers see more, windows stay"] if config.extended_tokens else []),
        *(
            f"phase {name}: {phase.steps:,} steps, {phase.shape}, rate x{phase.start} -> x{phase.end}"
            + (f", kept as {phase.checkpoint}" if phase.checkpoint else "")
            for name, phase in config.phases.items()
        ),
    ]
