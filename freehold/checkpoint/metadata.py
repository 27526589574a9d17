"""Which tensors a native checkpoint holds and where their bytes are. Needs no torch, and runs no code from a file.

New checkpoints say it in `state/metadata.json`. Earlier ones have PyTorch DCP's `.metadata`, a pickle: it is read by
an unpickler that knows seventeen names and makes plain data of each. Everything is compared with the files before a
byte of a tensor is read or allocated.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freehold.core.artifact import read_json, write_json
from freehold.core.errors import CheckpointError

STATE, METADATA, PICKLED = "state", "metadata.json", ".metadata"
MAX_PICKLE_BYTES = 1 << 30
DATA_FILE = re.compile(r"__\d+_\d+\.distcp")
REMEDY = "use another checkpoint; do not trust where this one came from"

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),  # its bits: numpy has no such type
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")},
    "bool": np.dtype("?"),
}
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a tensor and the stretch of a data file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: dtype, shape, and the chunks that make it up."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def write_metadata(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Write `metadata.json` into a `state/` folder."""
    # A list, because the order counts: a state that was loaded is saved in the order it was read.
    tensors = [
        {
            "name": name,
            "dtype": entry.dtype,
            "shape": entry.shape,
            "chunks": [{slot: getattr(chunk, slot) for slot in Chunk.__slots__} for chunk in entry.chunks],
        }
        for name, entry in entries.items()
    ]
    write_json(folder / METADATA, {"format_version": 1, "tensors": tensors})


def read_metadata(folder: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a checkpoint by key (`<part>/<name>`).

    CheckpointError when the metadata are hostile, damaged, or describe other files than those there.
    """
    state = folder / STATE
    json_form = (state / METADATA).exists()
    entries = dict(_from_json(state / METADATA) if json_form else _from_pickle(state / PICKLED))
    _check_entries(state, entries)
    return entries


def _invalid(where: object, found: object, expected: str = "metadata of a checkpoint") -> CheckpointError:
    return CheckpointError(
        "the metadata of the checkpoint are damaged or hostile", where=where, found=found, expected=expected,
        todo=REMEDY,
    )  # fmt: skip


def _from_json(path: Path) -> Iterator[tuple[str, TensorEntry]]:
    data = read_json(path, CheckpointError, REMEDY)
    try:
        for entry in data["tensors"]:
            chunks = tuple(Chunk(_sizes(c["offsets"]), _sizes(c["sizes"]), c["file"], c["start"], c["length"])
                           for c in entry["chunks"])  # fmt: skip
            yield str(entry["name"]), TensorEntry(str(entry["dtype"]), _sizes(entry["shape"]), chunks)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _invalid(path, repr(error)) from error


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(v) is int and 0 <= v < 1 << 48 for v in value):
        raise ValueError(f"not a list of sizes: {str(value)[:80]}")
    return tuple(value)


# -- the pickles of PyTorch ------------------------------------------------------------------------------------------


class _Record:
    """What stands for an object of a pickle: the values it was made with or given, and nothing that can run."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(key): value for key, value in state.items()})
        else:
            self.values = state


_DCP = "torch.distributed.checkpoint"
ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (f"{_DCP}.metadata", name): type(name, (_Record,), {})
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    },
    (f"{_DCP}.filesystem", "_StorageInfo"): type("_StorageInfo", (_Record,), {}),
    ("torch.serialization", "_get_layout"): _Record,
    ("torch._utils", "_rebuild_tensor_v2"): _Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    **{("torch", name): name for name in DTYPES},
    **{("torch", storage): dtype for storage, dtype in STORAGES.items()},
}  # fmt: skip
"""Every name that a pickle may use, and the plain thing that is put there."""


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler with the allow-list in place of imports.

    The one in C keeps its memo in an array as long as the highest index a pickle names: a few bytes take all memory.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        return pid


def unpickle(data: bytes, where: object) -> Any:
    """Return a pickle of DCP as plain data; CheckpointError for one that names anything else or is damaged."""
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle fails in any way; nothing of ours runs inside
        raise _invalid(where, f"{type(error).__name__}: {error}", "a pickle of PyTorch's checkpoint classes") from error


def _from_pickle(path: Path) -> Iterator[tuple[str, TensorEntry]]:
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise _invalid(path, f"{path.stat().st_size:,} bytes", f"at most {MAX_PICKLE_BYTES:,}")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError("the checkpoint has no metadata", where=path, found=error, todo=REMEDY) from error
    metadata = unpickle(data, path)
    try:
        stored = {(index.fqn, tuple(index.offset)): info for index, info in metadata.storage_data.items()}
        for name, entry in metadata.state_dict_metadata.items():
            if not hasattr(entry, "size"):  # bytes: no checkpoint of ours has any
                continue
            chunks = tuple(_chunk(chunk, stored[name, tuple(chunk.offsets)]) for chunk in entry.chunks)
            yield str(name), TensorEntry(str(entry.properties.values[0]), _sizes(entry.size), chunks)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _invalid(path, repr(error)[:200]) from error


def _chunk(chunk: Any, info: Any) -> Chunk:
    return Chunk(_sizes(chunk.offsets), _sizes(chunk.sizes), info.relative_path, info.offset, info.length)


# -- compared with the files -----------------------------------------------------------------------------------------


def _check_entries(state: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse metadata of tensors larger than their files, or of files outside the folder."""
    stretches: dict[str, list[tuple[int, int]]] = {}
    for name, entry in entries.items():
        where = f"{state}: {name}"
        if entry.dtype not in DTYPES:
            raise _invalid(where, f"dtype {entry.dtype}", ", ".join(DTYPES))
        covered = 0
        for chunk in entry.chunks:
            _check_chunk(where, entry, chunk)
            covered += math.prod(chunk.sizes)
            stretches.setdefault(chunk.file, []).append((chunk.start, chunk.start + chunk.length))
        if covered != math.prod(entry.shape):
            raise _invalid(where, f"{covered:,} values in its chunks", f"{math.prod(entry.shape):,} of {entry.shape}")
    for file, places in stretches.items():
        _check_file(state / file, sorted(places))


def _check_chunk(where: str, entry: TensorEntry, chunk: Chunk) -> None:
    numbers = isinstance(chunk.start, int) and isinstance(chunk.length, int) and min(chunk.start, chunk.length) >= 0
    if not numbers or not isinstance(chunk.file, str) or not DATA_FILE.fullmatch(chunk.file):
        raise _invalid(where, f"a chunk in {str(chunk.file)[:80]!r}", "a file __<rank>_<number>.distcp in state/")
    inside = len(chunk.offsets) == len(chunk.sizes) == len(entry.shape) and all(
        offset + size <= whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.shape, strict=True)
    )
    size = math.prod(chunk.sizes) * DTYPES[entry.dtype].itemsize
    if not inside or size > chunk.length:
        found = f"a chunk {chunk.sizes} at {chunk.offsets} in {chunk.length:,} bytes"
        raise _invalid(where, found, f"a part of {entry.shape}")


def _check_file(path: Path, places: list[tuple[int, int]]) -> None:
    """Refuse stretches that overlap (a small file would stand for large tensors) or end after the file."""
    if not path.is_file() or path.is_symlink():
        raise CheckpointError("a file of the checkpoint is missing", where=path, todo=REMEDY)
    end = 0
    for start, stop in places:
        if start < end:
            raise _invalid(path, f"two chunks share byte {start:,}", "chunks with bytes of their own")
        end = stop
    if end > path.stat().st_size:
        raise _invalid(path, f"{path.stat().st_size:,} bytes", f"{end:,} by the metadata")


# -- the bytes of a tensor ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Payload:
    """Where the values of a chunk are in its data file, and how far apart (in values) along each axis."""

    start: int
    strides: tuple[int, ...]


class _Slice(io.RawIOBase):
    """A stretch of an open file as a file of its own."""

    def __init__(self, handle: int, start: int, length: int) -> None:
        self._handle, self._start, self._length, self._at = handle, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, origin: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[origin])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._handle, min(len(buffer), max(0, self._length - self._at)), self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def find_payload(handle: int, chunk: Chunk, dtype: str, where: str) -> Payload:
    """Return where a chunk's values are inside its archive of `torch.save`; CheckpointError unless it is plain data."""
    try:
        with zipfile.ZipFile(io.BufferedReader(_Slice(handle, chunk.start, chunk.length))) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            head, data = members["data.pkl"], members["data/0"]
            plain = head.compress_type == data.compress_type == zipfile.ZIP_STORED
            if not plain or head.file_size > 1 << 16:
                raise ValueError("compressed, or a head that is too large")
            tensor = unpickle(archive.read(head), where)
        (_, stored, _, _, count), offset, sizes, strides = tensor.values[:4]
        numbers = math.prod(chunk.sizes)
        if (stored, offset, tuple(sizes)) != (dtype, 0, chunk.sizes) or count != numbers:
            raise ValueError(f"{stored} {tuple(sizes)} of {count} values")
        if data.file_size != numbers * DTYPES[dtype].itemsize or len(strides) != len(sizes):
            raise ValueError(f"{data.file_size:,} bytes")
        farthest = sum((size - 1) * step for size, step in zip(sizes, _sizes(strides), strict=True))
        if numbers and farthest >= numbers:
            raise ValueError(f"strides {strides}")
        local = os.pread(handle, 30, chunk.start + data.header_offset)
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        start = data.header_offset + 30 + names
        if local[:4] != b"PK\3\4" or start + data.file_size > chunk.length:
            raise ValueError("data outside the archive")
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, AttributeError, OSError, RuntimeError) as error:
        raise _invalid(where, f"{type(error).__name__}: {error}", f"one {dtype} tensor {chunk.sizes}") from error
    return Payload(chunk.start + start, tuple(strides))


def read_values(handle: int, start: int, count: int, dtype: str, where: str) -> np.ndarray:
    """Return `count` values from byte `start` of a file; CheckpointError when it ends before."""
    buffer = bytearray(count * DTYPES[dtype].itemsize)
    done = 0
    while done < len(buffer):
        got = os.preadv(handle, [memoryview(buffer)[done:]], start + done)
        if not got:
            raise CheckpointError("a file of the checkpoint ended while it was read", where=where, todo=REMEDY)
        done += got
    return np.frombuffer(buffer, DTYPES[dtype])


class DataFiles:
    """The open data files of a checkpoint's `state/` folder; reads chunks, or rows of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, int] = {}
        self._payloads: dict[Chunk, Payload] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def read(self, chunk: Chunk, dtype: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return a chunk, or `count` entries of its first axis; bfloat16 as uint16 bits. Scalars have no axis."""
        where = str(self.folder / chunk.file)
        handle, payload = self._open(chunk.file), self._payload(chunk, dtype, where)
        itemsize = DTYPES[dtype].itemsize
        sizes = chunk.sizes
        if sizes and payload.strides[0] == math.prod(sizes[1:]):  # entries of the first axis follow each other
            count = sizes[0] - first if count is None else count
            sizes, skipped = (count, *sizes[1:]), first * payload.strides[0]
            values = read_values(handle, payload.start + skipped * itemsize, math.prod(sizes), dtype, where)
            first = 0
        else:
            values = read_values(handle, payload.start, math.prod(sizes), dtype, where)
        strides = [step * itemsize for step in payload.strides]
        found = np.ndarray(sizes, values.dtype, values.data, strides=strides) if values.size else values.reshape(sizes)
        return found[first : None if count is None else first + count] if sizes else found

    def read_rows(self, entry: TensorEntry, first: int, count: int) -> np.ndarray:
        """Return rows [count, width] of a tensor seen as a matrix of rows of its last axis; a vector is one row."""
        width = entry.shape[-1]
        rows = np.empty((count, width), DTYPES[entry.dtype])
        for chunk in entry.chunks:
            for own, at, size in _runs(entry.shape, chunk, first, count):
                column = chunk.offsets[-1]
                part = self._rows_of_chunk(chunk, entry.dtype, own, size)
                rows[at : at + size, column : column + chunk.sizes[-1]] = part
        return rows

    def _rows_of_chunk(self, chunk: Chunk, dtype: str, first: int, count: int) -> np.ndarray:
        """Return rows of a chunk, and of a chunk whose rows follow each other in the file no others."""
        where = str(self.folder / chunk.file)
        payload = self._payload(chunk, dtype, where)
        width = chunk.sizes[-1]
        plain = tuple(math.prod(chunk.sizes[axis + 1 :]) for axis in range(len(chunk.sizes)))
        if payload.strides == plain:
            start = payload.start + first * width * DTYPES[dtype].itemsize
            return read_values(self._open(chunk.file), start, count * width, dtype, where).reshape(count, width)
        return self.read(chunk, dtype).reshape(-1, width)[first : first + count]

    def _payload(self, chunk: Chunk, dtype: str, where: str) -> Payload:
        if chunk not in self._payloads:
            self._payloads[chunk] = find_payload(self._open(chunk.file), chunk, dtype, where)
        return self._payloads[chunk]

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(self.folder / file, os.O_RDONLY)
            return self._handles[file]


def _runs(shape: tuple[int, ...], chunk: Chunk, first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Yield (row of the chunk, row of the answer, rows) for each run of wanted rows that a chunk holds.

    Example: of [4, 6, 8] a chunk at (2, 3, 0) of sizes (2, 3, 8) holds rows 15-17 and 21-23; rows 16 to 22 are wanted:
    (1, 0, 2) and (3, 5, 2).
    """
    middle = shape[-2] if len(shape) > 1 else 1
    sizes, offsets = chunk.sizes, chunk.offsets
    own_middle, own_offset = (sizes[-2], offsets[-2]) if len(sizes) > 1 else (1, 0)
    blocks = range(offsets[0], offsets[0] + sizes[0]) if len(shape) == 3 else range(1)
    for number, block in enumerate(blocks):
        start = block * middle + own_offset
        begin, end = max(start, first), min(start + own_middle, first + count)
        if begin < end:
            yield number * own_middle + begin - start, begin - first, end - begin
