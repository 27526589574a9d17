"""Short training runs of a small AFMoE, kept by their settings: what `width_transfer.py` and `muon_map.py` are made of.

Two layers (one sliding, one full), both with 8 experts top-2 half as wide as the model, heads of 64, rows of 256
tokens of the laptop recipe's corpus, SMEBU, a tenth of the steps to warm up, then constant rates. The loss of a run is
a function of its settings alone (same bits under any load), so runs may go in the background; nothing is timed here.
A finished run is not run again; its file says on which operators it ran.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write

from freehold.core.log import Log
from freehold.data.loader import PhaseRows, TextOrder
from freehold.data.shards import ShardSet
from freehold.kernels import cpu
from freehold.model.config import ModelConfig
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.tokenizer.bpe import BOS, END_OF_TEXT
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer
from freehold.trainer.validate import bits_per_byte, held_out

CONTEXT_TOKENS, MICRO_SEQUENCES, VALIDATION_TOKENS, POINTS = 256, 32, 2048, 4


@dataclass(frozen=True)
class Setting:
    """What a run depends on, apart from the tokens."""

    width: int
    batch_tokens: int
    steps: int
    matrices: str
    lr: float
    """AdamW's peak rate"""
    muon_lr: float = 0.0
    """Muon's peak rate; 0 where AdamW steps the matrices"""
    iterations: int = 5
    """Newton-Schulz iterations"""
    seed: int = 0


def model_of(width: int, vocab_size: int) -> ModelConfig:
    """Return the shape of a width."""
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=3 * width, moe_intermediate_size=width // 2,
        num_hidden_layers=2, num_dense_layers=0, num_attention_heads=width // 64,
        num_key_value_heads=max(width // 128, 1), head_dim=64, num_experts=8, num_experts_per_tok=2, sliding_window=64,
        global_attn_every_n_layers=2, max_position_embeddings=CONTEXT_TOKENS,
    )  # fmt: skip


def trainer_of(setting: Setting, vocab_size: int, threads: int, order: Any = None) -> Trainer:
    """Return a trainer at its start."""
    rates: dict[str, Any] = {"muon_lr": setting.muon_lr} if setting.muon_lr else {}
    job = Job(
        folder=Path(),
        model=model_of(setting.width, vocab_size),
        trainer=TrainerConfig(threads=threads),
        optim=OptimConfig(
            matrices=setting.matrices, lr=setting.lr, newton_schulz_steps=setting.iterations, **rates
        ),
        balance=SmebuConfig(rate=5e-3),
        schedule=Schedule({"all": PhaseConfig(steps=setting.steps, warmup_steps=max(setting.steps // 10, 1))}),
        order=order,
        micro_sequences=min(MICRO_SEQUENCES, setting.batch_tokens // CONTEXT_TOKENS),
        stage="pretrain",
        parent="",
    )  # fmt: skip
    return Trainer(job, Log(quiet=True), seed=setting.seed)


class Runs:
    """Runs on one tokenized corpus; a finished one is read from `folder`."""

    def __init__(self, tokens: Path, folder: Path, threads: int = 1) -> None:
        self.shards = ShardSet.load(tokens, verify=False)
        self.folder, self.threads = folder, threads
        self.validation = {
            name: held_out(
                source, self.shards.document_bytes("validation", name), CONTEXT_TOKENS, VALIDATION_TOKENS, BOS
            )
            for name, source in self.shards.sources("validation").items()
            if source.total_tokens
        }

    def _path(self, setting: Setting) -> Path:
        key = json.dumps(asdict(setting), sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    def finished(self, setting: Setting) -> bool:
        """Return whether a run needs no more computing."""
        return self._path(setting).exists()

    def curve(self, setting: Setting) -> list[dict[str, float]]:
        """Return validation bits per byte and training loss after two, three and four quarters of the steps."""
        path = self._path(setting)
        if not path.exists():
            operators = cpu.operators(torch.bfloat16)
            write(path, {"setting": asdict(setting), "operators": operators, "curve": self._run(setting)})
        curve: list[dict[str, float]] = json.loads(path.read_text())["curve"]
        last = curve[-1]
        print(
            f"{setting.width:4} wide {setting.batch_tokens:6} tokens {setting.matrices:5} x{setting.iterations} "
            f"lr {setting.lr:<8g} muon {setting.muon_lr:<6g} {last['bpb']:.4f} bits per byte, {last['step']} steps",
            flush=True,
        )
        return curve

    def _run(self, setting: Setting) -> list[dict[str, float]]:
        order = TextOrder(
            self.shards.sources("train"),
            [PhaseRows("all", setting.steps, {})],
            context_tokens=CONTEXT_TOKENS,
            sequences=setting.batch_tokens // CONTEXT_TOKENS,
            seed=setting.seed,
            separator=END_OF_TEXT,
            begin=BOS,
        )
        trainer = trainer_of(setting, self.shards.vocab_size, self.threads, order)
        losses: list[float] = []
        curve: list[dict[str, float]] = []
        for step in range(setting.steps):
            losses.append(trainer.train_step(order.batch(step))["loss/mean"])
            if (step + 1) * POINTS // setting.steps > max(step * POINTS // setting.steps, 1):
                bits = bits_per_byte(trainer.model, self.validation)["val/bpb"]
                mean = float(np.mean(losses[-setting.steps // POINTS :]))
                curve.append({"step": step + 1, "bpb": round(bits, 5), "train_loss": round(mean, 5)})
        return curve
