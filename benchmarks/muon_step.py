"""What Muon costs: the schedules of its orthogonalisation shape by shape, and its share of a step.

Schedules (every shape of the laptop preset and of S and M of `train_step.py`, five iterations, bfloat16): the CPU
kernel (a matrix a thread, symmetric products computed once), PyTorch's products of a batch, and PyTorch's products of
one matrix after the other. All must be as near to the same in float64 (within a quarter of the best's distance), or
the script fails. `optim/muon.py` chooses by shape; "chosen" is what it takes here, with and without the kernels.

Share: seconds inside Muon over seconds of the whole step, for one and for four passes (micro-batches) a step.

    python benchmarks/muon_step.py --json benchmarks/results/muon_step.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from common import environment, interleaved, middle, timed, write
from growth import rows, trainer_of
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from train_step import SHAPES as TRAIN_SHAPES

from freehold.kernels import cpu
from freehold.model.afmoe import Afmoe
from freehold.model.config import SHAPES, ModelConfig
from freehold.optim.build import is_hidden_matrix
from freehold.optim.muon import COEFFICIENTS, ONE_BY_ONE_FROM, Muon, as_matrices, newton_schulz

CONFIGS = {"laptop": (SHAPES["laptop"], 8, 512), **TRAIN_SHAPES}
SAMPLE = 64
"""Most matrices of a shape that are timed; more take proportionally longer."""


def shapes_of(model: dict[str, Any]) -> Counter[tuple[int, int]]:
    """Return how many matrices of each shape (smaller side first) Muon turns in a step."""
    with torch.device("meta"):
        named = dict(Afmoe(ModelConfig(**model)).named_parameters())
    found: Counter[tuple[int, int]] = Counter()
    for name, parameter in named.items():
        if is_hidden_matrix(name, parameter):
            n, rows, columns = as_matrices(name, parameter).shape
            found[min(rows, columns), max(rows, columns)] += n
    return found


def by_kernel(x: Tensor) -> Tensor:
    x = x.clone()
    cpu.orthogonalize_(x, torch.tensor(COEFFICIENTS))
    return x


def one_by_one(x: Tensor) -> Tensor:
    return torch.cat([newton_schulz(matrix[None], COEFFICIENTS) for matrix in x])


SCHEDULES = {"kernel": by_kernel, "batch": lambda x: newton_schulz(x, COEFFICIENTS), "one by one": one_by_one}


def schedules(rounds: int) -> dict[str, Any]:
    """Return the seconds a matrix of each shape takes by each schedule, and how far it is from float64."""
    counts = {name: shapes_of(model) for name, (model, _, _) in CONFIGS.items()}
    found = {}
    for shape in sorted({shape for shapes in counts.values() for shape in shapes}):
        n = min(SAMPLE, max(shapes[shape] for shapes in counts.values()))
        x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        usable = {k: s for k, s in SCHEDULES.items() if k != "kernel" or cpu.available(x, *shape)}
        exact = newton_schulz(x[:4].double(), COEFFICIENTS)
        wrong = {k: float((s(x)[:4].double() - exact).norm() / exact.norm()) for k, s in usable.items()}
        if max(wrong.values()) > 1.25 * min(wrong.values()):
            raise SystemExit(f"{shape}: the schedules are not equally near to float64: {wrong}")
        taken = interleaved({k: partial(s, x) for k, s in usable.items()}, rounds)
        found["x".join(map(str, shape))] = line = {
            "matrices": {name: shapes[shape] for name, shapes in counts.items() if shapes[shape]},
            "timed": n,
            "distance": wrong,
            "ms_per_matrix": {k: middle(1e3 * t["seconds"] / n for t in times) for k, times in taken.items()},
            "chosen": "kernel" if "kernel" in usable else "",
            "chosen_without_kernel": "one by one" if shape[0] * shape[1] >= ONE_BY_ONE_FROM else "batch",
        }
        lines = (f"{k} {m['median']:.3f} [{m['least']:.3f}, {m['most']:.3f}]" for k, m in line["ms_per_matrix"].items())
        print(f"{shape}, {n} matrices, ms each: {', '.join(lines)}", flush=True)
    return found


def share(name: str, passes: int, rounds: int, threads: int, pause_s: float) -> dict[str, Any]:
    """Return the seconds of a step, and those inside Muon."""
    shape, sequences, tokens = CONFIGS[name]
    trainer = trainer_of(ModelConfig(**shape), "muon", sequences, threads)
    batch = rows(tokens, sequences * passes, shape["vocab_size"])
    inside = [0.0]

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, Muon):
            inside[0] -= time.perf_counter()

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, Muon):
            inside[0] += time.perf_counter()

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    steps = []
    for number in range(rounds + 1):
        inside[0] = 0.0
        step = timed(lambda: trainer.train_step(batch))
        if number:
            steps.append({**step, "muon": inside[0]})
        time.sleep(pause_s)
    for hook in hooks:
        hook.remove()
    return {
        "step_tokens": sequences * passes * tokens,
        "seconds": middle(s["seconds"] for s in steps),
        "muon_seconds": middle(s["muon"] for s in steps),
        "share": middle(s["muon"] / s["seconds"] for s in steps),
        "foreign_cores": middle(s["foreign_cores"] for s in steps)["median"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--configs", nargs="*", default=list(CONFIGS), choices=CONFIGS)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--pause-s", type=float, default=0.0, help="rest between steps, on a machine that is shared")
    parser.add_argument("--no-schedules", action="store_true", help="measure the share only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"schedules": {}, "share": {}}
    if args.json and args.json.exists():
        result = json.loads(args.json.read_text())  # shapes and configurations that are not asked for stay
    result |= {"threads": args.threads, "operators": cpu.describe(torch.bfloat16), "environment": environment()}
    if not args.no_schedules:
        result["schedules"] = schedules(args.rounds)
        write(args.json, result)
    for name in args.configs:
        for passes in args.passes:
            result["share"][f"{name} x{passes}"] = found = share(name, passes, args.rounds, args.threads, args.pause_s)
            s, m = found["seconds"], found["share"]
            print(
                f"{name}, {passes} passes of {found['step_tokens'] // passes} tokens: step {s['median']:.3f} "
                f"[{s['least']:.3f}, {s['most']:.3f}] s, Muon {m['median']:.0%} [{m['least']:.0%}, {m['most']:.0%}]; "
                f"others {found['foreign_cores']:.2f} cores",
                flush=True,
            )
            write(args.json, result)
            gc.collect()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
