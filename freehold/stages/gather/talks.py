"""Sources of conversations, preferences and tasks: rows with rights, and items held out for evaluate."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freehold.conversations.files import Row, format_of, read
from freehold.core.artifact import sha256_file
from freehold.core.config import user_path
from freehold.core.document import Conversation, document_id, said
from freehold.core.errors import DataError, LicenceError
from freehold.ledger import conflicts
from freehold.ledger.evidence import Weighed, of_head, restrictions, weigh
from freehold.ledger.licence import normalise
from freehold.stages.gather import rights
from freehold.stages.gather.config import EVIDENCE_KEY, LICENCE_KEY, Conversations
from freehold.stages.gather.paths import Changed
from freehold.text.reading import encodable, unfit

TASK_FORMATS = ("task", "choice_task")
MOST_NAMED = 5
"""Refused rows that an error names."""


@dataclass
class Talks:
    """What a source of conversations became."""

    format: str
    rows: int = 0
    conversations: list[Conversation] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)
    """Task items by the id of their row, which is among `conversations` too until the policy has judged it."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    digest: str = ""

    @property
    def holds_tasks(self) -> bool:
        """Return whether its rows are held-out items, nothing to learn from."""
        return self.format in TASK_FORMATS


def read_talks(name: str, source: Conversations) -> Talks:
    """Return the rows of a source with their rights.

    Raises DataError for a file without a known format, one in which too many rows are refused, and one that changes
    while it is read.
    """
    path = user_path(source.path)
    before = sha256_file(path)
    kind = format_of(path, source.format, source.max_document_bytes)
    found = Talks(kind, digest=before)
    for row in read(path, kind, source.max_document_bytes):
        found.rows += 1
        place = f"{path.name}#{row.number}"
        reason = row.reason or _unfit(row)
        if reason:
            found.refused.append((place, reason))
            continue
        found.conversations.append(_conversation(name, source, row, place))
        if row.made is not None and row.made.item is not None:
            found.items.append({"id": found.conversations[-1].id, "task": name, **row.made.item})
    if sha256_file(path) != before:
        raise Changed(
            "a file changed while gather was reading it",
            where=path,
            expected=f"sha256 {before[:16]}, as it was at first",
            todo="wait until nothing writes there, and run again",
        )
    _check_refused(name, source, found)
    return _limited(found, source.max_bytes)


def counts(found: Talks) -> dict[str, Any]:
    """Return what sources.json says of the rows."""
    pairs = Counter("pairs" for c in found.conversations if any("rejected" in m for m in c.messages))
    return {"format": found.format, "rows": found.rows, "pairs": pairs["pairs"]}


def _unfit(row: Row) -> str:
    assert row.made is not None
    return next((reason for _, text in said(row.made.messages) if (reason := unfit(text))), "")


def _conversation(name: str, source: Conversations, row: Row, place: str) -> Conversation:
    assert row.made is not None
    weighed = _weighed(source, row)
    return Conversation(
        id=document_id(name, place),
        messages=row.made.messages,
        source=name,
        source_version=source.origin or Path(source.path).name,
        path=place,
        sha256=hashlib.sha256(row.raw).hexdigest(),
        wrapper_licence="",
        licence=weighed.licence,
        licence_evidence=weighed.evidence,
        acquired=source.acquired,
        kind="conversation",
        synthetic_from="",
        teacher=str(row.fields.get("teacher") or ""),
        split="",
        licence_confidence=weighed.confidence,
    )


def _weighed(source: Conversations, row: Row) -> Weighed:
    """Return what a row is under: what it says itself, else what the recipe says, and what its words say against it."""
    assert row.made is not None
    licence = str(row.fields.get(LICENCE_KEY) or source.licence)
    evidence = str(row.fields.get(EVIDENCE_KEY) or source.licence_evidence or "")
    detected = licence == rights.DETECT
    with contextlib.suppress(LicenceError):  # the gate refuses it, with every other row it refuses
        licence = licence if detected or not licence.strip() or not encodable(licence) else normalise(licence)
    base = Weighed("" if detected else licence, "medium" if evidence else "low", evidence)
    text = "\n".join(text for _, text in said(row.made.messages))
    weighed = weigh(base, [*of_head(text), *restrictions(text)], detected=detected)
    if not detected:
        stated = conflicts.of_row(row.fields, f"row {row.number}", LICENCE_KEY)
        against = list(map(str, conflicts.conflicts(base.licence, stated, around=False)))
        weighed = rights.doubted(weighed, against)
    return rights.settled(source.settled, weighed)


def _check_refused(name: str, source: Conversations, found: Talks) -> None:
    if found.conversations and len(found.refused) <= source.max_refused * found.rows:
        return
    named = [f"{place}: {reason}" for place, reason in found.refused[:MOST_NAMED]]
    raise DataError(
        "too many rows of a source of conversations cannot be read",
        where=f"gather.sources.{name}: {source.path}",
        found="\n            ".join([f"{len(found.refused):,} of {found.rows:,} rows of {found.format}", *named]),
        expected=f"at most {source.max_refused:.0%}",
        todo=f"freehold align --check {source.path} names every one; mend them, or raise max_refused",
    )


def _limited(found: Talks, max_bytes: int | None) -> Talks:
    """Sort the rows by id; keep those that fit `max_bytes` of text."""
    found.conversations.sort(key=lambda row: row.id)
    if max_bytes is not None:
        left, kept = max_bytes, []
        for row in found.conversations:
            size = sum(len(text.encode()) for _, text in said(row.messages))
            if size <= left:
                kept.append(row)
                left -= size
        found.conversations = kept
    return found
