"""The gate after gather: may these rows be a mixture, an alignment set, a release? Judged from a run's own tables.

Gather lets in what its policy allows. Later the question comes up again: rows were added or rewritten, a run is forked,
a model trained for one use is to be passed on for another. The answer names the rows, by source and licence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from freehold.core.artifact import read_manifest
from freehold.core.config import fill
from freehold.core.errors import DataError
from freehold.ledger.policy import (
    SEVERITY,
    Claim,
    Decision,
    Policy,
    Verdict,
    judge_origin,
    judge_row,
    judge_unknown,
    refusal,
)
from freehold.ledger.reservations import Reservations, Snapshot, host_and_path
from freehold.run.ancestry import (
    MadeBy,
    Record,
    Rows,
    ancestors,
    learned,
    learned_rows,
    own_origins,
    records_for,
    sum_rows,
)
from freehold.run.checkpoints import read_checkpoints
from freehold.run.layout import ADAPT, CURATE, GATHER, PRETRAIN, REPHRASE, WALK, RunFolder
from freehold.run.tables import Tables, readable


@dataclass(frozen=True)
class Group:
    """Rows of one source under one licence, shown by the same evidence."""

    claim: Claim
    """Their rights; its path is that of the first of them."""
    kind: str
    teacher: str
    documents: int
    verdict: Verdict


def corpus(
    run_folder: Path,
    policy: Policy,
    rewritten: Policy | None = None,
    *,
    sources: Collection[str] = (),
    kind: str = "",
    snapshot: Snapshot | None = None,
) -> list[Group]:
    """Judge what is kept for training: of some sources (none named: all), and `conversation` or other rows.

    `rewritten` is the policy for what a teacher wrote, when it has one of its own. With `snapshot`, documents that
    their sites reserve by then are refused.
    """
    rows = (
        "kept_rights where split = 'train' and (len($sources::varchar[]) = 0 or list_contains($sources, source))"
        " and ($kind = '' or (kind = 'conversation') = ($kind = 'conversation'))"
    )
    with readable(run_folder), Tables(run_folder) as tables:
        tables.with_all_columns()
        found = sum_rows(tables, rows, sources=sorted(sources), kind=kind)
        taken = reserved(tables, rows, snapshot, sources=sorted(sources), kind=kind)
    return _judged(found, policy, rewritten) + taken + _made_by(own_origins(RunFolder(run_folder)), policy)


def checkpoint(
    run_folder: Path, path: str, policy: Policy, rewritten: Policy | None = None, snapshot: Snapshot | None = None
) -> list[Group]:
    """Judge every row that a checkpoint learned from, its ancestors' in other runs included, and their origins.

    Raises DataError when there is no such checkpoint.
    """
    run, checkpoints = RunFolder(run_folder), read_checkpoints(run_folder)
    found = next((c for c in checkpoints if c.path == path), None)
    if found is None:
        expected = ", ".join(c.path for c in checkpoints) or None
        raise DataError("no such checkpoint", where=run_folder, found=path, expected=expected)
    rows, gaps = learned_rows(run, found)
    own = Record(run_folder.name, path, found.content_sha256, unknown=gaps, origins=own_origins(run))
    taken: list[Group] = []
    if snapshot:
        with readable(run_folder), Tables(run_folder) as tables:
            taken = reserved(tables, learned(tables, run, found), snapshot)
    return _judged(rows, policy, rewritten) + taken + inherited([own, *ancestors(run, found)], policy, rewritten)


def reserved(tables: Tables, rows: str, snapshot: Snapshot | None, **values: Any) -> list[Group]:
    """Return the documents that their sites reserve by a snapshot, by site; `rows` is the rest of a query.

    Each group has the rule and its date as evidence. Nothing without a snapshot or without addresses.
    """
    if snapshot is None or "address" not in tables.column_names(rows.partition(" ")[0]):
        return []
    having = "and" if " where " in rows else "where"
    found = tables.rows(
        "select address, source, licence, kind, teacher, count(*) documents, coalesce(sum(tokens), 0)::bigint tokens"
        f" from (select * from {rows} {having} address <> '') left join (select id, tokens from shards) using (id)"
        " group by all order by all",
        **values,
    )
    lost: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        rule = snapshot.rule(row["address"])
        if rule is not None:
            key = row["source"], host_and_path(row["address"])[0]
            lost.setdefault(key, []).append({**row, "rule": str(rule)})
    return [_reserved_site(host, rows_of_site, snapshot.date) for (_, host), rows_of_site in lost.items()]


def _reserved_site(host: str, rows: list[dict[str, Any]], date: str) -> Group:
    documents, tokens = (sum(row[key] for row in rows) for key in ("documents", "tokens"))
    first = rows[0]
    reason = (
        f"reserved by {host} on {date}, {first['rule']}: {documents:,} documents, {tokens:,} tokens; "
        "`freehold takedown reserved` says what they reached and writes the recipe without them"
    )
    claim = Claim(first["source"], "", first["address"], "", first["licence"], first["rule"])
    return Group(claim, first["kind"], first["teacher"], documents, Verdict("refuse", reason, ""))


def everything(
    run_folder: Path, policy: Policy, rewritten: Policy | None = None, snapshot: Snapshot | None = None
) -> list[Group]:
    """Judge the corpus of a run and what its models inherit from other runs."""
    own = corpus(run_folder, policy, rewritten, snapshot=snapshot)
    return own + inherited(ancestors(RunFolder(run_folder)), policy, rewritten)


def inherited(records: Iterable[Record], policy: Policy, rewritten: Policy | None = None) -> list[Group]:
    """Judge what models of other runs learned from, to the roots; what is not known of them is for a person."""
    groups: list[Group] = []
    for root, record in ((one, each) for one in records for each in one.all()):
        for group in _judged(record.rows, policy, rewritten):
            groups.append(replace(group, claim=replace(group.claim, source=f"{record.name}: {group.claim.source}")))
        groups += _made_by(record.origins, policy)
        for reason in record.unknown:
            claim = Claim(record.name, record.content_sha256, record.path, "", "", reason)
            verdict = judge_unknown(f"{record.name}: {reason}", record.settled or root.settled)
            groups.append(Group(claim, "model", "", 1, verdict))
    return groups


def _made_by(origins: Iterable[MadeBy], policy: Policy) -> list[Group]:
    """Return what stops by its origin."""
    judged = [(made, judge_origin(made.what, made.origin, policy)) for made in origins]
    return [
        Group(Claim(made.what, "", "", "", "", str(made.origin)), "origin", "", 1, verdict)
        for made, verdict in judged
        if verdict.decision != "allow"
    ]


def worst(groups: list[Group]) -> Decision:
    """Return the decision on all of them: the strictest one."""
    return max((g.verdict.decision for g in groups), key=SEVERITY.__getitem__, default="allow")


def hold(what: str, groups: list[Group]) -> None:
    """Raise LicenceError naming the rows when not all of them are allowed."""
    stopped = [(group.claim, group.verdict) for group in groups if group.verdict.decision != "allow"]
    if stopped:
        rows = sum(group.documents for group in groups if group.verdict.decision != "allow")
        raise refusal(stopped, f"the policy does not let {rows:,} rows into {what}")


def before_stage(
    run_folder: Path,
    stage: str,
    policy: Policy,
    config: dict[str, Any],
    rewritten: Policy | None = None,
    reservations: Reservations | None = None,
) -> None:
    """Stop a stage whose rows the policy does not let through: a mixture, an alignment set, an export.

    `config` is the stage's own, `rewritten` the policy for what a teacher wrote. An export is judged for the uses it
    names (`uses`) and those of the policy. What sites reserve by then, `reservations`, stops a mixture and an export.
    """
    gate = WALK[stage].gate
    run = RunFolder(run_folder)
    if stage in (PRETRAIN, REPHRASE, ADAPT):
        hold("the run by its parent or teacher", inherited(records_for(run, stage, config), policy, rewritten))
    if not gate or not run.finished(CURATE):
        return
    if gate == "mixture" and config.get("data") == "conversations":
        gate = "alignment set"
    snapshot = reservations.open() if reservations else None
    if gate == "mixture":
        weights = [phase.get("mixture") or {} for phase in config.get("phases", {}).values()]
        # A phase without a mixture reads every source.
        named = {source for phase in weights for source, weight in phase.items() if weight} if all(weights) else ()
        hold(
            "the mixture",
            corpus(run_folder, policy, rewritten, sources=tuple(named), kind="document", snapshot=snapshot),
        )
    elif gate == "alignment set":
        hold("the alignment set", corpus(run_folder, policy, kind="conversation"))
    else:
        wanted, of_rewritten = (
            one.model_copy(update={"uses": tuple(dict.fromkeys([*one.uses, *config.get("uses", ())]))})
            for one in (policy, rewritten or policy)
        )
        named_path = str(config.get("checkpoint", ""))
        if any(c.path == named_path for c in read_checkpoints(run_folder)):
            hold("the export", checkpoint(run_folder, named_path, wanted, of_rewritten, snapshot))


def recorded_reservations(run: RunFolder) -> Reservations | None:
    """Return where the run says that it has what sites reserve; None when it says nothing."""
    config = read_manifest(run.stage(GATHER)).get("config", {}) if run.finished(GATHER) else {}
    found = config.get("reservations")
    return fill(Reservations, found, "gather.reservations") if found else None


def table(groups: list[Group]) -> list[dict[str, Any]]:
    """Return the groups as rows for people and programs, those that are stopped first."""
    rows = [
        {
            "decision": group.verdict.decision,
            "source": group.claim.source,
            "kind": group.kind,
            "teacher": group.teacher,
            "wrapper_licence": group.claim.wrapper_licence,
            "licence": group.claim.licence,
            "confidence": group.claim.licence_confidence,
            "evidence": group.claim.licence_evidence,
            "documents": group.documents,
            "for_instance": group.claim.path,
            "reason": group.verdict.reason,
            "uses": dict(group.verdict.uses),
            "notes": list(group.verdict.notes),
        }
        for group in groups
    ]
    return sorted(rows, key=lambda row: (-SEVERITY[row["decision"]], row["source"], row["licence"]))


def _judged(rows: Iterable[Rows], policy: Policy, rewritten: Policy | None) -> list[Group]:
    groups = []
    for row in rows:
        claim = Claim(
            row.source,
            row.source_version,
            row.path,
            row.wrapper_licence,
            row.licence,
            row.licence_evidence,
            row.licence_confidence,
        )
        verdict = judge_row(claim, rewritten if rewritten and row.teacher else policy)
        groups.append(Group(claim, row.kind, row.teacher, row.documents, verdict))
    return groups
