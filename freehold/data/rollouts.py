"""Rollouts: what a policy sampled, what it earned, and why; the ledger they are kept in, and the rows they become.

One parquet file for each batch of rollouts, written before anything learns from it and never changed. Each file names
the hash of the one before it, so a file that was changed, removed or exchanged shows.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from freehold.core.artifact import sha256_file, write_atomic
from freehold.core.errors import ArtifactError
from freehold.core.marks import IGNORE, PADDING
from freehold.data.packing import Batch

FORMAT = "1"
FOLDER = "rollouts"
TRAINED, NO_SPREAD, CUT = "trained", "no spread", "truncated"
ROW_MULTIPLE = 16
"""Rows are as wide as the longest rollout, rounded up: what the kernels read together."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer to one task, with everything that its reward and its loss are computed from."""

    step: int
    """The step it is for."""
    drawn_at: int
    """Steps that the policy had done when it drew this."""
    policy: str
    """SHA-256 of the weights that drew it."""
    tokenizer: str
    environment: str
    version: str
    task: str
    answer: str
    """JSON of what the verifier compares with."""
    group: int
    member: int
    seed: int
    sampling: str
    """JSON"""
    ids: list[int]
    sampled: list[bool]
    """Of each id, whether the policy drew it."""
    behaviour: list[float]
    """fp32 log p of each id under the policy that drew; 0 where it did not."""
    reference: list[float] = field(default_factory=list)
    """The same under the reference; empty when there is none."""
    prompt: str
    """JSON of the messages of the prompt"""
    turns: str
    """JSON of the assistant's turns"""
    results: str
    """JSON of what the environment said between them"""
    state: str
    """JSON of the environment's state at the end"""
    truncated: bool
    calls: int
    invalid_calls: int
    parts: str = "{}"
    """JSON of the reward's parts by name"""
    length_factor: float = 1.0
    reward: float = 0.0
    group_mean: float = 0.0
    advantage: float = 0.0
    why: str = ""
    """trained, no spread or truncated"""
    source: str = ""
    document: str = ""
    licence: str = ""
    teacher: str = ""

    @property
    def drawn_tokens(self) -> int:
        """Return how many tokens the policy drew."""
        return sum(self.sampled)

    @property
    def correct(self) -> float:
        """Return the part of the reward that says whether the answer is right."""
        return float(json.loads(self.parts).get("correct", 0.0))


SCHEMA = pa.schema(
    [
        *((name, pa.int64()) for name in ("step", "drawn_at", "group", "member", "seed", "calls", "invalid_calls")),
        *((name, pa.string()) for name in ("policy", "tokenizer", "environment", "version", "task", "answer")),
        *((name, pa.string()) for name in ("sampling", "prompt", "turns", "results", "state", "parts", "why")),
        *((name, pa.string()) for name in ("source", "document", "licence", "teacher")),
        ("ids", pa.list_(pa.int32())),
        ("sampled", pa.list_(pa.bool_())),
        # fp32: the bits that the loss reads.
        ("behaviour", pa.list_(pa.float32())),
        ("reference", pa.list_(pa.float32())),
        ("truncated", pa.bool_()),
        *((name, pa.float64()) for name in ("length_factor", "reward", "group_mean", "advantage")),
    ]
)


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """A batch of rollouts: further arrays of shape [B, T]."""

    behaviour: np.ndarray
    advantage: np.ndarray
    reference: np.ndarray
    sequence: np.ndarray


class RolloutLedger:
    """The rollouts of one phase, by the first step that they are for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Return the file of the batch that begins at a step."""
        return self.folder / f"step_{step:08}.parquet"

    def steps(self) -> list[int]:
        """Return the steps at which a batch begins, in order."""
        return sorted(int(path.stem.removeprefix("step_")) for path in self.folder.glob("step_*.parquet"))

    def has(self, step: int) -> bool:
        """Return whether the batch is there, complete: files appear whole or not at all."""
        return self.path(step).exists()

    def write(self, step: int, rollouts: Sequence[Rollout], settings: Mapping[str, Any]) -> None:
        """Write a batch to disk before anything learns from it; it follows the batch before it."""
        before = [known for known in self.steps() if known < step]
        facts = {
            "format_version": FORMAT,
            "previous": sha256_file(self.path(before[-1])) if before else "",
            "settings": json.dumps(dict(settings), sort_keys=True),
        }
        columns = {name: [getattr(one, name) for one in rollouts] for name in SCHEMA.names}
        table = pa.table(columns, schema=SCHEMA.with_metadata(facts))
        out = io.BytesIO()
        pq.write_table(table, out, compression="zstd")
        write_atomic(self.path(step), out.getvalue())

    def read(self, step: int) -> tuple[list[Rollout], dict[str, Any]]:
        """Return a batch and the settings it was graded with.

        ArtifactError when the file is damaged, of another format, or does not follow the one before it.
        """
        path = self.path(step)
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ArtifactError("a file of rollouts cannot be read", where=path, found=error) from error
        facts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if facts.get("format_version") != FORMAT:
            raise ArtifactError(
                "rollouts of another format version", where=path, found=facts.get("format_version"), expected=FORMAT
            )
        before = [known for known in self.steps() if known < step]
        previous = sha256_file(self.path(before[-1])) if before else ""
        if facts["previous"] != previous:
            raise ArtifactError(
                "a file of rollouts does not follow the one before it: one of them was changed or removed",
                where=path,
                found=previous[:16],
                expected=facts["previous"][:16],
                todo="bring the files back from a copy, or make the stage again with --clean",
            )
        return [Rollout(**row) for row in table.to_pylist()], json.loads(facts["settings"])


def batch_of(step: int, known: Sequence[int]) -> int | None:
    """Return the first step of the batch that a step learns from; None when there is none."""
    return max((first for first in known if first <= step), default=None)


def policy_batch(rollouts: Sequence[Rollout], pad: int) -> PolicyBatch:
    """Arrange rollouts as rows, one each; without any, one row of padding.

    A row of its own begins at position 0, as it did in the engine: rotary angles, and with them bits, are the same.
    """
    longest = max((len(one.ids) - 1 for one in rollouts), default=1)
    shape = (max(len(rollouts), 1), -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE)
    inputs = np.full(shape, pad, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    documents = np.full(shape, PADDING, dtype=np.int32)
    behaviour, advantage, reference = (np.zeros(shape, dtype=np.float32) for _ in range(3))
    for row, one in enumerate(rollouts):
        length = len(one.ids) - 1
        ids, mask = np.asarray(one.ids, dtype=np.int64), np.asarray(one.sampled, dtype=bool)
        inputs[row, :length] = ids[:-1]
        targets[row, :length] = np.where(mask[1:], ids[1:], IGNORE)
        documents[row, :length] = 0
        behaviour[row, :length] = one.behaviour[1:]
        advantage[row, :length] = one.advantage
        # Without a reference its place is taken by the policy that drew: k3 is then the distance from it.
        reference[row, :length] = (one.reference or one.behaviour)[1:]
    return PolicyBatch(inputs, targets, documents, behaviour, advantage, reference, np.zeros(shape, dtype=np.int32))


def with_values(rollout: Rollout, **changes: Any) -> Rollout:
    """Return a rollout with some fields changed."""
    return dataclasses.replace(rollout, **changes)
