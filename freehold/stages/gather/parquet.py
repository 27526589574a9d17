"""Rows of parquet files, whatever kind of string holds their text; what rows repeat is in memory once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from freehold.core.errors import DataError
from freehold.core.streams import ENDINGS

BATCH_BYTES = 64_000_000
"""About what a batch of rows takes; a batch has at least one row."""
BATCH_ROWS = 256
OTHER_BYTES = 10_000
"""A longer licence or evidence is none."""


def parquet_rows(
    path: Path, key: str, others: tuple[str, ...], max_document_bytes: int, max_unpacked_bytes: int
) -> Iterator[tuple[bytes, str, str, dict[str, Any]]]:
    """Yield (bytes, text, why it is none, {other column: text}) of each row.

    Columns of text are read as dictionaries: a value that a million rows repeat is in memory once. Raises DataError
    when the file cannot be read, has no such column, or its columns unpack to more than `max_unpacked_bytes`.
    """
    try:
        names = pq.read_schema(path).names
        columns = [name for name in dict.fromkeys((key, *others)) if name in names]
        file = pq.ParquetFile(path, read_dictionary=columns)
        _check_column(path, key, file.schema_arrow)
        size = _unpacked_bytes(file.metadata, columns)
        if size > max_unpacked_bytes:
            raise DataError(
                "a parquet file unpacks to more than it may",
                where=path,
                found=f"{size:,} bytes",
                expected=f"at most max_unpacked_bytes = {max_unpacked_bytes:,}",
                todo="look at what it holds; raise max_unpacked_bytes when that is right",
            )
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES * file.metadata.num_rows // max(size, 1)))
        for batch in file.iter_batches(batch_size=rows, columns=columns):
            yield from _batch(batch, key, max_document_bytes)
    except (pa.ArrowException, OSError, MemoryError) as error:
        with path.open("rb") as opened:
            start = opened.read(8)
        packed = next((ending for ending, magic in ENDINGS.items() if start.startswith(magic)), "")
        raise DataError(
            "a parquet file cannot be read",
            where=path,
            found=(str(error).splitlines() or [repr(error)])[0],
            todo=f"unpack it: it is a {packed} file, and parquet packs its own columns" if packed else None,
        ) from error


def _check_column(path: Path, key: str, schema: pa.Schema) -> None:
    """Raise DataError when the column of text is missing or holds something else, or its name is there twice."""
    found = [field.type for field in schema if field.name == key]
    kinds = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in found]
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary,
               pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)  # fmt: skip
    if len(kinds) == 1 and any(test(kinds[0]) for test in is_text):
        return
    raise DataError(
        "a parquet file has no column of text" if len(kinds) < 2 else "a parquet file has two columns of one name",
        where=path,
        found=", ".join(f"{field.name} ({_stored(field.type)})" for field in schema),
        expected=f"`{key}`, a string",
        todo="name the column under `text_key`",
    )


def _stored(kind: pa.DataType) -> str:
    return str(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _unpacked_bytes(metadata: Any, columns: list[str]) -> int:
    """Return what the pages of some columns unpack to, as the file says."""
    total = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(index) for index in range(group.num_columns))
        total += sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)
    return total


def _batch(batch: Any, key: str, limit: int) -> Iterator[tuple[bytes, str, str, dict[str, Any]]]:
    texts = _Values(batch.column(key))
    others = {name: _Values(batch.column(name)) for name in batch.schema.names if name != key}
    for row in range(batch.num_rows):
        size = texts.size(row)
        if size is None or size > limit:
            yield b"", "", "empty" if size is None else f"more than max_document_bytes = {limit:,}", {}
            continue
        fields = {name: values.text(row) for name, values in others.items()}
        yield *texts.document(row), fields


class _Values:
    """A column, read one value at a time."""

    def __init__(self, column: Any) -> None:
        encoded = pa.types.is_dictionary(column.type)
        self.places = column.indices.to_pylist() if encoded else None
        values = column.dictionary if encoded else column
        self.values = values
        self.sizes: list[int | None] = []
        with_length = not (pa.types.is_nested(values.type) or pa.types.is_primitive(values.type))
        if with_length:
            wide = values.cast(pa.large_binary()) if pa.types.is_fixed_size_binary(values.type) else values
            self.sizes = pc.binary_length(wide).to_pylist()
        self.read: dict[int, tuple[bytes, str, str]] = {}

    def _place(self, row: int) -> int | None:
        return row if self.places is None else self.places[row]

    def size(self, row: int) -> int | None:
        """Return how many bytes the value of a row has; None for a null."""
        place = self._place(row)
        return None if place is None or not self.sizes else self.sizes[place]

    def document(self, row: int) -> tuple[bytes, str, str]:
        """Return the bytes and the text of a row, and why it is none; rows of one value share these objects."""
        place = self._place(row)
        assert place is not None
        if place not in self.read:
            raw = self.values[place : place + 1].cast(pa.large_binary())[0].as_py()
            try:
                self.read[place] = raw, raw.decode("utf-8"), ""
            except UnicodeDecodeError as error:
                self.read[place] = raw, "", f"not UTF-8: byte {error.start} is {raw[error.start]:#04x}"
        return self.read[place]

    def text(self, row: int) -> str | None:
        """Return a short value as text, whatever its type; None for a null and for what is too long."""
        place = self._place(row)
        if place is None or (self.sizes and (self.sizes[place] or 0) > OTHER_BYTES):
            return None
        found = self.values[place].as_py()
        return found.decode("utf-8", "replace") if isinstance(found, bytes) else None if found is None else str(found)
