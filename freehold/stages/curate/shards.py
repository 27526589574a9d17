"""Shards: the part of the corpus that is cleaned together and is then finished on disk.

`shards/` in the stage's folder exists while the stage works: `plan.json` says which rows of which file each shard takes
and for which job, `NNNNN/` is a finished shard (renamed into place, so it is whole), and a killed run resumes with
those that are missing. What a shard holds is a function of its rows and the configuration.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from freehold.core.artifact import atomic_folder, sha256_file, sha256_json, write_json
from freehold.core.document import Document, check_columns
from freehold.core.errors import DataError
from freehold.core.machine import machine_limits
from freehold.stages.curate import bias
from freehold.stages.curate.classifier import Model
from freehold.stages.curate.config import CurateConfig
from freehold.stages.curate.dedup import line_hashes, sketches, winnow, words_key
from freehold.stages.curate.steps import BATCH_CHARS, Draft, Tally, Tools, read, take
from freehold.text.held_out import Questions, read_questions
from freehold.text.words import Words

COLUMNS = 2
"""Version of the names in a shard's table; unfinished shards with others are made again."""
WORDS = 2
"""Raised when a text has other words than before: shards of a stage that was stopped are then made again."""


@dataclass(frozen=True)
class Shard:
    """Some rows of one row group of one source's file."""

    number: int
    source: str
    path: str
    group: int
    start: int
    rows: int


@dataclass(frozen=True)
class Job:
    """What every shard is made with: a worker elsewhere needs nothing else than this and the disk."""

    gathered: Path
    folder: Path
    config: CurateConfig
    key: str
    """Hash of the inputs and of what decides the bytes of a shard."""

    @classmethod
    def of(cls, gathered: Path, folder: Path, config: CurateConfig) -> Job:
        """Return the job of curating `gathered` into `folder`."""
        settings = config.model_dump(mode="json", exclude={"engine", "workers", "memory_bytes"})
        paths = [*gathered.glob("documents/*.parquet"), *gathered.glob("tasks/*.jsonl")]
        inputs = {path.name: sha256_file(path) for path in sorted(paths)}
        return cls(
            gathered,
            folder,
            config,
            sha256_json({"config": settings, "inputs": inputs, "words": WORDS, "columns": COLUMNS}),
        )

    @property
    def shards(self) -> Path:
        """Return the folder of the shards."""
        return self.folder / "shards"


def read_plan(job: Job) -> list[Shard]:
    """Return the shards of the job, those of the plan on disk if it is for the same job; else old work is removed."""
    paths = sorted((job.gathered / "documents").glob("*.parquet"))
    if not paths:
        raise DataError(
            "no documents to curate",
            where=job.gathered / "documents",
            expected="*.parquet",
            todo="run the gather stage",
        )
    file = job.shards / "plan.json"
    if file.exists():
        plan = json.loads(file.read_text(encoding="utf-8"))
        if plan["key"] == job.key:
            return [Shard(**shard) for shard in plan["shards"]]
    shutil.rmtree(job.shards, ignore_errors=True)
    shards = _divide(paths, job.config)
    write_json(file, {"key": job.key, "shards": [asdict(shard) for shard in shards]})
    return shards


def _divide(paths: Sequence[Path], config: CurateConfig) -> list[Shard]:
    """Return shards of about `shard_bytes`, in the order of sources; no row is read."""
    shards: list[Shard] = []
    for path in ordered_sources(paths, config):
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError("cannot read rows", where=path, found=error, todo="make the stage again") from error
        check_columns(path, file.schema_arrow.names, Document)
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            each = max(1, config.shard_bytes * facts.num_rows // max(1, facts.total_byte_size))
            for start in range(0, facts.num_rows, each):
                rows = min(each, facts.num_rows - start)
                shards.append(Shard(len(shards), path.stem, str(path), group, start, rows))
    return shards


def ordered_sources(paths: Sequence[Path], config: CurateConfig) -> list[Path]:
    """Return the sources' files: those of `priority` first, then by name; DataError for a name that is not there."""
    names = {path.stem: path for path in paths}
    for name in config.priority:
        if name not in names:
            raise DataError("no such source", where="curate.priority", found=name, expected=", ".join(sorted(names)))
    order = [*config.priority, *(name for name in sorted(names) if name not in config.priority)]
    return [names[name] for name in order]


def read_shard(shard: Shard, config: CurateConfig) -> Iterator[Draft]:
    """Yield the documents of a shard; DataError for a kind that has no rules."""
    skip, left = shard.start, shard.rows
    kinds = type(config.kinds).model_fields
    # The whole row group need not be read ahead, and threads cost more than they bring next to other shards.
    file = pq.ParquetFile(shard.path, pre_buffer=False)
    for batch in file.iter_batches(batch_size=256, row_groups=[shard.group], use_threads=False):
        part = batch.slice(skip, left)
        skip, left = max(0, skip - len(batch)), left - len(part)
        for values in part.to_pylist():
            row = Document(**values)
            if row.kind not in kinds:
                raise DataError(
                    "a document of a kind curation has no rules for",
                    where=f"{shard.path} ({row.id})",
                    found=row.kind,
                    expected=", ".join(kinds),
                )
            yield Draft(row, getattr(config.kinds, row.kind), row.text)
        if not left:
            return


def batches(drafts: Iterator[Draft]) -> Iterator[list[Draft]]:
    """Yield lists of documents of about BATCH_CHARS characters."""
    batch: list[Draft] = []
    size = 0
    for draft in drafts:
        batch.append(draft)
        size += len(draft.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def make_shard(job: Job, shard: Shard) -> None:
    """Clean the documents of one shard and write it; does nothing when it is finished."""
    folder = job.shards / f"{shard.number:05d}"
    if folder.exists():
        return
    config = job.config
    questions, model = _tools(job)
    tools = Tools(config, questions, model, Tally())
    came: list[int] = []
    kept: list[Draft] = []
    before = np.zeros(bias.SHAPE, np.int64)
    columns: dict[str, list[np.ndarray]] = {}
    for batch in batches(read_shard(shard, config)):
        came += [draft.size_bytes for draft in batch]
        first: dict[int, tuple[Words, np.ndarray]] = {}
        if config.bias.act != "off":
            sane = [draft for draft in batch if len(draft.text) <= draft.limits.max_chars]
            read(sane)
            counts = bias.count([draft.hashed for draft in sane])
            before += counts.sum(axis=0)
            first = {id(draft): (draft.hashed, one) for draft, one in zip(sane, counts, strict=True)}
        left = take(batch, tools)
        for name, column in describe(left, first, config).items():
            columns.setdefault(name, []).append(column)
        for draft in left:
            draft.words = None  # it is in the columns, and large
        kept += left
    with atomic_folder(folder) as temporary:
        with pa.ipc.new_file(temporary / "rows.arrow", Document.SCHEMA) as writer:
            values = {name: [getattr(draft.row, name) for draft in kept] for name in Document.SCHEMA.names}
            values["text"] = [draft.text for draft in kept]
            writer.write_table(pa.table(values, schema=Document.SCHEMA), max_chunksize=256)
        table = {name: np.concatenate(parts) for name, parts in columns.items()}
        for name in ARRAYS & table.keys():
            np.save(temporary / f"{name}.npy", table.pop(name))
        np.savez(temporary / "documents.npz", allow_pickle=False, **table, bias_before=before)
        write_json(temporary / "tally.json", {"in": [len(came), sum(came)], **tools.tally.as_dict()})


ARRAYS = {"words_of", "sketch", "run_hashes", "run_places", "line_hashes", "bias"}
"""What is large of `describe`, and mapped when it is read; the rest is a number or so for each document."""


def describe(
    drafts: Sequence[Draft], counted: dict[int, tuple[Words, np.ndarray]], config: CurateConfig
) -> dict[str, np.ndarray]:
    """Return what comparing asks of documents; `counted` has the bias of their words as they came, by id of the draft.

    Arrays with a row for each document, and of those that take up several (words, runs, lines) also how many.
    """
    words = [draft.hashed for draft in drafts]
    none = np.zeros(0, np.uint64)
    compared = np.array([draft.rules.near_duplicates for draft in drafts], bool)
    cut = np.array([draft.limits.cut for draft in drafts], bool)
    some = [one if yes else Words(none, 0, 0.0) for one, yes in zip(words, compared, strict=True)]
    columns = {
        "compared": compared,
        "cut": cut,
        "exact": np.array([words_key(one) for one in words], np.uint64),
        "sizes": np.array([draft.size_bytes for draft in drafts], np.int64),
        "words": np.array([len(one.hashes) for one in words], np.int64),
        "words_of": np.concatenate([none, *(one.hashes for one in words)]),
    }
    if config.near_duplicates.enabled:
        columns["sketch"] = sketches(some, config.near_duplicates)
    if config.overlap.contained != "off" or config.overlap.passages != "off":
        columns["run_hashes"], columns["run_places"], columns["runs"] = winnow(some)
    if config.lines.act != "off":
        lines = [line_hashes(draft.text) if yes else none for draft, yes in zip(drafts, cut, strict=True)]
        columns["line_hashes"] = np.concatenate([none, *lines])
        columns["lines"] = np.array([len(one) for one in lines], np.int64)
    if config.bias.act != "off":
        again = [i for i, draft in enumerate(drafts) if counted[id(draft)][0] is not draft.words]
        columns["bias"] = np.array([counted[id(draft)][1] for draft in drafts], np.int32).reshape(-1, *bias.SHAPE)
        columns["bias"][again] = bias.count([words[i] for i in again])
    return columns


@lru_cache(maxsize=1)
def _tools(job: Job) -> tuple[Questions, Model | None]:
    """Return what takes long to make and is the same for every shard; once in each process."""
    config = job.config
    asked = read_questions(job.gathered / "tasks") if config.decontamination.enabled else []
    weights = job.shards / "classifier.npy"
    return Questions(asked), Model(np.load(weights)) if weights.exists() else None


class Corpus:
    """All finished shards as one: documents are numbered through, in the order of sources."""

    def __init__(self, job: Job, shards: Sequence[Shard]) -> None:
        self.job, self.shards = job, shards
        self.folders = [job.shards / f"{shard.number:05d}" for shard in shards]
        tables: dict[str, list[np.ndarray]] = {}
        for folder in self.folders:
            with np.load(folder / "documents.npz") as arrays:
                for name in arrays.files:
                    tables.setdefault(name, []).append(arrays[name])
        self.bias_before = tables.pop("bias_before")
        self.table = {name: np.concatenate(parts) for name, parts in tables.items()}
        self.first = np.concatenate([[0], np.cumsum([len(part) for part in tables["words"]])])
        """Number of each shard's first document, and one more."""
        self.word_ends = np.cumsum(self.table["words"])
        self.word_first = np.concatenate([[0], self.word_ends])[self.first]
        self.source = np.repeat([shard.source for shard in shards], np.diff(self.first))
        self.ids = [identity for n in range(len(shards)) for identity in self.rows(n)["id"].to_pylist()]

    def __len__(self) -> int:
        return len(self.ids)

    @lru_cache(maxsize=8)  # noqa: B019 - as long as the stage; mapped pages count as memory
    def rows(self, shard: int) -> pa.Table:
        """Return a shard's rows; the columns are in the file and are read when touched."""
        with pa.memory_map(str(self.folders[shard] / "rows.arrow")) as file:
            return pa.ipc.open_file(file).read_all()

    def array(self, shard: int, name: str) -> np.ndarray:
        """Return one of a shard's arrays, mapped."""
        with machine_limits(self.folders[shard]):
            file = self.folders[shard] / f"{name}.npy"
            # An empty file cannot be mapped.
            return np.load(file, mmap_mode="r" if file.stat().st_size > 256 else None)

    def words(self, document: int) -> np.ndarray:
        """Return the word hashes of a document."""
        shard = int(np.searchsorted(self.first, document, "right")) - 1
        end = int(self.word_ends[document] - self.word_first[shard])
        return self._words(shard)[end - int(self.table["words"][document]) : end]

    @lru_cache(maxsize=8)  # noqa: B019 - as long as the stage; mapped pages count as memory
    def _words(self, shard: int) -> np.ndarray:
        return self.array(shard, "words_of")

    def flat(self, name: str, count: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (values, document) of an array with `count` values a document, shard by shard."""
        for shard in range(len(self.shards)):
            low, high = int(self.first[shard]), int(self.first[shard + 1])
            yield self.array(shard, name), np.repeat(np.arange(low, high), self.table[count][low:high])

    def tallies(self) -> Iterator[tuple[str, list[int], Tally]]:
        """Yield (source, [documents, bytes] that came, tally) of each shard."""
        for shard, folder in zip(self.shards, self.folders, strict=True):
            data: dict[str, Any] = json.loads((folder / "tally.json").read_text(encoding="utf-8"))
            yield shard.source, data["in"], Tally.from_dict(data)
