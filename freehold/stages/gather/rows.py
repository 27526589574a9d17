"""Sources of rows: JSONL and parquet files, one document a row."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from freehold.conversations.formats import detect
from freehold.conversations.messages import Refused
from freehold.core.artifact import sha256_file
from freehold.core.document import Document, document_id
from freehold.core.errors import DataError, LicenceError
from freehold.ledger.evidence import Weighed, of_head, restrictions, weigh
from freehold.ledger.licence import normalise
from freehold.stages.gather import rights
from freehold.stages.gather.config import EVIDENCE_KEY, LICENCE_KEY, JsonLines, Rows
from freehold.stages.gather.origins import date_of
from freehold.stages.gather.paths import Changed, rows_files
from freehold.stages.gather.record import skips
from freehold.text.reading import HALF_CHARACTER, encodable, unfit


def read_rows(name: str, source: Rows) -> tuple[list[Document], dict[str, Any]]:
    """Return the documents of a source of rows, and what sources.json says of it; Changed when a file changes."""
    skipped: list[tuple[str, str]] = []
    before = {path: sha256_file(path) for path in rows_files(source)}
    rows = sorted(row_documents(name, source, skipped), key=lambda d: d.id)
    for path, digest in before.items():
        if sha256_file(path) != digest:
            raise Changed(
                "a file changed while gather was reading it",
                where=path,
                expected=f"sha256 {digest[:16]}, as it was at first",
                todo="wait until nothing writes there, and run again",
            )
    documents, left = [], source.max_bytes
    for row in rows:
        size = len(row.text.encode())
        if left is not None and size > left:
            continue
        left = None if left is None else left - size
        documents.append(row)
    files = {path.name: digest for path, digest in before.items()}
    return documents, {"files": files, "skipped": skips(skipped)}


def row_documents(name: str, source: Rows, skipped: list[tuple[str, str]]) -> Iterator[Document]:
    """Yield the rows of the files of a source; what is too long, damaged or without text is noted and passed over."""
    read: Callable[..., Iterator[tuple[str, bytes, dict[str, Any]]]] = (
        _json_rows if isinstance(source, JsonLines) else _parquet_rows
    )
    stated = str(source.licence_evidence or "")
    for path in rows_files(source):
        acquired = source.acquired or date_of(path)
        for where, raw, row in read(path, source, skipped):
            text = row.get(source.text_key)
            licence = str(row.get(LICENCE_KEY) or source.licence)
            evidence = str(row.get(EVIDENCE_KEY) or stated)
            reason = unfit(text) if isinstance(text, str) else f"its `{source.text_key}` is not text"
            if reason or not isinstance(text, str) or not encodable(licence + evidence):
                skipped.append((where, reason or HALF_CHARACTER))
                continue
            detected = licence == rights.DETECT
            with contextlib.suppress(LicenceError):  # the gate refuses it, with every other row it refuses
                licence = licence if detected or not licence.strip() else normalise(licence)
            # A row that names its licence is one statement; with what shows it, somebody looked.
            base = Weighed("" if detected else licence, "medium" if evidence else "low", evidence)
            weighed = weigh(base, [*of_head(text), *restrictions(text)], detected=detected)
            if weighed.confidence == "low" and source.settled:
                weighed = Weighed(weighed.licence, "medium", f"{weighed.evidence}; settled: {source.settled}")
            yield Document(
                id=document_id(name, where),
                text=text,
                source=name,
                source_version=source.origin or path.name,
                path=where,
                sha256=hashlib.sha256(raw).hexdigest(),
                wrapper_licence="",
                licence=weighed.licence,
                licence_evidence=weighed.evidence,
                acquired=acquired,
                kind=source.content,
                synthetic_from="",
                teacher="",
                split="",
                licence_confidence=weighed.confidence,
            )


def _json_rows(path: Path, source: Rows, skipped: list[tuple[str, str]]) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Yield (place, line, object) of a JSONL file; a line is never held when it is longer than a document may be."""
    number = 0
    with path.open("rb") as file:
        while line := file.readline(source.max_document_bytes + 1):
            number += 1
            where = f"{path.name}#{number}"
            if len(line) > source.max_document_bytes:
                while line and not line.endswith(b"\n"):  # pass over the rest without keeping it
                    line = file.readline(1 << 20)
                skipped.append((where, f"a line of more than max_document_bytes = {source.max_document_bytes:,}"))
                continue
            try:
                row = json.loads(line)
                row[source.text_key]
            except (ValueError, KeyError, TypeError, RecursionError):
                _check_no_talk(path, source, line)
                skipped.append((where, f"not a JSON object with a `{source.text_key}`"))
                continue
            yield where, line, row


def _check_no_talk(path: Path, source: Rows, line: bytes) -> None:
    """Raise DataError, naming the right `kind`, for a row of conversations where text was announced."""
    try:
        kind = detect(json.loads(line))
    except (ValueError, RecursionError, Refused):
        return
    raise DataError(
        "a file of conversations is given as a file of text",
        where=path,
        found=f"rows of {kind}, without `{source.text_key}`",
        expected=f"objects with `{source.text_key}`",
        todo="write `kind: conversations` in place of `kind: jsonl` (docs/own-data.md, Conversations)",
    )


def _parquet_rows(
    path: Path, source: Rows, skipped: list[tuple[str, str]]
) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Yield (place, text, row) of a parquet file, a few rows in memory at a time; DataError when it is none."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    name = path.relative_to(source.path).as_posix() if Path(source.path).is_dir() else path.name
    try:
        file = pq.ParquetFile(path)
        columns = [key for key in (source.text_key, LICENCE_KEY, EVIDENCE_KEY)
                   if key in file.schema_arrow.names]  # fmt: skip
        kind = file.schema_arrow.field(source.text_key).type if source.text_key in columns else None
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
            raise DataError(
                "a parquet file has no column of text",
                where=path,
                found=", ".join(f"{f.name} ({f.type})" for f in file.schema_arrow),
                expected=f"`{source.text_key}`, a string",
                todo="name the column under `text_key`",
            )
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            texts = batch.column(source.text_key).cast(pa.large_binary())
            sizes = pc.binary_length(texts).to_pylist()
            others = {key: batch.column(key).cast(pa.string()).to_pylist() for key in columns if key != source.text_key}
            for index, size in enumerate(sizes):
                number += 1
                where = f"{name}#{number}"
                if size is None or size > source.max_document_bytes:
                    skipped.append((where, "empty" if size is None
                                    else f"more than max_document_bytes = {source.max_document_bytes:,}"))  # fmt: skip
                    continue
                raw = texts[index].as_py()
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    skipped.append((where, f"not UTF-8: byte {error.start} is {raw[error.start]:#04x}"))
                    continue
                yield where, raw, {source.text_key: text} | {key: column[index] for key, column in others.items()}
    except (pa.ArrowException, OSError) as error:
        raise DataError("a parquet file cannot be read", where=path, found=str(error).splitlines()[0]) from error
