"""How many steps a stage of a run does, how long one takes, and what is left of its phases after some of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from freehold.core.artifact import read_json, read_manifest
from freehold.core.log import read_metrics
from freehold.run.checkpoints import Checkpoint
from freehold.run.layout import PRETRAIN, TRAINER_FACTS, RunFolder


def resolved(folder: Path, stage: str) -> dict[str, Any]:
    """Return a stage's filled section, its keys in the order of the recipe; empty when it never began."""
    path = RunFolder(folder).resolved(stage)
    data = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return data if isinstance(data, dict) else {}


def total_steps(folder: Path, checkpoints: Sequence[Checkpoint], stage: str) -> int:
    """Return the steps done once a stage is finished, its parent's included: as configured, or as far as it came."""
    run = RunFolder(folder)
    if run.finished(stage):
        counts = read_manifest(run.stage(stage))["counts"]
        if "steps" in counts:
            return int(counts["steps"])
    here = [c.step for c in checkpoints if c.stage == stage]
    phases = resolved(folder, stage).get("phases", {})
    begin = _begin(folder) if stage == PRETRAIN else 0
    return max([*here, begin + sum(phase["steps"] for phase in phases.values())])


def _begin(folder: Path) -> int:
    """Return the step at which the run's pre-training began."""
    return first_step(resolved(folder, PRETRAIN).get("parent") or "")


def first_step(parent: str) -> int:
    """Return the first step of a branch: its parent's; 0 without a parent."""
    facts = Path(parent) / TRAINER_FACTS
    return int(read_json(facts)["step"]) if parent and facts.exists() else 0


def phases_left(folder: Path, step: int) -> dict[str, Any] | None:
    """Return the phases that are left after `step` steps of pre-training; the one that holds that step is cut.

    None when that cannot be said as a phase: inside a warm-up or a cosine.
    """
    left: dict[str, Any] = {}
    begin = _begin(folder)
    for name, phase in resolved(folder, PRETRAIN).get("phases", {}).items():
        done = min(max(step - begin, 0), phase["steps"])
        begin += phase["steps"]
        if done == phase["steps"]:
            continue
        if done == 0:
            left[name] = phase
            continue
        warm = phase.get("warmup_steps", 0)
        if done < warm or phase.get("shape", "constant") == "cosine":
            return None
        cut = {**phase, "steps": phase["steps"] - done, "warmup_steps": 0}
        if phase.get("shape") == "linear":
            cut["start"] = phase["start"] + (phase["end"] - phase["start"]) * (done - warm) / (phase["steps"] - warm)
        left[name] = cut
    return left


def step_seconds(run_folder: Path, stage: str) -> float | None:
    """Return the seconds of one optimizer step as the run itself measured them (median of its metrics), if it did."""
    rows = [row for row in read_metrics(RunFolder(run_folder).metrics(stage)) if row.get("perf/tokens_per_s")]
    found = []
    for before, row in zip([{}, *rows], rows, strict=False):
        steps, tokens = row["step"] - before.get("step", 0), row["tokens"] - before.get("tokens", 0)
        # The first line of a stage with a parent counts the parent's tokens and steps together, or neither.
        if steps > 0 and tokens > 0 and (before or len(rows) == 1):
            found.append(tokens / row["perf/tokens_per_s"] / steps)
    return sorted(found)[len(found) // 2] if found else None
