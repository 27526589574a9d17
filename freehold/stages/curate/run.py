"""Run curation: clean shard by shard, compare the documents with each other, write what is left, and a report."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from freehold.core.artifact import Workspace, read_json, sha256_file, write_json
from freehold.core.document import Conversation, Document, read_rows, replace, rewritten, said, write_rows
from freehold.core.errors import DataError
from freehold.core.machine import machine_limits
from freehold.guard.personal import redact
from freehold.stages.curate import bias, classifier
from freehold.stages.curate.config import CurateConfig, Exclusion
from freehold.stages.curate.dedup import (
    Span,
    cut_lines,
    cut_words,
    exact_duplicates,
    find_overlaps,
    near_duplicates,
    repeated_lines,
)
from freehold.stages.curate.engine import make_all
from freehold.stages.curate.filters import Why, clean_unicode
from freehold.stages.curate.privacy import check_density
from freehold.stages.curate.report import ALL, Report
from freehold.stages.curate.rules import MOST_DROPPED, NEAR_MIN_WORDS
from freehold.stages.curate.shards import Corpus, Job, Shard, read_plan
from freehold.stages.curate.split import is_validation, validation_documents
from freehold.text.held_out import Questions, read_questions
from freehold.text.words import text_hash


def run(config: CurateConfig, work: Workspace) -> dict[str, Any]:
    """Curate `gather/` into `work.folder`; returns the counts of the report's totals."""
    gathered = work.input("gather")
    job = Job.of(gathered, work.folder, config)
    shards = read_plan(job)
    report = Report()
    excluded = read_exclusion(config.exclude, gathered)
    # With a published model, conversations alone are enough.
    if shards or not any((gathered / "conversations").glob("*.parquet")):
        curate_documents(job, shards, excluded, report, work)
    questions = Questions(read_questions(gathered / "tasks") if config.decontamination.enabled else [])
    curate_conversations(gathered / "conversations", config, questions, excluded, report, work.folder)
    for path in sorted((gathered / "tasks").glob("*.jsonl")):
        (work.folder / "tasks").mkdir(exist_ok=True)
        shutil.copyfile(path, work.folder / "tasks" / path.name)
    say_sources(report, work)
    report.write_drops(work.folder / "drops.parquet")
    write_json(work.folder / "report.json", report.as_dict())
    shutil.rmtree(job.shards)
    return report.totals()


def say_sources(report: Report, work: Workspace) -> None:
    """Print what stayed of each source and why most of the rest did not; warn of one that lost much."""
    for source, entry in report.sources().items():
        came, stayed = entry["in"]["documents"], entry["out"]["documents"]
        reasons = sum((Counter(step["dropped"]) for step in entry["steps"]), Counter[str]())
        line = f"  {source}: {stayed:,} of {came:,} documents kept"
        line += "".join(f", most dropped as {reason} ({n:,})" for reason, n in reasons.most_common(1))
        if came - stayed > MOST_DROPPED * came:
            work.log.warn(f"{line.strip()}: drops.parquet says why of each")
        else:
            work.log.say(line)


def curate_documents(job: Job, shards: list[Shard], excluded: dict[str, Why], report: Report, work: Workspace) -> None:
    """Clean the documents shard by shard, compare them, and write what is left; DataError when nothing is."""
    config, gathered = job.config, job.gathered
    if config.classifier.act != "off":
        report.more["classifier"] = train_classifier(job, shards, work)
    for _ in work.log.track(make_all(job, shards), "curate", len(shards), unit="shards"):
        pass
    corpus = Corpus(job, shards)
    for source, came, tally in corpus.tallies():
        report.arrive(source, came, tally)
    work.log.say(f"curate: {sum(came[0] for came in report.came.values()):,} documents in {len(shards):,} shards")
    kept = compare(corpus, report)
    gone = sum(corpus.ids[document] in excluded for document in np.flatnonzero(kept.alive))
    if kept.alive.sum() == gone:
        reasons = Counter(drop["reason"] for drop in report.drops()) + Counter({"excluded": gone})
        raise DataError(
            "curation left no document",
            where=gathered / "documents",
            found=dict(sorted(reasons.items())),
            expected="at least one document",
            todo="loosen the limits under `curate.kinds`, or gather other sources",
        )
    check_sources(kept, report)
    write_documents(kept, excluded, report, work.folder)


def check_sources(kept: Kept, report: Report) -> None:
    """Raise DataError naming each source of which no document is left, with the main reason.

    Sources that are excluded, or are the classifier's bad examples, may lose everything.

    A recipe that weighs such a source later would speak of text that no step reads.
    """
    standing = set(kept.corpus.source[np.flatnonzero(kept.alive)].tolist())
    reasons: dict[str, Counter[str]] = {}
    for drop in report.drops():
        reasons.setdefault(drop["source"], Counter())[drop["reason"]] += 1
    lost = [name for name in report.tallies if report.came[name][0] and name not in standing]
    config = kept.corpus.job.config
    may_go = {*config.exclude.sources, *config.classifier.bad}  # examples of what is not wanted are there to be dropped
    found = [(name, reasons[name]) for name in lost if name not in may_go]
    if found:
        raise _lost_whole([(name, report.came[name][0], why) for name, why in found])


def _lost_whole(lost: list[tuple[str, int, Counter[str]]]) -> DataError:
    lines = []
    for name, came, reasons in lost:
        (reason, count), *_ = reasons.most_common(1) or [("unknown", 0)]
        lines.append(f"{name}: none of {came:,} kept, {count:,} dropped as {reason}")
    return DataError(
        "curation drops every row of a source",
        where=", ".join(name for name, _, _ in lost),
        found="\n            ".join(lines),
        expected="at least one row of each source",
        todo="loosen the rules of its kind under `curate.kinds`, or set its `content`; to do without it, name it under "
        "`curate.exclude.sources`",
    )


def train_classifier(job: Job, shards: list[Shard], work: Workspace) -> dict[str, Any]:
    """Train on the sources that the recipe names, unless a killed run did; returns how well it separates them."""
    config = job.config.classifier
    facts = job.shards / "classifier.json"
    if not facts.exists():
        known = {shard.source: Path(shard.path) for shard in shards}
        for name in (*config.good, *config.bad):
            if name not in known:
                raise DataError(
                    "no such source", where="curate.classifier", found=name, expected=", ".join(sorted(known))
                )

        def texts(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
            return ((row.id, row.text) for name in names for row in read_rows(known[name], Document))

        model, figures = classifier.train(texts(config.good), texts(config.bad), config)
        with machine_limits(job.shards):
            np.save(job.shards / "classifier.npy", model.weights)
        write_json(facts, figures)
        work.log.say(f"curate: classifier trained, {figures}")
    return read_json(facts)


@dataclass
class Kept:
    """What comparing leaves: which documents, and what is cut out of them."""

    corpus: Corpus
    alive: np.ndarray
    """bool [documents]"""
    sizes: np.ndarray
    """int64 [documents], bytes of the text after the cuts"""
    passages: dict[int, list[Span]] = field(default_factory=dict)
    lines: dict[int, set[int]] = field(default_factory=dict)

    def edited(self, document: int, text: str) -> str:
        """Return the text of a document with its cuts made."""
        if document in self.passages:
            text = cut_words(text, self.passages[document])
        if document in self.lines:
            text = cut_lines(text, self.lines[document])
        return text


def compare(corpus: Corpus, report: Report) -> Kept:
    """Compare the documents with each other: duplicates, bias, containment, repeated lines and passages.

    Of two documents the one of the earlier source stays; within a source the longer one, then that of the lower id.
    """
    config, table = corpus.job.config, corpus.table
    kept = Kept(corpus, np.ones(len(corpus), bool), table["sizes"].copy())
    ids = np.array([identity.encode() for identity in corpus.ids] or [b""])[: len(corpus)]
    _, first = np.unique(corpus.source, return_index=True)
    rank = np.searchsorted(np.sort(first), np.arange(len(corpus)), "right")
    order = np.lexsort((ids, -table["words"], rank))

    def standing(mask: np.ndarray | None = None) -> np.ndarray:
        chosen = kept.alive if mask is None else kept.alive & mask
        return order[chosen[order]]

    def step(name: str, drops: dict[int, Why], *, measure: bool = False) -> None:
        for document, why in sorted(drops.items()):
            row, text = _row(corpus, document)
            tally = report.tallies[row.source]
            if measure:
                tally.measure(name, row, text, why, len(text))
            else:
                tally.drop(name, row, text, why)
                kept.alive[document] = False
        close(name)

    def close(name: str) -> None:
        for source, tally in report.tallies.items():
            mine = kept.alive & (corpus.source == source)
            tally.close(name, [(int(mine.sum()), int(kept.sizes[mine].sum()))])

    twins = exact_duplicates(standing(), table["exact"], lambda document: _row(corpus, document)[1])
    step("exact_duplicates", {i: ("exact_duplicate", f"of {corpus.ids[j]}") for i, j in twins.items()})
    if config.near_duplicates.enabled:
        near = config.near_duplicates
        enough = table["words"] >= NEAR_MIN_WORDS
        sketch = [corpus.array(n, "sketch") for n in range(len(corpus.shards))]
        near_copies = near_duplicates(standing(table["compared"] & enough), sketch, corpus.words, near)
        step(
            "near_duplicates",
            {i: ("near_duplicate", f"{share:.3f} like {corpus.ids[j]}") for i, (j, share) in near_copies.items()},
        )
    if config.bias.act != "off":
        counts = [corpus.array(n, "bias") for n in range(len(corpus.shards))]
        if config.bias.act == "drop":
            here = np.flatnonzero(kept.alive)
            pushed, figures = bias.choose(np.concatenate(counts)[here], [corpus.ids[i] for i in here], config.bias)
            report.more["bias_filter"] = figures
            step("bias", {int(here[i]): ("bias", what) for i, what in pushed.items()})
    overlap = config.overlap
    spans: dict[int, list[Span]] = {}
    if overlap.contained != "off" or overlap.passages != "off":

        def runs() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
            for shard, (hashes, documents) in enumerate(corpus.flat("run_hashes", "runs")):
                yield hashes, documents, corpus.array(shard, "run_places")

        found = find_overlaps(
            standing(table["compared"]), table["runs"], runs, corpus.words, overlap, config.memory_bytes
        )
        if overlap.contained != "off":
            held: dict[int, Why] = {
                i: ("contained_duplicate", f"{share:.3f} is in others, most in {corpus.ids[j]}")
                for i, (j, share) in found.contained.items()
            }
            step("contained_duplicates", held, measure=overlap.contained == "measure")
        spans = {i: one for i, one in found.passages.items() if table["cut"][i] and kept.alive[i]}
    lines: dict[int, set[int]] = {}
    if config.lines.act != "off":
        places = np.full(len(corpus), -1, np.int64)
        left = standing(table["cut"])
        places[left] = np.arange(len(left))
        lines = repeated_lines(places, lambda: corpus.flat("line_hashes", "lines"), config.lines, config.memory_bytes)
    for name, cuts, act in (("passages", spans, overlap.passages), ("lines", lines, config.lines.act)):
        if act == "off":
            continue
        for document in sorted(cuts):
            if kept.alive[document]:
                _cut(name, document, cuts, act, kept, report)
        if act == "drop":
            setattr(kept, name, cuts)
        close(name)
    if config.bias.act != "off":
        report.more["bias"] = _bias(corpus, kept, counts)
    return kept


def _cut(name: str, document: int, cuts: Any, act: str, kept: Kept, report: Report) -> None:
    """Note what is cut out of a document, and drop it when too little is left."""
    corpus = kept.corpus
    row, text = _row(corpus, document)
    config = corpus.job.config
    before = kept.edited(document, text)
    after = Kept(corpus, kept.alive, kept.sizes, **{name: cuts}).edited(document, before)
    tally = report.tallies[row.source]
    detail = f"{len(cuts[document])} {name}, {len(before) - len(after)} of {len(before)} characters"
    if act == "measure":
        tally.measure(name, row, before, (f"repeated_{name}", detail), len(before) - len(after))
        return
    least = getattr(config.kinds, row.kind).min_chars
    if len(after) < least:
        tally.drop(name, row, before, (f"repeated_{name}", f"{detail}; {len(after)} left, at least {least}"))
        kept.alive[document] = False
    else:
        tally.sample(name, row, (f"repeated_{name}", detail), before, after)
        kept.sizes[document] = len(after.encode())


def _row(corpus: Corpus, document: int) -> tuple[Document, str]:
    shard = int(np.searchsorted(corpus.first, document, "right")) - 1
    values = corpus.rows(shard).slice(document - int(corpus.first[shard]), 1).to_pylist()[0]
    return Document(**values), str(values["text"])


def _bias(corpus: Corpus, kept: Kept, counts: list[np.ndarray]) -> dict[str, Any]:
    """Return the associations before and after, of everything and of each source."""
    least = corpus.job.config.bias.min_pairs
    sums: dict[str, dict[str, np.ndarray]] = {"before": {}, "after": {}}
    for number, shard in enumerate(corpus.shards):
        mine = kept.alive[corpus.first[number] : corpus.first[number + 1]]
        for when, part in (("before", corpus.bias_before[number]), ("after", counts[number][mine].sum(axis=0))):
            for name in (ALL, shard.source):
                sums[when][name] = sums[when].get(name, 0) + part.astype(np.int64)
    # Of a slice, those that stand out most; of all documents, all.
    return {
        when: {name: bias.associations(one, least)[: None if name == ALL else 10] for name, one in slices.items()}
        for when, slices in sums.items()
    }


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
            "an excluded row was not gathered",
            where="curate.exclude",
            found=", ".join(unknown[:5]) + (f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""),
            expected=f"ids, or sources of {', '.join(sorted(sources))}",
            todo="look it up with `freehold trace`",
        )
    return found


def write_documents(kept: Kept, excluded: dict[str, Why], report: Report, folder: Path) -> None:
    """Decide the split source by source, take out what is excluded, and write one parquet file each.

    The split is decided first, so that no document changes sides because another one went.
    """
    corpus = kept.corpus
    for source, tally in report.tallies.items():
        shards = [n for n, shard in enumerate(corpus.shards) if shard.source == source]
        numbers = np.concatenate([np.arange(corpus.first[n], corpus.first[n + 1]) for n in shards])
        numbers = numbers[kept.alive[numbers]]
        sizes = [(corpus.ids[i], int(kept.sizes[i])) for i in numbers]
        back = validation_documents(sizes, corpus.job.config.split)
        for i, (identity, _) in zip(numbers.tolist(), sizes, strict=True):
            if identity in excluded:
                row, text = _row(corpus, i)
                tally.drop("exclude", row, text, excluded[identity])
                kept.alive[i] = False
        left = [(identity, size) for identity, size in sizes if identity not in excluded]
        if left:
            _write_source(folder / "documents" / f"{source}.parquet", shards, kept, back)
        if excluded:
            tally.close("exclude", [(len(left), sum(size for _, size in left))])
        report.leave(source, (("validation" if identity in back else "train", size) for identity, size in left))


def _write_source(path: Path, shards: list[int], kept: Kept, back: set[str]) -> None:
    """Write the rows of one source that are left, a row group for each shard."""
    corpus = kept.corpus
    came = pq.read_schema(corpus.shards[shards[0]].path).names
    schema = pa.schema([field for field in Document.SCHEMA if field.name in came or field.name == "licence_confidence"])
    with machine_limits(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for shard in shards:
                first = int(corpus.first[shard])
                chosen = np.flatnonzero(kept.alive[first : int(corpus.first[shard + 1])])
                if not len(chosen):
                    continue
                rows = corpus.rows(shard).select(schema.names).take(pa.array(chosen))
                ids = rows["id"].to_pylist()
                splits = pa.array(["validation" if identity in back else "train" for identity in ids], pa.string())
                rows = rows.set_column(rows.schema.get_field_index("split"), "split", splits)
                if any(first + i in kept.passages or first + i in kept.lines for i in chosen.tolist()):
                    texts = zip(chosen.tolist(), rows["text"].to_pylist(), strict=True)
                    edited = pa.array([kept.edited(first + i, text) for i, text in texts], pa.string())
                    rows = rows.set_column(rows.schema.get_field_index("text"), "text", edited)
                writer.write_table(rows, row_group_size=4096)


def curate_conversations(
    gathered: Path,
    config: CurateConfig,
    questions: Questions,
    excluded: dict[str, Why],
    report: Report,
    folder: Path,
) -> None:
    """Take the conversations through unicode, exact duplicates, decontamination, privacy and exclusion; split them."""
    seen: dict[int, str] = {}
    for path in sorted(gathered.glob("*.parquet")):
        kept: list[Conversation] = []
        total = 0
        dropped: Counter[str] = Counter()
        for batch in _batches(read_rows(path, Conversation), 1000):
            total += len(batch)
            asked = questions.in_conversations(batch)
            for row, question in zip(batch, asked, strict=True):
                found = Counter[str]()
                messages = rewritten(row.messages, lambda text: _redacted(text, found, config))  # noqa: B023
                key = text_hash(json.dumps(messages, sort_keys=True))
                first = seen.setdefault(key, row.id)
                text = "\n".join(text for _, text in said(messages))
                why: Why | None = ("exact_duplicate", f"of {first}") if first != row.id else None
                why = why or question or check_density(len(text), found) or excluded.get(row.id)
                if why is not None:
                    report.talk.drop("conversations", row, text, why)
                    dropped[why[0]] += 1
                    continue
                report.talk_redacted[row.source].update(found)
                held_out = is_validation(row.id, config.split.conversation_fraction)
                kept.append(replace(row, messages=messages, split="validation" if held_out else "train"))
        report.converse(path.stem, total, Counter(row.split for row in kept), dropped)
        if total and not kept and not dropped["excluded"]:
            raise _lost_whole([(path.stem, total, dropped)])
        if kept:
            write_rows(folder / "conversations" / path.name, kept, Conversation)


def _redacted(text: str, found: Counter[str], config: CurateConfig) -> str:
    text, one = redact(clean_unicode(text)[0], config.privacy.find)
    found.update(one)
    return text


def _batches(rows: Iterator[Conversation], size: int) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
