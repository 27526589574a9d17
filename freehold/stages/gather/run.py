"""gather: find the sources, judge their rights, read them, and write documents with evidence."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from freehold.core.artifact import Workspace, write_json
from freehold.core.config import user_path
from freehold.core.document import Conversation, Document, Rights, document_id, write_rows
from freehold.core.errors import LicenceError
from freehold.ledger.evidence import Weighed
from freehold.ledger.known import look_up, of_file
from freehold.ledger.policy import Claim, Policy, Verdict, gate, judge_row, judged
from freehold.ledger.reservations import Losses, Snapshot, web_address
from freehold.stages.gather import rights
from freehold.stages.gather.config import (
    GENERAL,
    Conversations,
    FileSource,
    Folder,
    GatherConfig,
    Rows,
    Source,
    Warc,
    generator_of,
)
from freehold.stages.gather.foreign import read_foreign
from freehold.stages.gather.origins import Origin, find
from freehold.stages.gather.quotes import check_evidence
from freehold.stages.gather.readers import find_reader
from freehold.stages.gather.record import NAMED_SKIPS, check_size, rights_record, skips, unread
from freehold.stages.gather.requirements import missing
from freehold.stages.gather.rows import read_rows, row_documents
from freehold.stages.gather.talks import Talks, read_talks
from freehold.stages.gather.talks import counts as talk_counts
from freehold.stages.gather.warc import find_pages
from freehold.text.reading import Member, Part, Reading, unfit
from freehold.text.source import Generated

# A cap counts as reached when less than this share is left.
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


@dataclass
class Gathered:
    """What one source became."""

    documents: list[Document] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    tasks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    """What sources.json says."""
    owners: Sequence[Rights] = ()
    """The rows whose rights sources.json names; empty: the documents."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: str = ""
    """More for the line in the log."""


@dataclass(frozen=True)
class Found:
    """The sources that the policy lets in, their files, and what they claim."""

    refused: dict[str, Verdict]
    origins: dict[str, Origin]
    claims: dict[str, Weighed]
    quotes: dict[str, str]
    snapshot: Snapshot | None
    """What the recogniser makes of each quote: agrees, silent, or empty where there is none."""


def _gather(config: GatherConfig, work: Workspace) -> dict[str, Any]:
    found = _find(config)
    counts: dict[str, Any] = {"sources": {}}
    report: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name, source in config.sources.items():
        start = time.monotonic()
        if name in found.refused:
            counts["sources"][name] = {"documents": 0, "bytes": 0, "conversations": 0}
            report[name] = {"kind": source.kind, "left_out": found.refused[name].reason, **counts["sources"][name]}
            work.log.say(f"  {name}: skipped, {found.refused[name].reason}")
            continue
        made = _judged(name, source, _read(name, source, config, found, work), config.policy)
        counts["sources"][name] = counted = _write(name, source, made, work)
        report[name] = rights_record(source, made.owners or made.documents) | made.record | counted
        if made.refused:
            report[name]["refused"] = skips(made.refused)
        seconds[name] = round(time.monotonic() - start, 2)
        _say(name, made, report[name], seconds[name], work)
    for key in ("documents", "bytes", "conversations"):
        counts[key] = sum(c[key] for c in counts["sources"].values())
    if counts["documents"] and all(c["documents"] < 2 for c in counts["sources"].values()):
        work.log.warn(
            "no source has two documents: no text is held out for validation, so the model is measured on none. "
            "Give more files, or `separator` where one file holds many documents"
        )
    write_json(work.folder / "sources.json", report)
    modified = {name: origin.modified for name, origin in found.origins.items()}
    write_json(work.folder / "timing.json", {"seconds": seconds, "files_modified": modified})
    return counts


def _find(config: GatherConfig) -> Found:
    """Find the files of all sources, and judge what the sources claim before any text is read.

    Raises DataError for what is missing, and LicenceError for what the policy stops.
    """
    corpus_dir = user_path(config.corpus_dir)
    for _ in gate(_known(config), config.policy):
        pass  # read to its end: it raises after the last claim
    refused = _refused_by_claim(config)
    sources = {name: source for name, source in config.sources.items() if name not in refused}
    missing(sources, corpus_dir, config.pinned)
    snapshot = config.reservations.open() if config.reservations else None
    origins = {
        n: find_pages(n, s) if isinstance(s, Warc) else find(n, s, corpus_dir, config.pinned)
        for n, s in sources.items()
        if isinstance(s, FileSource)
    }
    claims = {n: rights.claim(config.sources[n], origin) for n, origin in origins.items()}  # type: ignore[arg-type]
    for _ in gate(_claims(sources, origins, claims, snapshot), config.policy):
        pass
    quotes = {}
    for name, origin in origins.items():
        source, licence = config.sources[name], claims[name].licence
        quotes[name] = check_evidence(name, source, origin, licence, corpus_dir, config.pinned)  # type: ignore[arg-type]
    return Found(refused, origins, claims, quotes, snapshot)


def _read(name: str, source: Source, config: GatherConfig, found: Found, work: Workspace) -> Gathered:
    """Return what a source holds, not yet judged row by row."""
    losses = Losses(found.snapshot)
    if isinstance(source, Generated):
        return _generated(name, source, config, found, work)
    if isinstance(source, Conversations):
        talks = read_talks(name, source)
        made = Gathered([], talks.conversations, record=_talks_record(talks), owners=talks.conversations)
        made.notes = f", rows of {talks.format}"
        if talks.holds_tasks:
            made.tasks = {name: talks.items}
        return made
    if isinstance(source, Rows):
        documents, record = read_rows(name, source, losses)
        return Gathered(documents, record=record)
    documents, record = _files(name, source, found.origins[name], found.claims[name], losses)
    record |= losses.record()
    if found.quotes[name]:
        record["quote"] = found.quotes[name]
    return Gathered(documents, record=record)


def _generated(name: str, source: Generated, config: GatherConfig, found: Found, work: Workspace) -> Gathered:
    """Return what a generator makes of the sources it uses."""
    generator = generator_of(source, name)
    materials = {}
    for key, (used, _) in generator.uses(source).items():
        if used in found.origins:
            of = config.sources[used]
            assert isinstance(of, FileSource)
            materials[key] = rights.material(of, found.origins[used])
        else:
            work.log.say(f"  {name}: nothing made of `{used}` ({key}), which is skipped")
    made = generator.make(source, materials, name, work.seed)
    record = made.record | {"made_from": sorted({d.synthetic_from for d in made.documents})}
    return Gathered(made.documents, made.conversations, made.tasks, record)


def _judged(name: str, source: Source, made: Gathered, policy: Policy) -> Gathered:
    """Return what the policy lets through; LicenceError to stop."""
    made.documents, made.refused = _through(made.documents, source, policy)
    made.documents.sort(key=lambda d: d.path)
    made.conversations, refused = _through(made.conversations, source, policy)
    if isinstance(source, Conversations):
        made.refused += refused
        if made.tasks:  # its rows are held-out items, under the licence of their row
            licences = {row.id: row.licence for row in made.conversations}
            items = [{**i, "licence": licences[i["id"]]} for i in made.tasks[name] if i["id"] in licences]
            made.conversations, made.tasks = [], {name: items}
    return made


def _write(name: str, source: Source, made: Gathered, work: Workspace) -> dict[str, Any]:
    """Write the files of a source; return its counts. Raises DataError when it came out too small."""
    size = sum(len(d.text.encode()) for d in made.documents)
    check_size(name, source, size, made.refused, made.record)
    write_rows(work.folder / "documents" / f"{name}.parquet", made.documents, Document)
    if made.conversations:
        write_rows(work.folder / "conversations" / f"{name}.parquet", made.conversations, Conversation)
    for task, rows in made.tasks.items():
        _write_task(work.folder / "tasks" / f"{task}.jsonl", rows)
    counted: dict[str, Any] = {
        "documents": len(made.documents), "bytes": size, "conversations": len(made.conversations),
    }  # fmt: skip
    return counted | ({"tasks": {task: len(rows) for task, rows in made.tasks.items()}} if made.tasks else {})


def _say(name: str, made: Gathered, record: dict[str, Any], seconds: float, work: Workspace) -> None:
    skipped = record.get("skipped", {}).get("count", 0)
    work.log.say(
        f"  {name}: {record['documents']:,} documents, {record['bytes'] / 1e6:.2f} MB"
        + (f", {record['conversations']:,} conversations" if record["conversations"] else "")
        + made.notes
        + (f", {skipped:,} files skipped" if skipped else "")
        + (f", {len(made.refused):,} refused" if made.refused else "")
        + (f", {record['reserved']['documents']:,} reserved by their sites" if "reserved" in record else "")
        + f", {seconds:.1f} s"
    )
    for line in record.get("warnings", ()):
        work.log.warn(f"{name}: {line}")


def _through(rows: list[R], source: Source, policy: Policy) -> tuple[list[R], list[tuple[str, str]]]:
    """Return the rows that the policy lets through, and (path, reason) of those it skipped; LicenceError to stop."""
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


def _refused_by_claim(config: GatherConfig) -> dict[str, Verdict]:
    """Return the sources that may be skipped and whose licence, as the recipe gives it, the policy does not let in."""
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


def _claims(
    sources: dict[str, Source], origins: dict[str, Origin], claims: dict[str, Weighed], snapshot: Snapshot | None
) -> Iterator[Claim]:
    """Yield what each source claims about its text, before it is read; where rows speak for themselves, what each says.

    Sources that skip what is refused, and those whose files must be read first, are judged row by row later.
    """
    for name, origin in origins.items():
        for known in filter(None, (of_file(member.sha256) for member in origin.members)):
            yield Claim(name, known.name, "", origin.wrapper_licence, claims[name].licence, claims[name].evidence)
            break
    for name, source in sources.items():
        if source.refused == "drop":
            continue
        if isinstance(source, Rows):
            for row in row_documents(name, source, [], Losses(snapshot)):
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


def _files(
    name: str, source: FileSource, origin: Origin, claim: Weighed, losses: Losses
) -> tuple[list[Document], dict[str, Any]]:
    reading = Reading(source.max_document_bytes, source.select, source.separator, skipped=list(origin.skipped))
    # Members, then documents, in the order of the hash of their id: the same choice everywhere, and files that
    # are not needed to reach the cap are not even read.
    ordered = sorted(origin.members, key=lambda m: document_id(name, m.path))
    reader = find_reader(source.reader, f"gather.sources.{name}.reader")
    own = source.reader in GENERAL  # these isolate file by file
    parts = reader.read(ordered, reading) if own else read_foreign(reader, ordered, reading)
    if reader.many_per_file or source.separator:
        parts = iter(sorted(parts, key=lambda p: document_id(name, p.path)))
    trimmed = (
        Part(p.member, p.anchor, cut(p.text, source.cut_bytes), p.findings)
        for p in _sound(parts, reading, source, losses)
    )
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
                address=_address(source, part.member),
                fetched=part.member.web.fetched if part.member.web else "",
            )
        )
    used = {d.path.partition("#")[0] for d in documents}
    return documents, unread(source, origin, documents) | {
        "members": len(origin.members),
        "members_sha256": origin.members_sha256,
        "files": origin.containers or {m.path: m.sha256 for m in origin.members if m.path in used},
        "skipped": skips(reading.skipped),
        "wrapper_says": [str(finding) for finding in rights.wrapper_findings(origin)[:NAMED_SKIPS]],
        "conflicts": list(claim.conflicts),
    }


def _sound(parts: Iterable[Part], reading: Reading, source: FileSource, losses: Losses) -> Iterator[Part]:
    """Pass on what can be a document; escapes in JSON can hold NULs and half characters that its file does not."""
    for part in parts:
        web = part.member.web
        said = (web.fetched, web.headers, part.findings) if web else ()
        reason = unfit(part.text) or losses.reserves(_address(source, part.member), part.text, *said)
        if reason:
            reading.skipped.append((part.path, reason))
        else:
            yield part


def _address(source: FileSource, member: Member) -> str:
    """Return the web address of a page of a web archive, or of a mirrored site, whose `origin` is the folder's."""
    if member.web is not None:
        return member.web.address
    if isinstance(source, Folder):
        return web_address(f"{source.origin.rstrip('/')}/{member.path}")
    return ""


def _talks_record(talks: Talks) -> dict[str, Any]:
    return {**talk_counts(talks), "sha256": talks.digest, "skipped": skips(talks.refused)}


def _write_task(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
