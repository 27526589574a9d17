"""Run curation: read what gather wrote, filter step by step, write what is left, every drop, and a report."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from freehold.core.artifact import Workspace, sha256_file, write_json
from freehold.core.document import Conversation, Document, read_rows, replace, write_rows
from freehold.core.errors import DataError
from freehold.stages.curate.config import Exclusion, KindRules, StageConfig
from freehold.stages.curate.decontaminate import Questions, read_questions
from freehold.stages.curate.dedup import ExactDuplicates, near_duplicates
from freehold.stages.curate.filters import (
    Why,
    check_code,
    check_language,
    check_length,
    check_prose,
    clean_unicode,
)
from freehold.stages.curate.privacy import check_density, redact
from freehold.stages.curate.report import Report
from freehold.stages.curate.split import is_validation, validation_documents
from freehold.stages.curate.words import WordHashes, Words, read_words, text_hash


@dataclass
class Draft:
    """A document on its way through the steps."""

    row: Document
    rank: int
    """Place of its source: of equal documents that of the lowest rank stays."""
    rules: KindRules
    text: str
    words: Words | None = None


def run(config: StageConfig, work: Workspace) -> dict[str, Any]:
    """Curate `gather/` into `work.folder`; returns the counts of the report's totals."""
    gathered = work.input("gather")
    report = Report()
    tasks = sorted((gathered / "tasks").glob("*.jsonl"))
    questions = Questions(
        read_questions(gathered / "tasks") if config.decontamination.enabled else [], config.decontamination
    )
    drafts = read_drafts(gathered / "documents", config)
    report.arrive((d.row.source, d.text) for d in drafts)
    work.log.say(f"curate: {len(drafts):,} documents, {report.bytes_in:,} bytes")
    kept = filter_documents(drafts, config, questions, report, work)
    if not kept:
        raise DataError(
            "curation left no document",
            where=gathered / "documents",
            found=dict(sorted(Counter(drop["reason"] for drop in report.drops).items())),
            expected="at least one document",
            todo="loosen the limits under `curate.kinds`, or gather other sources",
        )
    excluded = read_exclusion(config.exclude, gathered)
    write_documents(kept, config, excluded, report, work.folder)
    curate_conversations(gathered / "conversations", config, questions, excluded, report, work.folder)
    for path in tasks:
        (work.folder / "tasks").mkdir(exist_ok=True)
        shutil.copyfile(path, work.folder / "tasks" / path.name)
    report.write_drops(work.folder / "drops.parquet")
    write_json(work.folder / "report.json", report.as_dict())
    return report.totals()


def read_drafts(folder: Path, config: StageConfig) -> list[Draft]:
    """Read every document; order: the sources' priority, then their names, then as gathered."""
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise DataError("no documents to curate", where=folder, expected="*.parquet", todo="run the gather stage")
    names = [path.stem for path in paths]
    for name in config.priority:
        if name not in names:
            raise DataError("no such source", where="curate.priority", found=name, expected=", ".join(names))
    order = [*config.priority, *(name for name in names if name not in config.priority)]
    drafts = []
    for rank, name in enumerate(order):
        path = folder / f"{name}.parquet"
        for row in read_rows(path, Document):
            if row.kind not in type(config.kinds).model_fields:
                raise DataError(
                    "a document of a kind curation has no rules for",
                    where=f"{path} ({row.id})",
                    found=row.kind,
                    expected=", ".join(type(config.kinds).model_fields),
                )
            drafts.append(Draft(row, rank, getattr(config.kinds, row.kind), row.text))
    return drafts


def filter_documents(
    drafts: list[Draft], config: StageConfig, questions: Questions, report: Report, work: Workspace
) -> list[Draft]:
    """Take the documents through every step; returns those that are left, in the order they came."""

    def step(name: str, judge: Callable[[Draft], Why | None], drafts: list[Draft]) -> list[Draft]:
        left = []
        for draft in work.log.track(drafts, f"curate {name}", unit="documents"):
            why = judge(draft)
            if why is None:
                left.append(draft)
            else:
                report.drop(name, draft.row, len(draft.text), why)
        report.close(name, ((d.row.source, d.text) for d in left))
        return left

    def unicode(draft: Draft) -> Why | None:
        draft.text, repairs = clean_unicode(draft.text)
        report.repaired[draft.row.source].update(repairs.split())
        return check_length(draft.text, draft.rules)

    def quality(draft: Draft) -> Why | None:
        draft.words = read_words(draft.text, table)
        rules = draft.rules
        why = check_prose(draft.text, draft.words, rules.prose) if rules.prose else None
        return why or (check_code(draft.text, draft.row.path, rules.code) if rules.code else None)

    def private(draft: Draft) -> Why | None:
        draft.text, found = redact(draft.text, config.privacy)
        report.redacted[draft.row.source].update(found)
        return check_density(len(draft.text), found, config.privacy)

    table = WordHashes()
    left = step("length", lambda draft: check_length(draft.text, draft.rules), drafts)
    left = step("unicode", unicode, left)
    # Of equal documents the one that stays does not hang on the order of rows in a file.
    ranked = sorted(left, key=lambda draft: (draft.rank, draft.row.id))
    exact = ExactDuplicates()
    twice = {draft.row.id: exact(draft.row.id, draft.text) for draft in ranked}
    left = step("exact_duplicates", lambda draft: twice[draft.row.id], left)
    left = step("language", lambda draft: check_language(draft.text, draft.rules), left)
    left = step("quality", quality, left)
    left = step("decontamination", lambda draft: questions.in_document(draft.text, words_of(draft).hashes), left)
    if config.near_duplicates.enabled:
        here = {draft.row.id for draft in left if draft.rules.near_duplicates}
        ranked = [draft for draft in ranked if draft.row.id in here]
        alike = near_duplicates([d.row.id for d in ranked], [words_of(d) for d in ranked], config.near_duplicates)
        left = step("near_duplicates", lambda draft: alike.get(draft.row.id), left)
    return step("privacy", private, left)


def words_of(draft: Draft) -> Words:
    """Return the words that the quality step left."""
    assert draft.words is not None
    return draft.words


def read_exclusion(exclude: Exclusion, gathered: Path) -> dict[str, Why]:
    """Return the id of each row that must not stay, with the reason.

    Raises DataError for a source or an id that was not gathered, and for a file that is not the one named.
    """
    ids = set(exclude.documents)
    if exclude.file:
        if not exclude.file.is_file() or sha256_file(exclude.file) != exclude.file_sha256:
            raise DataError(
                "the list of excluded ids is missing or another one",
                where=exclude.file,
                found=sha256_file(exclude.file) if exclude.file.is_file() else "no file",
                expected=exclude.file_sha256,
                todo="bring the file back, or set curate.exclude.file_sha256",
            )
        ids |= set(exclude.file.read_text(encoding="utf-8").split())
    if not ids and not exclude.sources:
        return {}
    found: dict[str, Why] = {}
    sources = set()
    for path in [
        *sorted((gathered / "documents").glob("*.parquet")),
        *sorted(gathered.glob("conversations/*.parquet")),
    ]:
        sources.add(path.stem)
        for identity in pq.read_table(path, columns=["id"])["id"].to_pylist():
            if path.stem in exclude.sources:
                found[identity] = ("excluded", f"source {path.stem}")
            elif identity in ids:
                found[identity] = ("excluded", "by id")
    unknown = sorted(set(exclude.sources) - sources) or sorted(ids - found.keys())
    if unknown:
        raise DataError(
            "what is to be excluded was not gathered",
            where="curate.exclude",
            found=", ".join(unknown[:5]) + (f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""),
            expected=f"ids, or sources of {', '.join(sorted(sources))}",
            todo="look it up with `freehold trace`",
        )
    return found


def write_documents(
    kept: list[Draft], config: StageConfig, excluded: dict[str, Why], report: Report, folder: Path
) -> None:
    """Decide the split source by source, take out what is excluded, and write one parquet file each.

    The split is decided first, so that no document changes sides because another one went.
    """
    by_source: dict[str, list[Draft]] = {}
    for draft in kept:
        by_source.setdefault(draft.row.source, []).append(draft)
    for source, drafts in sorted(by_source.items()):
        sizes = [(draft.row.id, len(draft.text.encode())) for draft in drafts]
        back = validation_documents(sizes, config.split)
        rows = [
            replace(draft.row, text=draft.text, split="validation" if draft.row.id in back else "train")
            for draft in drafts
            if draft.row.id not in excluded
        ]
        for draft in drafts:
            if draft.row.id in excluded:
                report.drop("exclude", draft.row, len(draft.text), excluded[draft.row.id])
        if rows:
            write_rows(folder / "documents" / f"{source}.parquet", rows, Document)
        left = {row.id: row.split for row in rows}
        report.leave(source, [(left[identity], size) for identity, size in sizes if identity in left])
    if excluded:
        report.close("exclude", ((d.row.source, d.text) for d in kept if d.row.id not in excluded))


def curate_conversations(
    gathered: Path,
    config: StageConfig,
    questions: Questions,
    excluded: dict[str, Why],
    report: Report,
    folder: Path,
) -> None:
    """Take the conversations through unicode, exact duplicates, decontamination, privacy and exclusion; split them."""
    seen: dict[int, str] = {}
    for path in sorted(gathered.glob("*.parquet")):
        rows = []
        total = 0
        for row in read_rows(path, Conversation):
            total += 1
            messages, found = [], Counter[str]()
            for message in row.messages:
                content = message.get("content")
                if isinstance(content, str):
                    content, one = redact(clean_unicode(content)[0], config.privacy)
                    found.update(one)
                    message = {**message, "content": content}
                messages.append(message)
            key = text_hash(json.dumps(messages, sort_keys=True))
            first = seen.setdefault(key, row.id)
            chars = sum(len(str(message.get("content") or "")) for message in messages)
            why: Why | None = ("exact_duplicate", f"of {first}") if first != row.id else None
            why = why or questions.in_conversation(row) or check_density(chars, found, config.privacy)
            why = why or excluded.get(row.id)
            if why is not None:
                report.drop("conversations", row, chars, why)
                continue
            report.redacted[row.source].update(found)
            kept_back = is_validation(row.id, config.split.conversation_fraction)
            rows.append(replace(row, messages=messages, split="validation" if kept_back else "train"))
        report.talk(path.stem, total, Counter(row.split for row in rows))
        if rows:
            write_rows(folder / "conversations" / path.name, rows, Conversation)
