"""What is audited: opened checkpoints, and as much of the run that made them as there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from freehold.core.document import Document, read_rows
from freehold.core.errors import DataError
from freehold.core.log import Log
from freehold.data.loader import generator

if TYPE_CHECKING:
    from freehold.api import Loaded
    from freehold.data.shards import Shard, ShardSet

ROW_BATCH = 8
"""Rows of one forward pass: bounds activations and logits."""


class CannotAnswer(DataError):
    """An audit that needs what this model did not come with."""


@dataclass
class Subject:
    """Models by name in the order they were made, and what is known of their training."""

    models: dict[str, Loaded]
    log: Log
    seed: int = 0
    shards: ShardSet | None = None
    corpus: Path | None = None
    """Folder of curate."""
    trained: tuple[Path, ...] = ()
    """Folders of the training stages."""

    @property
    def product(self) -> Loaded:
        """Return the model that is given out."""
        return list(self.models.values())[-1]

    def split(self, split: str) -> dict[str, Shard]:
        """Return the token shards of a split by source; CannotAnswer without them."""
        if self.shards is None:
            raise CannotAnswer("the model came without its training text", expected="a run with token shards")
        return {name: shard for (name, of), shard in self.shards.shards.items() if of == split and len(shard.ids)}

    @cached_property
    def documents(self) -> dict[str, Document]:
        """The curated documents by id; empty without a corpus."""
        paths = sorted((self.corpus / "documents").glob("*.parquet")) if self.corpus else []
        return {row.id: row for path in paths for row in read_rows(path, Document)}

    def random(self, *parts: object) -> np.random.Generator:
        """Return a random generator of this audit's own."""
        return generator(self.seed, "audit", *parts)


@dataclass
class Finding:
    """What one audit found."""

    figures: dict[str, Any] = field(default_factory=dict)
    """By name: a number, or {value, low, high}."""
    tables: list[Any] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    """SVG by name."""
    details: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def logits_of(loaded: Loaded, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
    """Yield (row, fp32 logits [n, V]) of each row of n ids, rows of similar length in one forward pass."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    device = next(loaded.model.parameters()).device
    loaded.model.eval()
    for first in range(0, len(order), ROW_BATCH):
        batch = order[first : first + ROW_BATCH]
        width = max(len(rows[i]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for at, i in enumerate(batch):
            ids[at, : len(rows[i])] = torch.tensor(rows[i])  # padded behind: nothing looks forward
        hidden = loaded.model.hidden(ids.to(device))
        for at, i in enumerate(batch):
            yield i, loaded.model.lm_head(hidden[at, : len(rows[i])]).float()


def logprobs_of(loaded: Loaded, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the log-probability of each token but the first of each row, exactly as the engine computes it."""
    return [np.array(values[1:]) for values in loaded.engine.score(rows)]
