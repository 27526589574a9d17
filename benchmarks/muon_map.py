"""Where Muon pays against AdamW at equal wall-clock: over tokens a step, width and Newton-Schulz iterations.

Models and runs of `short_runs.py`. The loss after a number of steps is deterministic under any load;
what a step takes is timed apart, in short rounds in turn, and wall-clock is steps times the median step. Each way
sweeps the same number of rates around the best that `width_transfer.py` found at 128 wide (three iterations use
what five chose; the widest cell of the largest batch uses what 128 wide chose).

A cell says what AdamW has reached when its steps are done, where Muon stands at that very moment, and the break-even:
how many times AdamW's step a step of Muon may take to be level. Break-even does not depend on the machine; next to it
stands what Muon's step does take, here and (from `muon_step.py`) in the real shapes.

    freehold run recipes/laptop.yaml until=tokenize
    python benchmarks/muon_map.py --json benchmarks/results/muon_map.json --picture docs/images/muon_map.png

About half an hour of one core; finished runs are in `--cases` and are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment, interleaved, middle, write
from short_runs import CONTEXT_TOKENS, Runs, Setting, trainer_of
from width_transfer import setting

from freehold.data.packing import text_batch
from freehold.kernels import cpu

STEPS = {2048: 160, 8192: 100, 32768: 40}
CELLS = ((8192, 128), (8192, 256), (2048, 128), (2048, 256), (32768, 128), (32768, 256))
MULTIPLES = {"adamw": (0.5, 1.0, 2.0), "muon": (1.0, 2.0, 4.0)}
WAYS = {"adamw": ("adamw", 5), "muon, 5 iterations": ("muon", 5), "muon, 3 iterations": ("muon", 3)}
Curve = list[dict[str, float]]


def best_runs(
    runs: Runs, cells: Iterable[tuple[int, int]], finished: bool
) -> dict[tuple[int, int], dict[str, tuple[Setting, Curve]]]:
    """Return the best run of each way in each cell, by bits per byte at the end; of none: any setting and no curve."""
    found: dict[tuple[int, int], dict[str, tuple[Setting, Curve]]] = {}
    multiples: dict[tuple[int, int, str], float] = {}
    for cell in cells:
        batch, width = cell
        found[cell] = {}
        for name, (way, iterations) in WAYS.items():
            tried = list(MULTIPLES[way])
            if iterations != 5:
                tried = [multiples[batch, width, way]]
            elif cell == CELLS[-1] and (batch, 128) in found:
                tried = [multiples[batch, 128, way]]
            made = {m: replace(setting(way, width, m, batch, STEPS[batch]), iterations=iterations) for m in tried}
            curves = {m: runs.curve(s) for m, s in made.items() if not finished or runs.finished(s)}
            best = min(curves, key=lambda m: curves[m][-1]["bpb"]) if curves else tried[0]
            multiples[batch, width, way] = best
            found[cell][name] = made[best], curves.get(best, [])
    return found


def at(curve: Curve, step: float) -> float:
    """Return the bits per byte of a curve after `step` steps, by a line over the logarithm of the step."""
    return float(np.interp(math.log(step), [math.log(p["step"]) for p in curve], [p["bpb"] for p in curve]))


def break_even(adamw: Curve, muon: Curve) -> float | None:
    """Return AdamW's steps over those Muon needs for AdamW's last value; None: fewer than up to Muon's first point."""
    target = adamw[-1]["bpb"]
    if muon[0]["bpb"] <= target:
        return None
    bits, steps = [p["bpb"] for p in muon], [math.log(p["step"]) for p in muon]
    if target < bits[-1]:  # not reached: along the last stretch
        slope = (steps[-1] - steps[-2]) / (bits[-1] - bits[-2])
        needed = steps[-1] + slope * (target - bits[-1])
    else:
        needed = float(np.interp(-target, [-b for b in bits], steps))
    return round(adamw[-1]["step"] / math.exp(needed), 3)


def step_seconds(
    found: dict[tuple[int, int], dict[str, tuple[Setting, Curve]]],
    vocab_size: int,
    threads: int,
    rounds: int,
    pause_s: float,
) -> dict[tuple[int, int], dict[str, dict[str, float]]]:
    """Return what a step of each way takes in each cell, timed in turn; `price`: the median ratio to AdamW's."""
    seconds = {}
    for (batch, width), ways in found.items():
        ids = np.random.default_rng(0).integers(32, vocab_size, (batch // CONTEXT_TOKENS, CONTEXT_TOKENS + 1))
        rows = text_batch(ids.astype(np.uint16), 0, 0)
        trainers = {name: trainer_of(made, vocab_size, threads) for name, (made, _) in ways.items()}
        taken = interleaved({name: partial(t.train_step, rows) for name, t in trainers.items()}, rounds, pause_s)
        seconds[batch, width] = {
            name: {
                **middle(t["seconds"] for t in times),
                "foreign_cores": middle(t["foreign_cores"] for t in times)["median"],
                "price": middle(t["seconds"] / base["seconds"] for t, base in zip(times, taken["adamw"], strict=True))[
                    "median"
                ],
            }
            for name, times in taken.items()
        }
    return seconds


def draw(cells: list[dict[str, Any]]) -> bytes:
    """Return a PNG: break-even and actual price of Muon's step over the batch, for each width and iterations."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from freehold.run.figure import BLUE, MUTED, ORANGE, STYLE, png

    colours = {"muon, 5 iterations": BLUE, "muon, 3 iterations": ORANGE}
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
        widths = sorted({c["width"] for c in cells})
        for axes, width in zip(figure.subplots(1, len(widths), sharey=True), widths, strict=True):
            row = sorted((c for c in cells if c["width"] == width), key=lambda c: c["batch_tokens"])
            x = [c["batch_tokens"] for c in row]
            for name, colour in colours.items():
                known = [c for c in row if "break_even" in c["ways"][name]]
                even = [c["ways"][name]["break_even"] or 2.0 for c in known]
                price = [c["ways"][name]["price"] for c in row]
                axes.plot(
                    [c["batch_tokens"] for c in known], even, color=colour, marker="o", ms=4, label=f"{name}: may cost"
                )
                axes.plot(x, price, color=colour, marker="s", ms=4, ls=(0, (4, 3)), label=f"{name}: does cost")
            axes.axhline(1, color=MUTED, lw=1)
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{n:,}" for n in x])
            axes.set(title=f"{width} wide", xlabel="tokens a step")
        figure.axes[0].set_ylabel("steps of AdamW")
        figure.axes[0].legend()
        return png(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, default=Path("runs/laptop/tokenize/tokens"))
    parser.add_argument("--cases", type=Path, default=Path("runs/short_runs"), help="finished runs")
    parser.add_argument("--finished", action="store_true", help="report the runs there are, make none")
    parser.add_argument("--wanted", nargs="+", default=[f"{b}x{w}" for b, w in CELLS], help="tokens x width")
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0: only make the runs")
    parser.add_argument("--pause-s", type=float, default=0.0, help="rest between rounds, on a machine that is shared")
    parser.add_argument("--threads", type=int, default=2, help="while steps are timed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    runs = Runs(args.tokens, args.cases)
    cells = [tuple(map(int, cell.split("x"))) for cell in args.wanted]
    found = best_runs(runs, cells, args.finished)  # type: ignore[arg-type]
    if not args.rounds:
        return 0
    torch.set_num_threads(args.threads)
    seconds = step_seconds(found, runs.shards.vocab_size, args.threads, args.rounds, args.pause_s)
    lines: list[dict[str, Any]] = []
    if args.json and args.json.exists():  # cells that were not asked for stay
        old = json.loads(args.json.read_text())["cells"]
        lines = [c for c in old if (c["batch_tokens"], c["width"]) not in found]
    for (batch, width), ways in found.items():
        adamw = ways["adamw"][1]
        cell: dict[str, Any] = {"batch_tokens": batch, "width": width, "steps": STEPS[batch], "ways": {}}
        for name, (made, curve) in ways.items():
            price = seconds[batch, width][name].pop("price")
            cell["ways"][name] = line = {"seconds": seconds[batch, width][name], "price": price}
            text = f"{batch:6} tokens {width:4} wide {name:18} step costs {price:.2f}"
            if curve:
                line |= {"lr": made.lr, "muon_lr": made.muon_lr, "bpb": curve[-1]["bpb"], "curve": curve}
                text += f"; {line['bpb']:.4f} after {STEPS[batch]} steps"
            if curve and adamw:
                line["bpb_at_equal_time"] = at(curve, STEPS[batch] / price)
                line["break_even"] = break_even(adamw, curve)
                text += f", {line['bpb_at_equal_time']:.4f} at equal time; may cost {line['break_even'] or 'over 2'}"
            print(text)
        lines.append(cell)
    write(
        args.json,
        {"cells": lines, "threads": args.threads, "operators": cpu.describe(torch.bfloat16),
         "environment": environment()},
    )  # fmt: skip
    if args.picture:
        args.picture.write_bytes(draw(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
