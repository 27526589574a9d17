"""gather: find the sources, judge their rights, read them, and write documents with evidence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from freehold.conversations.formats import detect
from freehold.conversations.messages import Refused
from freehold.core.artifact import Workspace, sha256_file, write_json
from freehold.core.document import Conversation, Document, Rights, document_id, write_rows
from freehold.core.errors import DataError, LicenceError
from freehold.ledger.evidence import Weighed, of_head, restrictions, weigh
from freehold.ledger.known import look_up, of_file
from freehold.ledger.licence import normalise
from freehold.ledger.policy import Claim, Policy, Verdict, gate, judge_row, judged
from freehold.stages.gather import rights
from freehold.stages.gather.config import (
    EVIDENCE_KEY,
    LICENCE_KEY,
    Conversations,
    FileSource,
    Folder,
    GatherConfig,
    JsonLines,
    Rows,
    Source,
    generator_of,
)
from freehold.stages.gather.origins import (
    Changed,
    Origin,
    check_evidence,
    date_of,
    find,
    missing,
    rows_files,
)
from freehold.stages.gather.readers import find_reader
from freehold.stages.gather.talks import Talks, read_talks
from freehold.stages.gather.talks import counts as talk_counts
from freehold.text.reading import HALF_CHARACTER, Part, Reading, encodable, unfit
from freehold.text.source import Generated

# How many skipped files sources.json names for each source; the rest are counted.
NAMED_SKIPS = 50
# A cap counts as reached when less than this share of it is left.
CAP_SLACK = 0.02


R = TypeVar("R", Document, Conversation)


def run(config: GatherConfig, work: Workspace) -> dict[str, Any]:
    """Write documents/, conversations/, tasks/ and sources.json below `work.folder`; return the counts.

    Raises DataError for absent or changed sources, before anything is written, and LicenceError for rows the policy
    stops: what was written by then is removed.
    """
    try:
        return _gather(config, work)
    except LicenceError:  # of a text's own words it is known late
        for part in ("documents", "conversations", "tasks"):
            shutil.rmtree(work.folder / part, ignore_errors=True)
        raise


def _gather(config: GatherConfig, work: Workspace) -> dict[str, Any]:
    corpus_dir = Path(config.corpus_dir)
    for _ in gate(_known(config), config.policy):
        pass  # read to its end: it raises after the last claim
    left_out = _left_out(config)
    sources = {name: source for name, source in config.sources.items() if name not in left_out}
    missing(sources, corpus_dir, config.pinned)
    origins = {n: find(n, s, corpus_dir, config.pinned) for n, s in sources.items() if isinstance(s, FileSource)}
    claims = {n: rights.claim(config.sources[n], origin) for n, origin in origins.items()}  # type: ignore[arg-type]
    for _ in gate(_claims(sources, origins, claims), config.policy):
        pass
    for name, origin in origins.items():
        check_evidence(name, config.sources[name], origin, corpus_dir, config.pinned)  # type: ignore[arg-type]

    counts: dict[str, Any] = {"sources": {}}
    report: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name, source in config.sources.items():
        start = time.monotonic()
        conversations: list[Conversation] = []
        tasks: dict[str, list[dict[str, Any]]] = {}
        if name in left_out:
            counts["sources"][name] = {"documents": 0, "bytes": 0, "conversations": 0}
            report[name] = {"kind": source.kind, "left_out": left_out[name].reason, **counts["sources"][name]}
            work.log.say(f"  {name}: left out, {left_out[name].reason}")
            continue
        if isinstance(source, Generated):
            generator = generator_of(source, name)
            materials = {}
            for key, (used, _) in generator.uses(source).items():
                if used in origins:
                    of = config.sources[used]
                    assert isinstance(of, FileSource)
                    materials[key] = rights.material(of, origins[used])
                else:
                    work.log.say(f"  {name}: nothing made of `{used}` ({key}), which is skipped")
            made = generator.make(source, materials, name, work.seed)
            documents, conversations, tasks = made.documents, made.conversations, made.tasks
            record = made.record | {"made_from": sorted({d.synthetic_from for d in documents})}
        elif isinstance(source, Conversations):
            talks = read_talks(name, source)
            documents, conversations, record = [], talks.conversations, _talks_record(talks)
        elif isinstance(source, Rows):
            documents, record = _rows(name, source)
        else:
            documents, record = _files(name, source, origins[name], claims[name])
        documents, refused = _through(documents, source, config.policy)
        documents.sort(key=lambda d: d.path)
        conversations, unheard = _through(conversations, source, config.policy)
        if isinstance(source, Conversations):
            refused += unheard
            if talks.holds_tasks:
                licences = {row.id: row.licence for row in conversations}
                items = [{**i, "licence": licences[i["id"]]} for i in talks.items if i["id"] in licences]
                conversations, tasks = [], {name: items}
        size = sum(len(d.text.encode()) for d in documents)
        _check_size(name, source, size, refused, record)
        write_rows(work.folder / "documents" / f"{name}.parquet", documents, Document)
        if conversations:
            write_rows(work.folder / "conversations" / f"{name}.parquet", conversations, Conversation)
        for task, rows in tasks.items():
            _write_task(work.folder / "tasks" / f"{task}.jsonl", rows)
        counted: dict[str, Any] = {"documents": len(documents), "bytes": size, "conversations": len(conversations)}
        counted |= {"tasks": {task: len(rows) for task, rows in tasks.items()}} if tasks else {}
        counts["sources"][name] = counted
        owners: Sequence[Rights] = talks.conversations if isinstance(source, Conversations) else documents
        report[name] = _rights(source, owners) | record | counted
        if refused:
            report[name]["refused"] = _skips(refused)
        seconds[name] = round(time.monotonic() - start, 2)
        skipped = report[name].get("skipped", {}).get("count", 0)
        work.log.say(
            f"  {name}: {len(documents):,} documents, {size / 1e6:.2f} MB"
            + (f", {len(conversations):,} conversations" if conversations else "")
            + (f", rows of {talks.format}" if isinstance(source, Conversations) else "")
            + (f", {skipped:,} files skipped" if skipped else "")
            + (f", {len(refused):,} refused" if refused else "")
            + f", {seconds[name]:.1f} s"
        )
    for key in ("documents", "bytes", "conversations"):
        counts[key] = sum(c[key] for c in counts["sources"].values())
    write_json(work.folder / "sources.json", report)
    write_json(work.folder / "timing.json", {"seconds": seconds})
    return counts


def _through(rows: list[R], source: Source, policy: Policy) -> tuple[list[R], list[tuple[str, str]]]:
    """Return the rows that the policy lets through, and (path, reason) of those it left out; LicenceError to stop."""
    if source.refused == "stop":
        return list(gate(rows, policy)), []
    seen: dict[tuple[str, ...], Verdict] = {}
    kept, refused = [], []
    for row in rows:
        verdict = judged(row, policy, seen)
        if verdict.decision == "allow":
            kept.append(row)
        else:
            refused.append((row.path, f"{verdict.decision}: {verdict.reason}"))
    return kept, refused


def _left_out(config: GatherConfig) -> dict[str, Verdict]:
    """Return the sources that may be left out and whose licence, as the recipe gives it, the policy does not let in."""
    found = {}
    for name, source in config.sources.items():
        if source.refused == "drop" and source.licence not in {"", rights.DETECT, rights.WRAPPER}:
            evidence = str(source.licence_evidence or "")
            verdict = judge_row(Claim(name, name, "", "", source.licence, evidence), config.policy)
            if verdict.decision != "allow":
                found[name] = verdict
    return found


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


def _known(config: GatherConfig) -> Iterator[Claim]:
    """Yield the sources that name a package known to be falsely labelled, installed or not."""
    for name, source in config.sources.items():
        names = [name, getattr(source, "distribution", ""), getattr(source, "origin", "")]
        if isinstance(source, Folder | Rows | Conversations):
            names.append(Path(source.path).name)
        for found in filter(look_up, names):
            yield Claim(name, found, "", "", source.licence, str(source.licence_evidence or ""))


def _claims(sources: dict[str, Source], origins: dict[str, Origin], claims: dict[str, Weighed]) -> Iterator[Claim]:
    """Yield what each source claims about its text, before it is read; where rows speak for themselves, what each says.

    Sources that leave out what is refused, and those whose files must be read first, are judged row by row later.
    """
    for name, origin in origins.items():
        for known in filter(None, (of_file(member.sha256) for member in origin.members)):
            yield Claim(name, known.name, "", origin.wrapper_licence, claims[name].licence, claims[name].evidence)
            break
    for name, source in sources.items():
        if source.refused == "drop":
            continue
        if isinstance(source, Rows):
            for row in _row_documents(name, source, []):
                yield Claim(
                    name, row.source_version, row.path, "", row.licence, row.licence_evidence, row.licence_confidence
                )
        elif isinstance(source, Generated):
            yield Claim(name, "freehold", "", "", source.licence, str(source.licence_evidence or ""))
        elif isinstance(source, Conversations):
            for talk in read_talks(name, source).conversations:
                yield Claim(
                    name, talk.source_version, talk.path, "", talk.licence, talk.licence_evidence,
                    talk.licence_confidence
                )  # fmt: skip
        elif source.licence != rights.DETECT:
            origin, claim = origins[name], claims[name]
            yield Claim(
                name, origin.version, "", origin.wrapper_licence, claim.licence, claim.evidence, claim.confidence
            )


def _files(name: str, source: FileSource, origin: Origin, claim: Weighed) -> tuple[list[Document], dict[str, Any]]:
    reading = Reading(source.max_document_bytes, source.select, list(origin.skipped))
    # Members, then documents, in the order of the hash of their id: the same choice everywhere, and files that
    # are not needed to reach the cap are not even read.
    ordered = sorted(origin.members, key=lambda m: document_id(name, m.path))
    reader = find_reader(source.reader, f"gather.sources.{name}.reader")
    parts = reader.read(ordered, reading)
    if reader.many_per_file:
        parts = iter(sorted(parts, key=lambda p: document_id(name, p.path)))
    trimmed = (Part(p.member, p.anchor, cut(p.text, source.cut_bytes), p.findings) for p in _sound(parts, reading))
    documents = []
    for part in choose(trimmed, source.max_bytes):
        weighed = rights.of_document(source, origin, claim, part)
        documents.append(
            Document(
                id=document_id(name, part.path),
                text=part.text,
                source=name,
                source_version=origin.version,
                path=part.path,
                sha256=part.member.sha256,
                wrapper_licence=origin.wrapper_licence,
                licence=weighed.licence,
                licence_evidence=weighed.evidence,
                acquired=origin.acquired,
                kind=source.content,
                synthetic_from="",
                teacher="",
                split="",
                licence_confidence=weighed.confidence,
            )
        )
    used = {d.path.partition("#")[0] for d in documents}
    return documents, {
        "members": len(origin.members),
        "members_sha256": origin.members_sha256,
        "files": {m.path: m.sha256 for m in origin.members if m.path in used},
        "skipped": _skips(reading.skipped),
        "wrapper_says": [str(finding) for finding in rights.wrapper_findings(origin)[:NAMED_SKIPS]],
        "conflicts": list(claim.conflicts),
    }


def _sound(parts: Iterable[Part], reading: Reading) -> Iterator[Part]:
    """Pass on what can be a document; escapes in JSON can hold NULs and half characters that its file does not."""
    for part in parts:
        reason = unfit(part.text)
        if reason:
            reading.skipped.append((part.path, reason))
        else:
            yield part


def _rows(name: str, source: Rows) -> tuple[list[Document], dict[str, Any]]:
    skipped: list[tuple[str, str]] = []
    before = {path: sha256_file(path) for path in rows_files(source)}
    rows = sorted(_row_documents(name, source, skipped), key=lambda d: d.id)
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
    return documents, {"files": files, "skipped": _skips(skipped)}


def _row_documents(name: str, source: Rows, skipped: list[tuple[str, str]]) -> Iterator[Document]:
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


def _talks_record(talks: Talks) -> dict[str, Any]:
    return {**talk_counts(talks), "sha256": talks.digest, "skipped": _skips(talks.refused)}


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


def _rights(source: Source, documents: Sequence[Rights]) -> dict[str, Any]:
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


def _skips(skipped: list[tuple[str, str]]) -> dict[str, Any]:
    ordered = sorted(skipped)
    named = [{"path": path, "reason": reason} for path, reason in ordered[:NAMED_SKIPS]]
    return {"count": len(ordered), "named": named}


def _check_size(
    name: str, source: Source, size_bytes: int, refused: list[tuple[str, str]], record: dict[str, Any]
) -> None:
    skipped = record.get("skipped", {"count": 0, "named": []})
    first = [f"{skipped['count']:,} skipped: {one['path']}, {one['reason']}" for one in skipped["named"][:1]]
    spoken = isinstance(source, Generated | Conversations)  # they may have no documents
    if size_bytes < source.min_bytes or (size_bytes == 0 and not refused and not spoken):
        raise DataError(
            "a source came out smaller than the recipe expects",
            where=name,
            found="; ".join([f"{size_bytes:,} bytes of text", *first]),
            expected=f"at least {max(source.min_bytes, 1):,}",
            todo="look at `path` and `text_key` of the source"
            if isinstance(source, Rows)
            else "look at `members` and `reader` of the source; the package may have changed its layout",
        )


def _write_task(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
