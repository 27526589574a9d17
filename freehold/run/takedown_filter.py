"""The filter of a take-down: with it a served model does not say what was asked to be removed, from that day on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from freehold.core.document import Conversation, Document, read_rows, said
from freehold.core.errors import DataError
from freehold.guard import takedown as spans
from freehold.run.layout import CURATE, GATHER, REPHRASE, RunFolder
from freehold.run.takedown_answer import Takedown


@dataclass(frozen=True)
class Filtered:
    """The filter that was written."""

    filter: str
    rows: int
    """Rows whose spans are in it; earlier requests come on top."""
    spans: int
    """Spans of all requests."""


def write_filter(run_folder: Path, answer: Takedown, path: Path) -> Filtered:
    """Write, or extend, the filter of a take-down; spans that rows which stay also hold are not in it.

    Raises DataError when the run has no text of the rows, or the file is something else.
    """
    excluded = answer.excluded
    sources, ids = set(excluded.sources), {*excluded.documents, *excluded.rewritten}
    run = RunFolder(run_folder)

    def removed(row: Document | Conversation) -> bool:
        return row.source in sources or row.id in ids or row.synthetic_from in ids | sources

    everything = [*(run.tables(GATHER) or run.tables(CURATE)), *run.documents(REPHRASE)]
    gone = [text for row in _rows(everything) if removed(row) for text in _texts(row)]
    if not gone:
        raise DataError("the run has no text of these rows", where=run_folder, expected=f"documents in {GATHER}")
    kept = [*(run.tables(CURATE) or run.tables(GATHER)), *run.documents(REPHRASE)]
    others = (text for row in _rows(kept) if not removed(row) for text in _texts(row))
    earlier = spans.load(path) if path.exists() else None
    found = spans.build(gone, others, None if earlier is None else earlier.salt)
    found = found if earlier is None else spans.merged(earlier, found)
    spans.save(path, found)
    return Filtered(path.as_posix(), len(gone), sum(map(len, found.spans.values())))


def _rows(files: list[Path]) -> Iterator[Document | Conversation]:
    for file in files:
        if file.parent.name == "conversations":
            yield from read_rows(file, Conversation)
        else:
            yield from read_rows(file, Document)


def _texts(row: Document | Conversation) -> Iterator[str]:
    if isinstance(row, Document):
        yield row.text
    else:
        yield from (text for _, text in said(row.messages))
