"""A training stage with damaged files: what is whole stays, and training repeats only the steps that are lost.

The key file can be damaged while good checkpoints are there. What they were trained with is in the stage's filled
settings too, and a resume compares data, order, seed and tokenizer with the newest checkpoint's own facts.
"""

from __future__ import annotations

import shutil
from typing import Any

from freehold.core.artifact import sha256_file, write_json
from freehold.core.config import difference
from freehold.run.layout import finished_parts, step_of
from freehold.run.recipe import StagePlan, recorded_config
from freehold.run.steps import first_step, resolved


def prepare(stage: StagePlan, record: dict[str, Any]) -> bool:
    """Make a damaged training stage a started one that resumes before the damage; False when that cannot be shown.

    `record` is its manifest or key, empty when that is what is damaged.
    """
    if finished_parts(stage.folder) <= 0 or not _same_settings(stage):
        return False
    files = _damaged_files(stage, record)
    damaged = {checkpoint for name in files if (checkpoint := stage.run.checkpoint_of(name))}
    ends = _ends(stage)
    lost = min((ends[name] for name in damaged if name in ends), default=None)
    steps = {step_of(path): path for path in stage.run.step_checkpoints(stage.name).glob("step_*")}
    whole = [s for s, path in steps.items() if f"{path.parent.name}/{path.name}" not in damaged]
    kept = [step for step in whole if lost is None or step < lost]
    if not kept:
        return False
    # The steps up to a damaged checkpoint are done again, so that it is written again.
    for step, path in steps.items():
        if step not in kept:
            shutil.rmtree(path)
    for name in damaged & ends.keys():
        if (stage.folder / name).exists():
            shutil.rmtree(stage.folder / name)
    for name in files:  # its tables: written again at the end
        (stage.folder / name).unlink(missing_ok=True)
    write_json(stage.run.key(stage.name), {**stage.key(), **({"code": record["code"]} if record.get("code") else {})})
    stage.run.manifest(stage.name).unlink(missing_ok=True)
    return True


def _same_settings(stage: StagePlan) -> bool:
    """Return whether the filled settings that the stage wrote down are today's."""
    try:
        stated = {key: value for key, value in resolved(stage.run.root, stage.name).items() if key != "parallel"}
    except (ValueError, OSError):
        return False
    return bool(stated) and not difference(stated, recorded_config(stage.config))


def _ends(stage: StagePlan) -> dict[str, int]:
    """Return the named checkpoints and the steps done when each is saved."""
    done, found = first_step(getattr(stage.config, "parent", "")), {}
    for phase in stage.config.phases.values():
        done += phase.steps
        if phase.checkpoint:
            found[phase.checkpoint] = done
    return found


def _damaged_files(stage: StagePlan, record: dict[str, Any]) -> list[str]:
    """Return the files that are missing or have other bytes than the manifest says."""
    found = []
    for name, file in (record.get("files") or {}).items():
        path = stage.folder / name
        same_size = path.is_file() and path.stat().st_size == file["bytes"]
        if not same_size or sha256_file(path) != file["sha256"]:
            found.append(name)
    return found
