"""GGUF files of a model folder, outside of a walk: any size, one read of the weights, no torch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.core.errors import ExportError
from freehold.stages.export import gguf_writer
from freehold.stages.export.files import fallbacks, write_files
from freehold.stages.export.mix import MIXES, choose_types, file_bytes
from freehold.stages.export.release import write_release
from freehold.stages.export.source import Source, open_source

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Request:
    """What to write: types, the folder for them, the name of the files, an importance matrix, worker threads."""

    types: tuple[str, ...]
    output: Path
    name: str
    imatrix: Path | None = None
    workers: int = 0
    licence: str = ""


def parse_types(text: str) -> tuple[str, ...]:
    """Return the file types of a comma-separated list; ExportError for one that is unknown or given twice."""
    types = tuple(part.strip().upper() for part in text.split(",") if part.strip())
    wrong = [kind for kind in types if kind not in MIXES or types.count(kind) > 1]
    if wrong or not types:
        raise ExportError(
            "not a list of file types", where="--types", found=", ".join(wrong) or repr(text),
            expected=f"some of {', '.join(MIXES)}, each once",
        )  # fmt: skip
    return types


def describe(source: Source, request: Request) -> dict[str, Any]:
    """Return what an export would write: bytes and changed types by file type, bytes read, and space."""
    shapes, config = gguf_writer.tensor_shapes(source.config), source.config
    files = {}
    for kind in request.types:
        choices = choose_types(
            shapes, kind, layers=config.num_hidden_layers, experts=config.num_experts,
            importance=request.imatrix is not None,
        )  # fmt: skip
        path = request.output / f"{request.name}-{kind}.gguf"
        files[kind] = {"file": str(path), "bytes": file_bytes(shapes, choices), "fallbacks": fallbacks(choices)}
    there = next(parent for parent in [request.output, *request.output.parents] if parent.exists())
    return {
        "model": str(source.folder),
        "files": files,
        "bytes_read": sum(tensor.bytes for tensor in source.weights.tensors.values()),
        "bytes_written": sum(file["bytes"] for file in files.values()),
        "bytes_free": shutil.disk_usage(there).free,
    }


def export_folder(folder: Path, request: Request, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Write the GGUF files of a model folder and what belongs next to them; return figures.

    Resumes an export of the same that was stopped. Errors as in `open_source` and `write_files`.
    """
    if not NAME.fullmatch(request.name):
        raise ExportError("not a name for files", where="--name", found=request.name, expected=NAME.pattern)
    source = open_source(folder)
    files = {kind: request.output / f"{request.name}-{kind}.gguf" for kind in request.types}
    figures = write_files(
        folder, source.config, files, name=request.name, imatrix=request.imatrix, workers=request.workers, say=say,
        weights=source.weights,
    )  # fmt: skip
    write_release(
        request.output, files, source.config, name=request.name, source=folder, licence=request.licence,
        notes={kind: _note(changes) for kind, changes in figures["fallbacks"].items()},
    )  # fmt: skip
    return {"output": str(request.output), "files": {k: str(p) for k, p in files.items()}, **figures}


def _note(changes: dict[str, int]) -> str:
    return "; ".join(f"{count} tensors {change}" for change, count in changes.items())
