"""The planner beside the machine: predicted and measured peak memory and step time of real training steps.

Each configuration trains in processes of its own: two steps for memory, the growth of the peak resident set from just
before the trainer is built, with an allocator that hands freed memory back; a few more for the time of a step, the
fastest of which counts, with others' load beside it. One configuration (`fit`) sets the CPU's utilisation and the
constant of the process (code, threads, buffers); the other six are predictions.

    python benchmarks/plan.py --json benchmarks/results/plan.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import environment, machine_busy_s, write

from freehold.core.config import fill
from freehold.planner.config import PlanConfig
from freehold.planner.estimate import estimate

BASE = {"preset": "laptop", "vocab_size": 4096, "max_position_embeddings": 4096}
CONFIGS: dict[str, dict[str, Any]] = {
    "fit": {"model": BASE, "context_tokens": 512, "sequences": 8, "matrices": "muon"},
    "heads": {"model": {**BASE, "hidden_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4},
              "context_tokens": 512, "sequences": 8, "matrices": "muon"},
    "dense": {"model": {**BASE, "num_hidden_layers": 6, "num_dense_layers": 6, "intermediate_size": 512},
              "context_tokens": 1024, "sequences": 4, "matrices": "adamw"},
    "passes": {"model": {**BASE, "num_experts": 32}, "context_tokens": 512, "sequences": 16, "micro_sequences": 8,
               "matrices": "adamw"},
    "fine": {"model": {**BASE, "num_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 64},
             "context_tokens": 512, "sequences": 8, "matrices": "muon"},
    "global": {"model": {**BASE, "global_attn_every_n_layers": 1, "vocab_size": 8192}, "context_tokens": 1024,
               "sequences": 4, "matrices": "adamw"},
    "recompute": {"model": {**BASE, "num_hidden_layers": 8, "hidden_size": 192}, "context_tokens": 1024,
                  "sequences": 6, "matrices": "muon", "recompute": True},
}  # fmt: skip


def measure(spec: dict[str, Any], steps: int) -> dict[str, float]:
    """Train `steps` steps in this process; return bytes, seconds of each step, and others' load."""
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    import numpy as np
    import torch

    from freehold.core.log import Log
    from freehold.data.packing import text_batch
    from freehold.model.config import ModelConfig
    from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
    from freehold.optim.schedule import Schedule
    from freehold.trainer.config import TrainerConfig
    from freehold.trainer.loop import Job, Trainer

    config = fill(ModelConfig, spec["model"], "model")
    torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()
    folder = Path(tempfile.mkdtemp())
    process = psutil.Process()
    before = process.memory_info().rss
    trainer = Trainer(
        Job(
            folder=folder,
            model=config,
            trainer=TrainerConfig(recompute=spec.get("recompute", False)),
            optim=OptimConfig(matrices=spec["matrices"]),
            balance=SmebuConfig(),
            schedule=Schedule({"all": PhaseConfig(steps=1000)}),
            order=None,  # type: ignore[arg-type]  # the batch is handed to each step
            micro_sequences=spec.get("micro_sequences", spec["sequences"]),
            stage="pretrain",
            parent="",
        ),
        Log(folder, quiet=True),
        seed=0,
    )
    rng = np.random.default_rng(0)
    seconds, foreign = [], []
    for _ in range(steps):
        ids = rng.integers(32, config.vocab_size, (spec["sequences"], spec["context_tokens"] + 1))
        batch = text_batch(ids.astype(np.uint16), 0)
        own, busy, start = sum(process.cpu_times()[:2]), machine_busy_s(), time.perf_counter()
        trainer.train_step(batch)
        seconds.append(time.perf_counter() - start)
        foreign.append(max(machine_busy_s() - busy - sum(process.cpu_times()[:2]) + own, 0) / seconds[-1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    fastest = min(range(1, steps), key=seconds.__getitem__)
    return {
        "bytes": float(peak),
        "seconds": seconds[fastest],
        "seconds_median": statistics.median(seconds[1:]),
        "foreign_cores": foreign[fastest],
    }


HAND_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def in_process(name: str, steps: int, **variables: str) -> dict[str, float]:
    """Return what `measure` finds in a process of its own."""
    command = [sys.executable, __file__, "--only", name, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **variables})
    return dict(json.loads(done.stdout))


def predict(spec: dict[str, Any], mfu: float) -> tuple[float, float]:
    """Return the planner's bytes and seconds for a configuration on this CPU."""
    plan = {
        "model": spec["model"],
        "batch": {key: spec.get(key, 0) for key in ("context_tokens", "sequences", "micro_sequences")},
        "matrices": spec["matrices"],
        "parallel": {"recompute": "full" if spec.get("recompute") else "none"},
        "machine": {"device": "cpu", "kernels": "native", "mfu": mfu},
    }
    figures = estimate(fill(PlanConfig, plan, "plan"))["figures"]
    return figures["memory/peak"].value, figures["step/time"].value


def main() -> int:
    """Measure every configuration in a process of its own and lay the plan beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", default="", help="measure one configuration in this process")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(CONFIGS[args.only], args.steps)))
        return 0
    rows: dict[str, dict[str, float]] = {}
    mfu, constant = 0.2, 0.0
    for name, spec in CONFIGS.items():
        found = in_process(name, args.steps)
        found["bytes"] = in_process(name, 2, **HAND_BACK)["bytes"]
        if name == "fit":
            # Everything but a small fixed share scales with 1 / mfu: a few passes settle it.
            for _ in range(8):
                mfu *= predict(spec, mfu)[1] / found["seconds"]
            constant = found["bytes"] - predict(spec, mfu)[0]
        planned_bytes, planned_s = predict(spec, mfu)
        planned_bytes += constant
        rows[name] = {**found, "planned_bytes": planned_bytes, "planned_seconds": planned_s}
        print(
            f"{name:10} memory {planned_bytes / 2**20:7.1f} planned {found['bytes'] / 2**20:7.1f} MiB measured "
            f"({planned_bytes / found['bytes'] - 1:+.0%})   step {planned_s:6.3f} planned {found['seconds']:6.3f} s "
            f"measured ({planned_s / found['seconds'] - 1:+.0%})   others {found['foreign_cores']:.1f} cores",
            flush=True,
        )
    write(args.json, {"environment": environment(), "mfu": mfu, "constant_bytes": constant, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
