"""gather: find the sources, judge their rights, read them, and write documents with evidence."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from freehold.core.artifact import Workspace, write_json
from freehold.core.document import Conversation, Document, document_id, write_rows
from freehold.core.errors import DataError, LicenceError
from freehold.ledger.known import look_up
from freehold.ledger.licence import normalise
from freehold.ledger.policy import Claim, gate
from freehold.stages.gather import generate
from freehold.stages.gather.config import FileSource, Folder, Generated, JsonLines, Source, StageConfig
from freehold.stages.gather.origins import HALF_CHARACTER, Origin, check_evidence, date_of, encodable, find, missing
from freehold.stages.gather.readers import Part, Reading, read, unfit

# How many skipped files sources.json names for each source; the rest are counted.
NAMED_SKIPS = 50
# A cap counts as reached when less than this share of it is left.
CAP_SLACK = 0.02


def run(config: StageConfig, work: Workspace) -> dict[str, Any]:
    """Write documents/, conversations/, tasks/ and sources.json below `work.folder`; return the counts.

    Raises DataError for absent or changed sources and LicenceError for rows the policy stops, both before
    anything is written.
    """
    corpus_dir = Path(config.corpus_dir)
    for _ in gate(_known(config), config.policy):
        pass  # read to its end: it raises after the last claim
    missing(config.sources, corpus_dir)
    origins = {n: find(n, s, corpus_dir) for n, s in config.sources.items() if isinstance(s, FileSource)}
    for _ in gate(_claims(config, origins), config.policy):
        pass
    for name, source in config.sources.items():
        if isinstance(source, FileSource):
            check_evidence(name, source, corpus_dir)

    counts: dict[str, Any] = {"sources": {}}
    report: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name, source in config.sources.items():
        start = time.monotonic()
        conversations: list[Conversation] = []
        tasks: dict[str, list[dict[str, Any]]] = {}
        if isinstance(source, Generated):
            facts = config.sources[source.factbook] if source.factbook else None
            made = generate.make(name, source, origins.get(source.factbook or ""), facts, work.seed)
            documents, conversations, tasks = made.documents, made.conversations, made.tasks
            record = {"seeds": made.seeds, "made_from": sorted({d.synthetic_from for d in documents})}
        elif isinstance(source, JsonLines):
            documents, record = _json_lines(name, source)
        else:
            documents, record = _files(name, source, origins[name])
        documents = sorted(gate(documents, config.policy), key=lambda d: d.path)
        conversations = list(gate(conversations, config.policy))
        size = sum(len(d.text.encode()) for d in documents)
        _check_size(name, source, size)
        write_rows(work.folder / "documents" / f"{name}.parquet", documents, Document)
        if conversations:
            write_rows(work.folder / "conversations" / f"{name}.parquet", conversations, Conversation)
        for task, rows in tasks.items():
            _write_task(work.folder / "tasks" / f"{task}.jsonl", rows)
        counted: dict[str, Any] = {"documents": len(documents), "bytes": size, "conversations": len(conversations)}
        counted |= {"tasks": {task: len(rows) for task, rows in tasks.items()}} if tasks else {}
        counts["sources"][name] = counted
        report[name] = _rights(source, documents) | record | counted
        seconds[name] = round(time.monotonic() - start, 2)
        skipped = report[name].get("skipped", {}).get("count", 0)
        work.log.say(
            f"  {name}: {len(documents):,} documents, {size / 1e6:.2f} MB"
            + (f", {len(conversations):,} conversations" if conversations else "")
            + (f", {skipped:,} files skipped" if skipped else "")
            + f", {seconds[name]:.1f} s"
        )
    for key in ("documents", "bytes", "conversations"):
        counts[key] = sum(c[key] for c in counts["sources"].values())
    write_json(work.folder / "sources.json", report)
    write_json(work.folder / "timing.json", {"seconds": seconds})
    return counts


def choose(parts: Iterable[Part], max_bytes: int | None) -> Iterator[Part]:
    """Yield parts until `max_bytes` of UTF-8 text are taken; a part that no longer fits is passed over."""
    left = max_bytes
    for part in parts:
        size = len(part.text.encode())
        if left is not None and max_bytes is not None:
            if size > left:
                continue
            left -= size
        yield part
        if left is not None and max_bytes is not None and left < max_bytes * CAP_SLACK:
            return


def cut(text: str, limit_bytes: int | None) -> str:
    """Return the text, ended at the last blank line before `limit_bytes` UTF-8 bytes when it is longer."""
    data = text.encode()
    if limit_bytes is None or len(data) <= limit_bytes:
        return text
    head = data[:limit_bytes].decode("utf-8", "ignore")
    end = head.rfind("\n\n")
    return (head[:end] if end > 0 else head).rstrip() + "\n"


def _known(config: StageConfig) -> Iterator[Claim]:
    """Yield the sources that name a package known to be falsely labelled, installed or not."""
    for name, source in config.sources.items():
        names = [name, getattr(source, "distribution", ""), getattr(source, "origin", "")]
        if isinstance(source, Folder | JsonLines):
            names.append(Path(source.path).name)
        for found in filter(look_up, names):
            yield Claim(name, found, "", "", source.licence, str(source.licence_evidence or ""))


def _claims(config: StageConfig, origins: dict[str, Origin]) -> Iterator[Claim]:
    """Yield what each source claims about its text; for JSONL, what each row claims."""
    for name, source in config.sources.items():
        evidence = str(source.licence_evidence or "")
        if isinstance(source, JsonLines):
            for document in _json_rows(name, source, []):
                yield Claim(
                    name, document.source_version, document.path, "", document.licence, document.licence_evidence
                )
        elif isinstance(source, Generated):
            yield Claim(name, "freehold", "", "", source.licence, evidence)
        else:
            origin = origins[name]
            licence = _licence(source, origin)
            yield Claim(name, origin.version, "", origin.wrapper_licence, licence, evidence)


def _licence(source: FileSource, origin: Origin) -> str:
    """Return the content's licence: the declared one, or the wrapper's where the recipe says they are the same."""
    licence = origin.wrapper_licence if source.licence == "wrapper" else source.licence
    try:
        return normalise(licence)
    except LicenceError:
        return licence  # the gate refuses it, with every other row it refuses


def _files(name: str, source: FileSource, origin: Origin) -> tuple[list[Document], dict[str, Any]]:
    licence = _licence(source, origin)
    reading = Reading(source.max_document_bytes, list(origin.skipped))
    # Members, then documents, in the order of the hash of their id: the same choice everywhere, and files that
    # are not needed to reach the cap are not even read.
    ordered = sorted(origin.members, key=lambda m: document_id(name, m.path))
    parts = read(source.reader, ordered, reading)
    if source.reader == "bible":  # many documents in one file
        parts = iter(sorted(parts, key=lambda p: document_id(name, p.path)))
    trimmed = (Part(p.member, p.anchor, cut(p.text, source.cut_bytes)) for p in _sound(parts, reading))
    documents = [
        Document(
            id=document_id(name, part.path),
            text=part.text,
            source=name,
            source_version=origin.version,
            path=part.path,
            sha256=part.member.sha256,
            wrapper_licence=origin.wrapper_licence,
            licence=licence,
            licence_evidence=str(source.licence_evidence or ""),
            acquired=origin.acquired,
            kind=source.content,
            synthetic_from="",
            teacher="",
            split="",
        )
        for part in choose(trimmed, source.max_bytes)
    ]
    used = {d.path.partition("#")[0] for d in documents}
    return documents, {
        "members": len(origin.members),
        "members_sha256": origin.members_sha256,
        "files": {m.path: m.sha256 for m in origin.members if m.path in used},
        "skipped": _skips(reading.skipped),
    }


def _sound(parts: Iterable[Part], reading: Reading) -> Iterator[Part]:
    """Pass on what can be a document; escapes in JSON can hold NULs and half characters that its file does not."""
    for part in parts:
        reason = unfit(part.text)
        if reason:
            reading.skipped.append((part.path, reason))
        else:
            yield part


def _json_lines(name: str, source: JsonLines) -> tuple[list[Document], dict[str, Any]]:
    skipped: list[tuple[str, str]] = []
    rows = sorted(_json_rows(name, source, skipped), key=lambda d: d.id)
    documents, left = [], source.max_bytes
    for row in rows:
        size = len(row.text.encode())
        if left is not None and size > left:
            continue
        left = None if left is None else left - size
        documents.append(row)
    return documents, {"skipped": _skips(skipped)}


def _json_rows(name: str, source: JsonLines, skipped: list[tuple[str, str]]) -> Iterator[Document]:
    """Yield the rows of a JSONL file; a line that is too long, not JSON or without text is noted and passed over."""
    path = Path(source.path)
    acquired = date_of(path)
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
                text = row["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                skipped.append((where, "not a JSON object with a `text`"))
                continue
            licence = str(row.get("licence") or source.licence)
            evidence = str(row.get("licence_evidence") or source.licence_evidence or "")
            reason = unfit(text) if isinstance(text, str) else "its `text` is not text"
            if reason or not encodable(licence + evidence):
                skipped.append((where, reason or HALF_CHARACTER))
                continue
            yield Document(
                id=document_id(name, where),
                text=text,
                source=name,
                source_version=source.origin or path.name,
                path=where,
                sha256=hashlib.sha256(line).hexdigest(),
                wrapper_licence="",
                licence=licence,
                licence_evidence=evidence,
                acquired=acquired,
                kind=source.content,
                synthetic_from="",
                teacher="",
                split="",
            )


def _rights(source: Source, documents: list[Document]) -> dict[str, Any]:
    """Return what sources.json says about a source's rights, taken from the rows themselves."""
    first = documents[0] if documents else None
    return {
        "kind": source.kind,
        "version": first.source_version if first else "",
        "acquired": first.acquired if first else "",
        "wrapper_licence": first.wrapper_licence if first else "",
        "licences": dict(sorted(Counter(d.licence for d in documents).items())),
        "licence_evidence": sorted({d.licence_evidence for d in documents})[:10],
    }


def _skips(skipped: list[tuple[str, str]]) -> dict[str, Any]:
    ordered = sorted(skipped)
    named = [{"path": path, "reason": reason} for path, reason in ordered[:NAMED_SKIPS]]
    return {"count": len(ordered), "named": named}


def _check_size(name: str, source: Source, size_bytes: int) -> None:
    if size_bytes < source.min_bytes or (size_bytes == 0 and not isinstance(source, Generated)):
        raise DataError(
            "a source came out smaller than the recipe expects",
            where=name,
            found=f"{size_bytes:,} bytes of text",
            expected=f"at least {max(source.min_bytes, 1):,}",
            todo="look at `members` and `reader` of the source; the package may have changed its layout",
        )


def _write_task(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
