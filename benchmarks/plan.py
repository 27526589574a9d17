"""The planner compared with the machine: predicted and measured peak memory and step time of real training steps.

Each configuration trains in processes of its own: two steps for memory, the growth of the peak resident set from just
before the trainer is built, with an allocator that hands freed memory back; a few more for the time of a step, the
fastest of which counts, with others' load next to it. One configuration (`fit`) sets the CPU's utilisation and the
constant of the process (code, threads, buffers); the others are predictions: six shapes that vary what the formulas
depend on, then the laptop preset and S and M of `train_step.py` with Muon and AdamW, with and without recompute. Every
line is written when it is known, and stays if the script is asked for others. M needs 9 GB and is not timed.

    python benchmarks/plan.py --json benchmarks/results/plan.json
    python benchmarks/plan.py --replan --json benchmarks/results/plan.json
    python benchmarks/plan.py --recompute-cost laptop S --json benchmarks/results/plan.json
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
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import psutil
import torch
from common import environment, interleaved, machine_busy_s, middle, write
from train_step import SHAPES

from freehold.core.config import fill
from freehold.core.log import Log
from freehold.data.packing import Batch, text_batch
from freehold.model.config import ModelConfig
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.planner.config import PlanConfig
from freehold.planner.estimate import estimate
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer

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
SIZES: dict[str, dict[str, Any]] = {
    "laptop": {"model": {"preset": "laptop"}, "context_tokens": 512, "sequences": 8},
    **{
        name: {"model": model, "context_tokens": tokens, "sequences": sequences, "timed": name != "M"}
        for name, (model, sequences, tokens) in SHAPES.items()
    },
}
for _size, _spec in SIZES.items():
    for _matrices in ("muon", "adamw"):
        for _recompute in (False, True):
            _name = f"{_size} {_matrices}" + (" recompute" if _recompute else "")
            CONFIGS[_name] = {**_spec, "matrices": _matrices, "recompute": _recompute}


def build(spec: dict[str, Any], threads: int) -> tuple[Trainer, Batch]:
    """Return a trainer for a configuration and the rows of a step."""
    model = fill(ModelConfig, spec["model"], "model")
    folder = Path(tempfile.mkdtemp())
    job = Job(
        folder=folder,
        model=model,
        trainer=TrainerConfig(recompute=spec.get("recompute", False), threads=threads),
        optim=OptimConfig(matrices=spec["matrices"]),
        balance=SmebuConfig(),
        schedule=Schedule({"all": PhaseConfig(steps=1000)}),
        order=None,  # type: ignore[arg-type]  # the batch is handed to each step
        micro_sequences=spec.get("micro_sequences", spec["sequences"]),
        stage="pretrain",
        parent="",
    )
    ids = np.random.default_rng(0).integers(32, model.vocab_size, (spec["sequences"], spec["context_tokens"] + 1))
    return Trainer(job, Log(folder, quiet=True), seed=0), text_batch(ids.astype(np.uint16), 0, 0)


def measure(spec: dict[str, Any], steps: int, threads: int) -> dict[str, float]:
    """Train `steps` steps in this process; return bytes, seconds of each step, and others' load."""
    torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()
    process = psutil.Process()
    before = process.memory_info().rss
    trainer, batch = build(spec, threads)
    seconds, foreign = [], []
    for _ in range(steps):
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


def recompute_cost(name: str, rounds: int, threads: int) -> dict[str, Any]:
    """Return the seconds of a step (AdamW) with activations kept and made again, timed in turn in one process."""
    trainer, batch = build(CONFIGS[f"{name} adamw"], threads)

    def step(recompute: bool) -> None:
        trainer.model.recompute = recompute
        trainer.train_step(batch)

    taken = interleaved({"kept": partial(step, False), "recompute": partial(step, True)}, rounds)
    ratio = middle(r["seconds"] / k["seconds"] for k, r in zip(taken["kept"], taken["recompute"], strict=True))
    found = {how: middle(t["seconds"] for t in times) for how, times in taken.items()}
    foreign = middle(t["foreign_cores"] for times in taken.values() for t in times)["median"]
    print(
        f"{name}: {found['kept']['median']:.3f} s kept, {found['recompute']['median']:.3f} s recompute, ratio "
        f"{ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['most']:.2f}]; others {foreign:.1f} cores",
        flush=True,
    )
    return {**found, "ratio": ratio, "foreign_cores": foreign, "threads": threads}


HAND_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def in_process(name: str, steps: int, threads: int, **variables: str) -> dict[str, float]:
    """Return what `measure` finds in a process of its own."""
    command = [sys.executable, __file__, "--only", name, "--steps", str(steps), "--threads", str(threads)]
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


def fitted(spec: dict[str, Any], seconds: float) -> float:
    """Return the utilisation at which the planner gives a configuration these seconds."""
    mfu = 0.2
    for _ in range(8):  # everything but a small fixed share scales with 1 / mfu: a few passes settle it
        mfu *= predict(spec, mfu)[1] / seconds
    return mfu


def add_plan(result: dict[str, Any]) -> None:
    """Write the plan into every row that was measured; `fit` sets utilisation and constant."""
    fit = result["rows"]["fit"]
    mfu = fitted(CONFIGS["fit"], fit["seconds"])
    result |= {"mfu": mfu, "constant_bytes": fit["bytes"] - predict(CONFIGS["fit"], mfu)[0]}
    for row, measured in result["rows"].items():  # of earlier calls too: the constant may be another
        planned_bytes, planned_s = predict(CONFIGS[row], mfu)
        measured |= {"planned_bytes": planned_bytes + result["constant_bytes"], "planned_seconds": planned_s}


def two_threads() -> dict[str, float]:
    """Return M's step on two threads as `train_step.py` measured it, and as planned from S's of the same script."""
    steps = {}
    for size in ("S", "M"):
        pairs = json.loads((Path(__file__).parent / "results" / f"train_step_{size}.json").read_text())["pairs"]
        steps[size] = statistics.median(pair["ours"]["seconds"] for pair in pairs)
    mfu = fitted(CONFIGS["S adamw"], steps["S"])
    return {"fit_seconds": steps["S"], "mfu": mfu, "seconds": steps["M"],
            "planned_seconds": predict(CONFIGS["M adamw"], mfu)[1]}  # fmt: skip


def main() -> int:
    """Measure configurations in processes of their own and add the plan to them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--replan", action="store_true", help="measure nothing: plan again what was measured")
    parser.add_argument("--recompute-cost", nargs="+", choices=SIZES, help="measure this instead")
    parser.add_argument("--rounds", type=int, default=7, help="of --recompute-cost")
    parser.add_argument("--only", default="", help="measure one configuration in this process")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(CONFIGS[args.only], args.steps, args.threads)))
        return 0
    result: dict[str, Any] = {"rows": {}, "recompute_cost": {}}
    if args.json and args.json.exists():
        result |= json.loads(args.json.read_text())
    if args.replan:
        add_plan(result)
        result["two_threads"] = {"M adamw": two_threads()}
        write(args.json, result)
        for name, row in [*result["rows"].items(), *result["two_threads"].items()]:
            if "seconds" in row:
                off = row["planned_seconds"] / row["seconds"] - 1
                print(f"{name:24} {row['planned_seconds']:6.3f} planned {row['seconds']:6.3f} s measured ({off:+.0%})")
        return 0
    result |= {"environment": environment(), "threads": args.threads}
    for name in args.recompute_cost or ():
        result["recompute_cost"][name] = recompute_cost(name, args.rounds, args.threads)
        write(args.json, result)
    for name in () if args.recompute_cost else args.configs:
        spec = CONFIGS[name]
        found = in_process(name, args.steps, args.threads) if spec.get("timed", True) else {}
        found["bytes"] = in_process(name, 2, args.threads, **HAND_BACK)["bytes"]
        result["rows"][name] = found
        add_plan(result)
        write(args.json, result)
        planned_bytes, planned_s = found["planned_bytes"], found["planned_seconds"]
        line = f"{planned_bytes / 2**20:7.1f} planned {found['bytes'] / 2**20:7.1f} MiB measured"
        print(f"{name:24} memory {line} ({planned_bytes / found['bytes'] - 1:+.1%})", end="")
        if "seconds" in found:
            line = f"{planned_s:6.3f} planned {found['seconds']:6.3f} s measured"
            line += f" ({planned_s / found['seconds'] - 1:+.0%})   others {found['foreign_cores']:.1f} cores"
            print(f"   step {line}", end="")
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
