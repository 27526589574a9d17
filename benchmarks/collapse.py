"""Let the routing of a small model collapse, with and without each remedy, and draw loss and MaxVio.

A byte model of 16 experts learns Python's own library until its experts are balanced. From that checkpoint six runs go
on over the same batches, with SMEBU at its published rate, which is too slow to mend by itself what happens to five:

- drift: for 60 steps each update also pushes the router rows of two experts of every layer a little towards the
  average token. One run has no remedy; the others raise the balance step, or initialise the two experts again.
- bad batch: the update of one single step does all of that together. One run has no remedy, the other rolls back.

    python benchmarks/collapse.py --json benchmarks/results/collapse.json --picture docs/images/collapse.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freehold.core.artifact import package_versions, write_atomic
from freehold.core.log import Log, read_metrics
from freehold.core.machine import cpu_name
from freehold.data.loader import PhaseRows, Source, TextOrder
from freehold.data.packing import Batch
from freehold.model.config import ModelConfig
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.trainer.config import CollapseConfig, TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer

MODEL = ModelConfig(
    vocab_size=288, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=4,
    num_dense_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=16,
    num_experts_per_tok=2, sliding_window=64, max_position_embeddings=128,
)  # fmt: skip
BALANCED, FAULT, END = 160, 200, 420
"""The step from which the runs continue alone, the first faulty one, and the last."""
PUSHED, PUSH = [0, 1], 4.0
"""The experts that win, and what is added in all to their logits of the average token."""
SHOWN = 0.02
"""The loss shows a collapse once it is this many nats above that of the undisturbed run, in the mean of 15 steps."""


@dataclass(frozen=True)
class Run:
    """One run: how it is disturbed, what it does about it, and how it is drawn."""

    name: str
    fault_steps: int
    action: str
    colour: str

    @property
    def recovers(self) -> bool:
        """Return whether it should end as balanced as the undisturbed run."""
        return self.fault_steps == 0 or self.action != "none"


UNDISTURBED = Run("undisturbed", 0, "none", "#7b8794")
RUNS = (
    UNDISTURBED,
    Run("drift, no remedy", 60, "none", "#b3261e"),
    Run("drift, raise_rate", 60, "raise_rate", "#2563a8"),
    Run("drift, reinitialise", 60, "reinitialise", "#2f8f6b"),
    Run("bad batch, no remedy", 1, "none", "#b3261e"),
    Run("bad batch, roll_back", 1, "roll_back", "#2563a8"),
)


def library(limit_bytes: int = 2_000_000) -> Source:
    """Return the standard library's modules as bytes, each a document: id = byte + 32."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts, total = [], 0
    for path in paths:
        texts.append(np.append(np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.uint16) + 32, 1))
        total += len(texts[-1])
        if total > limit_bytes:
            break
    lengths = np.array([len(text) for text in texts])
    names = [path.name for path in paths[: len(texts)]]
    return Source("stdlib", np.concatenate(texts), np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths, names)


class Faulty(Trainer):
    """A run whose router is pushed by the updates of some steps; a skipped step pushes nothing."""

    fault_steps = 0

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """Train, then push."""
        step = self.step
        values = super().train_step(batch)
        if FAULT <= step < FAULT + self.fault_steps:
            for name, direction in self.average_inputs(batch).items():
                rows = self.state.masters[f"{name}.router.gate.weight"].data
                rows[PUSHED] += PUSH / self.fault_steps * direction / direction.square().sum()
            self.state.publish()
        return values

    @torch.no_grad()
    def average_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the mean input [d] of each layer's router."""
        means: dict[str, torch.Tensor] = {}
        hooks = [
            layer.router.register_forward_hook(lambda _, inputs, __, name=name: means.update({name: inputs[0].mean(0)}))
            for name, layer in self.state.moe_layers.items()
        ]
        self.model.eval()
        self.model.hidden(torch.from_numpy(batch.input_ids))
        for hook in hooks:
            hook.remove()
        return means


def trainer(folder: Path, source: Source, rate: float, action: str, end: int) -> Faulty:
    phases = {"stable": PhaseConfig(steps=end, warmup_steps=20)}
    job = Job(
        folder=folder,
        model=MODEL,
        trainer=TrainerConfig(
            dtype="float32",
            threads=1,
            checkpoint_every_steps=20,
            keep_every_steps=20,
            log_every_steps=1,
            collapse=CollapseConfig(action=action),
        ),  # fmt: skip
        optim=OptimConfig(lr=2e-3),
        balance=SmebuConfig(rate=rate),
        schedule=Schedule(phases),
        # The order covers all steps from the start: it must not depend on where the first part ends.
        order=TextOrder(
            {"stdlib": source}, [PhaseRows("stable", END, {})], context_tokens=128, sequences=8, seed=0, separator=1
        ),
        micro_sequences=8,
        stage="pretrain",
        parent="",
    )
    return Faulty(job, Log(folder, quiet=True), seed=0)


def series(folder: Path, key: str) -> np.ndarray:
    """Return one figure of every step of a run; NaN where a step was skipped."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss/mean" in row]
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows])


def smooth(values: np.ndarray, steps: int = 15) -> np.ndarray:
    """Return a running mean over the steps before, skipping those that have no figure."""
    windows = (values[max(0, i - steps + 1) : i + 1] for i in range(len(values)))
    return np.array([np.nanmean(w) if np.isfinite(w).any() else np.nan for w in windows])


def draw(figures: dict[str, Any], gaps: dict[str, np.ndarray], max_vio: dict[str, np.ndarray]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.2), dpi=125, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    steps = np.arange(1, END + 1)
    for column, kind in enumerate(("drift", "bad batch")):
        above, below = panels[0, column], panels[1, column]
        shown = [UNDISTURBED, *(run for run in RUNS if run.name.startswith(kind))]
        for run in shown:
            style: Any = {"color": run.colour, "linewidth": 1.8, "label": run.name.removeprefix(f"{kind}, ")}
            above.plot(steps, smooth(gaps[run.name]), **style)
            below.plot(steps, max_vio[run.name], **style)
        alarm = figures[shown[1].name]["alarm_steps"][0]
        for axes in (above, below):
            axes.axvspan(FAULT, FAULT + shown[1].fault_steps, color="#fbe3df", zorder=-5)
            axes.axvline(alarm, color="#1f2933", linewidth=1, linestyle=(0, (4, 3)))
            axes.spines[["top", "right"]].set_visible(False)
        below.annotate(
            f"first alarm:\nstep {alarm}", (FAULT - 4, 0.8), xycoords=below.get_xaxis_transform(), ha="right"
        )
        above.set_title(f"{kind}: loss above the undisturbed run (nats, mean of 15 steps)", loc="left", fontsize=11)
        below.set_title("MaxVio, mean of three layers", loc="left", fontsize=11)
        below.set_xlabel("optimizer step; shaded: the router is pushed")
        below.set_xlim(FAULT - 50, END)
        above.legend(frameon=False, loc="upper right")
    panels[1, 0].set_ylim(bottom=0)
    from freehold.run.figure import png

    return png(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--picture", type=Path, help="draw the runs here")
    args = parser.parse_args()
    started = time.monotonic()
    work, source = Path(tempfile.mkdtemp(prefix="freehold-collapse-")), library()
    # The rate of a run this short (docs/decisions/0009) balances the experts; the published one keeps them so.
    trainer(work / "start", source, 5e-3, "roll_back", BALANCED).run()
    figures: dict[str, Any] = {}
    gaps, max_vio = {}, {}
    for run in RUNS:
        folder = shutil.copytree(work / "start", work / run.name)
        trained = trainer(folder, source, 5e-4, run.action, END)
        trained.fault_steps = run.fault_steps
        trained.run()
        gaps[run.name] = series(folder, "loss/mean") - series(work / UNDISTURBED.name, "loss/mean")
        max_vio[run.name] = series(folder, "moe/max_vio")
        seen = np.flatnonzero(smooth(gaps[run.name]) > SHOWN)
        figures[run.name] = {
            "alarm_steps": [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "moe/alarm" in row],
            "loss_shows_it_at_step": int(seen[0]) + 1 if len(seen) and run.action == "none" else None,
            "skipped_steps": trained.skipped,
            "max_vio_last_40_steps": round(float(np.nanmean(max_vio[run.name][-40:])), 3),
            "loss_gap_last_40_steps_nats": round(float(np.nanmean(gaps[run.name][-40:])), 4),
        }
        print(run.name, figures[run.name], flush=True)
    even = figures[UNDISTURBED.name]["max_vio_last_40_steps"]
    as_expected = {run.name: (figures[run.name]["max_vio_last_40_steps"] < 2 * even) == run.recovers for run in RUNS}
    result = {
        "runs": figures,
        "as_expected": as_expected,
        "fault": {"first_step": FAULT, "experts": PUSHED, "logit": PUSH},
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "cpu": cpu_name(),
        "versions": package_versions(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.picture:
        write_atomic(args.picture, draw(figures, gaps, max_vio))
    shutil.rmtree(work)
    print(f"{result['seconds']} s,", "as expected" if all(as_expected.values()) else f"NOT as expected: {as_expected}")
    return 0 if all(as_expected.values()) and not figures[UNDISTURBED.name]["alarm_steps"] else 1


if __name__ == "__main__":
    sys.exit(main())
