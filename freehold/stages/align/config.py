"""Settings of alignment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from freehold.core.config import Config
from freehold.data.config import BatchConfig
from freehold.optim.config import BalanceConfig, NoBalanceConfig, OptimConfig, PhaseConfig, check_names
from freehold.parallel.config import ParallelConfig, check_divisible
from freehold.stages.align.rl_config import DistillConfig, PracticeConfig, RewardConfig, RlConfig
from freehold.trainer.config import TrainerConfig, check_guards


class PreferenceConfig(Config):
    """What a phase of kind preference minimises."""

    loss: Literal["dpo", "ipo", "simpo", "kto"] = Field(
        "dpo", description="dpo, ipo and simpo compare the answers of a pair; kto takes unpaired answers too"
    )
    beta: float = Field(0.1, gt=0, description="how far the policy may move from the checkpoint it starts from")
    margin: float = Field(0.0, ge=0, description="target margin (gamma of SimPO); a pair's own margin is added")
    alarm_nats: float = Field(
        2.0, gt=0, description="warn when better answers have lost this much log p since the phase began"
    )
    cross_entropy: float = Field(
        1.0, ge=0, description="weight of -log p of the better answers a token: without it their likelihood may fall"
    )


class SftConfig(Config):
    """What a phase of kind sft learns from its conversations."""

    sources: tuple[str, ...] = Field((), description="sources whose conversations are learned; empty: all of them")
    reasoning: Literal["keep", "last", "drop"] = Field(
        "keep",
        description="drop: learn the answers without the reasoning before them; keep: with it, where there is; last: "
        "only that of the turn that is learned, so that a conversation becomes an example for each turn",
    )
    turns: Literal["all", "last"] = Field("all", description="all turns of the assistant, or the last one alone")
    calls: bool = Field(True, description="whether turns that call tools are learned")


class AlignPhaseConfig(PhaseConfig):
    """One phase of alignment: what it learns from, and how."""

    kind: Literal["sft", "preference", "reward", "rl", "distill"] = Field(
        "sft",
        description="sft: conversations, loss on what the assistant says; preference: better and worse answers; "
        "reward: a model that scores answers, from the same pairs; rl: answers of the model itself to tasks that a "
        "program checks; distill: the distribution of a teacher",
    )
    practice: PracticeConfig = Field(
        default_factory=PracticeConfig, description="for kind sft: right answers to tasks, so that rl has some to find"
    )
    sft: SftConfig = Field(default_factory=SftConfig, description="for kind sft")
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig, description="for kind preference")
    reward: RewardConfig = Field(default_factory=RewardConfig, description="for kind reward")
    rl: RlConfig = Field(default_factory=RlConfig, description="for kind rl, and for distill on policy")
    distill: DistillConfig = Field(default_factory=DistillConfig, description="for kind distill")

    @model_validator(mode="before")
    @classmethod
    def _warms_up(cls, data: Any) -> Any:
        # A first step at the full rate is what reinforcement learning collapses of.
        if isinstance(data, dict) and data.get("kind") == "rl" and "warmup_steps" not in data:
            return {**data, "warmup_steps": min(5, int(data.get("steps", 5)))}
        return data

    @model_validator(mode="after")
    def _complete(self) -> AlignPhaseConfig:
        drawn = self.kind == "rl" or (self.kind == "distill" and self.distill.on_policy)
        if drawn and not self.rl.environments:
            raise ValueError("rl.environments is empty: name at least one, e.g. {arithmetic: {}}")
        if self.kind == "distill" and not self.distill.teacher.checkpoint:
            raise ValueError("distill.teacher.checkpoint is missing")
        return self

    def settings(self) -> tuple[Config, ...]:
        """Return what makes two phases of one kind different jobs."""
        own: dict[str, tuple[Config, ...]] = {
            "sft": (self.sft, self.practice),
            "preference": (self.preference,),
            "reward": (self.reward,),
            "rl": (self.rl,),
            "distill": (self.distill, self.rl, self.sft, self.practice),
        }
        return own[self.kind]


class AlignConfig(Config):
    """Phases of kinds, one after another, each from the checkpoint of the one before."""

    checkpoint: str = Field("base", description="named checkpoint of pretrain to start from")
    batch: BatchConfig = Field(default_factory=BatchConfig, description="rows and tokens of a step")
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the rows of a fine-tuning step that are pre-training text, against forgetting",
    )
    max_forgetting: float | None = Field(
        None,
        gt=0,
        description="most that held-out bits per byte may rise, as a share (0.05: 5 %); above it the stage fails. "
        "null: not measured",
    )
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(matrices="adamw", lr=5e-4), description="optimizer of the fine-tuning"
    )
    balance: BalanceConfig = Field(
        default_factory=NoBalanceConfig, description="expert balancing; none keeps the routing that Base learnt"
    )
    trainer: TrainerConfig = Field(default_factory=TrainerConfig, description="precision, loss, checkpoints, reports")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="degrees of parallelism")
    phases: dict[str, AlignPhaseConfig] = Field(
        default_factory=lambda: {
            "sft": AlignPhaseConfig(
                steps=100, warmup_steps=5, shape="linear", end=0.0, checkpoint="preview", stage_type="Preview"
            )
        },
        min_length=1,
        description="named phases, one after another; where the kind changes, the next starts from the checkpoint of "
        "the one before, with a new optimizer",
    )

    @field_validator("phases")
    @classmethod
    def _names(cls, phases: dict[str, AlignPhaseConfig]) -> dict[str, AlignPhaseConfig]:
        check_names(phases)
        return phases

    @model_validator(mode="after")
    def _fits(self) -> AlignConfig:  # the model is that of the checkpoint: `run` looks at the rest
        batch = self.batch
        check_divisible(self.parallel, sequences=batch.sequences, micro_sequences=batch.micro_sequences, stage="align")
        check_guards(self.trainer.collapse, self.balance, self.parallel, "align")
        for group in self.groups()[:-1]:
            last, phase = list(group.items())[-1]
            if not phase.checkpoint:
                raise ValueError(f"phases.{last} is followed by another kind, so it needs a `checkpoint` name")
        alone = sorted({phase.kind for phase in self.phases.values()} - {"sft"})
        if self.parallel.devices > 1 and alone:
            raise ValueError(f"phases of kind {' and '.join(alone)} run in one process: set parallel to 1")
        if round(self.replay * batch.sequences) == batch.sequences:
            raise ValueError("replay leaves no row for conversations: raise batch.sequences or lower replay")
        return self

    def groups(self) -> list[dict[str, AlignPhaseConfig]]:
        """Return the phases in runs of one kind with the same settings, in order."""
        found: list[dict[str, AlignPhaseConfig]] = []
        before: tuple[str, tuple[Config, ...]] | None = None
        for name, phase in self.phases.items():
            what = (phase.kind, phase.settings())
            if what != before:
                found.append({})
            found[-1][name] = phase
            before = what
        return found


def plan(config: AlignConfig) -> list[str]:
    """Return what the config implies, for --dry-run."""
    steps = sum(phase.steps for phase in config.phases.values())
    kinds = [next(iter(group.values())) for group in config.groups()]
    names = {
        "sft": "fine-tuning",
        "reward": "a reward model",
        "rl": "reinforcement learning",
        "distill": "distillation",
    }
    named = [names.get(one.kind, one.preference.loss) for one in kinds]
    return [
        *([f"sharded: {config.parallel.product} processes"] if config.parallel.devices > 1 else []),
        f"{', then '.join(named)}: {steps:,} steps of up to {config.batch.step_tokens:,} tokens "
        f"from {config.checkpoint}",
    ]
