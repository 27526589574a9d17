"""The header of a GGUF file, checked before llama.cpp sees it: there a wrong count or offset ends the process.

Format: ggml's docs/gguf.md, versions 2 and 3. Only the header is read, and every number is bounded before it is used.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from freehold.core.errors import ArtifactError

MAGIC = b"GGUF"
MOST_TENSORS, MOST_KEYS, MOST_NAME_BYTES = 1 << 16, 1 << 16, 1 << 16
MOST_STRING_BYTES, MOST_ITEMS = 1 << 26, 1 << 24
MOST_DIMENSIONS = 4
# {type of a value: its struct code}; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# {type of a tensor: (values, bytes) of a block}, as ggml.h numbers them.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip


class _Wrong(Exception):
    """What is wrong with a header."""


def check_gguf(path: Path) -> dict[str, Any]:
    """Return a file's metadata (long arrays as their length); ArtifactError when llama.cpp must not see the file."""
    try:
        with path.open("rb") as file:
            return _Header(file, path.stat().st_size).read()
    except (_Wrong, struct.error, UnicodeDecodeError, OSError) as error:
        raise ArtifactError(
            "not a sound GGUF file", where=path, found=str(error) or type(error).__name__,
            expected="a header whose counts, types and offsets fit the file", todo="download or export it again",
        ) from error  # fmt: skip


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._at = file, size, 0

    def read(self) -> dict[str, Any]:
        """Return the metadata after everything was checked."""
        if self._take(4) != MAGIC:
            raise _Wrong("it does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            raise _Wrong(f"version {version}; 2 and 3 are known")
        tensors = self._bounded(self._number("Q"), MOST_TENSORS, "tensors")
        keys = self._bounded(self._number("Q"), MOST_KEYS, "keys")
        facts: dict[str, Any] = {}
        for _ in range(keys):
            name = self._string(MOST_NAME_BYTES)
            if name in facts:
                raise _Wrong(f"the key {name!r} twice")
            facts[name] = self._value(self._number("I"))
        alignment = facts.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise _Wrong(f"general.alignment {alignment!r} is no power of two from 8 on")
        self._check_tensors([self._tensor() for _ in range(tensors)], alignment)
        return facts

    def _check_tensors(self, tensors: list[tuple[str, int, int]], alignment: int) -> None:
        """Check that tensors (name, offset, bytes) have different names and follow each other in the file."""
        start = -(-self._at // alignment) * alignment
        if len({name for name, _, _ in tensors}) != len(tensors):
            raise _Wrong("two tensors with one name")
        end = 0
        for name, offset, size in sorted(tensors, key=lambda tensor: tensor[1]):
            if offset % alignment:
                raise _Wrong(f"{name} begins at {offset}, no multiple of {alignment}")
            if offset < end:
                raise _Wrong(f"{name} begins at {offset}, inside the tensor before it")
            end = offset + size
            if start + end > self._size:
                raise _Wrong(f"{name} ends at byte {start + end:,}; the file has {self._size:,}")

    def _tensor(self) -> tuple[str, int, int]:
        name = self._string(MOST_NAME_BYTES)
        count = self._bounded(self._number("I"), MOST_DIMENSIONS, "dimensions")
        shape = [self._bounded(self._number("Q"), self._size * 8, f"values of {name}") for _ in range(count)]
        kind, offset = self._number("I"), self._number("Q")
        if kind not in _BLOCKS:
            raise _Wrong(f"{name} has the unknown type {kind}")
        values, size = _BLOCKS[kind]
        if not shape or 0 in shape or shape[0] % values:
            raise _Wrong(f"{name} has the shape {shape}; its type needs rows of a multiple of {values}")
        total = 1
        for length in shape:
            total = self._bounded(total * length, self._size * 8, f"values of {name}")
        return name, self._bounded(offset, self._size, f"bytes before {name}"), total // values * size

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string(MOST_STRING_BYTES)
        if kind != _ARRAY or depth > 0:
            raise _Wrong(f"a value of the unknown type {kind}")
        inner, count = self._number("I"), self._bounded(self._number("Q"), MOST_ITEMS, "items of an array")
        if inner in _SCALARS:
            size = struct.calcsize(_SCALARS[inner])
            self._take(self._bounded(size * count, self._size, "bytes of an array"))
            return count
        for _ in range(count):
            self._value(inner, depth + 1)
        return count

    def _string(self, most: int) -> str:
        return self._take(self._bounded(self._number("Q"), most, "bytes of a text")).decode("utf-8")

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _take(self, count: int) -> bytes:
        data = self._file.read(self._bounded(count, self._size, "bytes"))
        if len(data) != count:
            raise _Wrong("it ends in the middle of its header")
        self._at += len(data)
        return data

    @staticmethod
    def _bounded(value: int, most: int, what: str) -> int:
        if value > most:
            raise _Wrong(f"{value:,} {what}; at most {most:,}")
        return value
