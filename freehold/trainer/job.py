"""What one training run is configured with: the loop reads it and never changes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from freehold.data.loader import Order
from freehold.losses.cross_entropy import CrossEntropy
from freehold.losses.protocol import Loss
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.optim.config import BalanceConfig, OptimConfig
from freehold.optim.schedule import Schedule
from freehold.parallel.config import ParallelConfig
from freehold.trainer.config import TrainerConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Job:
    """All that one training run needs to know."""

    folder: Path
    """Where `checkpoints/` and the named checkpoints go."""
    model: ModelConfig
    trainer: TrainerConfig
    optim: OptimConfig
    balance: BalanceConfig
    schedule: Schedule
    order: Order
    micro_sequences: int
    stage: str
    """pretrain or align: recorded in each checkpoint's trainer.json."""
    parent: str
    """content_sha256 of the checkpoint this run starts from, or empty."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokens_before: int = 0
    """Tokens the parent had seen."""
    files: tuple[Path, ...] = ()
    """Files copied into each checkpoint (the tokenizer's)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further facts for trainer.json."""
    documents_of: Callable[[int], list[dict[str, Any]]] = lambda _: []
    """Names the documents of a step: id, source, licence; none where only the order knows them."""
    loss: Loss | None = None
    """What the stage minimises; None: cross-entropy with the recipe's z-loss."""
    build: Callable[[], Afmoe] | None = None
    """Makes the model with its weights where only some of them train; None: drawn, or those of the start."""
    watch: Callable[[int, Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], None] | None = None
    """Sees each step that was applied: its number, the masters with their gradients, the loads of each MoE layer."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the model computes in."""
        return DTYPES[self.trainer.dtype]

    def minimised(self) -> Loss:
        """Return the loss of this run."""
        return self.loss or CrossEntropy(self.trainer.z_loss, self.trainer.loss_chunk_tokens)
