"""The answer to a take-down as data: what rows reached, what is still clean, and the way back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from freehold.run.layout import training


@dataclass(frozen=True)
class RightsSum:
    """Rows of one source under one licence."""

    source: str
    source_version: str
    kind: str
    licence: str
    documents: int


@dataclass(frozen=True)
class FateSum:
    """Rows of one source that ended in the same way: train, validation, dropped or unknown."""

    source: str
    fate: str
    documents: int


@dataclass(frozen=True)
class Origin:
    """Rows made from something that is asked for; certain when all of that is."""

    synthetic_from: str
    documents: int
    certain: bool


@dataclass(frozen=True)
class Twin:
    """A kept row of which a row asked for was dropped as a copy."""

    id: str
    source: str
    path: str
    licence: str


@dataclass(frozen=True)
class Excluded:
    """The rows as curate and rephrase take them: whole sources by name, the rest by id."""

    sources: list[str]
    documents: list[str]
    rewritten: list[str]


@dataclass(frozen=True)
class ShardSum:
    """Rows in one token shard."""

    shard: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class StageSum:
    """What one stage saw of the rows, and in which steps."""

    stage: str
    documents: int
    tokens: int
    steps: int
    ranges: list[list[int]]


@dataclass(frozen=True)
class Judged:
    """A checkpoint, and how many of the rows it learned from."""

    path: str
    stage: str
    stage_type: str
    phase: str
    step: int
    content_sha256: str
    state: Literal["affected", "clean", "unknown"]
    documents: int

    @property
    def age(self) -> tuple[int, int, int]:
        """Return what orders checkpoints; of two of one step the named one is kept for good, so it is the newer."""
        return (training().index(self.stage), self.step, -self.path.count("/"))


@dataclass(frozen=True)
class Restart:
    """The cheapest way to a run's last checkpoints without the rows."""

    origin: str
    """The checkpoint to continue from; empty for a start from nothing."""
    from_step: int
    steps: dict[str, int]
    step_s: dict[str, float]
    hours: float | None
    blocked: str
    """Why there is no way; empty when there is one."""
    certain: bool
    """False when no checkpoint is known to have learned from the rows but of some it is unknown."""


@dataclass(frozen=True)
class RunAnswer:
    """What the rows reached in one run."""

    run: str
    rows: int
    shards: tuple[ShardSum, ...]
    seen: tuple[StageSum, ...]
    checkpoints: list[Judged]
    unknown: list[str]
    exports: list[str]
    last_clean: str | None
    restart: Restart | None


@dataclass(frozen=True)
class Takedown:
    """The answer over a run and those next to it."""

    query: str
    matched_by: str
    run: str
    asked: int
    derived: int
    twins: tuple[Twin, ...]
    perhaps_derived: list[Origin]
    widened: bool
    rows: int
    rights: tuple[RightsSum, ...]
    fate: tuple[FateSum, ...]
    excluded: Excluded
    runs: list[RunAnswer]
    missing: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as JSON-able data; a restart's origin is called `from` there."""
        data = asdict(self)
        for run in data["runs"]:
            if run["restart"]:
                run["restart"] = {"from": run["restart"].pop("origin"), **run["restart"]}
        return data
