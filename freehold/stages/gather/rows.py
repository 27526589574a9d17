"""Sources of rows: JSONL and parquet files, one document a row."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from freehold.conversations.formats import detect
from freehold.conversations.messages import Refused
from freehold.core.artifact import sha256_file
from freehold.core.document import Document, document_id
from freehold.core.errors import DataError, LicenceError
from freehold.core.streams import UNREADABLE, Damaged, unpacked
from freehold.ledger import conflicts
from freehold.ledger.evidence import Finding, Weighed, of_head, restrictions, weigh
from freehold.ledger.licence import normalise
from freehold.ledger.reservations import Losses, web_address
from freehold.stages.gather import rights
from freehold.stages.gather.config import EVIDENCE_KEY, LICENCE_KEY, JsonLines, Rows
from freehold.stages.gather.isolated import EndedError, Item, isolated
from freehold.stages.gather.parquet import parquet_rows
from freehold.stages.gather.paths import Changed, name_below, rows_files
from freehold.stages.gather.record import skips
from freehold.text.reading import HALF_CHARACTER, encodable, unfit, without_thoughts


class Row(NamedTuple):
    """One row of a file."""

    place: str
    """`file#number`."""
    sha256: str
    """Of the line, or of the bytes of the text."""
    fields: dict[str, Any]


Skipped = list[tuple[str, str]]
Read = Callable[[Path, str, Rows, Skipped], Iterator[Row]]
ROW_S = 60.0
"""CPU time for a row; one of 8 MB takes 0.1 s."""


def read_rows(name: str, source: Rows, losses: Losses) -> tuple[list[Document], dict[str, Any]]:
    """Return the documents of a source of rows, and what sources.json says about it; Changed when a file changes."""
    skipped: Skipped = []
    before = {path: sha256_file(path) for path in rows_files(source)}
    rows = sorted(row_documents(name, source, skipped, losses), key=lambda d: d.id)
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
    files = {name_below(path, source.path): digest for path, digest in before.items()}
    return documents, {"files": files, "skipped": skips(skipped), **losses.record()}


def row_documents(name: str, source: Rows, skipped: Skipped, losses: Losses | None = None) -> Iterator[Document]:
    """Yield the rows of the files of a source; what is too long, damaged or without text is noted and passed over.

    Raises DataError when a file is none of its kind, or unpacks to more than it may.
    """
    read: Read = _json_rows if isinstance(source, JsonLines) else _parquet_rows
    losses = losses or Losses()
    taken = 0
    for path in rows_files(source):
        for row in _apart(read, path, source, skipped):
            text = row.fields.get(source.text_key)
            if not isinstance(text, str):
                skipped.append((row.place, f"its `{source.text_key}` is not text"))
                continue
            text, thoughts = without_thoughts(text)
            reason = thoughts or unfit(text) or losses.reserves(web_address(row.fields.get(source.address_key)), text)
            if reason:
                skipped.append((row.place, reason))
                continue
            taken += len(text)
            if taken > source.max_unpacked_bytes:
                raise _too_much(path, source)
            document = _document(name, source, path, row, text)
            if document is None:
                skipped.append((row.place, HALF_CHARACTER))
            else:
                yield document


def _apart(read: Read, path: Path, source: Rows, skipped: Skipped) -> Iterator[Row]:
    """Yield the rows of a file, read in a process of its own; DataError when a row takes more than it may."""
    rows = 0
    try:
        for head, text in isolated(lambda: _sent(read, path, source), ROW_S):
            rows += 1
            skipped += [(place, reason) for place, reason in head["skipped"]]
            if head["place"]:
                value = text.decode("utf-8", "surrogatepass") if head["is_text"] else None
                yield Row(head["place"], head["sha256"], {**head["fields"], source.text_key: value})
    except EndedError as error:
        raise DataError(
            "a file of rows cannot be read within its limits",
            where=path,
            found=f"{error}, after {rows:,} rows",
            todo="take the row out, or lower max_document_bytes",
        ) from error


def _sent(read: Read, path: Path, source: Rows) -> Iterator[Item]:
    keys, skipped = {LICENCE_KEY, EVIDENCE_KEY, source.address_key} - {source.text_key}, Skipped()
    for row in read(path, name_below(path, source.path), source, skipped):
        text = row.fields.get(source.text_key)
        fields = {key: row.fields[key] for key in row.fields if key in keys or key.lower() in conflicts.KEYS}
        head = {"place": row.place, "sha256": row.sha256, "fields": fields, "is_text": isinstance(text, str)}
        yield {**head, "skipped": skipped[:]}, text.encode("utf-8", "surrogatepass") if isinstance(text, str) else b""
        skipped.clear()
    yield {"place": "", "skipped": skipped}, b""


def _too_much(path: Path, source: Rows) -> DataError:
    return DataError(
        "a source of rows holds more text than it may",
        where=path,
        found=f"more than max_unpacked_bytes = {source.max_unpacked_bytes:,}",
        todo="look at what it holds; raise max_unpacked_bytes when that is right",
    )


def _document(name: str, source: Rows, path: Path, row: Row, text: str) -> Document | None:
    """Return a row as a document with its rights; None when these hold half a character."""
    licence = str(row.fields.get(LICENCE_KEY) or source.licence)
    evidence = str(row.fields.get(EVIDENCE_KEY) or source.licence_evidence or "")
    if not encodable(licence + evidence):
        return None
    detected = licence == rights.DETECT
    with contextlib.suppress(LicenceError):  # the gate refuses it, with every other row it refuses
        licence = licence if detected or not licence.strip() else normalise(licence)
    # A row that names its licence is one statement; with what shows it, somebody looked.
    base = Weighed("" if detected else licence, "medium" if evidence else "low", evidence)
    weighed = _weighed(source, base, row, text, detected)
    return Document(
        id=document_id(name, row.place),
        text=text,
        source=name,
        source_version=source.origin or path.name,
        path=row.place,
        sha256=row.sha256,
        wrapper_licence="",
        licence=weighed.licence,
        licence_evidence=weighed.evidence,
        acquired=source.acquired,
        kind=source.content,
        synthetic_from="",
        teacher="",
        split="",
        licence_confidence=weighed.confidence,
        address=web_address(row.fields.get(source.address_key)),
    )


def _weighed(source: Rows, base: Weighed, row: Row, text: str, detected: bool) -> Weighed:
    """Return what a row is under: its claim, what its text says, and what its other keys state of a licence."""
    own = [*of_head(text), *restrictions(text)]
    stated = conflicts.of_row(row.fields, row.place, LICENCE_KEY)
    known = [one for one in stated if conflicts.leaves(one.says)]
    if detected:
        own += [Finding("metadata", one.place, one.says) for one in known]
        against = [str(one) for one in stated if one not in known]
    else:
        against = list(map(str, conflicts.conflicts(base.licence, stated, around=False)))
        against += rights.against_claim(base.licence, own, text, row.place)
    return rights.settled(source.settled, rights.doubted(weigh(base, own, detected=detected), against))


def _json_rows(path: Path, name: str, source: Rows, skipped: Skipped) -> Iterator[Row]:
    """Yield the objects of a JSONL file; a line is never held when it is longer than a document may be."""
    limit = source.max_document_bytes
    try:
        with path.open("rb") as packed:
            _check_kind(path, packed.read(8), source)
            packed.seek(0)
            file = unpacked(packed)
            number, left = 0, source.max_unpacked_bytes
            while line := file.readline(limit + 1):
                number += 1
                place = f"{name}#{number}"
                left -= len(line)
                if len(line) > limit:
                    while line and not line.endswith(b"\n") and left >= 0:  # pass over the rest without keeping it
                        line = file.readline(1 << 20)
                        left -= len(line)
                    skipped.append((place, f"a line of more than max_document_bytes = {limit:,}"))
                elif reason := _not_a_row(path, source, line):
                    skipped.append((place, reason))
                else:
                    yield Row(place, hashlib.sha256(line).hexdigest(), json.loads(line.decode("utf-8-sig")))
                if left < 0 and file is not packed:
                    raise _too_much(path, source)
    except Damaged as error:
        raise DataError("a compressed file cannot be unpacked", where=path, found=error) from error


def _not_a_row(path: Path, source: Rows, line: bytes) -> str:
    """Return why a line is no object with a text; empty when it is one."""
    try:
        json.loads(line.decode("utf-8-sig"))[source.text_key]
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
    except (ValueError, KeyError, TypeError, RecursionError):
        _check_no_talk(path, source, line)
        return f"not a JSON object with a `{source.text_key}`"
    return ""


def _check_kind(path: Path, start: bytes, source: Rows) -> None:
    """Raise DataError for a file whose first bytes are those of another kind of file."""
    found = next((kind for magic, kind in UNREADABLE.items() if start.startswith(magic)), "")
    if found:
        raise DataError(
            "a file is not JSON lines",
            where=path,
            found=found,
            expected="one JSON object a line in UTF-8; .gz, .bz2, .xz and .zst are unpacked",
            todo="write `kind: parquet`" if found == "parquet" else "unpack or convert the file",
        )


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


def _parquet_rows(path: Path, name: str, source: Rows, skipped: Skipped) -> Iterator[Row]:
    """Yield the rows of a parquet file whose text may be a document; the others are noted."""
    others = (LICENCE_KEY, EVIDENCE_KEY, source.address_key, *sorted(conflicts.KEYS))
    limits = source.max_document_bytes, source.max_unpacked_bytes
    for number, (raw, text, reason, fields) in enumerate(parquet_rows(path, source.text_key, others, *limits), 1):
        place = f"{name}#{number}"
        if reason:
            skipped.append((place, reason))
        else:
            yield Row(place, hashlib.sha256(raw).hexdigest(), {source.text_key: text, **fields})
