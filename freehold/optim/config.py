"""What a recipe can configure of the optimizer, the schedule and the balancing rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from freehold.core.config import Config

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Config):
    """Muon for the hidden matrices, AdamW for embedding, head, router and gains (trinity report, section 3.4)."""

    matrices: Literal["muon", "adamw"] = Field("muon", description="who steps the hidden matrices")
    muon_lr: float = Field(0.02, gt=0, description="peak Muon learning rate, before sqrt(max(1, fan_out/fan_in))")
    newton_schulz_steps: int = Field(5, ge=1, le=5, description="iterations of the orthogonalisation")
    muon_weight_decay: float = Field(0.0, ge=0, description="decoupled decay of the hidden matrices")
    lr: float = Field(3e-3, gt=0, description="peak AdamW learning rate")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's moment decays")
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW's decay of head, router and, with matrices: adamw, of the hidden matrices"
    )
    clip_norm: float = Field(1.0, gt=0, description="global gradient norm above which gradients are scaled down")


class PhaseConfig(Config):
    """One named stretch of the schedule: its length, its learning rate, and what its end is called."""

    steps: int = Field(gt=0, le=1_000_000_000, description="optimizer steps")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up from zero to the phase's first rate")
    shape: Literal["constant", "linear", "cosine"] = Field("constant", description="course of the rate")
    start: float = Field(1.0, ge=0, description="first rate, as a fraction of the peak")
    end: float = Field(1.0, ge=0, description="last rate, as a fraction of the peak (constant: same as start)")
    checkpoint: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9_-]*)?$",  # no dots: files of the stage and unfinished folders have one
        description="name of the checkpoint kept at the end, e.g. truebase",
    )
    stage_type: str = Field("", description="what that checkpoint is called: TrueBase, Base, Preview ...")
    mixture: dict[str, float] = Field(
        default_factory=dict, description="weight per source of this phase; empty: in proportion to tokens"
    )


def check_names(phases: Mapping[str, PhaseConfig]) -> None:
    """Refuse checkpoint names that would overwrite each other or the run's own folders; ValueError names them."""
    names = [phase.checkpoint for phase in phases.values() if phase.checkpoint]
    for name in names:
        if name in ("checkpoints", "log") or names.count(name) > 1:
            raise ValueError(f"checkpoint name {name!r} is " + ("reserved" if names.count(name) == 1 else "used twice"))


class RouterLossConfig(Config):
    """Terms of balancing that act through the gradient, next to any rule that moves the bias."""

    sequence_loss: float = Field(
        0.0, ge=0, description="alpha of the sequence-wise balance loss (Trinity Large: 1e-4); 0: none"
    )
    router_z_loss: float = Field(
        0.0, ge=0, description="weight of the squared log-partition of the router's logits (ST-MoE: 1e-3); 0: none"
    )

    @property
    def has_loss(self) -> bool:
        """Whether the model must return its routings for a loss."""
        return self.sequence_loss > 0 or self.router_z_loss > 0


class SmebuConfig(RouterLossConfig):
    """Soft-clamped Momentum Expert Bias Updates (trinity report, section 2.2)."""

    kind: Literal["smebu"] = "smebu"
    rate: float = Field(5e-4, gt=0, description="lambda: largest step before centring")
    momentum: float = Field(0.5, ge=0, lt=1, description="beta of the momentum")


class SignConfig(RouterLossConfig):
    """Auxiliary-loss-free balancing by the sign of the violation (Wang et al. 2024), re-centred."""

    kind: Literal["sign"] = "sign"
    rate: float = Field(1e-3, gt=0, description="gamma: the step")


class NoBalanceConfig(RouterLossConfig):
    """The bias stays as it is; a loss may balance alone."""

    kind: Literal["none"] = "none"


BalanceConfig = Annotated[SmebuConfig | SignConfig | NoBalanceConfig, Field(discriminator="kind")]
