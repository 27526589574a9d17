"""A small AFMoE with everything an error in spreading it could hide in, trained for some steps on any world.

Odd widths (nothing divides by four), irregular layers, a dense first layer, a shared expert, biased routing, losses on
the routing, rows with few and with no targets, padding, and a norm that is clipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch

from freehold.core.log import Log
from freehold.data.packing import IGNORE, PADDING, Batch
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.parallel.config import ParallelConfig
from freehold.trainer.config import CollapseConfig, TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer

ROWS, TOKENS, STEPS = 8, 16, 3
SHAPE = {
    "vocab_size": 66,
    "hidden_size": 36,
    "intermediate_size": 50,
    "moe_intermediate_size": 20,
    "head_dim": 8,
    "num_shared_experts": 1,
    "sliding_window": 3,
}
"""What differs from `tiny.HARD`: widths that four does not divide, and a window that a quarter of a row holds."""


def batches() -> list[Batch]:
    """Return whole steps, of which every rank takes its rows."""
    random, found = np.random.default_rng(0), []
    for _ in range(STEPS):
        ids, targets = random.integers(0, 66, (2, ROWS, TOKENS))
        documents = np.sort(random.integers(0, 3, (ROWS, TOKENS)), 1).astype(np.int32)
        targets[random.random((ROWS, TOKENS)) < 0.2] = IGNORE
        targets[0], documents[1, 10:], targets[1, 10:] = IGNORE, PADDING, IGNORE
        found.append(Batch(ids, targets, documents))
    return found


def shape(**changes: Any) -> ModelConfig:
    """Return the shape of the model."""
    return tiny.hard("sliding full sliding sliding", **SHAPE | changes)


def weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return weights far from their first values, and biases that decide something."""
    return tiny.disturb(Afmoe(config), seed=1).state_dict()


def make(parallel: dict[str, Any], dtype: str = "float64", **changes: Any) -> Trainer:
    """Return the real loop on this process's world."""
    config = shape(**changes.pop("model", {}))
    # Float64 is no dtype a recipe can ask for.
    collapse = CollapseConfig(action=changes.pop("collapse", "none"))
    trainer = TrainerConfig(threads=1, recompute=changes.pop("recompute", False), collapse=collapse)
    trainer = trainer.model_copy(update={"dtype": dtype})
    job = Job(
        folder=Path(),
        model=config,
        trainer=trainer,
        optim=OptimConfig(clip_norm=0.5, lr=1e-2, weight_decay=0.1, **changes.pop("optim", {})),
        balance=SmebuConfig(rate=1e-2, sequence_loss=1e-2, router_z_loss=1e-3),
        schedule=Schedule({"stable": PhaseConfig(steps=STEPS)}),
        order=None,  # type: ignore[arg-type]  # rows are handed in
        micro_sequences=changes.pop("micro", 2),
        stage="pretrain",
        parent="",
        parallel=ParallelConfig(**parallel),
    )
    assert not changes
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == "float64" else torch.float32)
    try:
        return Trainer(job, Log(quiet=True), seed=0, weights=weights(config))
    finally:
        torch.set_default_dtype(default)


def part(trainer: Trainer, batch: Batch) -> Batch:
    """Return this process's part of a step."""
    rows = trainer.world.rows(len(batch.input_ids))
    return batch.rows(rows.start, rows.stop).columns(trainer.world.columns(batch.input_ids.shape[1]))


def train(trainer: Trainer) -> dict[str, Any]:
    """Take the steps; return losses, norms, the first step's gradients, and all state after the last, whole."""
    report: dict[str, Any] = {"loss": [], "norm": [], "gradients": {}}
    step = trainer.state.optimizers.step

    def look(factor: float, scale: Any, keep: Any = None) -> None:
        if not report["gradients"]:
            report["gradients"] = {n: whole(trainer, n, m.grad) for n, m in trainer.state.masters.items()}
        step(factor, scale, keep)

    trainer.state.optimizers.step = look
    for batch in batches():
        values = trainer.train_step(part(trainer, batch))
        report["loss"].append([values[name] for name in ("loss/mean", "loss/z", "loss/sequence", "loss/router_z")])
        report["norm"].append(values["optim/grad_norm"])
    state = trainer.checkpoints.tensors()
    for name in ("model", "optimizer", "balance"):
        tensors = {k: trainer.state.gathered(t) for k, t in state[name].items()}
        report[name] = {key: tensor.detach().double().numpy().copy() for key, tensor in tensors.items()}
    report["counts"] = {n: layer.load_counts.numpy() for n, layer in trainer.state.moe_layers.items()}
    report["tokens"] = trainer.progress.tokens
    return report


def whole(trainer: Trainer, name: str, tensor: torch.Tensor) -> np.ndarray:
    """Return the complete tensor of which this is the process's part."""
    return trainer.state.gathered(trainer.state.to_checkpoint(name, tensor)).detach().double().numpy().copy()
