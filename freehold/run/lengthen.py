"""More steps on a run: a phase of constant rate is lengthened in place, any other change of phases is a branch.

In a phase of constant rate (WSD's stable phase) the steps done so far are the same however long the phase is. The run
continues from the phase's last checkpoint. Which rows those steps read followed from the phase's length then, so the
old length is recorded (`lengthened` in the key file and the manifest), and the added steps are arranged by themselves:
they read what a branch off that checkpoint would read.
"""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.core.artifact import read_json, write_json
from freehold.run.checkpoints import read_checkpoints
from freehold.run.layout import MANIFEST, RunFolder, step_of
from freehold.run.recipe import StagePlan
from freehold.run.steps import first_step, resolved

Lengthened = dict[str, list[int]]
"""Of each lengthened phase the numbers of steps it had before, ascending."""


@dataclass(frozen=True)
class Change:
    """How the phases of a recipe differ from those a stage was made with."""

    same: tuple[str, ...]
    """The phases that are as they were, from the first one on."""
    phase: str = ""
    """The phase that became longer after them at a constant rate; empty when none did."""
    steps: int = 0
    """The steps that phase had before."""
    done: int = 0
    """The steps whose schedule is unchanged."""


def change_of(stage: StagePlan, record: dict[str, Any]) -> Change | None:
    """Return how the phases changed when nothing else of the stage did; None otherwise."""
    if not stage.stage.lengthens:
        return None
    key, old_config = stage.key(), record.get("config") or {}
    new, recorded_phases = key["config"]["phases"], old_config.get("phases") or {}
    # Records have their keys sorted; the filled settings have them in the recipe's order.
    order = list(resolved(stage.run.root, stage.name).get("phases") or new)
    old = {name: recorded_phases[name] for name in order if name in recorded_phases}
    rest = [{k: v for k, v in config.items() if k != "phases"} for config in (old_config, key["config"])]
    others = ("seed", "inputs", "contract")
    if (
        rest[0] != rest[1]
        or any(record.get(name) != key[name] for name in others)
        or list(old.items()) == list(new.items())
    ):
        return None
    same: list[str] = []
    done = 0
    for (name, before), (now_name, now) in zip(old.items(), new.items(), strict=False):
        if (name, before) != (now_name, now):
            longer = name == now_name and {**before, "steps": now["steps"]} == now and now["steps"] > before["steps"]
            if longer and now["shape"] == "constant":
                return Change(tuple(same), name, before["steps"], done + before["steps"])
            break
        same.append(name)
        done += before["steps"]
    if len(same) == len(old):  # a phase was added after the last one
        return Change(tuple(same), "", 0, done)
    return Change(tuple(same), done=done)


def lengthen(stage: StagePlan, record: dict[str, Any]) -> bool:
    """Prepare a stage to continue with more steps; return False when that is not what changed, or cannot be done.

    Afterwards the stage is a started one whose newest checkpoint is from before the change. A kill at any point leaves
    it as it was or so.
    """
    change = change_of(stage, record)
    added = change is not None and len(change.same) == len((record.get("config") or {}).get("phases") or {})
    if change is None or not (change.phase or added):
        return False
    last = first_step(stage.config.parent) + change.done
    folder = stage.run.step_checkpoints(stage.name)
    found = [c for c in read_checkpoints(stage.run.root) if c.stage == stage.name and c.step <= last]
    if not found:
        return False
    newest = max(found, key=lambda c: c.step)
    _link(stage.run.root / newest.path, folder / f"step_{newest.step:08d}")
    lengthened = recorded(stage.run, stage.name)
    if change.phase:
        lengthened[change.phase] = sorted({*lengthened.get(change.phase, []), change.steps})
    spans = {name: record[name] for name in ("code", "code_sha256", "freehold_version") if name in record}
    write_json(stage.run.key(stage.name), {**stage.key(), **spans, "lengthened": lengthened})
    for path in folder.glob("step_*"):
        if step_of(path) > last:
            shutil.rmtree(path)
    stage.run.manifest(stage.name).unlink(missing_ok=True)  # last: until here it is the finished stage it was
    return True


def recorded(run: RunFolder, stage: str) -> Lengthened:
    """Return what a stage records of lengthened phases; empty when there is nothing."""
    for path in (run.key(stage), run.manifest(stage)):
        if path.exists() and (found := read_json(path).get("lengthened")):
            return {name: [int(steps) for steps in lengths] for name, lengths in found.items()}
    return {}


def branch_command(stage: StagePlan, record: dict[str, Any]) -> str:
    """Return the command that makes the changed phases as a branch of this run; empty when no checkpoint allows it."""
    change = change_of(stage, record)
    if change is None or not change.same:
        return ""
    phases = stage.config.phases
    name = phases[change.same[-1]].checkpoint
    folder = stage.folder / name
    if not name or not (folder / MANIFEST).exists():
        return ""
    removed = [f"phases.{phase}=null" for phase in change.same]
    words = [stage.name, *stage.typed, *removed, f"parent={folder}", "--fork", f"{stage.head.name}-longer"]
    return "freehold " + " ".join(shlex.quote(word) for word in words)


def _link(source: Path, target: Path) -> None:
    """Put a finished checkpoint among the step checkpoints, without a second copy of its bytes."""
    if source == target or target.exists():
        return
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=os.link)
    temporary.rename(target)
