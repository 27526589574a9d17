"""What a recipe can say about the shape of a batch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from freehold.core.config import Config
from freehold.core.errors import ConfigError


class BatchConfig(Config):
    """Rows of tokens in one optimizer step, and how many go through the model together."""

    context_tokens: int = Field(512, ge=8, description="length of a row")
    sequences: int = Field(8, ge=1, description="rows in one optimizer step")
    micro_sequences: int = Field(0, ge=0, description="rows in one forward and backward (0: all together)")

    @property
    def step_tokens(self) -> int:
        """Return the tokens of one optimizer step."""
        return self.context_tokens * self.sequences

    @property
    def micro(self) -> int:
        """Return the rows of one micro-batch."""
        return self.micro_sequences or self.sequences

    def check_fits(self, max_position_embeddings: int, stage: str) -> None:
        """Raise ConfigError when a row is longer than the model's context."""
        if self.context_tokens > max_position_embeddings:
            raise ConfigError(
                "a row is longer than the model's context",
                where=f"{stage}.batch.context_tokens",
                found=self.context_tokens,
                expected=f"at most max_position_embeddings = {max_position_embeddings}",
            )

    @model_validator(mode="after")
    def _divides(self) -> BatchConfig:
        # Equal micro-batches, so that compiled code and memory are the same in each.
        if self.sequences % self.micro:
            raise ValueError(f"sequences ({self.sequences}) must be a multiple of micro_sequences ({self.micro})")
        return self


class StreamConfig(Config):
    """One permuted document after another, cut into rows; the rows of a phase are shuffled."""

    kind: Literal["stream"] = "stream"


class BufferConfig(Config):
    """The Random Sequential Document Buffer: rows from documents picked at random, each document read in order."""

    kind: Literal["buffer"] = "buffer"
    documents: int = Field(
        8,
        ge=1,
        description="documents of a source at which its buffer is filled up again; what it holds should be a small "
        "part of what the run reads of that source",
    )
    refill: float = Field(2.0, ge=1, description="to how many times that number it is filled")
    workers: int = Field(
        1, ge=1, description="parts that rows, documents and slots are split into; the order depends on it"
    )


class EpochLimit(Config):
    """How often a source may be read, and what becomes of a mixture that asks for more."""

    most: float | None = Field(
        None,
        gt=0,
        description="times a source may be read, over all phases and those of the parent; none: no limit. Up to about "
        "four cost little (Muennighoff et al. 2023, arXiv:2305.16264)",
    )
    sources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="the same for single sources, e.g. {generated: 2}; goes before `most`"
    )
    over: Literal["error", "redistribute"] = Field(
        "error", description="what happens when a phase asks for more: an error, or the other sources give the rest"
    )

    def of(self, source: str) -> float | None:
        """Return the limit of a source, or None."""
        # What is said of one source goes before what is said of all.
        return self.sources.get(source, self.most)


class TextBatchConfig(BatchConfig):
    """Rows of running text, and the order in which documents get into them."""

    order: Annotated[StreamConfig | BufferConfig, Field(discriminator="kind")] = Field(
        default_factory=StreamConfig, description="order of the text: stream or buffer"
    )
    epochs: EpochLimit = Field(default_factory=EpochLimit, description="how often a source may be read")

    @model_validator(mode="after")
    def _splits(self) -> TextBatchConfig:
        if isinstance(self.order, BufferConfig):
            workers = self.order.workers
            for name, n in (("sequences", self.sequences), ("order.documents", self.order.documents)):
                # Equal parts for all workers: the order then depends on their number, and on nothing else.
                if n % workers:
                    raise ValueError(f"{name} ({n}) must be a multiple of order.workers ({workers})")
        return self


class LongConfig(Config):
    """Which text a longer context is trained on."""

    keep_short: float = Field(
        0.01, ge=0, le=1, description="probability that a very short document is kept; rises with length to `keep_long`"
    )
    keep_long: float = Field(0.9, ge=0, le=1, description="probability that a document which fills a row is kept")
    join: bool = Field(True, description="join the kept documents of one source until they fill a row")
    needles: float = Field(
        0.25, ge=0, le=1, description="share of rows with generated needle tasks hidden in their own text; 0: none"
    )
    keys: int = Field(8, ge=1, le=16, description="most facts in one task; all are asked for")
    wordings: int = Field(4, ge=1, le=4, description="forms of a fact: 1 a pair alone, up to 4 with whole sentences")
