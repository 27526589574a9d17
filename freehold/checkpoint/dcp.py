"""Native checkpoints: PyTorch DCP tensors in `state/`, facts in JSON, everything hashed in a manifest written last.

A checkpoint is written into a fresh folder and renamed: DCP over an existing folder can mix old metadata with new
shards, and DCP does not notice a flipped byte on load, so files are hashed here (distributed.md, P11 and P12).
Keys are `<part>/<name>`, part being model, optimizer, balance, collapse or rng.

There is one format. Of several ranks each writes what it holds and hashes its own files; rank 0 writes the rest and the
manifest. Any number of ranks, or one process, reads what any other number wrote. Save, check and load of a run over
several ranks are done by all of them together, and fail on all of them when they fail on one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from freehold.checkpoint import hf
from freehold.checkpoint.limits import check_config_size, check_finite
from freehold.checkpoint.metadata import STATE, DataFiles, read_metadata
from freehold.checkpoint.storage import Reader, Writer
from freehold.core.artifact import (
    MANIFEST,
    atomic_folder,
    hash_files,
    read_json,
    read_manifest,
    verify_files,
    write_json,
    write_manifest,
)
from freehold.core.errors import ArtifactError, CheckpointError, FreeholdError
from freehold.core.machine import REFUSALS, disk_error
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig, from_hf_dict, to_hf_dict

State = dict[str, dict[str, Tensor]]
T = TypeVar("T")


def save(
    folder: Path,
    state: State,
    config: ModelConfig,
    facts: dict[str, Any],
    copy: Iterable[Path] = (),
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Write a whole checkpoint or nothing; return its manifest.

    `facts` become `trainer.json` (step, phase, stage type, parent ...); `copy` are files taken along (the
    tokenizer's), so that a checkpoint can be opened alone. `group` is the process group to talk over, all ranks when
    none is given. Raises ArtifactError when the disk is full, and leaves what was there before.
    """
    flat = {f"{part}/{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}
    names = sorted({name for each in gather(list(flat), group) for name in each})
    temporary = folder.with_name(folder.name + ".tmp")
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            if _rank(group) == 0:
                stack.enter_context(atomic_folder(folder))

        def write() -> dict[str, Any]:
            (temporary / STATE).mkdir(exist_ok=True)
            with _quiet(), _full_disk(temporary, sum(_local(tensor).nbytes for tensor in flat.values())):
                writer = Writer(temporary / STATE, sync_files=True)
                dcp.save(flat, storage_writer=writer, process_group=group)
            if _rank(group) == 0:
                write_json(temporary / "config.json", to_hf_dict(config))
                write_json(temporary / "trainer.json", facts)
                for path in copy:
                    shutil.copyfile(path, temporary / path.name)
            return hash_files(temporary, lambda path: _writer_of(path) == _rank(group))

        together(begin, group)
        files = {name: record for each in together(write, group) for name, record in each.items()}

        def finish() -> dict[str, Any]:
            manifest = {}
            if _rank(group) == 0:
                counts = {"tensors": len(names)}
                manifest = write_manifest(
                    temporary, kind="checkpoint", counts=counts, files=dict(sorted(files.items()))
                )
            stack.close()
            return manifest

        return together(finish, group)[0]


def check(folder: Path, group: dist.ProcessGroup | None = None, *, shared: bool = False) -> dict[str, Any]:
    """Verify that a checkpoint is finished and that none of its bytes changed; return its facts.

    With `shared` all ranks do it together: each reads a part of the files, and all agree. Raises CheckpointError
    naming the file.
    """

    def part() -> None:
        try:
            manifest = read_manifest(folder, kind="checkpoint")
            if shared:
                names = sorted(manifest["files"])[_rank(group) :: _size(group)]
                manifest = {**manifest, "files": {name: manifest["files"][name] for name in names}}
            verify_files(folder, manifest)
        except ArtifactError as error:
            raise CheckpointError(
                f"damaged or unfinished checkpoint: {error.what}",
                where=error.where,
                found=error.found,
                expected=error.expected,
                todo="use an older checkpoint; a training run goes back to the last good one by itself",
            ) from error

    together(part, group) if shared else part()
    return read_json(folder / "trainer.json", CheckpointError)


def load(
    folder: Path,
    parts: Iterable[str] | None = None,
    *,
    verify: bool = True,
    empty: Callable[[str, torch.Size, torch.dtype], Tensor | None] | None = None,
) -> State:
    """Read the tensors of a checkpoint, all parts or some.

    `empty` makes the tensor that one is read into from its key, shape and dtype, a DTensor where this rank holds a
    part; None skips it. Without `empty` every tensor is read completely. No rank waits for another. Raises
    CheckpointError when the checkpoint is damaged (with `verify`) or when a part asked for is not in it.
    """
    if verify:
        check(folder)
    parts = None if parts is None else list(parts)
    make = empty or (lambda _, size, dtype: torch.empty(size, dtype=dtype))
    entries = read_metadata(folder)
    flat = {
        key: tensor
        for key, entry in entries.items()
        if (parts is None or key.partition("/")[0] in parts)
        and (tensor := make(key, torch.Size(entry.shape), getattr(torch, entry.dtype))) is not None
    }
    with _quiet(), contextlib.closing(DataFiles(folder / STATE)) as files:
        try:
            dcp.load(flat, storage_reader=Reader(entries, files), no_dist=True)
        except CheckpointException as failure:
            raise _first_problem(failure, folder) from failure
    state: State = {part: {} for part in parts} if parts is not None else {}
    for key, tensor in flat.items():
        part, _, name = key.partition("/")
        state.setdefault(part, {})[name] = tensor
    held = {key.partition("/")[0] for key in entries}
    if "model" not in held and (parts is None or "model" in parts):
        raise CheckpointError("the checkpoint holds no model", where=folder, found=sorted(entries)[:3])
    return state


def read_names(folder: Path) -> dict[str, list[str]]:
    """Return the names of the tensors a checkpoint holds, by part; reads none of them."""
    names: dict[str, list[str]] = {}
    for key in read_metadata(folder):
        part, _, name = key.partition("/")
        names.setdefault(part, []).append(name)
    return names


def read_config(folder: Path) -> ModelConfig:
    """Return the shape of a checkpoint's model; CheckpointError when its tensors are of another one."""
    if is_imported(folder):
        return hf.check_hf(folder)
    data = read_json(folder / "config.json", CheckpointError, None)
    shapes = {key[6:]: entry.shape for key, entry in read_metadata(folder).items() if key.startswith("model/")}
    values = sum(map(math.prod, shapes.values()))
    # Experts are stacked here: as many as there are values could be.
    check_config_size(data, len(shapes), values, folder / "config.json", experts=values)
    return from_hf_dict(data, str(folder / "config.json"))


def read_model(folder: Path, *, verify: bool = True) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the config and the model's tensors (float32 masters, expert biases) of a checkpoint.

    CheckpointError when they are of another shape, or hold a NaN or an infinity.
    The tensors of an imported model come in the dtypes they were published in.
    """
    if is_imported(folder):
        if verify:
            check(folder)
        return hf.load_hf(folder)
    config, model = read_config(folder), load(folder, ["model"], verify=verify)["model"]
    with torch.device("meta"):
        expected = Afmoe(config).state_dict()
    match_keys(model, expected, folder)
    for name, tensor in model.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                "a tensor has another shape than config.json says", where=f"{folder}: {name}",
                found=tuple(tensor.shape), expected=tuple(expected[name].shape),
            )  # fmt: skip
    check_finite(model, folder)
    return config, model


def stream_model(folder: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """Return what `read_model` returns, of an imported model one tensor in memory at a time."""
    if is_imported(folder):
        check(folder)
        return hf.stream_hf(folder)
    config, state = read_model(folder)
    return config, iter(state.items())


def is_imported(folder: Path) -> bool:
    """Return whether a checkpoint holds weights in HF form, as they were published, and nothing of a training."""
    return not (folder / STATE).exists() and (folder / MANIFEST).exists()


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
    """Return the newest undamaged step checkpoint below `folder`, naming each one skipped; None without any.

    All ranks look together and find the same.
    """
    found = together(lambda: sorted(path.name for path in folder.glob("step_????????")))[0]
    for path in (folder / name for name in reversed(found)):
        try:
            check(path, shared=True)
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


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every rank's value, in the order of ranks; of one process its own alone."""
    if _size(group) == 1:
        return [value]
    values: list[Any] = [None] * _size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def together(do: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Do something on every rank and return what each got; when it fails on one it fails on all, by the same error.

    A rank that failed raises what it met; the others raise that of the lowest one, as the FreeholdError that it is or
    as a CheckpointError that names the rank and quotes it.
    """
    if _size(group) == 1:
        return [do()]
    result, error = None, None
    try:
        result = do()
    except (Exception, CheckpointException) as problem:  # DCP's is a BaseException
        error = problem
    report: dict[str, Any] = {"what": "a checkpoint could not be written or read", "found": str(error)}
    if isinstance(error, FreeholdError):
        report = error.to_dict()
    kind = ArtifactError if isinstance(error, ArtifactError) else CheckpointError
    results = gather((result, None if error is None else (kind, report)), group)
    if error is not None:
        raise error
    for rank, (_, failed) in enumerate(results):
        if failed:
            kind, report = failed
            raise kind(**{**report, "what": f"rank {rank}: {report['what']}"})
    return [value for value, _ in results]  # type: ignore[misc]


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _writer_of(path: Path) -> int:
    """Return the rank that wrote a file: DCP names its files after it, all else is rank 0's."""
    found = re.fullmatch(r"__(\d+)_\d+\.distcp", path.name)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def _full_disk(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Name what the disk refused where torch's writer reports only an unexpected position in its archive."""
    before = shutil.disk_usage(folder).free
    try:
        yield
    except (Exception, CheckpointException) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
        refused = [e for e, _ in failures if isinstance(e, OSError) and e.errno in REFUSALS]
        if before < needed_bytes or shutil.disk_usage(folder).free < 1 << 20:
            refused.append(OSError(errno.ENOSPC, "No space left on device"))
        if refused:
            raise disk_error(refused[-1], folder) from error
        raise


def _first_problem(failure: CheckpointException, folder: Path) -> FreeholdError:
    """Return what DCP met: an error of ours as it is, another one as a CheckpointError."""
    errors = [error for error, _ in failure.failures.values()]
    ours = [error for error in errors if isinstance(error, FreeholdError)]
    return ours[0] if ours else CheckpointError("the checkpoint cannot be read", where=folder, found=errors[0])


class _quiet(warnings.catch_warnings):
    """Silence DCP's notes about running without a process group."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
