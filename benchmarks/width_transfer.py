"""Whether the best learning rates of a narrow model are the best of a wide one: 128, 256 and 512 wide.

Models of `short_runs.py`, 160 steps of 2,048 tokens each, whatever the width. Two ways to train: the recipe's (Muon
for hidden matrices, AdamW for the rest; both rates times the same multiple) and AdamW for everything. Multiples are
powers of two; rates transfer when the best multiple moves by no more than one of these between 128 and 512.

    freehold run recipes/laptop.yaml until=tokenize
    python benchmarks/width_transfer.py --json benchmarks/results/width_transfer.json

About twenty minutes of one core; finished runs are in `--cases` and are not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import environment, write
from short_runs import Runs, Setting

WIDTHS = (128, 256, 512)
BATCH_TOKENS, STEPS = 2048, 160
MUON_LR, MUON_ADAMW_LR, ADAMW_LR = 0.02, 5e-3, 8e-3
"""The rates at multiple 1: the laptop recipe's, and AdamW's alone."""
MULTIPLES = {"muon": (0.5, 1.0, 2.0, 4.0, 8.0), "adamw": (0.125, 0.25, 0.5, 1.0, 2.0)}


def setting(way: str, width: int, multiple: float, batch_tokens: int = BATCH_TOKENS, steps: int = STEPS) -> Setting:
    """Return the run of a way at a multiple of its rates."""
    if way == "muon":
        return Setting(width, batch_tokens, steps, "muon", MUON_ADAMW_LR * multiple, MUON_LR * multiple)
    return Setting(width, batch_tokens, steps, "adamw", ADAMW_LR * multiple)


def best(swept: dict[str, float]) -> float:
    """Return the multiple of the lowest bits per byte."""
    return float(min(swept, key=swept.__getitem__))


def draw(found: dict[str, dict[str, dict[str, float]]]) -> bytes:
    """Return a PNG: bits per byte over the multiple of the rates, for each way and width."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from freehold.run.figure import BLUE, GREEN, ORANGE, STYLE, png

    titles = {"muon": "Muon, AdamW for the rest", "adamw": "AdamW for everything"}
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
        for axes, (way, widths) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
            for (width, swept), colour in zip(widths.items(), (BLUE, GREEN, ORANGE), strict=False):
                axes.plot([float(m) for m in swept], list(swept.values()), color=colour, marker="o", ms=4, label=width)
                axes.plot(best(swept), min(swept.values()), color=colour, marker="o", ms=10, mfc="none")
            axes.set_xscale("log", base=2)
            ticks = sorted({float(m) for swept in widths.values() for m in swept})
            axes.set_xticks(ticks, [f"{m:g}" for m in ticks])
            axes.set(title=titles[way], xlabel="multiple of the rates (ring: the best)")
            axes.legend(title="width")
        figure.axes[0].set_ylabel("validation bits per byte")
        return png(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, default=Path("runs/laptop/tokenize/tokens"))
    parser.add_argument("--cases", type=Path, default=Path("runs/short_runs"), help="finished runs")
    parser.add_argument("--finished", action="store_true", help="report the runs there are, make none")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    runs, less = Runs(args.tokens, args.cases), args.finished
    found: dict[str, Any] = {way: {} for way in MULTIPLES}
    for width in args.widths:
        for way, multiples in MULTIPLES.items():
            if found[way] and not less:  # a wider model takes a while: only around the best of the one before
                near = best(list(found[way].values())[-1])
                multiples = tuple(m for m in multiples if near / 2 <= m <= near * 2)
            wanted = {m: setting(way, width, m) for m in multiples}
            swept = {f"{m:g}": runs.curve(s)[-1]["bpb"] for m, s in wanted.items() if not less or runs.finished(s)}
            while not less and (low := best(swept)) in (ends := [float(m) for m in swept])[:: len(ends) - 1]:
                further = low / 2 if low == ends[0] else low * 2  # the best must be inside
                swept[f"{further:g}"] = runs.curve(setting(way, width, further))[-1]["bpb"]
                swept = dict(sorted(swept.items(), key=lambda item: float(item[0])))
            if not swept:
                continue
            found[way][str(width)] = swept
    moved = {way: {width: best(swept) for width, swept in widths.items()} for way, widths in found.items()}
    for way, widths in moved.items():
        print(f"{way}: best multiple " + ", ".join(f"{m:g} at {width}" for width, m in widths.items()))
    write(
        args.json,
        {"finished_only": less, "batch_tokens": BATCH_TOKENS, "steps": STEPS,
         "rates": {"muon_lr": MUON_LR, "lr": MUON_ADAMW_LR}, "adamw_lr": ADAMW_LR, "bpb": found, "best": moved,
         "environment": environment()},
    )  # fmt: skip
    if args.picture:
        args.picture.write_bytes(draw(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
