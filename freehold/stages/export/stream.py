"""Writes GGUF files of several types in one read of the shards, with bounded memory, and resumes after a kill.

Work is cut into slabs of rows that never cross an expert. A slab is read once, quantized to every type, and written to
its place in each file: no order between slabs is needed, so they run in parallel. A progress record next to the files
lists finished tensors with the hash of what was written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freehold.core.artifact import sha256_json
from freehold.core.errors import ExportError
from freehold.kernels import quantize
from freehold.kernels.quantize import NotFiniteError, widen
from freehold.stages.export.imatrix import Importance
from freehold.stages.export.masters import to_bf16
from freehold.stages.export.mix import Choice
from freehold.stages.export.source import Weights
from freehold.stages.export.types import TENSOR_TYPES

SLAB_VALUES = 1 << 19
"""Values a worker holds: 1 MiB in bfloat16. Part of the hashes in a progress record."""
SYNC_S = 5.0
"""Finished tensors are recorded at most this much later, after the files have reached the disk."""
PROGRESS = "export-progress.jsonl"
ALIGNMENT = 32


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file: its name there and the source tensors that are stacked in it."""

    name: str
    sources: tuple[str, ...]
    rows: int
    """Rows of each source."""
    width: int

    def slabs(self) -> Iterator[tuple[int, int, int]]:
        """Yield (source, first row, rows) of each piece of work, in the order of the file."""
        step = max(1, SLAB_VALUES // self.width)
        for source in range(len(self.sources)):
            for first in range(0, self.rows, step):
                yield source, first, min(step, self.rows - first)


@dataclass
class Target:
    """One file to write: where, its header with metadata, and the type and first byte of every tensor."""

    file_type: str
    path: Path
    header: bytes
    choices: dict[str, Choice]
    offsets: dict[str, int]
    bytes: int
    handle: int = -1

    @property
    def partial(self) -> Path:
        """The file while it is not complete."""
        return self.path.with_name(self.path.name + ".partial")


def place(header: bytes, tensors: list[Tensor], choices: dict[str, Choice]) -> tuple[dict[str, int], int]:
    """Return the first byte of every tensor and the size of the file; data follow the (padded) header."""
    offsets, at = {}, len(header)
    for tensor in tensors:
        offsets[tensor.name] = at
        size = TENSOR_TYPES[choices[tensor.name].type].row_bytes(tensor.width) * tensor.rows * len(tensor.sources)
        at += size + -size % ALIGNMENT
    return offsets, at


def encode(kind: str, rows: np.ndarray, importance: np.ndarray | None) -> bytes:
    """Return rows (bfloat16 bits or float32) as a tensor type stores them. Raises NotFiniteError."""
    if kind in quantize.TYPES:
        return quantize.quantize(kind, rows, importance).tobytes()
    values = widen(rows)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise NotFiniteError(int(finite.argmin()), "in the weights")
    if kind == "F32":
        return values.tobytes()
    if kind == "BF16":
        return rows.tobytes() if rows.dtype == np.uint16 else to_bf16(values).tobytes()
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    if not np.isfinite(half).all():
        raise NotFiniteError(int(np.isfinite(half).all(axis=1).argmin()), "as F16: it does not fit")
    return half.tobytes()


class Writer:
    """Fills target files from shards; see the module. One writer a folder."""

    def __init__(
        self, shards: Weights, tensors: list[Tensor], targets: list[Target], importance: Importance | None,
        workers: int, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.shards, self.tensors, self.targets, self.importance = shards, tensors, targets, importance
        self.workers, self.say = workers, say
        self.progress = targets[0].path.parent / PROGRESS
        self._finished: dict[str, dict[str, str]] = {}
        self._unsynced: list[str] = []

    def run(self) -> dict[str, Any]:
        """Write, or finish writing, all files; return bytes and seconds.

        ExportError when the folder holds other work, a weight is not finite, or the disk is full (then the same
        command resumes).
        """
        start, read = time.monotonic(), 0
        self.progress.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as record, _disk_errors(self.progress.parent):
            self._resume(record)
            waiting = [tensor for tensor in self.tensors if tensor.name not in self._finished]
            read = self._write(waiting, record)
            for target in self.targets:
                os.close(target.handle)
                target.handle = -1
                target.partial.replace(target.path)
            self.progress.unlink()
        return {"bytes_read": read, "seconds": time.monotonic() - start}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Any]:
        with self.progress.open("a+", encoding="utf-8") as record:
            try:
                fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as problem:
                raise ExportError(
                    "another export is writing into this folder", where=self.progress.parent, found=problem,
                    todo="wait for it, or give another --output",
                ) from problem  # fmt: skip
            try:
                yield record
            finally:
                for target in self.targets:
                    if target.handle >= 0:
                        os.close(target.handle)

    def _identity(self) -> str:
        """Return a hash of everything that decides the bytes of the files."""
        return sha256_json({
            "shards": self.shards.fingerprint(),
            "importance": self.importance.sha256() if self.importance else "",
            "headers": {t.path.name: hashlib.sha256(t.header).hexdigest() for t in self.targets},
            "slab": SLAB_VALUES,
        })  # fmt: skip

    def _resume(self, record: Any) -> None:
        """Open the files, and take from a progress record what is still in them."""
        record.seek(0)
        lines = [json.loads(line) for line in record.read().splitlines() if line.endswith("}")]
        identity = self._identity()
        if lines and lines[0].get("export") != identity:
            raise ExportError(
                "the folder holds an unfinished export of something else", where=self.progress,
                found="other weights, types, name or importance matrix",
                todo="repeat the command that was stopped, or delete the folder",
            )  # fmt: skip
        self._check_folder(resumed=bool(lines))
        for target in self.targets:
            if lines and target.path.exists():  # stopped between the renames at the end
                target.path.replace(target.partial)
            target.handle = os.open(target.partial, os.O_RDWR | os.O_CREAT, 0o666)
            os.ftruncate(target.handle, target.bytes)
            write_at(target.handle, target.header, 0)
        if not lines:
            record.write(json.dumps({"export": identity}) + "\n")
            record.flush()
        self._verify({line["tensor"]: line["sha256"] for line in lines[1:]})

    def _check_folder(self, *, resumed: bool) -> None:
        """Refuse to replace finished files, or to begin where the disk is too small."""
        folder = self.progress.parent
        there = [target.path.name for target in self.targets if target.path.exists()]
        if there and not resumed:
            self.progress.unlink()
            raise ExportError(
                "a file of this name exists", where=folder / there[0], todo="delete it, or give another --output"
            )
        written = sum(t.partial.stat().st_blocks * 512 for t in self.targets if t.partial.exists())
        needed, free = sum(target.bytes for target in self.targets) - written, shutil.disk_usage(folder).free
        if needed > free:
            if not resumed:
                self.progress.unlink()
            raise ExportError(
                "the disk is too small for these files", where=folder, found=f"{free / 1e9:,.2f} GB free",
                expected=f"{needed / 1e9:,.2f} GB", todo="free space, give another --output, or fewer types",
            )  # fmt: skip

    def _verify(self, recorded: dict[str, dict[str, str]]) -> None:
        """Read back what a record says is finished; what differs is written again."""
        by_name = {tensor.name: tensor for tensor in self.tensors}
        with ThreadPoolExecutor(self.workers) as pool:
            names = [name for name in recorded if name in by_name]
            for name, found in zip(names, pool.map(lambda n: self._stored(by_name[n]), names), strict=True):
                if found == recorded[name]:
                    self._finished[name] = found
        if recorded:
            self.say(f"resumed: {len(self._finished)} of {len(self.tensors)} tensors were written before")

    def _stored(self, tensor: Tensor) -> dict[str, str]:
        """Return the hashes of a tensor as it is in the files."""
        result = {}
        for target in self.targets:
            row, at, hashed = self._row_bytes(target, tensor), target.offsets[tensor.name], hashlib.sha256()
            for source, first, count in tensor.slabs():
                start = at + (source * tensor.rows + first) * row
                hashed.update(hashlib.sha256(os.pread(target.handle, count * row, start)).digest())
            result[target.file_type] = hashed.hexdigest()
        return result

    @staticmethod
    def _row_bytes(target: Target, tensor: Tensor) -> int:
        return TENSOR_TYPES[target.choices[tensor.name].type].row_bytes(tensor.width)

    def _write(self, waiting: list[Tensor], record: Any) -> int:
        """Run all slabs with a bounded number in flight; return the bytes read."""
        meter = _Meter(sum(self._source_bytes(tensor) for tensor in waiting), self.say)
        pending: deque[tuple[Tensor, bool, Future[list[bytes]]]] = deque()
        hashes = [hashlib.sha256() for _ in self.targets]
        synced = time.monotonic()

        def settle() -> None:
            nonlocal hashes, synced
            tensor, last, future = pending.popleft()
            for hashed, digest in zip(hashes, future.result(), strict=True):
                hashed.update(digest)
            if last:
                self._note(tensor, [hashed.hexdigest() for hashed in hashes])
                hashes = [hashlib.sha256() for _ in self.targets]
                meter.add(self._source_bytes(tensor), tensor.name)
                if time.monotonic() - synced > SYNC_S:
                    self._sync(record)
                    synced = time.monotonic()

        pool = ThreadPoolExecutor(self.workers)
        try:
            for tensor in waiting:
                slabs = list(tensor.slabs())
                for slab in slabs:
                    if len(pending) >= self.workers + 2:
                        settle()
                    pending.append((tensor, slab is slabs[-1], pool.submit(self._slab, tensor, *slab)))
            while pending:
                settle()
        finally:
            pool.shutdown(cancel_futures=True)
            self._sync(record)
        return meter.total

    def _source_bytes(self, tensor: Tensor) -> int:
        return sum(self.shards.tensors[source].bytes for source in tensor.sources)

    def _slab(self, tensor: Tensor, source: int, first: int, count: int) -> list[bytes]:
        """Read, quantize and write one slab; return the digest of what each file got."""
        rows = self.shards.read_rows(tensor.sources[source], first, count)
        importance = self.importance.row(tensor.name, source) if self.importance else None
        encoded: dict[str, tuple[bytes, bytes]] = {}
        digests = []
        for target in self.targets:
            kind = target.choices[tensor.name].type
            if kind not in encoded:
                try:
                    data = encode(kind, rows, importance)
                except NotFiniteError as problem:
                    raise self._not_finite(tensor, source, first, problem) from problem
                encoded[kind] = data, hashlib.sha256(data).digest()
            data, digest = encoded[kind]
            row = (source * tensor.rows + first) * self._row_bytes(target, tensor)
            write_at(target.handle, data, target.offsets[tensor.name] + row)
            digests.append(digest)
        return digests

    def _not_finite(self, tensor: Tensor, source: int, first: int, problem: NotFiniteError) -> ExportError:
        expert = f", expert {source}" if len(tensor.sources) > 1 else ""
        return ExportError(
            "a weight is not a finite number", where=f"{tensor.sources[source]} ({tensor.name}{expert})",
            found=f"NaN or infinity in row {first + problem.row}, {problem.when}", expected="finite weights",
            todo="find out how training or conversion broke this tensor; a file with it would answer nonsense",
        )  # fmt: skip

    def _note(self, tensor: Tensor, hashes: list[str]) -> None:
        by_type = {target.file_type: found for target, found in zip(self.targets, hashes, strict=True)}
        offsets = {target.file_type: target.offsets[tensor.name] for target in self.targets}
        self._unsynced.append(json.dumps({"tensor": tensor.name, "offset": offsets, "sha256": by_type}) + "\n")

    def _sync(self, record: Any) -> None:
        """Record finished tensors once their bytes are on the disk."""
        if not self._unsynced:
            return
        for target in self.targets:
            os.fdatasync(target.handle)
        record.writelines(self._unsynced)
        record.flush()
        self._unsynced.clear()


class _Meter:
    """Says how fast an export reads and how long the rest will take."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say, self.done = total, say, 0
        self.start = self.said = time.monotonic()

    def add(self, count: int, name: str) -> None:
        """Count finished bytes; say so every few seconds."""
        self.done += count
        now = time.monotonic()
        if now - self.said < SYNC_S:
            return
        self.said, rate = now, self.done / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate
        self.say(
            f"{self.done / 1e9:,.2f} of {self.total / 1e9:,.2f} GB read, {rate / 1e6:,.0f} MB/s, "
            f"{left / 60:,.1f} min left, at {name}"
        )


def write_at(handle: int, data: bytes, start: int) -> None:
    """Write all bytes at a place in a file."""
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, start)
        view, start = view[done:], start + done


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into an error that says what to do."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ExportError(
            "the disk is full", where=folder, found=problem.strerror, expected="room for the rest of the files",
            todo="free space and repeat the command: it resumes where it stopped",
        ) from problem  # fmt: skip
