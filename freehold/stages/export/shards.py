"""Reads the weights of a Hugging Face folder slab by slab: safetensors without torch and without mapping files.

Headers come from strangers: they are bounded and checked against the file before a byte of data is read. Format: the
safetensors README (huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freehold.core.errors import ExportError
from freehold.kernels.quantize import widen

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
DTYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
DAMAGED = "download or copy this file again; nothing was written"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor is: its file, the first byte of its data, its dtype and shape."""

    file: str
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Shards:
    """The tensors of a folder by name. Reading is safe in several threads; memory is what is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read and check every header; ExportError when a file is missing, damaged, or not safetensors."""
        self.folder = folder
        self.files = _file_names(folder)
        self.tensors: dict[str, Stored] = {}
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()
        for file in self.files:
            for name, stored in read_header(folder / file).items():
                if name in self.tensors:
                    raise ExportError(
                        "two files hold the same tensor", where=folder, found=f"{name} in {self.tensors[name].file}",
                        expected=f"it in {file} only", todo=DAMAGED,
                    )  # fmt: skip
                self.tensors[name] = stored

    def close(self) -> None:
        """Close all files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def fingerprint(self) -> list[list[Any]]:
        """Return what changes when a file is replaced: name, size and time of change of each."""
        stats = [(file, (self.folder / file).stat()) for file in self.files]
        return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]

    def read_rows(self, name: str, first: int, count: int) -> np.ndarray:
        """Return rows of a tensor [count, width]: bfloat16 as uint16 bits, else float32. A vector is one row."""
        stored = self.tensors[name]
        dtype, width = DTYPES[stored.dtype], stored.shape[-1]
        size = count * width * dtype.itemsize
        buffer = bytearray(size)
        self._read(stored.file, memoryview(buffer), stored.start + first * width * dtype.itemsize, name)
        rows = np.frombuffer(buffer, dtype).reshape(count, width)
        return rows if stored.dtype == "BF16" else widen(rows)

    def read(self, name: str) -> np.ndarray:
        """Return a whole tensor in float32."""
        shape = self.tensors[name].shape
        return widen(self.read_rows(name, 0, math.prod(shape[:-1]))).reshape(shape)

    def _read(self, file: str, buffer: memoryview, start: int, name: str) -> None:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(self.folder / file, os.O_RDONLY)
        done = 0
        while done < len(buffer):
            got = os.preadv(self._handles[file], [buffer[done:]], start + done)
            if not got:
                raise ExportError(
                    "a file of weights ended while it was read", where=f"{self.folder / file}: {name}",
                    found=f"{start + done:,} bytes", expected=f"at least {start + len(buffer):,}",
                    todo="copy this file again, then repeat the command: it resumes",
                )  # fmt: skip
            done += got


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file; ExportError unless its header describes exactly this file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, f"a header of {length:,} bytes in a file of {size:,}", "a safetensors file")
            header = json.loads(file.read(length))
    except OSError as problem:
        raise ExportError("a file of weights cannot be read", where=path, found=problem, todo=DAMAGED) from problem
    except (ValueError, RecursionError) as problem:
        raise _damaged(path, problem, "a JSON header") from problem
    if not isinstance(header, dict):
        raise _damaged(path, type(header).__name__, "a JSON object as header")
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _stored(path: Path, name: str, entry: Any, data_start: int, size: int) -> Stored:
    """Return one checked entry of a header."""
    where = f"{path}: {name}"
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and len(shape) <= 8):
        raise _damaged(where, f"shape {shape}, data_offsets {offsets}", "lists of sizes")
    if dtype not in DTYPES:
        raise ExportError(
            "weights of a dtype that cannot be converted", where=where, found=dtype, expected=", ".join(DTYPES),
            todo="export from the bfloat16 checkpoint, not from a quantized one",
        )  # fmt: skip
    stored = Stored(path.name, data_start + offsets[0], dtype, tuple(shape))
    if offsets[1] - offsets[0] != stored.bytes:
        raise _damaged(where, f"{offsets[1] - offsets[0]:,} bytes", f"{stored.bytes:,} for {dtype} {shape}")
    if data_start + offsets[1] > size:
        raise ExportError(
            "a file of weights is truncated", where=where, found=f"{size:,} bytes",
            expected=f"at least {data_start + offsets[1]:,}", todo=DAMAGED,
        )  # fmt: skip
    return stored


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in value)


def _damaged(where: object, found: object, expected: object) -> ExportError:
    return ExportError("not a safetensors file, or damaged", where=where, found=found, expected=expected, todo=DAMAGED)


def _file_names(folder: Path) -> list[str]:
    """Return the files that hold a folder's weights, in order."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).is_file():
            raise ExportError(
                "the folder has no weights", where=folder, found="neither of them", expected=f"{SINGLE} or {INDEX}",
                todo="give the folder with config.json and the safetensors files",
            )  # fmt: skip
        return [SINGLE]
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({str(name) for name in found})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ExportError("not an index of weights", where=folder / INDEX, found=problem, todo=DAMAGED) from problem
    strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    missing = [name for name in names if name not in strange and not (folder / name).is_file()]
    if strange or missing or not names:
        raise ExportError(
            "the index names a file that is not there", where=folder / INDEX, found=(strange or missing or ["none"])[0],
            expected="safetensors files next to the index", todo="download the missing files",
        )  # fmt: skip
    return names
