"""What a run's models were made of before this run: the records of parents and teachers, across runs to the roots.

A record says what a checkpoint learned from (its rows summed by rights), where its models and teachers come from, and
holds the records of its own parents. The walk copies a parent's record into the child (`ancestry.json`, part of the
stage's content and so of its hash) before the first step: it holds when the parent's folder is gone. A parent without
a record is unknown, never free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from freehold.core.artifact import read_json, read_manifest, sha256_json, write_json
from freehold.core.errors import ArtifactError, FreeholdError
from freehold.ledger.policy import Origin
from freehold.run.checkpoints import Checkpoint, exported_checkpoint, read_checkpoints
from freehold.run.layout import ADAPT, ALIGN, EXPORT, GATHER, IMPORT, PRETRAIN, REPHRASE, TRAINER_FACTS, RunFolder
from freehold.run.tables import Tables, readable

DEEPEST = 64
"""Generations that are followed; more is unknown, as a hostile record may have no end."""
RIGHTS = (
    "source",
    "source_version",
    "kind",
    "wrapper_licence",
    "licence",
    "licence_evidence",
    "licence_confidence",
    "teacher",
)


@dataclass(frozen=True)
class Rows:
    """Rows of one source under one licence, shown by the same evidence."""

    source: str
    source_version: str
    kind: str
    wrapper_licence: str
    licence: str
    licence_evidence: str
    licence_confidence: str
    teacher: str
    documents: int
    path: str
    """Of the first of them."""


@dataclass(frozen=True)
class MadeBy:
    """Who made something that went into a model, and where."""

    what: str
    """`model nano`, `teacher Small`, `source sotu`, `run base`."""
    origin: Origin


@dataclass(frozen=True)
class Record:
    """What is known of one checkpoint of another run."""

    run: str
    path: str
    content_sha256: str
    rows: tuple[Rows, ...] = ()
    origins: tuple[MadeBy, ...] = ()
    unknown: tuple[str, ...] = ()
    """What is not known, in sentences; a policy reviews that."""
    parents: tuple[Record, ...] = field(default=())
    settled: str = ""
    """Why what is not known does not matter, in the words of who looked into it (`pretrain.parent_settled`)."""

    @property
    def name(self) -> str:
        """Return what people call it."""
        return f"{self.run}/{self.path}" if self.run else f"checkpoint {self.content_sha256[:12] or 'unknown'}"

    def all(self) -> Iterator[Record]:
        """Yield it and every ancestor."""
        yield self
        for parent in self.parents:
            yield from parent.all()

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able data, with the hash that it is checked by."""
        origins = [{"what": o.what, "origin": o.origin.model_dump()} for o in self.origins]
        data = {
            "run": self.run,
            "path": self.path,
            "content_sha256": self.content_sha256,
            "rows": [asdict(row) for row in self.rows],
            "origins": origins,
            "unknown": list(self.unknown),
            "settled": self.settled,
            "parents": [parent.to_dict() for parent in self.parents],
        }
        return {**data, "record_sha256": sha256_json(data)}

    @classmethod
    def from_dict(cls, data: dict[str, Any], depth: int = 0) -> Record:
        """Read a record; raise ArtifactError when it is damaged or was changed."""
        try:
            stated = {key: value for key, value in data.items() if key != "record_sha256"}
            if depth > DEEPEST or sha256_json(stated) != data["record_sha256"]:
                raise ValueError("its hash differs" if depth <= DEEPEST else "too many generations")
            return cls(
                run=str(data["run"]),
                path=str(data["path"]),
                content_sha256=str(data["content_sha256"]),
                rows=tuple(Rows(**row) for row in data["rows"]),
                origins=tuple(MadeBy(str(o["what"]), Origin.model_validate(o["origin"])) for o in data["origins"]),
                unknown=tuple(map(str, data["unknown"])),
                settled=str(data["settled"]),
                parents=tuple(cls.from_dict(parent, depth + 1) for parent in data["parents"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ArtifactError("the record of an ancestor is damaged", found=error, expected="as written") from error


def unknown(reason: str, content_sha256: str = "", name: str = "") -> Record:
    """Return the record of a model of which nothing is known."""
    return Record("", name, content_sha256, unknown=(reason,))


def ancestors(run: RunFolder, checkpoint: Checkpoint | None = None) -> tuple[Record, ...]:
    """Return the records of the parents and teachers in other runs: of a checkpoint, or of all that a run trains.

    Copied records come first; where there is none, as in runs of earlier versions, the parent's folder is read.
    """
    stages = (PRETRAIN, ALIGN, ADAPT) if checkpoint is None else tuple(dict(checkpoint.bounds))
    found: list[Record] = []
    for stage in (*stages, REPHRASE):
        found += ancestors_of_stage(run, stage)
    known = {record.content_sha256 for record in found}
    for one in read_checkpoints(run.root) if checkpoint is None else [checkpoint]:
        if one.outside and one.outside not in known:
            known.add(one.outside)
            # A folder that is gone cannot say its hash; the child recorded it.
            lost = next((record for record in found if record.unknown and not record.content_sha256), None)
            found = [record for record in found if record is not lost]
            reason = lost.unknown[0] if lost else "it has no record"
            settled = str(_config(run, PRETRAIN).get("parent_settled") or "")
            found.append(replace(unknown(reason, one.outside), settled=settled))
    return tuple(found)


def ancestors_of_stage(run: RunFolder, stage: str) -> list[Record]:
    """Return the records that a stage copied; without a copy, what the folders it names say."""
    path = run.ancestry(stage)
    if path.exists():
        try:
            return [Record.from_dict(record) for record in read_json(path).get("parents", [])]
        except ArtifactError as error:
            return [unknown(f"{path}: {error.what}")]
    config = _config(run, stage)
    return records_of(stage, config) if config else []


def _config(run: RunFolder, stage: str) -> dict[str, Any]:
    """Return what a stage was configured with, from its manifest or key file."""
    for path in (run.manifest(stage), run.key(stage)):
        if path.exists():
            return dict(read_json(path).get("config") or {})
    return {}


def records_of(stage: str, config: dict[str, Any]) -> list[Record]:
    """Return the records of what a stage's settings name in other runs: a parent checkpoint, a teacher's file."""
    found = []
    parent = str(config.get("parent") or "")
    if stage == PRETRAIN and parent:
        found.append(replace(record_of(Path(parent)), settled=str(config.get("parent_settled") or "")))
    base = str(config.get("base") or "")
    if stage == ADAPT and base:
        found.append(replace(record_of(_model_of(Path(base))), settled=str(config.get("base_settled") or "")))
    teacher = config.get("teacher") or {}
    if stage == REPHRASE and teacher:
        path = "" if teacher.get("distribution") else str(teacher.get("path") or "")
        run = _run_of(Path(path)) if path else None
        if run is not None and run.finished(EXPORT):
            found.append(record_of(run.root / exported_checkpoint(read_manifest(run.stage(EXPORT)))))
        else:  # its licence is in the rows; who made it is in the settings
            name = str(teacher.get("model") or Path(path).name)
            found.append(Record("", f"teacher {name}", "", origins=(MadeBy(f"teacher {name}", _origin(teacher)),)))
    return found


def _model_of(path: Path) -> Path:
    """Return the checkpoint that a base means: of an export the one it was made from, of a run the one it exports."""
    run = _run_of(path / "any")
    if run is None or not run.any_finished():
        return path
    exported = read_manifest(run.stage(EXPORT)) if run.finished(EXPORT) else {}
    inside = path.resolve().relative_to(run.root.resolve()).as_posix()
    return run.root / exported_checkpoint(exported) if inside == "." or inside.startswith(EXPORT) else path


def record_of(folder: Path, depth: int = 0) -> Record:
    """Return the record of a checkpoint from the run it is in; what cannot be read is unknown."""
    try:
        content = str(read_manifest(folder)["content_sha256"])
        facts = read_json(folder / TRAINER_FACTS)
        if depth > DEEPEST:
            return unknown("too many generations", content)
        if facts.get("imported"):
            return _of_import(folder, content, facts)
        if facts.get("record"):  # made from one model alone: pruned, or grown
            return Record("", folder.as_posix(), content, parents=(Record.from_dict(facts["record"]),))
        run = _run_of(folder)
        if run is None:
            return unknown("it is in no run folder", content, folder.as_posix())
        return _of_run(run, folder, content)
    except FreeholdError as error:
        return unknown(f"{error.what}: {error.where}", "", folder.as_posix())


def _run_of(path: Path) -> RunFolder | None:
    """Return the run that a checkpoint or an exported file is in; None for one that is in none."""
    return next((RunFolder(parent) for parent in path.parents[:4] if RunFolder(parent).any_finished()), None)


def _of_import(folder: Path, content: str, facts: dict[str, Any]) -> Record:
    """Return the record of a published model: one row, its licence, and who made it."""
    rights = facts.get("rights") or {}
    name = str(rights.get("source") or folder.name)
    row = {key: str(rights.get(key) or "") for key in RIGHTS} | {"source": name, "kind": "model"}
    origin = MadeBy(f"model {name}", _origin(rights))
    return Record(
        folder.parent.parent.name, f"{IMPORT}/{folder.name}", content, (Rows(**row, documents=1, path=""),), (origin,)
    )


def _of_run(run: RunFolder, folder: Path, content: str) -> Record:
    relative = folder.resolve().relative_to(run.root.resolve()).as_posix()
    found = next((c for c in read_checkpoints(run.root) if c.path == relative), None)
    if found is None:
        return unknown("its run does not know it as a checkpoint", content, folder.as_posix())
    rows, gaps = learned_rows(run, found)
    return Record(run.root.name, relative, content, rows, own_origins(run), gaps, ancestors(run, found))


def learned_rows(run: RunFolder, checkpoint: Checkpoint) -> tuple[tuple[Rows, ...], tuple[str, ...]]:
    """Return what a checkpoint learned from in this run, summed by rights, and what is not known.

    Where its steps are not recorded, as in a run that is not finished, all rows kept for training count.
    """
    with readable(run.root), Tables(run.root) as tables:
        rows, lost = sum_rows(tables, learned(tables, run, checkpoint)), lost_rows(tables)
    kept_as_it_is = PRETRAIN in _stages(checkpoint) and not (_config(run, PRETRAIN).get("phases") or {"": 1})
    if lost and not kept_as_it_is:  # a parent that was kept brought its own steps, and its record
        return rows, (f"{lost:,} documents that it learned from are not in its run any more",)
    return rows, ()


def learned(tables: Tables, run: RunFolder, checkpoint: Checkpoint) -> str:
    """Return the rows that a checkpoint learned from in this run, as the rest of a query, all columns in them."""
    tables.with_all_columns()
    stages = _stages(checkpoint)
    if any(stage not in tables.traced for stage in stages):
        return "kept_rights where split = 'train'"
    tables.connection.execute(
        "create table read as select distinct document_id id from trace join"
        " (select unnest($stages::varchar[]) stage, unnest($ends::bigint[]) past) using (stage)"
        " where first_step < past",
        {"stages": stages, "ends": [end for _, end in checkpoint.bounds]},
    )
    return "all_rights where id in (select id from read)"


def lost_rows(tables: Tables) -> int:
    """Return how many of the rows that `learned` found are not in the run any more."""
    if not tables.value("select count(*) from duckdb_tables() where table_name = 'read'"):
        return 0
    return int(tables.value("select count(*) from read where id not in (select id from all_rights)"))


def _stages(checkpoint: Checkpoint) -> list[str]:
    return [stage for stage, _ in checkpoint.bounds]


def sum_rows(tables: Tables, where: str, **values: Any) -> tuple[Rows, ...]:
    """Return rows of a view with all columns, summed by rights."""
    known = set(tables.column_names(where.partition(" ")[0]))
    columns = ", ".join(f"coalesce({name}, '') {name}" if name in known else f"'' {name}" for name in RIGHTS)
    return tables.read(
        Rows, f"select {columns}, count(*) documents, min(path) path from {where} group by all order by all", **values
    )


def own_origins(run: RunFolder) -> tuple[MadeBy, ...]:
    """Return who made the sources of a run, and the run itself."""
    sources = sorted((_config(run, GATHER).get("sources") or {}).items())
    found = [MadeBy(f"source {n}", _origin(s["made_by"])) for n, s in sources if any((s.get("made_by") or {}).values())]
    manifests = (read_json(run.manifest(stage)) for stage in (ALIGN, PRETRAIN, ADAPT) if run.finished(stage))
    made = next((manifest["origin"] for manifest in manifests if manifest.get("origin")), None)
    return (*found, MadeBy(f"run {run.root.name}", _origin(made))) if made else tuple(found)


def origin_of(data: dict[str, Any]) -> str:
    """Return who made something and where, for people; empty when nothing is stated."""
    origin = _origin(data)
    return "" if origin == Origin() else str(origin)


def _origin(data: dict[str, Any]) -> Origin:
    return Origin.model_validate({key: str(data.get(key) or "") for key in Origin.model_fields})


def records_for(run: RunFolder, stage: str, config: dict[str, Any]) -> list[Record]:
    """Return the records of what a stage reads of other runs: those it copied, else as the other runs say now.

    A copied record stays: the parent's folder may be gone when a stage resumes.
    """
    records = records_of(stage, config)
    kept = ancestors_of_stage(run, stage) if records and run.ancestry(stage).exists() else []
    wanted = {record.content_sha256 for record in records if not record.unknown}
    return kept if kept and wanted <= {record.content_sha256 for record in kept} else records


def write(run: RunFolder, stage: str, config: dict[str, Any]) -> None:
    """Copy the records of what a stage reads of other runs into it, before its work."""
    if records := records_for(run, stage, config):
        write_json(run.ancestry(stage), {"format_version": 1, "parents": [record.to_dict() for record in records]})
