"""Compressed files as streams: recognised by their first bytes, unpacked piece by piece, never in full."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

ENDINGS = {
    ".gz": b"\x1f\x8b", ".dz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd",
}  # fmt: skip
"""Endings of names of compressed files, and the bytes they begin with; `.dz` is dictzip."""
XZ_MEMORY_BYTES = 256_000_000
"""What an xz stream may ask for its dictionary; the largest preset of xz needs 65 MB, a header may ask for 4 GB."""
UNREADABLE = {
    b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a rar archive", b"\x1f\x9d": "compress",
    b"\x04\x22\x4d\x18": "lz4", b"PAR1": "parquet", b"ARROW1": "an Arrow file", b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}  # fmt: skip
"""First bytes of what people take for a file of text or JSON lines, and its name."""


class Chunk(NamedTuple):
    """What a decompressor made of some bytes."""

    data: bytes
    rest: bytes
    """Bytes behind the end of the stream."""
    ended: bool
    hungry: bool = True
    """Whether it has nothing more to give without further bytes."""


class Damaged(OSError):
    """A compressed stream that cannot be unpacked."""


def is_compressed(name: str) -> bool:
    """Return whether a file's name ends as those of compressed files do."""
    return name.lower().endswith(tuple(ENDINGS))


def plain_name(name: str) -> str:
    """Return a file's name without the ending of its compression: `rows.jsonl` for `rows.jsonl.gz`."""
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def unpacked(file: BinaryIO) -> BinaryIO:
    """Return the unpacked stream of a compressed one, else the stream itself; reading raises Damaged."""
    buffered = file if hasattr(file, "peek") else io.BufferedReader(file)  # type: ignore[type-var]
    head = buffered.peek(6)[:6]  # type: ignore[attr-defined]
    kind = next((name for name, magic in ENDINGS.items() if head.startswith(magic)), "")
    if not kind:
        return buffered  # type: ignore[return-value]
    return io.BufferedReader(_Unpacked(buffered, kind))  # type: ignore[arg-type]


def unpack(name: str, data: bytes, limit: int) -> bytes | None:
    """Return a file's bytes, unpacked when its name says it is compressed; None when they are more than `limit`.

    Raises Damaged when it is not what its name says.
    """
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    if not ending:
        return data
    if not data.startswith(ENDINGS[ending]):
        raise Damaged(f"Not a {ending.removeprefix('.')} file ({data[:2]!r})")
    found = unpacked(io.BytesIO(data)).read(limit + 1)
    return None if len(found) > limit else found


class _Unpacked(io.RawIOBase):
    """The unpacked side of a stream of gzip, bzip2, xz or Zstandard members, one after the other."""

    def __init__(self, inner: BinaryIO, kind: str) -> None:
        self.inner, self.kind = inner, kind
        if kind == ".zst":
            import pyarrow as pa

            self.zstd = pa.CompressedInputStream(pa.PythonFile(inner, mode="r"), "zstd")
        self.decompress = _decompressor(kind)
        self.rest, self.within, self.members, self.hungry = b"", False, 0, True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = bytes(self.zstd.read(len(buffer))) if self.kind == ".zst" else self._piece(len(buffer))
        except (zlib.error, lzma.LZMAError, EOFError, ValueError, gzip.BadGzipFile) as error:
            raise Damaged(str(error)) from error
        except OSError as error:
            raise error if isinstance(error, Damaged) else Damaged(str(error).splitlines()[0]) from error
        buffer[: len(data)] = data
        return len(data)

    def _piece(self, size: int) -> bytes:
        while True:
            packed = self.rest or (self.inner.read(1 << 16) if self.hungry else b"")
            if not packed and self.hungry:
                if self.within or not self.members:
                    raise Damaged("the compressed data ends too early")
                return b""
            if not self.within:
                # A file may end in zeros, as those on tapes do.
                packed = packed.lstrip(b"\0")
                if not packed:
                    continue
            self.within = True
            data, self.rest, ended, self.hungry = self.decompress(packed, size)
            if ended:
                self.decompress, self.within, self.hungry = _decompressor(self.kind), False, True
                self.members += 1
            if data:
                return data


def _decompressor(kind: str) -> Callable[[bytes, int], Chunk]:
    """Return a function (packed bytes, most bytes to give) -> Chunk, for one member of a stream."""
    if kind in {".gz", ".dz"}:
        inflate = zlib.decompressobj(wbits=31)

        def of_gzip(packed: bytes, size: int) -> Chunk:
            data = inflate.decompress(packed, size)
            return Chunk(data, inflate.unused_data or inflate.unconsumed_tail, inflate.eof)

        return of_gzip
    other = bz2.BZ2Decompressor() if kind == ".bz2" else lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES)

    def of_other(packed: bytes, size: int) -> Chunk:
        # These keep what they have not used; an empty piece asks for more.
        data = other.decompress(packed, size)
        return Chunk(data, other.unused_data, other.eof, other.needs_input)

    return of_other
