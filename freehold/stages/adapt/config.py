"""Settings of adaptation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from freehold.core.config import Config
from freehold.data.config import BatchConfig
from freehold.model.groups import families, select
from freehold.optim.config import BalanceConfig, NoBalanceConfig, OptimConfig, PhaseConfig, check_names
from freehold.parallel.config import ParallelConfig
from freehold.trainer.config import TrainerConfig

EVERYTHING = tuple(name for name in families() if name != "router")
"""All groups but the router, which only its policy touches."""
PRESETS: dict[str, dict[str, Any]] = {
    "specialise": {"groups": ["experts"], "replay": {"share": 0.0}, "optim": {"lr": 3e-3}},
    "learn": {"groups": list(EVERYTHING), "replay": {"share": 0.25}, "optim": {"lr": 1e-3}},
    "own": {"groups": [], "replay": {"share": 0.25}, "optim": {"lr": 1e-3}},
}
"""What each preset sets where the recipe does not."""


class ReplayConfig(Config):
    """Old text among the new rows, against forgetting."""

    share: float = Field(0.25, ge=0, lt=1, description="share of the rows of a step that are old text")
    source: Path | None = Field(
        None,
        description="folder of tokens to replay, e.g. runs/laptop/tokenize/tokens; empty: those of the base's own run",
    )
    mixture: dict[str, float] = Field(
        default_factory=dict, description="weight per source of the old text; empty: in proportion to tokens"
    )
    exclude: tuple[str, ...] = Field((), description="sources and document ids that were taken down: never replayed")


class DriftLimits(Config):
    """When routing or the old text has moved too far from the base; on old data only."""

    overlap: float = Field(0.86, ge=0, le=1, description="least mean share of chosen experts that are the base's")
    kl: float = Field(0.04, gt=0, description="most KL divergence of the router's scores from the base's, in nats")
    load_tv: float = Field(0.10, gt=0, description="most total variation between the loads of the experts")
    bits_per_byte: float = Field(0.02, gt=0, description="most rise of the old text's bits per byte, as a share")


class DriftConfig(Config):
    """Measuring how far the adapted model is from its base."""

    tokens: int = Field(8192, ge=0, description="held-out tokens of each source that are read; 0: do not measure")
    floor: bool = Field(True, description="also measure the base in float32: what is left without any training")
    gate: bool = Field(True, description="a drift beyond the limits fails the stage after everything is written")
    limits: DriftLimits = Field(default_factory=DriftLimits, description="the limits of the gate")


class ProofConfig(Config):
    """Opening the adapter with the tools of others."""

    run: bool = Field(True, description="open the written adapter with peft, transformers and llama.cpp and compare")
    tolerance: float = Field(1e-5, gt=0, description="largest difference of a log-probability, all in float32")
    tokens: int = Field(48, ge=8, description="tokens of the probe")


class AdaptConfig(Config):
    """LoRA, QLoRA or full tuning of a finished model on new text or conversations."""

    base: Path | None = Field(
        None, description="the model to adapt: a checkpoint, a run folder, or an AFMoE folder in Hugging Face form"
    )
    base_settled: str = Field(
        "",
        pattern=r"^$|\S",
        description="why a base without a record of its rights may be used, in the words of who looked into it",
    )
    preset: Literal["specialise", "learn", "own"] = Field(
        "learn",
        description="specialise: factors on the routed experts; learn: factors on everything with old text among the "
        "rows; own: every parameter in full with old text among the rows",
    )
    data: Literal["text", "conversations"] = Field("text", description="what of the run is learned from")
    groups: tuple[str, ...] = Field(
        EVERYTHING, description="groups that get factors, by our names: " + ", ".join(families())
    )
    experts: float | None = Field(
        None,
        gt=0,
        le=1,
        description="adapt only the experts that carry this share of a layer's gate on the new text; null: all",
    )
    rank: int = Field(16, ge=1, description="rank of the factors; of an expert's max(1, rank / experts a token uses)")
    expert_rank: int | None = Field(None, ge=1, description="rank of an expert's factors, instead of the rule")
    alpha: float = Field(32.0, gt=0, description="factors count alpha / rank")
    quantize: Literal["none", "Q4_0", "Q8_0", "Q4_K", "NF4"] = Field(
        "none", description="keep the frozen routed experts as blocks of this type; everything else stays as it is"
    )
    router: Literal["frozen", "replay_kl", "lora", "full"] = Field(
        "frozen",
        description="frozen: gate and bias stay, by hash; replay_kl: the same, and what enters the router on old rows "
        "is held to the base's choice; lora: factors on the gate; full: gate and bias train, and only a merged model "
        "is written",
    )
    router_kl: float = Field(
        1.0, gt=0, description="weight of the divergence of router: replay_kl, per token and layer"
    )
    replay: ReplayConfig = Field(default_factory=ReplayConfig, description="old text among the new")
    batch: BatchConfig = Field(default_factory=BatchConfig, description="rows and tokens of a step")
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(matrices="adamw", lr=1e-3), description="AdamW on the factors"
    )
    balance: BalanceConfig = Field(
        default_factory=NoBalanceConfig, description="expert balancing; anything but none needs router: full"
    )
    trainer: TrainerConfig = Field(default_factory=TrainerConfig, description="precision, loss, checkpoints, reports")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="one process: degrees must be 1")
    phases: dict[str, PhaseConfig] = Field(
        default_factory=lambda: {"adapt": PhaseConfig(steps=60, warmup_steps=3, shape="linear", end=0.1)},
        min_length=1,
        description="named phases, one after another",
    )
    check_steps: int = Field(3, ge=1, description="steps after which every planned group must have moved")
    merge: bool = Field(False, description="also write merged/, the base with the factors added, in Hugging Face form")
    drift: DriftConfig = Field(default_factory=DriftConfig, description="how far the model moved from its base")
    proof: ProofConfig = Field(default_factory=ProofConfig, description="the adapter in the tools of others")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """Fill in what the preset says and the recipe does not."""
        if not isinstance(data, dict):
            return data
        preset = PRESETS.get(data.get("preset") or "learn", {})
        data = {"groups": preset.get("groups"), **{k: v for k, v in data.items() if v is not None}}
        data["optim"] = {"matrices": "adamw", **preset.get("optim", {}), **_mapping(data.get("optim"))}
        data["replay"] = {**preset.get("replay", {}), **_mapping(data.get("replay"))}
        if data["groups"] is None:
            del data["groups"]
        return data

    @field_validator("phases")
    @classmethod
    def _names(cls, phases: dict[str, PhaseConfig]) -> dict[str, PhaseConfig]:
        check_names(phases)
        return phases

    @model_validator(mode="after")
    def _fits(self) -> AdaptConfig:
        found = select(self.groups, "adapt.groups")
        if self.preset != "own" and not found:
            raise ValueError("groups names nothing to adapt")
        if "router" in found and self.router != "lora":
            raise ValueError(f"groups names the router, but router is {self.router}: set router: lora")
        if self.parallel.devices > 1:
            raise ValueError("adaptation runs in one process: set parallel to 1")
        if not isinstance(self.balance, NoBalanceConfig) and self.router != "full":
            raise ValueError(f"balance moves the router's bias, but router is {self.router}: set balance.kind: none")
        if self.preset == "own" and self.quantize != "none":
            raise ValueError("a model in blocks of few bits cannot be trained in full: set quantize: none")
        if self.preset == "own" and (self.experts is not None or self.router in ("replay_kl", "lora")):
            raise ValueError("preset own trains every parameter: experts must be null and router frozen or full")
        if self.router == "replay_kl" and (self.trainer.recompute or not self.replayed_rows):
            raise ValueError("router: replay_kl needs rows of old text (replay.share) and no recompute")
        if self.replayed_rows == self.batch.sequences:
            raise ValueError("replay leaves no row for the new data: raise batch.sequences or lower replay.share")
        return self

    @property
    def adapted(self) -> tuple[str, ...]:
        """Return the groups that get factors."""
        if self.preset == "own":
            return ()
        found = select(self.groups, "adapt.groups")
        return (*found, "router") if self.router == "lora" and "router" not in found else found

    @property
    def replayed_rows(self) -> int:
        """Return the rows of a step that are old text."""
        return round(self.replay.share * self.batch.sequences)

    def ranks(self, experts_per_token: int) -> dict[str, int]:
        """Return the rank of each group: of an expert the rank divided by how many a token uses."""
        of_expert = self.expert_rank or max(1, self.rank // experts_per_token)
        return {group: of_expert if group.startswith("experts.") else self.rank for group in self.adapted}


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return {} if value is None else {k: v for k, v in value.model_dump().items() if k in value.model_fields_set}


def plan(config: AdaptConfig) -> list[str]:
    """Return what the config implies, for --dry-run."""
    steps = sum(phase.steps for phase in config.phases.values())
    what = "every parameter in full" if config.preset == "own" else f"factors on {', '.join(config.adapted)}"
    return [
        f"{config.preset}: {what}, router {config.router}",
        f"{steps:,} steps of up to {config.batch.step_tokens:,} tokens of {config.data}, "
        f"{config.replayed_rows} of {config.batch.sequences} rows old text",
        *([f"routed experts in {config.quantize} blocks"] if config.quantize != "none" else []),
    ]
