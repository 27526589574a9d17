"""What a plan can be configured with: model, degrees, machine, and every assumption that a number rests on."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field

from freehold.core.config import Config, unknown_key
from freehold.core.errors import ConfigError
from freehold.model.config import ModelConfig
from freehold.parallel.config import ParallelConfig, check_degrees, validate_layout
from freehold.planner.hardware import DEVICES, INTERRUPTIONS_PER_DEVICE_HOUR, Device

PARTS = ("attention_per_layer", "norms_per_layer", "dense_ffn", "expert", "shared_experts", "router")
"""What `parts` may replace; see `parameter_counts`."""


class PlannedParallel(ParallelConfig):
    """The degrees, and what a rank keeps for the backward pass; a recipe says that under `trainer`."""

    recompute: Literal["none", "full"] = Field("none", description="run every block again in the backward pass?")


class BatchConfig(Config):
    """Rows of tokens in one optimizer step, over all devices, and in one forward pass of one data rank."""

    context_tokens: int = Field(4096, ge=8, description="length of a row")
    sequences: int = Field(0, ge=0, description="rows in one optimizer step, all devices (0: one a data rank)")
    micro_sequences: int = Field(1, ge=0, description="rows in one forward pass of a data rank (0: all of them)")


class MachineConfig(Config):
    """The devices and the assumptions about them; every printed time, price and risk rests on these."""

    device: str = Field("h100", description="one of " + ", ".join(DEVICES))
    devices: int = Field(0, ge=0, description="devices there are (0: as many as the degrees need)")
    mfu: float = Field(0.35, gt=0, le=1, description="share of the peak FLOP/s that the arithmetic reaches")
    overlap: float = Field(0.8, ge=0, le=1, description="share of communication hidden behind arithmetic")
    imbalance: float = Field(1.2, ge=1, description="busiest expert rank's tokens over the mean")
    dispatch: float = Field(
        1.0, gt=0, le=1, description="rows sent to experts over top-k; less where copies for one machine are merged"
    )
    kernels: Literal["fused", "native", "plain"] = Field(
        "fused", description="who decides what is kept for the backward pass: our ops, our CPU kernels, plain PyTorch"
    )
    usd_hour: float | None = Field(None, ge=0, description="price of a device-hour; null: the table's")
    overhead: float = Field(1.0, ge=1, description="all money of the project over the rent of this run")
    interruptions_per_device_hour: float = Field(
        INTERRUPTIONS_PER_DEVICE_HOUR, ge=0, description="unexpected stops; default: Llama 3 405B's"
    )
    storage_bytes_s: float = Field(50e9, gt=0, description="bytes a second that storage takes from all devices")
    network: float = Field(1.0, gt=0, description="bandwidth between machines over the table's, e.g. 2 for twice")
    bubble: float = Field(1.0, ge=0, le=1, description="share of 1F1B's pipeline bubble that the schedule leaves")

    @pydantic.field_validator("device")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DEVICES:
            raise ConfigError("no such device", where="machine.device", found=name, expected=", ".join(DEVICES))
        return name

    @property
    def spec(self) -> Device:
        """Return the row of the hardware table, at the price given."""
        spec = DEVICES[self.device]
        spec = spec._replace(network_bytes_s=self.network * spec.network_bytes_s)
        return spec if self.usd_hour is None else spec._replace(usd_hour=self.usd_hour)


class PlanConfig(Config):
    """One training run on paper."""

    name: str = Field("", description="what the plan is called")
    model: ModelConfig = Field(description="the shape, in AFMoE's fields")
    parts: dict[str, int] = Field(
        default_factory=dict, description="parameters of one layer's parts where the shape is not AFMoE's"
    )
    parallel: PlannedParallel = Field(default_factory=PlannedParallel, description="degrees")
    batch: BatchConfig = Field(default_factory=BatchConfig, description="rows of a step")
    machine: MachineConfig = Field(default_factory=MachineConfig, description="devices and assumptions")
    tokens: float = Field(0, ge=0, description="tokens of the run (0: unknown, so no days and no money)")
    matrices: Literal["muon", "adamw"] = Field("muon", description="who steps the hidden matrices")
    newton_schulz_steps: int = Field(5, ge=1, le=5, description="Muon's iterations of the orthogonalisation")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="compute dtype; masters are float32")
    loss_chunk_tokens: int = Field(2048, ge=0, description="tokens whose logits exist at one time (0: all)")

    @pydantic.field_validator("parts")
    @classmethod
    def _parts(cls, parts: dict[str, int]) -> dict[str, int]:
        for name in parts:
            if name not in PARTS:
                raise unknown_key(f"plan.parts.{name}", name, PARTS)
        return parts

    @property
    def sequences(self) -> int:
        """Return the rows of one optimizer step."""
        return self.batch.sequences or self.parallel.data * max(self.batch.micro_sequences, 1)

    @property
    def micro_sequences(self) -> int:
        """Return the rows of one forward pass of a data rank."""
        return self.batch.micro_sequences or self.sequences // self.parallel.data

    @property
    def micro_tokens(self) -> int:
        """Return the tokens of one forward pass of one rank."""
        return self.micro_sequences * self.batch.context_tokens // self.parallel.context

    @property
    def micro_batches(self) -> int:
        """Return the forward passes of one optimizer step."""
        return self.sequences // (self.parallel.data * self.micro_sequences)

    @property
    def bytes_per_value(self) -> int:
        """Return the width of the compute dtype."""
        return 2 if self.dtype == "bfloat16" else 4

    @pydantic.model_validator(mode="after")
    def _agree(self) -> PlanConfig:
        """Refuse degrees that do not fit model and batch."""
        if self.machine.devices:
            check_degrees(self.parallel, self.machine.devices, "devices (machine.devices)")
        validate_layout(
            self.parallel,
            self.model,
            context_tokens=self.batch.context_tokens,
            sequences=self.sequences,
            micro_sequences=self.batch.micro_sequences,
        )
        return self

    @property
    def chunk_tokens(self) -> int:
        """Return the tokens of one sequence that one rank holds."""
        return self.batch.context_tokens // self.parallel.context


def plan_of_recipe(name: str, pretrain: dict[str, Any]) -> dict[str, Any]:
    """Return what a recipe's filled `pretrain` section says of a plan: on this machine's CPU, or on H100s for CUDA."""
    cpu = {"device": "cpu", "mfu": 0.2, "kernels": "native", "storage_bytes_s": 0.5e9}
    batch, trainer = pretrain["batch"], pretrain["trainer"]
    steps = sum(phase["steps"] for phase in pretrain["phases"].values())
    return {
        "name": name,
        "model": pretrain["model"],
        "batch": {key: batch[key] for key in ("context_tokens", "sequences", "micro_sequences")},
        "tokens": steps * batch["context_tokens"] * batch["sequences"],
        "matrices": pretrain["optim"]["matrices"],
        "newton_schulz_steps": pretrain["optim"]["newton_schulz_steps"],
        "dtype": trainer["dtype"],
        "loss_chunk_tokens": trainer["loss_chunk_tokens"],
        "parallel": {**pretrain["parallel"], "nproc": 0, "recompute": "full" if trainer["recompute"] else "none"},
        "machine": {"device": "h100"} if pretrain["parallel"]["device"] == "cuda" else cpu,
    }
