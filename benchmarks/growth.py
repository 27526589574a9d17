"""How a step's time grows where it should not: with the number of experts, and with the length of the context.

Experts: 8 to 256 of them, top-4, so a token meets the same parameters; 8 rows of 512 tokens. Context: 512 to 8,192
positions, always 8,192 tokens a step, one model; sliding layers see 128 positions, every fourth layer sees all. The
shape is S of `train_step.py`, with four layers (one dense) where experts are counted. Ideal: the time at the least
size times the ratio of the FLOPs (`model/config.py`). Next to the whole step with AdamW and with Muon stands the model
alone, forward and backward; the difference is gradients summed, clipped and stepped for weights few tokens have met.
Every size is timed once a round, in turn; random tokens, a fresh router, so the experts are about evenly loaded.

    python benchmarks/growth.py --json benchmarks/results/growth.json --picture docs/images/growth.png
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
from common import environment, interleaved, middle, write
from train_step import SHAPES

from freehold.core.log import Log
from freehold.data.packing import Batch, text_batch
from freehold.kernels import cpu
from freehold.losses.cross_entropy import chunked_loss
from freehold.model.config import ModelConfig, flops_per_token, parameter_counts
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer

EXPERTS = (8, 16, 32, 64, 128, 256)
CONTEXTS = (512, 1024, 2048, 4096, 8192)
STEP_TOKENS = {"experts": 4096, "context": 8192}
S, _, S_CONTEXT = SHAPES["S"]


def trainer_of(model: ModelConfig, matrices: str, sequences: int, threads: int) -> Trainer:
    job = Job(
        folder=Path(),
        model=model,
        trainer=TrainerConfig(threads=threads),
        optim=OptimConfig(matrices=matrices),  # type: ignore[arg-type]
        balance=SmebuConfig(),
        schedule=Schedule({"all": PhaseConfig(steps=1000)}),
        order=None,  # type: ignore[arg-type]  # the batch is handed to each step
        micro_sequences=sequences,
        stage="pretrain",
        parent="",
    )
    return Trainer(job, Log(quiet=True), seed=0)


def rows(context_tokens: int, sequences: int, vocab_size: int = S["vocab_size"]) -> Batch:
    ids = np.random.default_rng(0).integers(32, vocab_size, (sequences, context_tokens + 1))
    return text_batch(ids.astype(np.uint16), 0, 0)


def model_alone(trainer: Trainer, batch: Batch) -> Callable[[], None]:
    """Return a forward and backward pass whose gradients are dropped."""
    ids, targets, documents = (torch.from_numpy(x) for x in (batch.input_ids, batch.targets, batch.document_ids))

    def run() -> None:
        trainer.model.train()
        hidden = trainer.model.hidden(ids, document_ids=documents)
        chunked_loss(hidden, trainer.model.lm_head.weight, targets, scale=1 / ids.numel()).total.backward()
        for parameter in trainer.state.parameters.values():
            parameter.grad = None

    return run


def cases(
    axes: list[str], threads: int
) -> dict[str, dict[str, tuple[dict[str, Callable[[], object]], dict[str, float]]]]:
    """Return for each axis and size what is timed, and its FLOPs and parameters."""
    found: dict[str, Any] = {axis: {} for axis in axes}
    sequences = STEP_TOKENS["experts"] // S_CONTEXT
    batch = rows(S_CONTEXT, sequences)
    for experts in EXPERTS if "experts" in axes else ():
        model = ModelConfig(**{**S, "num_hidden_layers": 4, "num_experts": experts})
        adamw, muon = (trainer_of(model, matrices, sequences, threads) for matrices in ("adamw", "muon"))
        found["experts"][str(experts)] = (
            {
                "model": model_alone(adamw, batch),
                "adamw": lambda t=adamw: t.train_step(batch),
                "muon": lambda t=muon: t.train_step(batch),
            },
            sizes(model, S_CONTEXT),
        )
    if "context" not in axes:
        return found
    model = ModelConfig(**{**S, "max_position_embeddings": max(CONTEXTS)})
    trainer = trainer_of(model, "adamw", STEP_TOKENS["context"] // min(CONTEXTS), threads)
    for context in CONTEXTS:
        batch_of = rows(context, STEP_TOKENS["context"] // context)
        found["context"][str(context)] = (
            {"model": model_alone(trainer, batch_of), "adamw": lambda b=batch_of: trainer.train_step(b)},
            sizes(model, context),
        )
    return found


def sizes(model: ModelConfig, context_tokens: int) -> dict[str, float]:
    counts = parameter_counts(model)
    return {
        "flops_per_token": flops_per_token(model, context_tokens),
        "active": counts["active_with_head"],
        "total": counts["total"],
    }


def draw(axes_of: dict[str, Any]) -> bytes:
    """Return a PNG: seconds over experts and over context, with the ideal lines."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from freehold.run.figure import BLUE, GREEN, MUTED, ORANGE, STYLE, png

    colours = {"model": GREEN, "adamw": BLUE, "muon": ORANGE}
    names = {"model": "forward and backward", "adamw": "whole step, AdamW", "muon": "whole step, Muon"}
    titles = {"experts": "Experts, top-4, 4,096 tokens", "context": "Positions of a row, 8,192 tokens"}
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4), dpi=130, layout="constrained")
        for axes, (axis, found) in zip(figure.subplots(1, 2), axes_of.items(), strict=True):
            x = [int(size) for size in found]
            for name in next(iter(found.values()))["seconds"]:
                s = [found[size]["seconds"][name] for size in found]
                middles = np.array([v["median"] for v in s])
                spread = [middles - [v["least"] for v in s], [v["most"] for v in s] - middles]
                axes.errorbar(x, middles, spread, color=colours[name], marker="o", ms=4, capsize=2, label=names[name])
                ideal = [v["ideal"][name] for v in found.values()]
                axes.plot(x, ideal, color=colours[name], lw=1, ls=(0, (4, 3)))
            axes.plot([], [], color=MUTED, lw=1, ls=(0, (4, 3)), label="ideal: by FLOPs")
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{size:,}" for size in x])
            axes.set_ylim(0)
            axes.set(title=titles[axis], ylabel="seconds")
            axes.legend()
        return png(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=STEP_TOKENS, default=list(STEP_TOKENS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pause-s", type=float, default=0.0, help="rest between rounds, on a machine that is shared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--draw-only", action="store_true", help="draw what --json holds")
    args = parser.parse_args()
    if not args.draw_only:
        torch.set_num_threads(args.threads)
        result: dict[str, Any] = {"axes": {}}
        if args.json and args.json.exists():
            result = json.loads(args.json.read_text())  # an axis that is not asked for stays
        result |= {"threads": args.threads, "rounds": args.rounds}
        for axis, found in cases(args.axes, args.threads).items():
            taken = interleaved(
                {f"{size} {name}": step for size, (steps, _) in found.items() for name, step in steps.items()},
                args.rounds,
                args.pause_s,
            )
            base = next(iter(found))
            lines = {}
            for size, (steps, facts) in found.items():
                growth = facts["flops_per_token"] / found[base][1]["flops_per_token"]
                seconds = {n: middle(t["seconds"] for t in taken[f"{size} {n}"]) for n in steps}
                lines[size] = {
                    **facts,
                    "seconds": seconds,
                    "ideal": {n: middle(t["seconds"] for t in taken[f"{base} {n}"])["median"] * growth for n in steps},
                    "foreign_cores": middle(t["foreign_cores"] for n in steps for t in taken[f"{size} {n}"])["median"],
                }
                parts = (f"{n} {s['median']:.3f} [{s['least']:.3f}, {s['most']:.3f}] s" for n, s in seconds.items())
                others = f"others {lines[size]['foreign_cores']:.2f} cores"
                print(f"{axis} {size}: {', '.join(parts)}; FLOPs x{growth:.2f}; {others}", flush=True)
            result["axes"][axis] = lines
        result |= {"operators": cpu.describe(torch.bfloat16), "environment": environment()}
        write(args.json, result)
    else:
        result = json.loads(args.json.read_text())
    if args.picture:
        args.picture.write_bytes(draw(result["axes"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
