"""The tiny model shapes, text, runs and recipes that all tests share; change a copy by keyword, never write another.

tiny.config()                 a plain shape that trains in milliseconds a step
tiny.hard()                   a shape with everything a silent error could hide in
tiny.source(), tiny.order()   random documents, and the order of pre-training over them
tiny.job(), tiny.trainer()    a run of 8 steps in two phases, without a recipe
tiny.PRETRAIN, tiny.ALIGN     the same as the sections of a recipe
tiny.RECIPE                   a whole recipe, from text to evaluation, for tests of the commands
tiny.law_recipe()             a recipe of one new source, for tests that bring text to a finished run
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from freehold.core.log import Log
from freehold.data.loader import PhaseRows, Source, TextOrder
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_dense_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}

HARD: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_dense_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_shared_experts": 2,
    "route_scale": 2.3,
    "sliding_window": 5,
    "max_position_embeddings": 64,
}

PHASES: dict[str, dict[str, Any]] = {
    "stable": {"steps": 5, "warmup_steps": 2, "checkpoint": "truebase", "stage_type": "TrueBase"},
    "anneal": {"steps": 3, "shape": "linear", "end": 0.0, "checkpoint": "base", "stage_type": "Base"},
}
TRAINER: dict[str, Any] = {"dtype": "float32", "threads": 1}

PRETRAIN: dict[str, Any] = {
    "model": {**SHAPE, "vocab_size": 320},
    "batch": {"context_tokens": 32, "sequences": 2},
    "trainer": {**TRAINER, "checkpoint_every_steps": 4},
    "phases": {
        "stable": {"steps": 4, "checkpoint": "truebase", "stage_type": "TrueBase"},
        "anneal": {"steps": 2, "shape": "linear", "end": 0.0, "checkpoint": "base", "stage_type": "Base"},
    },
}
ALIGN: dict[str, Any] = {
    "batch": {"context_tokens": 64, "sequences": 2},
    "trainer": TRAINER,
    "phases": {"sft": {"steps": 3, "checkpoint": "preview", "stage_type": "Preview"}},
}


def config(**changes: Any) -> ModelConfig:
    """Return the plain shape: window 8, a global layer every 4th, one dense layer, 4 experts of which 2 are used."""
    return ModelConfig(**SHAPE | changes)


def hard(kinds: str = "sliding full sliding sliding full", **changes: Any) -> ModelConfig:
    """Return a shape with irregular layer types, query width 96 over d 32, two shared experts, route_scale far from 1.

    `kinds` names the attention of each layer.
    """
    layers = tuple(f"{kind}_attention" for kind in kinds.split())
    return ModelConfig(**HARD | {"num_hidden_layers": len(layers), "layer_types": layers} | changes)


@torch.no_grad()
def disturb(model: Afmoe, seed: int = 0) -> Afmoe:
    """Fill a model with weights far from their first values, and expert biases that decide something; return it."""
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        else:
            parameter.mul_(3.0)  # so that attention and routing are far from uniform
    for moe in model.moe_layers().values():
        moe.expert_bias.normal_(0, 0.3, generator=generator)
    return model


def source(name: str = "a", seed: int = 0, documents: int = 30, low: int = 32) -> Source:
    """Return random documents of 5 to 39 tokens from `low` to 63; each ends with token 1."""
    g = np.random.default_rng(seed)
    lengths = g.integers(5, 40, documents)
    tokens = np.concatenate([np.append(g.integers(low, 64, n - 1), 1) for n in lengths]).astype(np.uint16)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return Source(name, tokens, starts, lengths, [f"{name}{i}" for i in range(documents)])


def phases(**steps: int) -> dict[str, PhaseConfig]:
    """Return the phases of a run, or with `steps` phases of those names and lengths."""
    found = {name: {"steps": n, "warmup_steps": min(n, 2)} for name, n in steps.items()} or PHASES
    return {name: PhaseConfig(**fields) for name, fields in found.items()}


def order(plan: Mapping[str, PhaseConfig] | None = None, sequences: int = 4, **changes: Any) -> TextOrder:
    """Return the order of pre-training over one source, in rows of 16 tokens; `plan` are the phases of the run."""
    rows = [PhaseRows(name, phase.steps, {}) for name, phase in (plan or phases()).items()]
    settings = {"context_tokens": 16, "sequences": sequences, "seed": 0, "separator": 1} | changes
    return TextOrder({"a": source()}, rows, **settings)


def job(folder: Path, plan: Mapping[str, PhaseConfig] | None = None, **changes: Any) -> Job:
    """Return a run of pre-training: 8 steps of 4 rows of 16 tokens, a checkpoint every 2; `changes` are Job's fields.

    The run has the phases `plan` in schedule and order.
    """
    plan = plan or phases()
    plain = Job(
        folder=folder,
        model=config(),
        trainer=TrainerConfig(**TRAINER, checkpoint_every_steps=2, log_every_steps=1, keep_last=2),
        optim=OptimConfig(muon_lr=0.02, lr=1e-2),
        balance=SmebuConfig(),
        schedule=Schedule(plan),
        order=changes["order"] if "order" in changes else order(plan),
        micro_sequences=4,
        stage="pretrain",
        parent="",
        facts={"tokenizer_sha256": "x"},
    )
    return dataclasses.replace(plain, **changes)


def trainer(folder: Path, plan: Mapping[str, PhaseConfig] | None = None, **changes: Any) -> Trainer:
    """Return the training loop of `job`."""
    return Trainer(job(folder, plan, **changes), Log(folder, quiet=True), seed=0)


def law_recipe(folder: Path) -> Path:
    """Write a recipe of one new source, forty short files, and return its path."""
    (folder / "law").mkdir()
    for number in range(40):
        text = f"Article {number}. " + f"Whoever owns a field of class {number} must keep its fence. " * 30
        (folder / "law" / f"{number}.txt").write_text(text, encoding="utf-8")
    source = {"kind": "folder", "path": str(folder / "law"), "licence": "LicenseRef-Own", "acquired": "2026-11-29",
              "licence_evidence": {"rule": "own work"}}  # fmt: skip
    data = {"name": "lawful", "runs_dir": str(folder / "runs"), "gather": {"sources": {"law": source}}}
    path = folder / "law.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path
