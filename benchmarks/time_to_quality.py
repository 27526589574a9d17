"""Seconds of training until held-out text is predicted to a given number of bits per byte, for six ways to train.

All read the same tokens in the same order from a finished `tokenize` stage, hold the same validation documents out,
warm up for 20 steps and then keep their rates. Each way tries the same three multiples of its base rates with seed
0; the best goes on with the other seeds. Only training steps are timed, from the second one on, so that compiling is
free.

1 freehold       AFMoE, Muon + AdamW, SMEBU: what the laptop recipe does
2 transformers   the same AFMoE in transformers, fused AdamW, bfloat16 autocast, torch.compile, no balancing
3 dense          all layers dense at equal active parameters, otherwise as 1
4 adamw          as 1 with AdamW for every parameter
5 sign, none     as 1 with the sign rule, without balancing

    freehold run recipes/laptop.yaml until=tokenize
    python benchmarks/time_to_quality.py --run runs/laptop --json benchmarks/results/time_to_quality.json

An interrupted run goes on: every finished measurement is in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from common import environment, write

from freehold.core.log import Log
from freehold.data.loader import PhaseRows, TextOrder
from freehold.data.packing import Batch
from freehold.data.shards import ShardSet
from freehold.kernels import native
from freehold.model.afmoe import Afmoe
from freehold.model.config import SHAPES, ModelConfig, parameter_counts, to_hf_dict
from freehold.optim.config import NoBalanceConfig, OptimConfig, PhaseConfig, SignConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.tokenizer.bpe import END_OF_TEXT
from freehold.trainer.config import TrainerConfig
from freehold.trainer.loop import Job, Trainer
from freehold.trainer.validate import bits_per_byte, held_out

CONTEXT_TOKENS, SEQUENCES, STEPS, WARMUP_STEPS, VALIDATE_EVERY = 512, 8, 4000, 20, 25
MULTIPLES = (0.5, 1.0, 2.0)
LAPTOP = ModelConfig(**SHAPES["laptop"])
DENSE = ModelConfig(**{**SHAPES["laptop"], "num_dense_layers": SHAPES["laptop"]["num_hidden_layers"]})
MUON, MUON_LR, ADAMW_LR = "muon", 0.02, 5e-3
WAYS: dict[str, dict[str, Any]] = {
    "freehold": {},
    "transformers": {"matrices": "adamw", "lr": 2e-3},
    "dense": {"model": DENSE},
    "adamw": {"matrices": "adamw", "lr": 2e-3},
    "sign": {"balance": SignConfig(kind="sign")},
    "none": {"balance": NoBalanceConfig(kind="none")},
}


class Ours:
    """Training by our own loop's step."""

    def __init__(self, order: TextOrder, way: dict[str, Any], multiple: float, seed: int, folder: Path) -> None:
        self.order = order
        job = Job(
            folder=folder,
            model=way.get("model", LAPTOP),
            trainer=TrainerConfig(),
            optim=OptimConfig(
                matrices=way.get("matrices", MUON), muon_lr=MUON_LR * multiple, lr=way.get("lr", ADAMW_LR) * multiple
            ),
            balance=way.get("balance", SmebuConfig(kind="smebu", rate=5e-3)),
            schedule=Schedule({"all": PhaseConfig(steps=STEPS, warmup_steps=WARMUP_STEPS)}),
            order=order,
            micro_sequences=SEQUENCES,
            stage="pretrain",
            parent="",
        )
        self.trainer = Trainer(job, Log(folder, quiet=True), seed=seed)

    def step(self, step: int) -> None:
        self.trainer.train_step(self.order.batch(step))

    def model(self) -> Afmoe:
        return self.trainer.model


class Theirs:
    """Training transformers' model the way its users would."""

    def __init__(self, order: TextOrder, way: dict[str, Any], multiple: float, seed: int, _: Path) -> None:
        from transformers import AfmoeConfig, AfmoeForCausalLM

        self.order = order
        self.measure = Afmoe(LAPTOP)  # holds the weights while they are validated, so that all are measured alike
        self.measure.init_weights(torch.Generator().manual_seed(seed))
        hf = AfmoeConfig(**{k: v for k, v in to_hf_dict(LAPTOP, "float32").items() if k != "architectures"})
        hf._experts_implementation, hf._attn_implementation = "grouped_mm", "sdpa"
        self.hf = AfmoeForCausalLM(hf).float()
        self.hf.load_state_dict(self.measure.state_dict())
        self.compiled = torch.compile(self.hf, dynamic=False)
        self.peak = way["lr"] * multiple
        self.optimizer = torch.optim.AdamW(
            self.hf.parameters(), lr=self.peak, betas=OptimConfig().betas, weight_decay=0.1, fused=True
        )

    def step(self, step: int) -> None:
        batch: Batch = self.order.batch(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * min(1.0, (step + 1) / WARMUP_STEPS)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.compiled(input_ids=torch.from_numpy(batch.input_ids), use_cache=False).logits
        targets = torch.from_numpy(batch.targets).flatten()
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(self.hf.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def model(self) -> Afmoe:
        self.measure.load_state_dict(self.hf.state_dict())
        return self.measure


def curve(
    make: Callable[[], Ours | Theirs], validate: Callable[[Afmoe], float], target: float, budget_s: float
) -> Iterator[dict[str, float]]:
    """Train; yield (step, seconds of training, bits per byte) until the target or the budget is reached."""
    way, seconds = make(), 0.0
    for step in range(STEPS):
        start = time.perf_counter()
        way.step(step)
        if step:
            seconds += time.perf_counter() - start
        if (step + 1) % VALIDATE_EVERY == 0:
            point = {"step": step + 1, "seconds": round(seconds, 2), "bpb": validate(way.model())}
            yield point
            if point["bpb"] <= target or seconds > budget_s:
                return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/laptop"))
    parser.add_argument("--target", type=float, default=1.9, help="bits per byte")
    parser.add_argument("--budget-s", type=float, default=300, help="give up after so many seconds of training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/time_to_quality.json"))
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    shards = ShardSet.load(args.run / "tokenize" / "tokens")
    orders = {
        seed: TextOrder(
            shards.sources("train"),
            [PhaseRows("all", STEPS, {})],
            context_tokens=CONTEXT_TOKENS,
            sequences=SEQUENCES,
            seed=seed,
            separator=END_OF_TEXT,
        )
        for seed in range(args.seeds)
    }
    validation = {
        name: held_out(source, shards.document_bytes("validation", name), CONTEXT_TOKENS, 4096, END_OF_TEXT)
        for name, source in shards.sources("validation").items()
        if source.total_tokens
    }
    result: dict[str, Any] = {"target_bpb": args.target, "budget_s": args.budget_s, "measured": {}}
    if args.json.exists():
        old = json.loads(args.json.read_text())
        if (old["target_bpb"], old["budget_s"]) == (args.target, args.budget_s):
            result = old
    result |= {
        "tokens_sha256": json.loads((args.run / "tokenize" / "manifest.json").read_text())["content_sha256"],
        "active_parameters": {n: parameter_counts(c)["active"] for n, c in (("afmoe", LAPTOP), ("dense", DENSE))},
        "operators": native.describe(torch.bfloat16),
        "environment": environment("transformers"),
    }

    def measured(name: str, multiple: float, seed: int) -> dict[str, Any]:
        key = f"{name} x{multiple} seed {seed}"
        if key not in result["measured"]:
            kind = Theirs if name == "transformers" else Ours
            with tempfile.TemporaryDirectory() as folder:
                points = list(
                    curve(
                        lambda: kind(orders[seed], WAYS[name], multiple, seed, Path(folder)),
                        lambda model: bits_per_byte(model, validation)["val/bpb"],
                        args.target,
                        args.budget_s,
                    )
                )
            result["measured"][key] = {"curve": points, "reached": points[-1]["bpb"] <= args.target, **points[-1]}
            write(args.json, result)
        found = result["measured"][key]
        how = "reached" if found["reached"] else "NOT reached, stands at"
        print(f"{key}: {how} {found['bpb']:.3f} after {found['seconds']:.0f} s, {found['step']} steps", flush=True)
        return found

    summary = {}
    for name in args.ways.split(","):
        swept = {multiple: measured(name, multiple, 0) for multiple in MULTIPLES}
        best = min(swept, key=lambda m: (not swept[m]["reached"], swept[m]["seconds"], swept[m]["bpb"]))
        runs = [swept[best], *(measured(name, best, seed) for seed in range(1, args.seeds))]
        seconds = [r["seconds"] if r["reached"] else None for r in runs]
        known = [s for s in seconds if s is not None]
        summary[name] = {
            "multiple": best,
            "seconds": seconds,
            "median_s": statistics.median(known) if len(known) == len(runs) else None,
            "steps": [r["step"] for r in runs],
            "bpb_at_end": [r["bpb"] for r in runs],
        }
    result["summary"] = {**result.get("summary", {}), **summary}
    write(args.json, result)
    base = result["summary"].get("freehold", {}).get("median_s")
    for name, line in result["summary"].items():
        ratio = f"{line['median_s'] / base:.2f} x" if base and line["median_s"] else "not reached by all"
        print(f"{name:14s} rates x{line['multiple']}: {line['seconds']} s, {ratio}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
