"""Files of conversations: one JSON object a line or one JSON array, compressed or not, or parquet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from freehold.conversations.formats import FORMATS, NEEDS, Format, Made, convert, detect
from freehold.conversations.messages import Refused, refuse_file
from freehold.core.errors import DataError
from freehold.core.streams import unpacked

MAX_ROW_BYTES = 8_000_000
"""A longer line is refused, and never held in memory."""
MAX_ARRAY_BYTES = 2_000_000_000
"""A larger array is refused: JSON lines are read row by row."""
PARQUET_ROWS, PARQUET_BYTES = 256, 1 << 30
"""Rows of a parquet file read together, and what they may take."""
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
        with path.open("rb") as packed:
            if packed.read(4) == b"PAR1":
                yield from _parquet(path, max_bytes)
                return
            packed.seek(0)
            file = unpacked(packed)
            start = file.peek(4096)[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")  # type: ignore[attr-defined]
            if start[:1] == b"[":
                yield from _array(path, _bounded(path, file))
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


def _bounded(path: Path, file: BinaryIO) -> bytes:
    """Return all bytes of an array of rows, which is parsed in memory; DataError when it unpacks to very many."""
    data = file.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        found = f"more than {MAX_ARRAY_BYTES:,} bytes"
        raise refuse_file("a JSON array of rows is too large to be read as one", path, found)
    return data


def _parquet(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes, Any]]:
    """Yield the rows of a parquet file; columns are keys, and what is null is not there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            # No value of a group is larger than the group: this number of rows fits, whatever its dictionaries hold.
            rows = max(1, min(PARQUET_ROWS, PARQUET_BYTES // max(1, facts.total_byte_size)))
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, *_parquet_row(row, max_bytes)
    except (pa.ArrowException, OSError, MemoryError) as error:
        found = (str(error).splitlines() or [repr(error)])[0]
        raise refuse_file("a parquet file of conversations cannot be read", path, found) from error


def _parquet_row(row: dict[str, Any], max_bytes: int) -> tuple[bytes, Any]:
    value = _without_nulls(row)
    try:
        raw = json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # dates, bytes, half characters: none of them is in a conversation
        return b"", f"not of JSON's types: {str(error)[:100]}"
    if len(raw) > max_bytes:
        return b"", f"a row of more than max_document_bytes = {max_bytes:,}"
    return raw, value


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null: parquet gives every struct all keys of its column."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


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
