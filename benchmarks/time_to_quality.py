"""Seconds of training until held-out text is predicted to given numbers of bits per byte, for six ways to train.

All read the same tokens in the same order from a finished `tokenize` stage, hold the same validation documents out,
warm up for 20 steps and then keep their rates. Each way tries the same three multiples of its base rates for a few
steps (one more, twice or half as far out, while the best is the outermost); the best trains with every seed until
the last target or for `--steps` steps. The first of `--ways` is the one the others are compared with.

1 freehold       AFMoE, Muon (three iterations of Newton-Schulz) + AdamW, SMEBU
2 transformers   the same AFMoE in transformers, fused AdamW, bfloat16 autocast, torch.compile, no balancing
3 dense          all layers dense at equal active parameters, otherwise as 1
4 adamw          as 1 with AdamW for every parameter
5 sign, none     as 1 with the sign rule, without balancing

How many steps a way needs does not depend on how busy the machine is, so the curves may be computed at any time, each a
file in `--cases`; how long a step takes does, so steps are timed afterwards, all ways in turn, many rounds. Seconds are
steps times the median step; compiling and validation are not counted.

    freehold run recipes/laptop.yaml until=tokenize
    python benchmarks/time_to_quality.py --run runs/laptop --ways freehold,transformers,dense \
        --json benchmarks/results/time_to_quality.json --picture docs/images/time_to_quality.png

Finished cases are not run again: an interrupted run resumes, and `--ways` lets two processes share the work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
from common import environment, machine_busy_s, write

from freehold.core.log import Log
from freehold.data.loader import PhaseRows, TextOrder
from freehold.data.packing import Batch
from freehold.data.shards import ShardSet
from freehold.kernels import cpu
from freehold.model.afmoe import Afmoe
from freehold.model.config import SHAPES, ModelConfig, parameter_counts, to_hf_dict
from freehold.optim.config import NoBalanceConfig, OptimConfig, PhaseConfig, SignConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.tokenizer.bpe import BOS, END_OF_TEXT
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer
from freehold.trainer.validate import bits_per_byte, held_out

CONTEXT_TOKENS, SEQUENCES, STEPS, WARMUP_STEPS, VALIDATE_EVERY = 512, 8, 4000, 20, 20
SWEEP_STEPS = 400
MULTIPLES = (0.5, 1.0, 2.0)
TIMED_STEPS = 6
LAPTOP = ModelConfig(**SHAPES["laptop"])
DENSE = ModelConfig(**{**SHAPES["laptop"], "num_dense_layers": SHAPES["laptop"]["num_hidden_layers"]})
MUON, MUON_LR, ADAMW_LR = "muon", 0.02, 5e-3
NEWTON_SCHULZ_STEPS = 3
WAYS: dict[str, dict[str, Any]] = {
    "freehold": {},
    "transformers": {"matrices": "adamw", "lr": 4e-3},
    "dense": {"model": DENSE},
    "adamw": {"matrices": "adamw", "lr": 4e-3},
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
                matrices=way.get("matrices", MUON),
                newton_schulz_steps=NEWTON_SCHULZ_STEPS,
                muon_lr=MUON_LR * multiple,
                lr=way.get("lr", ADAMW_LR) * multiple,
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
        self.measure = Afmoe(
            LAPTOP
        )  # holds the weights while they are validated, so that all are measured the same way
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


def curve(way: Ours | Theirs, validate: Callable[[Afmoe], float], target: float, steps: int) -> list[list[float]]:
    """Train for `steps` steps, or to the target; return [step, bits per byte] of every VALIDATE_EVERY-th step."""
    points = []
    for step in range(steps):
        way.step(step)
        if (step + 1) % VALIDATE_EVERY == 0:
            points.append([step + 1, validate(way.model())])
            if points[-1][1] <= target:
                break
    return points


def reached(points: list[list[float]], target: float) -> float | None:
    """Return the step at which a curve crosses the target, between two validations, or None."""
    for (step, bits), (next_step, next_bits) in zip(points, points[1:], strict=False):
        if next_bits <= target:
            return step + (next_step - step) * (bits - target) / (bits - next_bits)
    return None


def bits_at(points: list[list[float]], step: float) -> float | None:
    """Return the bits per byte of a curve at a step, between two validations; None beyond its end."""
    if step > points[-1][0]:
        return None
    return float(np.interp(step, *zip(*points, strict=True)))


def spread(ratios: Iterable[float]) -> dict[str, float]:
    """Return the median of some ratios and their ends."""
    ratios = list(ratios)
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def compared(
    target: float, curves: list[list[list[float]]], step_s: float, base: list[list[list[float]]], base_step_s: float
) -> dict[str, Any]:
    """Return when a way's curves, one a seed, are at a target, and what they are at when the other way is."""
    steps, base_steps = ([reached(points, target) for points in way] for way in (curves, base))
    both = None not in steps + base_steps
    return {
        "steps": steps,
        "seconds": [s and s * step_s for s in steps],
        "ratio": spread(s * step_s / (b * base_step_s) for s, b in zip(steps, base_steps, strict=True))
        if both
        else None,
        "bpb_when_it_is_there": [
            b and bits_at(points, b * base_step_s / step_s) for points, b in zip(curves, base_steps, strict=True)
        ],
    }


def draw(summary: dict[str, Any], curves: dict[str, list[list[list[float]]]]) -> bytes:
    """Return a PNG: bits per byte over seconds of training, a line a way and seed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from freehold.run.figure import BLUE, GREEN, INK, MUTED, ORANGE, RED, STYLE, png

    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4), dpi=130, layout="constrained")
        axes = figure.subplots()
        for (name, line), colour in zip(summary.items(), (BLUE, ORANGE, GREEN, RED, MUTED, INK), strict=False):
            for seed, points in enumerate(curves[name]):
                seconds = [step * line["step_s"] for step, _ in points]
                label = None if seed else f"{name}: {line['step_s'] * 1e3:.0f} ms a step"
                axes.plot(seconds, [bits for _, bits in points], color=colour, lw=1, label=label)
        axes.set(xlabel="seconds of training", ylabel="bits per byte of held-out text", ylim=(None, 2.1))
        axes.set_xscale("log")
        axes.legend()
        return png(figure)


class Bench:
    """The data, and what has been measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        shards = ShardSet.load(args.run / "tokenize" / "tokens")
        self.tokens_sha256 = json.loads((args.run / "tokenize" / "manifest.json").read_text())["content_sha256"]
        self.orders = {
            seed: TextOrder(
                shards.sources("train"),
                [PhaseRows("all", STEPS, {})],
                context_tokens=CONTEXT_TOKENS,
                sequences=SEQUENCES,
                seed=seed,
                separator=END_OF_TEXT,
                begin=BOS,
            )
            for seed in range(args.seeds)
        }
        validation = {
            name: held_out(source, shards.document_bytes("validation", name), CONTEXT_TOKENS, 4096, BOS)
            for name, source in shards.sources("validation").items()
            if source.total_tokens
        }
        self.validate = lambda model: bits_per_byte(model, validation)["val/bpb"]

    def make(self, name: str, multiple: float, seed: int, folder: str) -> Ours | Theirs:
        """Return a way to train at its first step."""
        kind = Theirs if name == "transformers" else Ours
        return kind(self.orders[seed], WAYS[name], multiple, seed, Path(folder))

    def measured(self, name: str, multiple: float, seed: int, steps: int, target: float = 0.0) -> list[list[float]]:
        """Return the curve of one case, computing it unless one is there that went as far."""
        case = f"{name}-x{multiple:g}-seed{seed}"
        for path in sorted(self.args.cases.glob(f"{case}-*.json")):
            done = json.loads(path.read_text())
            if done["tokens_sha256"] != self.tokens_sha256:
                raise SystemExit(
                    f"{path} is of other tokens: delete {self.args.cases} or name the run it was made from"
                )
            if done["curve"][-1][0] >= steps or done["curve"][-1][1] <= target:
                return done["curve"]
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            points = curve(self.make(name, multiple, seed, folder), self.validate, target, steps)
        done = {"tokens_sha256": self.tokens_sha256, "operators": cpu.describe(torch.bfloat16), "curve": points}
        write(self.args.cases / f"{case}-{points[-1][0]}.json", done)
        print(f"{case}: {points[-1]}, {time.monotonic() - start:.0f} s", flush=True)
        return points

    def best_multiple(self, name: str) -> tuple[float, dict[float, float]]:
        """Return the multiple with the fewest bits per byte after SWEEP_STEPS, and those of all that were tried."""
        tried: dict[float, float] = {}
        todo = list(MULTIPLES)
        while todo:
            tried |= {m: dict(self.measured(name, m, 0, SWEEP_STEPS))[SWEEP_STEPS] for m in todo}
            best, todo = min(tried, key=tried.__getitem__), []
            if best in (min(tried), max(tried)) and len(tried) < len(MULTIPLES) + 2:
                todo = [best * 2 if best == max(tried) else best / 2]
        return best, tried

    def time(self, multiples: dict[str, float]) -> dict[str, list[float]]:
        """Return the seconds of a step of each way in every round, all ways in turn."""
        with tempfile.TemporaryDirectory() as folder:
            ways = {name: self.make(name, multiple, 0, folder) for name, multiple in multiples.items()}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for round_ in range(-1, self.args.rounds):  # the first warms up and compiles
                for name, way in ways.items():
                    taken = []
                    for step in range(TIMED_STEPS):
                        start = time.perf_counter()
                        way.step((round_ + 1) * TIMED_STEPS + step)
                        taken.append(time.perf_counter() - start)
                    if round_ >= 0:
                        seconds[name].append(statistics.median(taken))
        return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/laptop"))
    parser.add_argument("--cases", type=Path, default=Path("runs/time_to_quality"), help="finished curves")
    parser.add_argument("--targets", default="1.9,1.8,1.7,1.65,1.6", help="bits per byte, the farthest last")
    parser.add_argument("--steps", type=int, default=1500, help="give up after this many steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9, help="of timing; 0 computes curves only")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    bench, names = Bench(args), args.ways.split(",")
    sweeps = {name: bench.best_multiple(name) for name in names}
    targets = [float(target) for target in args.targets.split(",")]
    curves = {
        name: [bench.measured(name, sweeps[name][0], seed, args.steps, targets[-1]) for seed in range(args.seeds)]
        for name in names
    }
    if not args.rounds:
        return 0
    busy, own, start = machine_busy_s(), time.process_time(), time.monotonic()
    seconds = bench.time({name: sweeps[name][0] for name in names})
    foreign = ((machine_busy_s() - busy) - (time.process_time() - own)) / (time.monotonic() - start)
    step_s = {name: statistics.median(seconds[name]) for name in names}
    summary: dict[str, Any] = {
        name: {
            "multiple": sweeps[name][0],
            "sweep_bpb": sweeps[name][1],
            "step_s": step_s[name],
            "step_ratio": spread(a / b for a, b in zip(seconds[name], seconds[names[0]], strict=True)),
            "bpb_at_end": [points[-1] for points in curves[name]],
            "targets": {
                f"{target:g}": compared(target, curves[name], step_s[name], curves[names[0]], step_s[names[0]])
                for target in targets
            },
        }
        for name in names
    }
    result = {
        "compared_with": names[0],
        "tokens_sha256": bench.tokens_sha256,
        "active_parameters": {n: parameter_counts(c)["active"] for n, c in (("afmoe", LAPTOP), ("dense", DENSE))},
        "operators": cpu.describe(torch.bfloat16),
        "summary": summary,
        "step_s_by_round": seconds,
        "foreign_cores": max(foreign, 0.0),
        "curves": curves,
        "environment": environment("transformers"),
    }
    write(args.json, result)
    if args.picture:
        args.picture.write_bytes(draw(summary, curves))
    for name, line in summary.items():
        print(f"{name:13} rates x{line['multiple']:g}  {line['step_s']:.3f} s a step")
        for target, at in line["targets"].items():
            ratio = at["ratio"]
            against = ratio and f"{ratio['median']:.2f} x [{ratio['min']:.2f}, {ratio['max']:.2f}]"
            print(f"    {target:>5}  steps {at['steps']}  {against or 'not by all seeds'}")
    print(f"others kept {result['foreign_cores']:.2f} cores busy while steps were timed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
