"""The recipe of a run without the rows of a take-down: what curate excludes, and where pre-training continues."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from freehold.core.artifact import read_manifest, sha256_file, write_atomic
from freehold.core.errors import ArtifactError, DataError
from freehold.ledger.reservations import Reservations
from freehold.run.layout import (
    CURATE,
    EVALUATE,
    EXPORTED,
    GATHER,
    PRETRAIN,
    REPHRASE,
    TOKENIZE,
    WALK,
    RunFolder,
    training,
    until,
)
from freehold.run.steps import phases_left, resolved
from freehold.run.takedown_answer import Excluded, Takedown

MOST_IDS_IN_RECIPE = 200
"""More excluded ids than this go into a file next to the recipe."""


@dataclass(frozen=True)
class Applied:
    """The recipe that was written, and the command that makes its run."""

    recipe: str
    command: str


def write_recipe(
    run_folder: Path, answer: Takedown, folder: Path = Path(), reservations: Reservations | None = None
) -> Applied:
    """Write the recipe of the run without the rows of a take-down; return its path and the command that makes it.

    The recipe is the run's own, as it was filled, with the rows under `curate.exclude`, the tokenizer kept, and
    pre-training continued from the cheapest clean checkpoint. `reservations` replaces what the run compared its
    documents with. Raises ArtifactError when the run did not keep the
    settings of its stages, DataError when its parent must be made clean first.
    """
    restart = answer.runs[0].restart
    data = _sections(run_folder)
    if restart and restart.blocked:
        raise DataError("there is no clean place to continue from", where=run_folder, found=restart.blocked)
    if reservations:
        data[GATHER] = {**data[GATHER], "reservations": reservations.model_dump(mode="json")}
    slug = re.sub(r"[^A-Za-z0-9]+", "-", answer.query).strip("-").lower()[:40] or "rows"
    name = f"{run_folder.name}-without-{slug}"
    _exclude(data, run_folder, answer.excluded, folder, name)
    last = [stage for stage in WALK if stage in data][-1]
    if restart is None:
        last = TOKENIZE if TOKENIZE in data else CURATE
        data = {stage: data[stage] for stage in until(last) if stage in data}
    elif restart.origin:
        _restart_from(data, run_folder, Path(restart.origin), restart.from_step)
    gone = {*answer.excluded.sources, *answer.excluded.rewritten}
    for stage in training():
        for phase in data.get(stage, {}).get("phases", {}).values():
            phase["mixture"] = {source: w for source, w in (phase.get("mixture") or {}).items() if source not in gone}
    head = {
        "name": run_folder.name,
        "seed": read_manifest(RunFolder(run_folder).stage(GATHER)).get("seed", 0),
        "runs_dir": run_folder.parent.as_posix(),
        "until": last,
    }
    path = folder / f"{name}.yaml"
    about = (
        f"# {run_folder.name} without {answer.query} ({answer.matched_by}, {answer.rows:,} rows).\n"
        f"# Made by `freehold takedown`; run it as a fork, which keeps the run it came from:\n"
        f"#   freehold run {path} --fork {name}\n"
    )
    write_atomic(path, about + yaml.safe_dump({**head, **data}, sort_keys=False, allow_unicode=True))
    return Applied(path.as_posix(), f"freehold run {path} --fork {name}")


def _sections(run_folder: Path) -> dict[str, Any]:
    """Return the settings of each stage that began, in the order of the walk."""
    data = {stage: section for stage in WALK if (section := resolved(run_folder, stage))}
    if not {GATHER, CURATE} <= data.keys():
        run = RunFolder(run_folder)
        raise ArtifactError(
            "the run does not say how it was made",
            where=run_folder,
            expected=" and ".join(run.resolved(stage).relative_to(run_folder).as_posix() for stage in (GATHER, CURATE)),
            todo="put the ids under curate.exclude in its recipe by hand",
        )
    return data


def _exclude(data: dict[str, Any], run_folder: Path, rows: Excluded, folder: Path, name: str) -> None:
    """Put the rows under the `exclude` of curate and rephrase."""
    data[CURATE] = {**data[CURATE], "exclude": _merged(data[CURATE].get("exclude"), rows, folder, name)}
    rephrase = data.get(REPHRASE, {})
    if rephrase.get("teacher"):
        answers = RunFolder(run_folder).teacher_answers.as_posix()
        data[REPHRASE] = {
            **rephrase,
            "exclude": sorted({*rephrase["exclude"], *rows.rewritten}),
            "reuse": [*dict.fromkeys([*rephrase["reuse"], answers])],  # nothing is asked twice
        }


def _restart_from(data: dict[str, Any], run_folder: Path, origin: Path, step: int) -> None:
    """Continue pre-training from a checkpoint, with the run's own tokenizer and the phases that are left."""
    data[TOKENIZE] = {**data[TOKENIZE], "tokenizer": RunFolder(run_folder).tokenizer.as_posix()}
    left = phases_left(run_folder, step) or {}
    data[PRETRAIN] = {**data[PRETRAIN], "parent": origin.as_posix(), "phases": left}
    made = {phase["checkpoint"] for phase in left.values()} or {origin.name}
    aligned = Path(EXPORTED).name
    for key in ("checkpoints", "task_checkpoints"):
        if key in data.get(EVALUATE, {}):
            data[EVALUATE][key] = [c for c in data[EVALUATE][key] if c in made or c == aligned]


def _merged(before: dict[str, Any] | None, rows: Excluded, folder: Path, name: str) -> dict[str, Any]:
    """Return curate's `exclude` with the rows of an earlier take-down and of this one."""
    before = before or {}
    sources = sorted({*before.get("sources", ()), *rows.sources})
    ids = {*before.get("documents", ()), *rows.documents}
    if before.get("file"):
        ids |= set(Path(before["file"]).read_text(encoding="utf-8").split())
    if len(ids) <= MOST_IDS_IN_RECIPE:
        return {"sources": sources, "documents": sorted(ids)}
    path = folder / f"{name}.ids.txt"
    write_atomic(path, "".join(f"{identity}\n" for identity in sorted(ids)))
    return {"sources": sources, "documents": [], "file": path.as_posix(), "file_sha256": sha256_file(path)}
