"""Archives read in passing: tar, zip and Debian packages, with a limit on what they unpack to.

Nothing is written to disk. A member whose path leaves the archive, a link, a device, a second member of the same name
and one that is too large is named and passed over; an archive that unpacks to more than its limit is refused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from freehold.core.errors import DataError
from freehold.core.streams import unpacked

LEAVES = "its path leaves the archive"
# What a damaged archive or an unreadable one makes the libraries below raise.
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error, RuntimeError,
          UnicodeDecodeError, ValueError)  # fmt: skip

EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK)  # fmt: skip
HEADER_BYTES = 1_000_000
"""What an extended header may have; the longest path of Linux has 4,096 bytes."""


@dataclass(frozen=True)
class Entry:
    """One member of an archive, in the order of the archive."""

    path: str
    problem: str
    """Empty, or why it cannot be taken."""
    size_bytes: int
    read: Callable[[], bytes]
    """Its bytes; only while the entry is the current one."""


class _Bounded(io.RawIOBase):
    """A stream that raises once more than `limit` bytes were read: the unpacked side of an archive."""

    def __init__(self, inner: BinaryIO, limit: int, where: Path) -> None:
        self.inner, self.left, self.limit, self.where = inner, limit, limit, where

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.inner.read(size if size >= 0 else self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise _bomb(self.where, self.limit)
        return data


def _bomb(where: Path, limit: int) -> DataError:
    return DataError(
        "an archive unpacks to more than it may",
        where=where,
        expected=f"at most max_unpacked_bytes = {limit:,}",
        todo="look at what it holds; raise max_unpacked_bytes when that is right",
    )


def entries(archive: Path, limit: int) -> Iterator[Entry]:
    """Yield the regular members of a tar or zip archive of any name; DataError when it is damaged or a bomb."""
    with damaged(archive):
        if zipfile.is_zipfile(archive):
            yield from _zip(archive, limit)
        else:
            with archive.open("rb") as file:
                yield from _tar(file, archive, limit)


def debian(archive: Path, limit: int) -> tuple[dict[str, str], Iterator[Entry]]:
    """Return the control fields of a .deb and an iterator over its files; DataError when it is none."""
    with damaged(archive), archive.open("rb") as file:
        parts = dict(_ar(file, archive))
        control = next((name for name in parts if name.startswith("control.tar")), "")
        data = next((name for name in parts if name.startswith("data.tar")), "")
        if not control or not data:
            raise DataError("not a Debian package", where=archive, found=", ".join(parts) or "nothing")
        fields: dict[str, str] = {}
        for entry in _tar(_Part(file, *parts[control]), archive, limit):
            if entry.path == "control" and entry.size_bytes <= HEADER_BYTES:
                for line in entry.read().decode("utf-8", "replace").split("\n"):
                    name, colon, value = line.partition(":")
                    if colon and not line.startswith((" ", "\t")):
                        fields[name.lower()] = value.strip()
    return fields, _debian_files(archive, parts[data], limit)


def _debian_files(archive: Path, part: tuple[int, int], limit: int) -> Iterator[Entry]:
    with damaged(archive), archive.open("rb") as file:
        yield from _tar(_Part(file, *part), archive, limit)


class _Part(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.left = file, size
        file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.file.read(min(len(buffer), self.left))
        self.left -= len(data)
        buffer[: len(data)] = data
        return len(data)


def _ar(file: BinaryIO, where: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (start, size)) of the members of an ar archive."""
    if file.read(8) != b"!<arch>\n":
        raise DataError("not a Debian package", where=where, expected="an ar archive")
    place = 8
    while len(head := file.read(60)) == 60:
        size = int(head[48:58])
        if size < 0:
            raise DataError("not a Debian package", where=where, found=f"a member of {size} bytes")
        yield head[:16].decode("ascii").strip().rstrip("/"), (place + 60, size)
        place += 60 + size + size % 2
        file.seek(place)


class _Header(tarfile.TarInfo):
    """A header of a tar archive, refused where it would need much memory, or stand for bytes that are not there."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        # The documented place to look at a member before its kind is handled; names of paths are read in full.
        if self.type in EXTENDED and self.size > HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes; {HEADER_BYTES:,} are enough for any name")
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]


def _tar(file: BinaryIO | io.RawIOBase, where: Path, limit: int) -> Iterator[Entry]:
    buffered = io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file  # type: ignore[arg-type]
    stream, left = _Bounded(unpacked(buffered), limit, where), limit
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:  # type: ignore[call-overload]
        for info in tar:
            if info.isdir():
                continue
            # Holes of sparse members come from no stream: they are counted by their size.
            left -= info.size
            if left < 0:
                raise _bomb(where, limit)

            def read(info: tarfile.TarInfo = info) -> bytes:
                with damaged(where):  # it is read outside of this generator
                    opened = tar.extractfile(info)
                    return opened.read() if opened else b""

            path = info.name.removeprefix("./")
            problem = "a sparse file" if info.issparse() else _problem(path, info.isreg())
            yield Entry(path, problem, info.size, functools.cache(read))


def _zip(archive: Path, limit: int) -> Iterator[Entry]:
    left = limit
    with zipfile.ZipFile(archive) as packed:
        for info in packed.infolist():
            if info.is_dir():
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            problem = _problem(info.filename, kind in (0, stat.S_IFREG))
            # Members may overlap and so unpack to more than the archive has room for.
            left -= info.file_size
            if left < 0:
                raise _bomb(archive, limit)

            def read(info: zipfile.ZipInfo = info) -> bytes:
                with damaged(archive), packed.open(info) as opened:
                    data = opened.read(info.file_size + 1)
                    if len(data) != info.file_size:
                        raise zipfile.BadZipFile(f"{info.filename} is not of the size it says")
                return data

            yield Entry(info.filename, problem, info.file_size, functools.cache(read))


def _problem(path: str, regular: bool) -> str:
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "\\" in path or (parts and ":" in parts[0]):
        return LEAVES
    return "" if regular else "not a regular file"


@contextlib.contextmanager
def damaged(archive: Path) -> Iterator[None]:
    """Turn what the libraries say of a broken archive into one DataError."""
    try:
        yield
    except DAMAGE as error:
        raise DataError("an archive cannot be read", where=archive, found=error) from error


def kept(data: bytes) -> tuple[str, Callable[[int], bytes | None]]:
    """Return a member's SHA-256 and a reader of its bytes, kept packed: an archive is read once, in its order."""
    small = zlib.compress(data, 1)
    size = len(data)
    return hashlib.sha256(data).hexdigest(), lambda limit: zlib.decompress(small) if size <= limit else None
