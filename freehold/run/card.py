"""What a run's ledger says of its data, gathered once for every document made from them.

Everything here is read from manifests, reports and tables; what none of them holds is skipped, and the documents say
that it is unknown. What only people know (who publishes the model, under which name) comes from a file of statements.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from freehold.core.artifact import MANIFEST, read_json, read_manifest
from freehold.core.config import Config, fill, load_yaml
from freehold.core.document import has_addresses
from freehold.core.errors import ArtifactError
from freehold.run.ancestry import ancestors
from freehold.run.checkpoints import read_checkpoints
from freehold.run.layout import CURATE, GATHER, RunFolder, training
from freehold.run.tables import Tables, readable

LENGTHS = [0, *(4**n for n in range(2, 12))]
"""Edges of the classes of document length, bytes."""


class Statements(Config):
    """Statements of the provider that no ledger can hold; what is not stated stays unknown."""

    provider: str = Field("", description="name and contact details of who provides the model")
    representative: str = Field("", description="authorised representative in the Union")
    model_name: str = Field("", description="versioned name under which the model is published")
    placed_on_market: str = Field("", description="date of placement on the Union market")
    published: str = Field("", description="date on which the data set or its description was published (ISO)")
    url: str = Field("", description="page of the data set")
    purpose: str = Field("", description="what the system is for, and how the data serve it")
    purchased_or_licensed: str = Field("", description="whether data were bought, or licensed by agreement")
    user_data: str = Field("", description="whether data of users were used, and of which services")
    code_of_practice: str = Field("", description="whether the provider signed the code of practice")
    reservation_of_rights: str = Field("", description="measures to respect reservations from text and data mining")
    illegal_content: str = Field("", description="measures to keep illegal content out")


def read_statements(path: Path | None) -> Statements:
    """Read a YAML file of statements; ConfigError for a key that is none of ours."""
    return Statements() if path is None else fill(Statements, load_yaml(path), str(path))


def facts(run_folder: Path) -> dict[str, Any]:
    """Return what the run recorded of its data; ArtifactError when curate has not finished."""
    run = RunFolder(run_folder)
    if not run.finished(CURATE):
        raise ArtifactError(
            "nothing to describe: the run has no finished corpus",
            where=run.stage(CURATE),
            expected=MANIFEST,
            todo="run `freehold run RECIPE` first",
        )
    curate = read_manifest(run.stage(CURATE))
    report = run.curate_report
    config = curate.get("config", {})
    with readable(run_folder), Tables(run_folder) as tables:
        shards = "(select id, sum(tokens)::bigint tokens, sum(bytes)::bigint bytes from shards group by id)"
        tables.connection.execute(
            # What was rewritten is named by the sources of its seeds: their ids would fill pages.
            "create table corpus as select rights.* replace (coalesce(seed.source, rights.synthetic_from)"
            " as synthetic_from), kept.split,"
            " case when rights.kind = 'conversation' then 'conversations' else 'documents' end rows_of, tokens, bytes"
            f" from kept join rights using (id) left join {shards} sizes using (id)"
            " left join rights seed on seed.id = rights.synthetic_from and rights.teacher <> ''"
        )

        def sums(*columns: str) -> list[dict[str, Any]]:
            names = ", ".join(columns)
            return tables.rows(
                f"select {names}, count(*) filter (rows_of = 'documents') documents,"
                " count(*) filter (rows_of = 'conversations') conversations,"
                " coalesce(sum(bytes), 0)::bigint bytes, coalesce(sum(tokens), 0)::bigint tokens"
                f" from corpus group by {names} order by {names}"
            )

        lengths = [
            tables.value(
                "select count(*) from corpus where bytes >= $low and bytes < $high", low=low, high=high or 2**62
            )
            for low, high in zip(LENGTHS, [*LENGTHS[1:], 0], strict=True)
        ]
        result: dict[str, Any] = {
            "run": run_folder.name,
            "sources": _sources(run_folder, sums("source", "split")),
            "licences": sums("licence"),
            "kinds": sums("kind"),
            "origins": sums("synthetic_from", "teacher"),
            "splits": sums("split"),
            "lengths": {"edges_bytes": LENGTHS, "documents": lengths},
            "sized": tables.value("select count(*) from corpus where bytes is not null"),
            "read": tables.rows(
                "select stage, source, count(distinct document_id) documents, sum(tokens)::bigint tokens"
                " from trace group by stage, source order by stage desc, source"
            ),
            "missing": tables.missing,
        }
    result["languages"] = _languages(config, result["kinds"])
    result["counts"] = curate["counts"]
    result["redacted"] = curate["counts"].get("redacted", {})
    result["steps"] = [s["step"] for s in _first(read_json(report)["sources"])["steps"]] if report.exists() else []
    result["privacy"] = config.get("privacy", {}).get("find")
    result["decontaminated"] = config.get("decontamination", {}).get("enabled")
    result["excluded"] = config.get("exclude", {})
    result["policy"] = _policy(run_folder)
    result |= _reservations(run)
    result["files"] = {
        name: record for name, record in curate["files"].items() if name.startswith(("documents/", "conversations/"))
    }
    result["content_sha256"] = curate["content_sha256"]
    result["created"] = curate.get("created", "")
    result["training"] = {
        stage: {key: manifest["counts"].get(key) for key in ("steps", "epochs")}
        | {"began": str(manifest.get("created", ""))[:10]}  # when it was finished: the only day its manifest holds
        for stage in training()
        if run.finished(stage)
        for manifest in [read_manifest(run.stage(stage))]
    }
    result["checkpoints"] = [
        {
            "path": c.path,
            "stage_type": c.stage_type,
            "step": c.step,
            "content_sha256": c.content_sha256,
            "outside": c.outside,
        }
        for c in read_checkpoints(run_folder)
        if c.named
    ]
    result["ancestors"] = [
        {
            "name": record.name,
            "content_sha256": record.content_sha256,
            "licences": sorted({row.licence for row in record.rows}),
            "documents": sum(row.documents for row in record.rows),
            "origin": "; ".join(str(made.origin) for made in record.origins),
            "unknown": list(record.unknown),
            "settled": record.settled or root.settled,
        }
        for root in ancestors(run)
        for record in root.all()
    ]
    return result


def _first(mapping: dict[str, Any]) -> Any:
    return next(iter(mapping.values()), {"steps": []})


def _sources(run_folder: Path, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every source that was gathered, with what is left."""
    path = RunFolder(run_folder).sources
    gathered = read_json(path) if path.exists() else {}
    # A source without a date in the recipe was acquired when the stage first read it.
    folder = RunFolder(run_folder).stage(GATHER)
    read = str(read_manifest(folder).get("created", ""))[:10] if (folder / MANIFEST).exists() else ""
    names = sorted({*gathered, *(row["source"] for row in kept)})
    rows = []
    for name in names:
        entry = gathered.get(name, {})
        mine = {row["split"]: row for row in kept if row["source"] == name}
        rows.append(
            {
                "source": name,
                "kind": entry.get("kind", ""),
                "version": entry.get("version", ""),
                "acquired": entry.get("acquired") or (read if entry.get("kind") else ""),
                "wrapper_licence": entry.get("wrapper_licence", ""),
                "licences": sorted(entry.get("licences", {})),
                "evidence": entry.get("licence_evidence", []),
                "made_from": entry.get("made_from", []),
                "gathered_documents": entry.get("documents"),
                "gathered_bytes": entry.get("bytes"),
                **{
                    key: sum(row[key] for row in mine.values())
                    for key in ("documents", "conversations", "bytes", "tokens")
                },
                "train_tokens": mine.get("train", {}).get("tokens", 0),
            }
        )
    return rows


def _languages(config: dict[str, Any], kinds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return by rule how many documents were let through: the rule's languages, or none looked for."""
    rules = config.get("kinds", {})
    found: dict[str, dict[str, Any]] = {}
    for row in kinds:
        if row["kind"] == "conversation" or row["kind"] not in rules:
            rule = "not looked at"
        else:
            languages = rules[row["kind"]].get("languages")
            rule = "let through as " + ", ".join(languages) if languages else "not looked at"
        entry = found.setdefault(rule, {"language": rule, "documents": 0, "bytes": 0, "kinds": []})
        entry["documents"] += row["documents"] + row["conversations"]
        entry["bytes"] += row["bytes"]
        entry["kinds"].append(row["kind"])
    return [found[rule] for rule in sorted(found)]


def _reservations(run: RunFolder) -> dict[str, Any]:
    """Return the date of the snapshot of what sites reserve and what gather skipped for it; empty without any."""
    config = read_manifest(run.stage(GATHER)).get("config", {}) if run.finished(GATHER) else {}
    stated = config.get("reservations")
    records = read_json(run.sources).values() if run.sources.exists() else ()
    lost = [record["reserved"] for record in records if "reserved" in record]
    found: dict[str, Any] = {"reservations": stated["date"]} if stated else {}
    kept = [path.relative_to(run.stage(CURATE)).as_posix() for path in run.documents(CURATE) if has_addresses(path)]
    if kept:
        found["with_addresses"] = kept
    if lost:
        hosts = sorted({host for one in lost for host in one["hosts"]})
        found["reserved"] = {"documents": sum(one["documents"] for one in lost), "hosts": hosts}
    return found


def _policy(run_folder: Path) -> dict[str, Any]:
    run = RunFolder(run_folder)
    if not run.finished(GATHER):
        return {}
    policy: dict[str, Any] = read_manifest(run.stage(GATHER)).get("config", {}).get("policy", {})
    return policy
