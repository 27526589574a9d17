"""What sources.json says of a source: its rights, what was skipped, and when it came out too small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from freehold.core.document import Document, Rights
from freehold.core.errors import DataError
from freehold.stages.gather.config import Archive, Conversations, FileSource, Folder, Rows, Source, Warc
from freehold.stages.gather.origins import LICENCE_FILE, Origin
from freehold.stages.gather.paths import idle_globs, unmatched
from freehold.stages.gather.separated import hint
from freehold.text.source import Generated

# How many skipped files sources.json names for each source; the rest are counted.
NAMED_SKIPS = 50


def rights_record(source: Source, documents: Sequence[Rights]) -> dict[str, Any]:
    """Return what sources.json says about a source's rights, taken from the rows themselves."""
    first = documents[0] if documents else None
    return {
        "kind": source.kind,
        "version": first.source_version if first else "",
        "acquired": first.acquired if first else "",
        "wrapper_licence": first.wrapper_licence if first else "",
        "licences": dict(sorted(Counter(d.licence for d in documents).items())),
        "licence_evidence": sorted({d.licence_evidence for d in documents})[:10],
        "confidence": dict(sorted(Counter(d.licence_confidence for d in documents).items())),
    }


def skips(skipped: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the number of skipped places, and the first ones with their reasons."""
    ordered = sorted(skipped)
    named = [{"path": path, "reason": reason} for path, reason in ordered[:NAMED_SKIPS]]
    return {"count": len(ordered), "named": named}


def unread(source: FileSource, origin: Origin, documents: Sequence[Document]) -> dict[str, Any]:
    """Return what sources.json says of files that no glob takes, and the warnings that follow; empty when none do."""
    found: dict[str, Any] = {}
    warnings = []
    idle = idle_globs(source, origin.paths)
    if idle:
        warnings.append(f"no file in {place(source)} matches {'; '.join(idle)}")
    if isinstance(source, Folder):
        texts = (p for p in origin.paths if not _of_no_text(p))
        left = unmatched(texts, source)
        if left:
            found["unmatched"] = left
            endings = ", ".join(f"{count:,} {ending}" for ending, count in left["endings"].items())
            warnings.append(
                f"{left['count']:,} files of {place(source)} match none of {', '.join(source.members)} and are not "
                f"read: {endings}"
            )
    if isinstance(source, Folder | Archive) and (line := hint([(d.path, d.text) for d in documents], source.separator)):
        warnings.append(line)
    return found | ({"warnings": warnings} if warnings else {})


def _of_no_text(path: str) -> bool:
    """Return whether a file is a licence's, which is read as evidence, or hidden."""
    parts = PurePosixPath(path).parts
    return bool(LICENCE_FILE.match(parts[-1])) or any(part.startswith(".") for part in parts)


def place(source: FileSource) -> str:
    """Return where the files of a source are."""
    if isinstance(source, Folder | Warc):
        return source.path
    return source.file if isinstance(source, Archive) else str(getattr(source, "distribution", source.kind))  # type: ignore[attr-defined]


def check_size(
    name: str, source: Source, size_bytes: int, refused: list[tuple[str, str]], record: dict[str, Any]
) -> None:
    """Raise DataError for a source without text, or with less than its `min_bytes`."""
    skipped = record.get("skipped", {"count": 0, "named": []})
    warnings = record.get("warnings", [])
    first = [f"{skipped['count']:,} skipped: {one['path']}, {one['reason']}" for one in skipped["named"][:1]]
    spoken = isinstance(source, Generated | Conversations)  # they may have no documents
    if size_bytes < source.min_bytes or (size_bytes == 0 and not refused and not spoken):
        raise DataError(
            "a source came out smaller than the recipe expects",
            where=name,
            found="; ".join([f"{size_bytes:,} bytes of text", *first, *warnings]),
            expected=f"at least {max(source.min_bytes, 1):,}",
            todo="look at `path` and `text_key` of the source"
            if isinstance(source, Rows)
            else "look at `members` and `reader` of the source; the package may have changed its layout",
        )
