"""Native checkpoints: PyTorch DCP tensors in `state/`, facts in JSON, everything hashed in a manifest written last.

A checkpoint is written into a fresh folder and renamed: DCP over an existing folder can mix old metadata with new
shards, and DCP does not notice a flipped byte on load, so files are hashed here (distributed.md, P11 and P12).
Keys are `<part>/<name>`, part being model, optimizer, balance or rng.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from freehold.core.artifact import (
    MANIFEST,
    atomic_folder,
    read_manifest,
    verify_files,
    write_json,
    write_manifest,
)
from freehold.core.errors import ArtifactError, CheckpointError
from freehold.core.machine import disk_error
from freehold.model.config import ModelConfig, from_hf_dict, to_hf_dict

STATE = "state"
State = dict[str, dict[str, Tensor]]


def save(
    folder: Path, state: State, config: ModelConfig, facts: dict[str, Any], copy: Iterable[Path] = ()
) -> dict[str, Any]:
    """Write a whole checkpoint or nothing.

    `facts` become `trainer.json` (step, phase, stage type, parent ...); `copy` are files taken along (the
    tokenizer's), so that a checkpoint can be opened alone. Returns the manifest; raises ArtifactError when the
    disk is full, and leaves what was there before.
    """
    flat = {f"{part}/{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}
    with atomic_folder(folder) as temporary:
        with _quiet(), _full_disk(temporary, sum(tensor.nbytes for tensor in flat.values())):
            dcp.save(flat, storage_writer=_Writer(temporary / STATE, sync_files=True))
        write_json(temporary / "config.json", to_hf_dict(config))
        write_json(temporary / "trainer.json", facts)
        for path in copy:
            shutil.copyfile(path, temporary / path.name)
        return write_manifest(temporary, kind="checkpoint", counts={"tensors": len(flat)})


def check(folder: Path) -> dict[str, Any]:
    """Verify that a checkpoint is finished and that no byte of it changed; return its facts.

    Raises CheckpointError naming the file.
    """
    try:
        manifest = read_manifest(folder, kind="checkpoint")
        verify_files(folder, manifest)
    except ArtifactError as error:
        raise CheckpointError(
            f"damaged or unfinished checkpoint: {error.what}",
            where=error.where,
            found=error.found,
            expected=error.expected,
            todo="use an older checkpoint; a training run goes back to the last good one by itself",
        ) from error
    facts: dict[str, Any] = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    return facts


def load(folder: Path, parts: Iterable[str] | None = None, *, verify: bool = True) -> State:
    """Read the tensors of a checkpoint, all parts or some.

    Raises CheckpointError when it is damaged (with `verify`) or when a part asked for is not in it.
    """
    if verify:
        check(folder)
    with _quiet():
        reader = dcp.FileSystemReader(folder / STATE)
        metadata = reader.read_metadata().state_dict_metadata
        flat: dict[str, Tensor] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata) and (parts is None or key.partition("/")[0] in parts)
        }
        dcp.load(flat, storage_reader=reader)
    state: State = {part: {} for part in parts} if parts is not None else {}
    for key, tensor in flat.items():
        part, _, name = key.partition("/")
        state.setdefault(part, {})[name] = tensor
    if not state.get("model") and (parts is None or "model" in parts):
        raise CheckpointError("the checkpoint holds no model", where=folder, found=sorted(metadata)[:3])
    return state


def read_config(folder: Path) -> ModelConfig:
    """Return the shape of a checkpoint's model."""
    return from_hf_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def read_model(folder: Path, *, verify: bool = True) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the config and the model's tensors (float32 masters, expert biases) of a checkpoint."""
    state = load(folder, ["model"], verify=verify)
    return read_config(folder), state["model"]


def match_keys(found: Iterable[str], expected: Iterable[str], folder: Path) -> None:
    """Compare names both ways (DCP ignores extra ones in the file); CheckpointError names the first difference."""
    found, expected = set(found), set(expected)
    for names, what in (
        (expected - found, "a tensor is missing from the checkpoint"),
        (found - expected, "the checkpoint holds a tensor the model does not have"),
    ):
        if names:
            raise CheckpointError(
                what, where=folder, found=f"{len(names)} such, e.g. {min(names)}", todo="is it another model's?"
            )


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"step_{step:08d}"


def last_good(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest undamaged step checkpoint below `folder`, naming each one skipped; None without any."""
    for path in sorted(folder.glob("step_????????"), reverse=True):
        try:
            check(path)
            return path
        except CheckpointError as error:
            warn(f"skipped a checkpoint\n{error}")
    return None


def prune(
    folder: Path, *, keep_last: int, keep_every_steps: int, every_steps: int, needed_step: int | None = None
) -> None:
    """Delete step checkpoints beyond the last `keep_last` and those at multiples of `keep_every_steps`.

    Ones off the `every_steps` grid (made by an interruption) go as soon as a newer one exists, so that what is
    left does not depend on when a run was stopped. The newest of at most `needed_step` steps is kept in any case.
    """
    for leftover in folder.glob("step_*"):  # of a save or a removal that was killed
        if leftover.suffix == ".tmp" or not (leftover / MANIFEST).exists():
            shutil.rmtree(leftover)
    steps = [int(path.name.removeprefix("step_")) for path in sorted(folder.glob("step_????????"))]
    grid = [step for step in steps if step % every_steps == 0 or step == steps[-1]]
    kept = set(grid[-keep_last:]) | {s for s in grid if keep_every_steps and s % keep_every_steps == 0}
    if needed_step is not None:
        kept |= set([step for step in steps if step <= needed_step][-1:])
    remove_unless(folder, lambda path: int(path.name.removeprefix("step_")) in kept)


def remove_unless(folder: Path, wanted: Callable[[Path], bool]) -> None:
    """Delete the finished step checkpoints below `folder` that are not wanted; a kill leaves only a `.tmp`."""
    for path in sorted(folder.glob("step_????????")):
        if (path / MANIFEST).exists() and not wanted(path):
            shutil.rmtree(path.rename(path.with_suffix(".tmp")))


@contextlib.contextmanager
def _full_disk(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Name a full disk where torch's writer tells only of an unexpected position in its archive."""
    before = shutil.disk_usage(folder).free
    try:
        yield
    except (Exception, CheckpointException) as error:
        if before < needed_bytes or shutil.disk_usage(folder).free < 1 << 20:
            raise disk_error(OSError(errno.ENOSPC, "No space left on device"), folder) from error
        raise


class _Writer(dcp.FileSystemWriter):
    """DCP's writer without the random id and the path in its metadata: the same state gives the same bytes."""

    def storage_meta(self) -> None:
        """Record nothing about the place."""


class _quiet(warnings.catch_warnings):
    """Silence DCP's notes about running without a process group."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
