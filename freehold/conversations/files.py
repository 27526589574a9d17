"""Files of conversations: one JSON object a line, or one JSON array."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freehold.conversations.formats import FORMATS, NEEDS, Format, Made, convert, detect
from freehold.conversations.messages import Refused, refuse_file
from freehold.core.errors import DataError

MAX_ROW_BYTES = 8_000_000
"""A longer line is refused, and never held in memory."""
LOOKED_AT = 1000
"""Rows from whose keys the format of a file follows, when the recipe does not name it."""


@dataclass(frozen=True)
class Row:
    """One row of a file: what it became, or why it was refused."""

    number: int
    """Counts from 1: the line of a JSONL file, the place in an array."""
    raw: bytes
    fields: Mapping[str, Any] = field(default_factory=dict)
    made: Made | None = None
    reason: str = ""


def format_of(path: Path, named: str = "auto", max_bytes: int = MAX_ROW_BYTES) -> Format:
    """Return the one format of a file; DataError when it has none, or rows of several formats.

    The format that most of the first rows have is the file's when no other format has a tenth of them: rows of another
    one are then refused by number, and the file is not.
    """
    if named != "auto":
        return FORMATS[FORMATS.index(named)]  # type: ignore[arg-type]
    found: Counter[str] = Counter()
    first = ""
    for number, _, value in _values(path, max_bytes):
        if number > LOOKED_AT:
            break
        try:
            if isinstance(value, str):
                raise Refused(value)
            found[detect(value)] += 1
        except Refused as error:
            first = first or f"row {number}: {error}"
    if not found:
        raise refuse_file("no row of a format that is known", path, first or "no rows")
    (kind, most), *others = found.most_common()
    if others and 10 * sum(n for _, n in others) >= most:
        raise DataError(
            "a file holds rows of several formats",
            where=path,
            found=", ".join(f"{n:,} {name}" for name, n in found.most_common()),
            expected="one format a file",
            todo="split the file, or name the format of the rows to take: format: " + kind,
        )
    return kind  # type: ignore[return-value]


def read(path: Path, kind: Format, max_bytes: int = MAX_ROW_BYTES) -> Iterator[Row]:
    """Yield every row of a file, refused ones with the reason; DataError when the file cannot be read.

    A row that has all keys of `kind` is one, whatever other keys it has: the recipe, or most of the file, said so.
    """
    for number, raw, value in _values(path, max_bytes):
        try:
            if isinstance(value, str):
                raise Refused(value)
            if any(value.get(key) is None for key in NEEDS[kind]) and (found := detect(value)) != kind:
                raise Refused(f"a row of {found} in a file of {kind}")
            yield Row(number, raw, value, convert(value, kind))
        except Refused as error:
            yield Row(number, raw, value if isinstance(value, Mapping) else {}, reason=str(error))


def _values(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes, Any]]:
    """Yield (number, bytes, object) of each row; the reason as text where it is no object."""
    try:
        with path.open("rb") as file:
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
            file.seek(0)
            if start[:1] == b"[":
                yield from _array(path, file.read())
                return
            number = 0
            while line := file.readline(max_bytes + 1):
                number += 1
                if len(line) > max_bytes:
                    while line and not line.endswith(b"\n"):  # pass over the rest without keeping it
                        line = file.readline(1 << 20)
                    yield number, b"", f"a line of more than max_document_bytes = {max_bytes:,}"
                elif line.strip():
                    yield number, line, _object(line)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("a file of conversations cannot be read", where=path, found=error) from error


def _object(line: bytes) -> Any:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return f"not JSON: {str(error)[:100]}"
    return value if isinstance(value, dict) else f"not a JSON object but {type(value).__name__}"


def _array(path: Path, data: bytes) -> Iterator[tuple[int, bytes, Any]]:
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise refuse_file("not JSON", path, str(error)[:200]) from error
    for number, row in enumerate(rows, 1):
        raw = json.dumps(row, ensure_ascii=False, sort_keys=True).encode(errors="replace")
        yield number, raw, row if isinstance(row, dict) else f"not a JSON object but {type(row).__name__}"
