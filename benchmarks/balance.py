"""How fast, how steadily and at what price each balancing rule evens out a skewed router.

A small AFMoE (two layers, both with experts, top-4) is trained on the text of Python's standard library through the
training loop's own step, from a start in which 8 experts take most of the tokens: their router rows are 6 times as
long. Every rule starts from the same weights and reads the same rows. Make the text first (12 seconds):

    freehold run recipes/tiny.yaml name=balance until=tokenize gather.sources.code.max_bytes=12000000
    python benchmarks/balance.py --json benchmarks/results/balance.json --picture docs/images/balance.png

Each (experts, rule, rate) is a case of about a minute of one core. Finished cases are in `--cases`, with the load and
the bias of every expert at every step, and are not run again.

MaxVio is that of the assignments summed over a window of steps, in the worse of the two layers. One step has too few
tokens for it: with 2,048 tokens and 256 experts even dice show 0.5. What is left of that in a window is the floor; the
window grows with the number of experts so that the floor is about the same for all. It is given twice: for even dice,
and for this text, whose tokens are not independent (from the step-to-step differences of each expert's load, which a
slow drift or a slowly moving bias hardly touches). "Even after n steps" means that no window that begins at step n or
later shows 0.1 or more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freehold.core.artifact import package_versions
from freehold.core.log import Log
from freehold.core.machine import cpu_name
from freehold.data.loader import PhaseRows, TextOrder
from freehold.data.shards import ShardSet
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.optim.config import BalanceConfig, NoBalanceConfig, OptimConfig, PhaseConfig, SignConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.tokenizer.bpe import BOS, END_OF_TEXT
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer
from freehold.trainer.validate import bits_per_byte, held_out

CONTEXT_TOKENS, SEQUENCES, TOP_K = 64, 32, 4
HOT_EXPERTS, HOT_FACTOR = 8, 6.0
TARGET = 0.1
TUNED_AT = 128
"""Experts at which each rule's rate is chosen; the other sizes take the published rate and the one chosen here."""
PUBLISHED = {"smebu": 5e-4, "sign": 1e-3, "sequence": 1e-4}
RATES = {"smebu": (5e-4, 2e-3, 1e-2, 5e-2, 2e-1), "sign": (1e-3, 5e-3, 2e-2, 5e-2), "sequence": (1e-2, 1e-1, 1.0)}


def rule_config(rule: str, rate: float) -> BalanceConfig:
    """Return what a recipe would say; `smebu+sequence` is SMEBU at `rate` with the published sequence loss."""
    match rule:
        case "smebu":
            return SmebuConfig(rate=rate)
        case "smebu+sequence":
            return SmebuConfig(rate=rate, sequence_loss=PUBLISHED["sequence"])
        case "sign":
            return SignConfig(rate=rate)
        case "sequence":
            return NoBalanceConfig(sequence_loss=rate)
        case _:
            return NoBalanceConfig()


def build(args: argparse.Namespace, shards: ShardSet, experts: int, balance: BalanceConfig) -> Trainer:
    """Return a trainer at its skewed start."""
    model = ModelConfig(
        vocab_size=shards.vocab_size, hidden_size=64, intermediate_size=128, moe_intermediate_size=16,
        num_hidden_layers=2, num_dense_layers=0, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_experts=experts, num_experts_per_tok=TOP_K, sliding_window=32, max_position_embeddings=CONTEXT_TOKENS,
    )  # fmt: skip
    order = TextOrder(
        {"code": shards.sources("train")["code"]},
        [PhaseRows("stable", args.steps, {})],
        context_tokens=CONTEXT_TOKENS,
        sequences=SEQUENCES,
        seed=args.seed,
        separator=END_OF_TEXT,
        begin=BOS,
    )
    start = Afmoe(model)
    start.init_weights(torch.Generator().manual_seed(args.seed))
    with torch.no_grad():
        for layer in start.moe_layers().values():
            layer.router.gate.weight[:HOT_EXPERTS] *= HOT_FACTOR
    job = Job(
        folder=Path(),
        model=model,
        trainer=TrainerConfig(threads=1),
        optim=OptimConfig(matrices="adamw", lr=3e-3),
        balance=balance,
        schedule=Schedule({"stable": PhaseConfig(steps=args.steps, warmup_steps=20)}),
        order=order,
        micro_sequences=SEQUENCES,
        stage="pretrain",
        parent="",
    )
    return Trainer(job, Log(quiet=True), seed=args.seed, weights=start.state_dict())


def run_case(args: argparse.Namespace, shards: ShardSet, experts: int, rule: str, rate: float) -> dict[str, Any]:
    """Train one case and return what happened, with arrays `load` and `bias` [steps, layers, E]."""
    trainer = build(args, shards, experts, rule_config(rule, rate))
    layers = list(trainer.state.moe_layers.values())
    loads, biases, losses = [], [], []
    load_before, cpu, wall = os.getloadavg()[0], time.process_time(), time.monotonic()
    for step in range(args.steps):
        losses.append(trainer.train_step(trainer.job.order.batch(step))["loss/mean"])
        loads.append(torch.stack([layer.load_counts for layer in layers]).numpy().copy())
        biases.append(torch.stack([layer.expert_bias for layer in layers]).numpy().copy())
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    source = shards.sources("validation")["code"]
    held = held_out(source, shards.document_bytes("validation", "code"), CONTEXT_TOKENS, 0, BOS)
    return {
        "experts": experts,
        "rule": rule,
        "rate": rate,
        "train_loss": float(np.mean(losses[-args.steps // 10 :])),
        "val_bpb": bits_per_byte(trainer.model, {"code": held})["val/bpb"],
        "cpu_s": round(cpu, 1),
        "wall_s": round(wall, 1),
        "load_before": round(load_before, 2),
        "load": np.stack(loads),
        "bias": np.stack(biases),
    }


def window_of(experts: int) -> int:
    """Return the steps whose loads are summed: 50 for 32 experts, 400 for 256."""
    return max(1, experts * 200 // 128)


def figures(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case with its figures in the place of its arrays."""
    load, bias = case["load"], case["bias"]
    each, window = windowed(load, 1), windowed(load, window_of(case["experts"]))
    tenth, above = len(load) // 10, np.nonzero(window >= TARGET)[0]
    until = int(above[-1]) + 1 if len(above) else 0
    return {
        **{key: value for key, value in case.items() if key not in ("load", "bias")},
        "steps_until_even": until if until < len(window) else None,
        "max_vio_first_step": float(each[0]),
        "max_vio_final": float(window[-1]),
        "max_vio_last_tenth": float(window[-tenth:].mean()),
        "max_vio_last_tenth_std": float(window[-tenth:].std()),
        "max_vio_one_step": float(each[-tenth:].mean()),
        "bias_std": float(bias[-tenth:].std(0).mean()),
        "bias_abs_max": float(np.abs(bias[-1]).max()),
        "dead_experts": int((load[-window_of(case["experts"]) :].sum(0) == 0).sum()),
        "text_floor": text_floor(load[-window_of(case["experts"]) :]),
        "curve": {"every_steps": 5, "max_vio": [round(float(v), 4) for v in window[::5]]},
    }


def windowed(load: np.ndarray, window: int) -> np.ndarray:
    """Return MaxVio of the loads [steps, layers, E] summed over the `window` steps from each step on."""
    sums = np.cumsum(np.concatenate([np.zeros_like(load[:1]), load]), axis=0)
    sums = sums[window:] - sums[:-window]
    return (sums.max(-1) / sums.mean(-1) - 1).max(-1)


def even_floor(experts: int, assignments: int) -> float:
    """Return the expected MaxVio of two layers with `assignments` thrown evenly over the experts."""
    draws = np.random.default_rng(0).multinomial(assignments, np.full(experts, 1 / experts), size=(400, 2))
    return float((draws.max((1, 2)) / (assignments / experts) - 1).mean())


def text_floor(load: np.ndarray) -> float:
    """Return the expected MaxVio of a window [steps, layers, E] were each expert's expected load the mean."""
    noise = np.diff(load, axis=0).astype(np.float64)
    deviation = np.sqrt((noise**2).mean(0) / 2 * len(load)) / load.sum(0).mean(-1, keepdims=True)
    draws = np.random.default_rng(0).standard_normal((400, *deviation.shape)) * deviation
    return float(draws.max(-1).max(-1).mean())


def name_of(rule: str, rate: float) -> str:
    return rule if rule == "none" else f"{rule} {rate:g}"


def chosen(cases: list[dict[str, Any]], rule: str) -> float:
    """Return the rate that is even soonest at TUNED_AT experts; among equals the one of the lower loss."""
    own = [c for c in cases if c["experts"] == TUNED_AT and c["rule"] == rule]
    return min(own, key=lambda c: (math.inf if c["steps_until_even"] is None else c["steps_until_even"], c["val_bpb"]))[
        "rate"
    ]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is not yet run, and return the figures of all; rates are chosen before the other sizes use them."""
    shards = ShardSet.load(args.tokens, verify=False)
    args.cases.mkdir(parents=True, exist_ok=True)
    cases: list[dict[str, Any]] = []

    def case(experts: int, rule: str, rate: float = 0.0) -> None:
        path = args.cases / f"{experts}-{rule}-{rate:g}-{args.steps}-{args.seed}.npz"
        if not path.exists():
            found = run_case(args, shards, experts, rule, rate)
            np.savez_compressed(path.with_suffix(".part.npz"), **found)
            path.with_suffix(".part.npz").rename(path)
        with np.load(path) as file:
            done = figures({key: value if value.ndim else value.item() for key, value in file.items()})
        cases.append(done)
        print(
            f"{experts:4} {name_of(rule, rate):24} even after {done['steps_until_even']!s:>5}  "
            f"MaxVio {done['max_vio_first_step']:6.2f} -> {done['max_vio_final']:.3f}  {done['val_bpb']:.4f} bpb  "
            f"bias std {done['bias_std']:.5f}  {done['cpu_s']} s",
            flush=True,
        )

    for rule, rates in RATES.items():
        for rate in rates:
            case(TUNED_AT, rule, rate)
    tuned = {rule: chosen(cases, rule) for rule in RATES}
    case(TUNED_AT, "smebu+sequence", tuned["smebu"])
    for experts in args.experts:
        case(experts, "none")
        if experts != TUNED_AT:
            for rule in RATES:
                for rate in sorted({r for r in (PUBLISHED[rule], tuned[rule]) if r in RATES[rule]}):
                    case(experts, rule, rate)
    return cases


def draw(cases: list[dict[str, Any]], floors: dict[str, Any], tuned: dict[str, float]) -> bytes:
    """Return a PNG: MaxVio over the steps for each number of experts, and bits per byte at the end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from freehold.run.figure import BLUE, FAINT, GREEN, INK, MUTED, ORANGE, STYLE, png

    colours = {"none": MUTED, "smebu": BLUE, "smebu+sequence": "#7b4fa3", "sign": ORANGE, "sequence": GREEN}
    sizes = sorted({c["experts"] for c in cases})
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 7.4), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        grid = figure.add_gridspec(2, len(sizes), height_ratios=(2, 1))
        for column, experts in enumerate(sizes):
            axes, prices = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
            shown = [
                c
                for c in cases
                if c["experts"] == experts
                and c["rate"] in (0.0, PUBLISHED.get(c["rule"]), tuned.get(c["rule"].split("+")[0]))
            ]
            shown.sort(key=lambda c: (list(colours).index(c["rule"]), c["rate"]))
            for c in shown:
                own = c["rate"] == PUBLISHED.get(c["rule"]) and c["rate"] != tuned.get(c["rule"])
                x = np.arange(len(c["curve"]["max_vio"])) * c["curve"]["every_steps"]
                style = {"color": colours[c["rule"]], "ls": ":" if own else "-", "lw": 1.6}
                axes.plot(x, c["curve"]["max_vio"], label=name_of(c["rule"], c["rate"]), **style)
            axes.axhline(TARGET, color=INK, lw=0.8)
            floor = floors[str(experts)]
            axes.axhspan(floor["even_dice"], floor["text"], color=FAINT, lw=0, label="floor: even dice to this text")
            axes.set(yscale="log", title=f"{experts} experts, top-{TOP_K}", xlabel="first step of the window")
            if column == 0:
                axes.set_ylabel("MaxVio of the window, worse layer")
            if not figure.legends and (experts == TUNED_AT or TUNED_AT not in sizes):
                figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
            names = [name_of(c["rule"], c["rate"]) for c in shown]
            prices.scatter([c["val_bpb"] for c in shown], names, color=[colours[c["rule"]] for c in shown], s=28)
            prices.invert_yaxis()
            prices.set_xlabel("validation bits per byte after the last step")
            prices.grid(axis="x", color=FAINT, lw=0.6)
        return png(figure)


def table(cases: list[dict[str, Any]]) -> str:
    """Return the table of docs/balancing.md."""
    lines = [
        "| experts | rule | steps until MaxVio < 0.1 | MaxVio, last tenth | of one step | std of the bias "
        "| bits per byte |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in sorted(
        cases, key=lambda c: (c["experts"], list(RATES).index(c["rule"].split("+")[0]) if c["rate"] else -1)
    ):
        until = c["steps_until_even"]
        lines.append(
            f"| {c['experts']} | {name_of(c['rule'], c['rate'])} | {'never' if until is None else until} | "
            f"{c['max_vio_last_tenth']:.3f} ± {c['max_vio_last_tenth_std']:.3f} | {c['max_vio_one_step']:.2f} | "
            f"{c['bias_std']:.4f} | {c['val_bpb']:.4f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, default=Path("runs/balance/tokenize/tokens"))
    parser.add_argument("--cases", type=Path, default=Path("runs/balance/cases"), help="finished cases")
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--picture", type=Path, help="draw the result here")
    args = parser.parse_args()
    cases = measure(args)
    tuned = {rule: chosen(cases, rule) for rule in RATES}
    assignments = SEQUENCES * CONTEXT_TOKENS * TOP_K
    floors = {
        str(n): {
            "even_dice": even_floor(n, assignments * window_of(n)),
            "text": float(
                np.median(
                    [c["text_floor"] for c in cases if c["experts"] == n and c["steps_until_even"] is not None] or [0]
                )
            ),
            "even_dice_one_step": even_floor(n, assignments),
            "window_steps": window_of(n),
        }
        for n in sorted({c["experts"] for c in cases})
    }
    result = {
        "settings": {
            "steps": args.steps, "seed": args.seed,
            "step_tokens": SEQUENCES * CONTEXT_TOKENS, "top_k": TOP_K, "target": TARGET,
            "hot_experts": HOT_EXPERTS, "hot_factor": HOT_FACTOR, "threads": 1,
        },
        "published": PUBLISHED,
        "tuned": tuned,
        "floors": floors,
        "cases": cases,
        "cpu_s": round(sum(c["cpu_s"] for c in cases), 1),
        "cpu": cpu_name(),
        "versions": package_versions(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }  # fmt: skip
    print(table(cases))
    print(json.dumps({key: result[key] for key in ("tuned", "floors", "cpu_s")}))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        args.picture.write_bytes(draw(cases, floors, tuned))
    return 0


if __name__ == "__main__":
    sys.exit(main())
