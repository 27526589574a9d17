"""Settings of phases of kind rl, reward and distill."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from freehold.core.config import Config

MOST_RATE = 1 / 30
"""Share of the peak rate of fine-tuning above which reinforcement learning has been seen to collapse."""


class EnvironmentConfig(Config):
    """Where tasks come from."""

    environment: str = Field("", description="an entry point of freehold.environments; empty: the key's name")
    weight: float = Field(1.0, gt=0, description="share of the prompts, next to the other environments")
    settings: dict[str, Any] = Field(default_factory=dict, description="what the environment takes")


class RlConfig(Config):
    """What a phase of kind rl asks, how it is rewarded, and what is minimised."""

    environments: dict[str, EnvironmentConfig] = Field(
        default_factory=dict, description="environments by name: arithmetic, letters, calculator, ..."
    )
    prompts: int = Field(32, ge=1, description="tasks of one batch of rollouts")
    group: int = Field(8, ge=2, description="answers to each task; the mean of their rewards is the baseline")
    max_tokens: int = Field(64, ge=1, description="most tokens of one turn of the assistant; a longer one is cut")
    max_turns: int = Field(8, ge=1, description="most turns of the assistant in an episode")
    temperature: float = Field(1.0, gt=0, le=2, description="of sampling, and of the loss")
    dialect: Literal["hermes", "xml"] = Field("hermes", description="how tool calls are written")
    loss: Literal["pg", "clip", "cispo", "dppo", "gspo"] = Field(
        "clip", description="what a token's ratio may do; where all ratios are 1, every one has the same gradient"
    )
    normalise: Literal["tokens", "sequences", "constant"] = Field(
        "tokens", description="sum over tokens / tokens of the step; GRPO's mean of means; / (answers * max_tokens)"
    )
    low: float | None = Field(None, ge=0, lt=1, description="lower clip; none: 0.2, of gspo 3e-4")
    high: float | None = Field(None, ge=0, description="upper clip; none: 0.28, of gspo 4e-4")
    cap: float = Field(5.0, gt=0, description="largest ratio of cispo")
    distance: float = Field(0.2, gt=0, le=1, description="of dppo: largest change of a token's probability")
    guard: Literal["none", "icepop", "tis"] = Field(
        "none", description="what repairs a gap between engine and trainer; it acts on ratios that are not 1 alone"
    )
    advantage: Literal["mean", "rloo", "std", "max_rl"] = Field("mean", description="baseline of a group")
    kl: float = Field(0.0, ge=0, description="weight of the KL to the checkpoint that the phase starts from")
    conciseness: float = Field(
        0.0, ge=0, lt=1, description="how much the longest right answer of a group loses, times the pass rate"
    )
    truncated: Literal["mask", "zero"] = Field(
        "mask", description="mask: an answer that was cut is not learned from; zero: it is, with a reward of 0"
    )
    refill: int = Field(
        0, ge=0, le=8, description="times as many tasks again that are drawn while too few groups differ in reward"
    )
    micro_rollouts: int = Field(32, ge=1, description="rollouts in one forward and backward pass")
    updates: int = Field(1, ge=1, description="optimizer steps on one batch of rollouts, each on a part of its groups")
    lag: int = Field(0, ge=0, description="batches by which rollouts are older than the weights that learn from them")
    rate: float = Field(MOST_RATE, gt=0, le=1, description="share of align.optim.lr; above 1/30 it tends to collapse")
    min_reward: float = Field(
        0.02, ge=0, le=1, description="least share of right answers in the first batch: below it nothing is learned"
    )
    held_out: int = Field(64, ge=0, description="held-out tasks answered greedily to watch for collapse; 0: none")
    held_out_every_steps: int = Field(10, ge=1, description="steps between these")
    collapse: float = Field(
        0.5, ge=0, lt=1, description="share of the accuracy at the start below which the phase stops and rolls back"
    )

    @model_validator(mode="after")
    def _fits(self) -> RlConfig:
        if self.prompts % self.updates:
            raise ValueError(f"prompts ({self.prompts}) must be a multiple of updates ({self.updates})")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the lower and upper clip."""
        usual = (3e-4, 4e-4) if self.loss == "gspo" else (0.2, 0.28)
        return usual[0] if self.low is None else self.low, usual[1] if self.high is None else self.high


class PracticeConfig(Config):
    """Right answers to tasks of environments, next to the conversations of a fine-tuning phase."""

    environments: dict[str, EnvironmentConfig] = Field(
        default_factory=dict, description="environments by name, as in rl; empty: none"
    )
    examples: int = Field(2000, ge=1, description="how many right answers")


class RewardConfig(Config):
    """What a phase of kind reward minimises."""

    centre: float = Field(0.01, ge=0, description="weight of the squared sum of both scores, which holds them around 0")


class TeacherConfig(Config):
    """Who is imitated, and under which terms."""

    checkpoint: str = Field(
        "", description="folder of a checkpoint of ours, of the same tokenizer; relative to the run"
    )
    licence: str = Field("", description="SPDX expression of the teacher's weights; empty: what its record says")
    licence_evidence: str = Field("", description="what shows that licence")
    allows_training: bool | None = Field(
        None, description="whether its terms allow other models to learn from it; false refuses, none asks the licence"
    )


class DistillConfig(Config):
    """What a phase of kind distill imitates."""

    teacher: TeacherConfig = Field(default_factory=TeacherConfig, description="the teacher")
    on_policy: bool = Field(
        False, description="true: on answers that the student draws for the tasks of `rl`; false: on conversations"
    )
    temperature: float = Field(1.0, gt=0, description="of both distributions")
