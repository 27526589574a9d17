"""A full training step compared with transformers' AfmoeForCausalLM at its best, interleaved in one run.

Both start from the same weights and take the same batch: forward, backward, clip, AdamW (fused), and for ours the
copy to the compute weights and the expert balancing as well (transformers has none). Ours computes in bfloat16 with
fp32 masters, transformers in bfloat16 autocast over fp32 weights; with --dtype float32 both in fp32. Transformers'
candidates (experts as grouped_mm or one by one, with and without torch.compile) are tried first; the fastest continues.
The first losses must agree, and ours may be no further from transformers' fp32 logits than its own autocast is (in
fp32: within 1e-4), or the script fails.

    python benchmarks/train_step.py --config S --json benchmarks/results/train_step_S.json
    python benchmarks/train_step.py --config S --dtype float32 --json benchmarks/results/train_step_S_fp32.json
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import psutil
import torch
from common import environment, timed, write

from freehold.core.log import Log
from freehold.data.packing import Batch, text_batch
from freehold.kernels import cpu
from freehold.model.config import ModelConfig, flops_per_token, to_hf_dict
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.parallel.config import ParallelConfig
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer
from freehold.trainer.monitor import gemm_flops_per_s

SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "S": (
        {
            "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 8, "num_dense_layers": 1, "num_experts": 32,
            "num_experts_per_tok": 4, "moe_intermediate_size": 128, "intermediate_size": 768, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 128, "max_position_embeddings": 512,
        }, 8, 512,
    ),
    "M": (
        {
            "vocab_size": 16384, "hidden_size": 512, "num_hidden_layers": 12, "num_dense_layers": 2, "num_experts": 128,
            "num_experts_per_tok": 4, "moe_intermediate_size": 256, "intermediate_size": 1536,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "sliding_window": 256,
            "max_position_embeddings": 1024,
        }, 4, 1024,
    ),
}  # fmt: skip
CANDIDATES = (("grouped_mm", True), ("grouped_mm", False), ("eager", False))
LEARNING_RATE = 1e-4


class Theirs:
    """One way to train transformers' model."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, torch.Tensor], experts: str, compiled: bool, device: str = "cpu"
    ) -> None:
        from transformers import AfmoeConfig, AfmoeForCausalLM

        hf = AfmoeConfig(**{k: v for k, v in to_hf_dict(config, "float32").items() if k not in ("architectures",)})
        hf._experts_implementation = experts
        hf._attn_implementation = "sdpa"
        self.model = AfmoeForCausalLM(hf).float()
        self.model.load_state_dict(weights)
        self.device = torch.device(device)
        self.model.to(self.device)
        self.model.train()
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def loss(self, batch: Batch, autocast: bool) -> torch.Tensor:
        ids, targets = (torch.from_numpy(x).to(self.device) for x in (batch.input_ids, batch.targets))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            logits = self.forward(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def logits(self, batch: Batch, autocast: bool) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            return self.model(
                input_ids=torch.from_numpy(batch.input_ids).to(self.device), use_cache=False
            ).logits.float()

    def step(self, batch: Batch, autocast: bool) -> float:
        loss = self.loss(batch, autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def ours(
    config: ModelConfig, dtype: str, sequences: int, folder: Path, *, device: str = "cpu", compiled: bool = False
) -> Trainer:
    job = Job(
        folder=folder,
        model=config,
        trainer=TrainerConfig(dtype=dtype, z_loss=0.0, compile=compiled),
        parallel=ParallelConfig(device=device),  # type: ignore[arg-type]
        optim=OptimConfig(matrices="adamw", lr=LEARNING_RATE),
        balance=SmebuConfig(kind="smebu"),
        schedule=Schedule({"all": PhaseConfig(steps=1000, warmup_steps=0)}),
        order=None,  # type: ignore[arg-type]  # each step gets the batch
        micro_sequences=sequences,
        stage="pretrain",
        parent="",
    )
    return Trainer(job, Log(folder, quiet=True), seed=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=SHAPES, default="S")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--candidates", default="", help="only these, e.g. grouped_mm+compile,eager")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    shape, sequences, tokens = SHAPES[args.config]
    config, autocast = ModelConfig(**shape), args.dtype == "bfloat16"
    rng = np.random.default_rng(0)
    batch = text_batch(rng.integers(2, config.vocab_size, (sequences, tokens + 1)).astype(np.uint16), 0, 0)
    trainer = ours(config, args.dtype, sequences, Path(os.environ.get("TMPDIR", "/tmp")) / "freehold-train-step")
    # Parameters have transformers' names in memory.
    weights = {name: tensor.detach().float() for name, tensor in trainer.checkpoints.tensors()["model"].items()}
    peak = gemm_flops_per_s(getattr(torch, args.dtype), seconds=2)

    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(torch.from_numpy(batch.input_ids)).float()

    names = [f"{experts}{'+compile' if compiled else ''}" for experts, compiled in CANDIDATES]
    tried: dict[str, Any] = {}
    best: Theirs | None = None
    for name, (experts, compiled) in zip(names, CANDIDATES, strict=True):
        if args.candidates and name not in args.candidates.split(","):
            continue
        try:
            theirs = Theirs(config, weights, experts, compiled)
            exact, rounded = (theirs.logits(batch, autocast=precise) for precise in (False, autocast))
            distance = {
                who: float((x - exact).norm() / exact.norm()) for who, x in (("ours", logits), ("theirs", rounded))
            }
            first = theirs.step(batch, autocast)
            seconds = [timed(lambda t=theirs: t.step(batch, autocast))["seconds"] for _ in range(3)]
        except Exception as problem:  # a candidate that cannot run is not the best one
            tried[name] = {"error": f"{type(problem).__name__}: {str(problem)[:200]}"}
            print(f"transformers {name}: {tried[name]['error']}", flush=True)
            continue
        tried[name] = {"seconds": seconds, "first_loss": first, "distance_from_fp32_logits": distance}
        print(f"transformers {name}: {min(seconds):.3f} s a step; from its fp32 logits: {distance}", flush=True)
        if min(seconds) == min(min(t["seconds"]) for t in tried.values() if "seconds" in t):
            best, best_name = theirs, name
        del theirs
        gc.collect()
    if best is None:
        raise SystemExit("no candidate of transformers ran")

    distance = tried[best_name]["distance_from_fp32_logits"]
    first = trainer.train_step(batch)["loss/mean"]
    expected = tried[best_name]["first_loss"]
    agree = abs(first - expected) < (1e-2 if autocast else 1e-4)
    agree &= distance["ours"] < (1.2 * distance["theirs"] if autocast else 1e-4)
    operators = cpu.describe(getattr(torch, args.dtype))
    print(f"first loss: ours {first:.5f}, theirs {expected:.5f}; ours runs on {operators}")
    if not agree:
        raise SystemExit("the two do not compute the same thing")

    trainer.train_step(batch)
    pairs = []
    for _ in range(args.pairs):
        pairs.append(
            {
                "ours": timed(lambda: trainer.train_step(batch)),
                "theirs": timed(lambda: best.step(batch, autocast)),
            }
        )
        print("  ".join(f"{who} {pairs[-1][who]['seconds']:.3f} s" for who in ("ours", "theirs")), flush=True)
    ratios = sorted(p["theirs"]["seconds"] / p["ours"]["seconds"] for p in pairs)
    middle = {who: statistics.median(p[who]["seconds"] for p in pairs) for who in ("ours", "theirs")}
    flops = flops_per_token(config, tokens) * sequences * tokens
    result = {
        "config": args.config,
        "dtype": args.dtype,
        "shape": {**shape, "sequences": sequences, "tokens": tokens},
        "transformers": best_name,
        "candidates": tried,
        "pairs": pairs,
        "ratio": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
        "tokens_per_s": {who: sequences * tokens / s for who, s in middle.items()},
        "mfu": {who: flops / s / peak for who, s in middle.items()},
        "gemm_flops_per_s": peak,
        "foreign_cores": statistics.median(p[w]["foreign_cores"] for p in pairs for w in ("ours", "theirs")),
        "operators": operators,
        "peak_memory_bytes": psutil.Process().memory_info().rss,
        "environment": environment("transformers"),
    }
    write(args.json, result)
    print(
        f"{args.config} {args.dtype}: "
        f"ours {result['tokens_per_s']['ours']:.0f} tok/s (MFU {result['mfu']['ours']:.0%}), "
        f"transformers {best_name} {result['tokens_per_s']['theirs']:.0f} tok/s (MFU {result['mfu']['theirs']:.0%}); "
        f"ratio {result['ratio']['median']:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}], "
        f"others kept {result['foreign_cores']:.2f} cores busy"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
