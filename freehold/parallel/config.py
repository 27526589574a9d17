"""What a recipe can say about how the model and its batches are sharded over processes."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from freehold.core.config import Config
from freehold.core.errors import ConfigError
from freehold.model.config import ModelConfig


class SuperviseConfig(Config):
    """When a rank counts as hanging or slow, and when starting again has no more sense."""

    hang_s: float = Field(180.0, gt=0, description="a rank without a new step, save or validation for this long hangs")
    slow_s: float = Field(60.0, gt=0, description="seconds over which a rank is compared with the others")
    disk_wait_s: float = Field(
        600.0, ge=0, description="a run the disk has no room for is tried again for this long before it is given up"
    )
    max_relaunches: int = Field(3, ge=0, description="give up after this many starts without a new checkpoint")


class ParallelConfig(Config):
    """Degrees; the product of replicate, shard, context and pipeline is the number of processes, one a device."""

    replicate: int = Field(1, ge=1, description="copies of the sharded model (the outer axis of HSDP)")
    shard: int = Field(1, ge=1, description="data ranks that share one copy of the parameters (FSDP)")
    expert: int = Field(1, ge=1, description="ranks that share the experts of a layer; inside shard x context")
    context: int = Field(1, ge=1, description="ranks that share one sequence")
    pipeline: int = Field(1, ge=1, description="ranks that the layers are assigned to")
    schedule: Literal["1f1b", "interleaved"] = Field(
        "1f1b", description="pipeline: one group of layers a rank, or two, which halves the idle time and sends twice"
    )
    nproc: int = Field(
        0, ge=0, description="processes to start on this machine (0: one, or those that a launcher has started)"
    )
    hosts: int = Field(1, ge=1, description="machines that start `nproc` each (docs/never-lose-a-step.md)")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="cpu (over gloo) or cuda (over NCCL); auto: cuda where each local process has a device"
    )
    supervise: SuperviseConfig = Field(
        default_factory=SuperviseConfig,
        description="what `nproc` processes are watched for (docs/never-lose-a-step.md)",
    )

    @property
    def devices(self) -> int:
        """Return the product of the degrees."""
        return self.replicate * self.shard * self.context * self.pipeline

    @property
    def data(self) -> int:
        """Return how many ranks see different sequences."""
        return self.replicate * self.shard

    @property
    def stages(self) -> int:
        """Return the groups of consecutive layers that the pipeline is cut into."""
        # Two groups a rank: while one waits for its neighbour, the other has work (Narayanan et al. 2021).
        return self.pipeline * (2 if self.schedule == "interleaved" and self.pipeline > 1 else 1)

    @property
    def group(self) -> int:
        """Return the ranks that one copy of a stage's parameters is sharded over."""
        # Ranks of one context group read the same rows, so they can share parameters like data ranks.
        return self.shard * self.context

    @property
    def product(self) -> str:
        """Return the degrees and their product, for messages."""
        return (
            f"replicate {self.replicate} x shard {self.shard} x context {self.context} x pipeline {self.pipeline} "
            f"= {self.devices}"
        )


def check_degrees(parallel: ParallelConfig, processes: int, what: str, place: str = "parallel") -> None:
    """Raise ConfigError when the degrees do not multiply to the processes there are; `what` says whose number it is."""
    if parallel.devices != processes:
        raise ConfigError(
            f"the degrees do not multiply to the {what}",
            where=place,
            found=parallel.product,
            expected=processes,
            todo=f"e.g. {place}.shard={processes}, or start {parallel.devices}",
        )


def check_divisible(parallel: ParallelConfig, *, sequences: int, micro_sequences: int, stage: str = "") -> None:
    """Raise ConfigError for what is wrong whatever the model: processes, rows, passes; see `validate_layout`."""
    p, place = parallel, f"{stage}." if stage else ""
    if p.nproc:
        started = f"{place}parallel.nproc" + (f" x {place}parallel.hosts" if p.hosts > 1 else "")
        check_degrees(p, p.nproc * p.hosts, f"processes to start ({started})", f"{place}parallel")
    # Experts are sharded among ranks that already share the dense parameters.
    if p.group % p.expert:
        raise ConfigError(
            "expert ranks must be part of shard x context",
            where=f"{place}parallel.expert",
            found=f"{p.expert} in {p.shard} x {p.context}",
            expected=f"a divisor of {p.group}",
        )
    # A rank without a row, or with fewer than the others, would leave a collective waiting.
    each = micro_sequences or sequences // p.data
    if not each or sequences % (p.data * each):
        raise ConfigError(
            "the rows of a step do not divide evenly over the data ranks",
            where=f"{place}batch.sequences",
            found=f"{sequences} rows over {p.data} data ranks in passes of {micro_sequences or 'all'}",
            expected=f"a multiple of {math.lcm(p.data, p.data * max(micro_sequences, 1))}",
        )
    # With fewer passes than ranks some ranks never work; the interleaved schedule runs in rounds of `pipeline`.
    passes = sequences // (p.data * each)
    rounds = f", a multiple of {p.pipeline}" if p.schedule == "interleaved" else ""
    if passes < p.pipeline or (p.schedule == "interleaved" and passes % (passes // p.pipeline)):
        raise ConfigError(
            "the passes of a step do not fill the pipeline",
            where=f"{place}batch.micro_sequences",
            found=f"{passes} passes of {each} rows on each data rank, through {p.pipeline} ranks ({p.schedule})",
            expected=f"at least {p.pipeline} passes{rounds}",
            todo=f"lower {place}batch.micro_sequences or raise {place}batch.sequences",
        )


def validate_layout(
    parallel: ParallelConfig,
    model: ModelConfig,
    *,
    context_tokens: int,
    sequences: int,
    micro_sequences: int,
    stage: str = "",
) -> None:
    """Raise ConfigError, naming the key, when model or batch do not divide by the degrees.

    `sequences` are the rows of a whole step, `micro_sequences` those of one forward pass of a data rank (0: all of
    its rows).
    """
    p, place = parallel, f"{stage}." if stage else ""
    # One all-to-all sends blocks of equal numbers of experts.
    if model.num_experts % p.expert:
        raise ConfigError(
            "the experts do not divide evenly over the expert ranks",
            where=f"{place}parallel.expert",
            found=f"{model.num_experts} experts over {p.expert} ranks",
            expected=f"a divisor of {model.num_experts}",
        )
    # A sliding layer fetches keys from the rank before it only: a window may not reach over two ranks.
    slides = "sliding_attention" in model.layer_types
    if p.context > 1 and (
        context_tokens % p.context or (slides and context_tokens // p.context < model.sliding_window)
    ):
        raise ConfigError(
            "the chunk of a sequence that one rank holds is shorter than the window",
            where=f"{place}parallel.context",
            found=f"{context_tokens} tokens over {p.context} ranks = {context_tokens / p.context:g} each",
            expected=f"equal chunks of at least sliding_window = {model.sliding_window} tokens",
            todo=f"lower {place}parallel.context or raise {place}batch.context_tokens",
        )
    if p.stages > model.num_hidden_layers:
        raise ConfigError(
            "more stages than layers",
            where=f"{place}parallel.pipeline",
            found=p.stages,
            expected=f"at most {model.num_hidden_layers}",
        )
    check_divisible(p, sequences=sequences, micro_sequences=micro_sequences, stage=stage)
