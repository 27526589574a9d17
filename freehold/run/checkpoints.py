"""The finished checkpoints of a run, what each was made of, and how a question names one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from freehold.core.artifact import MANIFEST, read_json, read_manifest
from freehold.run.layout import EXPORT, EXPORTED, RunFolder, training

WEIGHTS = (".safetensors", ".gguf")
"""Endings of exported files that hold weights."""


@dataclass(frozen=True)
class Checkpoint:
    """One finished checkpoint of a run."""

    path: str
    """Relative to the run folder."""
    stage: str
    stage_type: str
    step: int
    phase: str
    content_sha256: str
    created: str
    parent: str
    """Content hash of the checkpoint it was started from; empty without one."""
    skipped_steps: tuple[int, ...] = ()
    bounds: tuple[tuple[str, int], ...] = ()
    """The (stage, steps) it is made of: an align checkpoint has its parent's too."""
    outside: str = ""
    """The hash of the ancestor that is not in this run; empty when all are."""

    @property
    def named(self) -> bool:
        """Whether it is kept for good (`pretrain/base`), not one of every few steps."""
        return self.path.count("/") == 1

    @property
    def label(self) -> str:
        """Return what people call it: Base, or its path."""
        return self.stage_type or self.path


def read_checkpoints(run_folder: Path) -> list[Checkpoint]:
    """Return every finished checkpoint of a run, oldest first, named ones before step ones of the same step."""
    found: list[Checkpoint] = []
    for stage in training():
        here = [
            _read(run_folder, stage, path)
            for path in RunFolder(run_folder).trainer_facts(stage)
            if (path.parent / MANIFEST).exists()
        ]
        found += sorted(here, key=lambda c: (c.step, c.path.count("/"), c.path))
    by_hash = {c.content_sha256: c for c in found}
    return [_with_ancestry(checkpoint, by_hash) for checkpoint in found]


def _read(run_folder: Path, stage: str, path: Path) -> Checkpoint:
    facts, manifest = read_json(path), read_manifest(path.parent)
    return Checkpoint(
        path=path.parent.relative_to(run_folder).as_posix(),
        stage=stage,
        stage_type=facts.get("stage_type") or "",
        step=int(facts["step"]),
        phase=facts.get("phase", ""),
        content_sha256=manifest["content_sha256"],
        created=manifest.get("created", ""),
        parent=facts.get("parent") or "",
        skipped_steps=tuple(facts.get("skipped_steps", ())),
    )


def _with_ancestry(checkpoint: Checkpoint, by_hash: dict[str, Checkpoint]) -> Checkpoint:
    bounds, parent = [(checkpoint.stage, checkpoint.step)], checkpoint.parent
    seen = {checkpoint.content_sha256}
    while parent in by_hash and parent not in seen:  # a hostile record may name itself
        seen.add(parent)
        bounds.append((by_hash[parent].stage, by_hash[parent].step))
        parent = by_hash[parent].parent
    return replace(checkpoint, bounds=tuple(bounds), outside=parent)


def exported_checkpoint(manifest: dict[str, Any]) -> str:
    """Return the path of the checkpoint that an export was made from."""
    return str(manifest.get("config", {}).get("checkpoint", EXPORTED))


def find_checkpoint(run_folder: Path, query: str) -> str | None:
    """Return the path (in the run) of the checkpoint that a question names, or None when it names none.

    It may be named by its path or its last part, what it is (Base), the beginning of its hash (8 digits or more), or
    by an exported file made from it.
    """
    run = RunFolder(run_folder)
    wanted = query.rstrip("/").removeprefix(run_folder.as_posix().rstrip("/") + "/")
    if wanted.partition("/")[0] == EXPORT and run.finished(EXPORT):
        manifest = read_manifest(run.stage(EXPORT))
        if any(f"{EXPORT}/{name}".startswith(wanted) for name in manifest["files"]):
            wanted = exported_checkpoint(manifest)
    for checkpoint in reversed(read_checkpoints(run_folder)):
        names = (checkpoint.path, checkpoint.path.rpartition("/")[2], checkpoint.stage_type)
        if wanted in names or (len(wanted) >= 8 and checkpoint.content_sha256.startswith(wanted)):
            return checkpoint.path
    return None
