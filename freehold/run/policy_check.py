"""The gate after gather: may these rows be a mixture, an alignment set, a release? Judged from a run's own tables.

Gather lets in what its policy allows. Later the question comes up again: rows were added or rewritten, a run is forked,
a model trained for one use is to be passed on for another. The answer names the rows, by source and licence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.ledger.policy import SEVERITY, Claim, Decision, Policy, Verdict, judge_row, refusal
from freehold.run.checkpoints import read_checkpoints
from freehold.run.layout import CURATE, WALK, RunFolder
from freehold.run.tables import Tables, readable
from freehold.run.trace import learned_from

RIGHTS = "source, source_version, kind, wrapper_licence, licence, licence_evidence, licence_confidence, teacher"


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
) -> list[Group]:
    """Judge what is kept for training: of some sources (none named: all), and `conversation` or other rows.

    `rewritten` is the policy for what a teacher wrote, when it has one of its own.
    """
    rows = (
        "kept_rights where split = 'train' and (len($sources::varchar[]) = 0 or list_contains($sources, source))"
        " and ($kind = '' or (kind = 'conversation') = ($kind = 'conversation'))"
    )
    with readable(run_folder), Tables(run_folder) as tables:
        return _judged(tables, rows, policy, rewritten, sources=sorted(sources), kind=kind)


def checkpoint(run_folder: Path, path: str, policy: Policy, rewritten: Policy | None = None) -> list[Group]:
    """Judge every row that a checkpoint, or one it was made from, learned from; DataError when there is no such one."""
    with readable(run_folder), Tables(run_folder) as tables:
        learned_from(tables, path)
        return _judged(tables, "all_rights where id in (select id from learned)", policy, rewritten)


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
    run_folder: Path, stage: str, policy: Policy, config: dict[str, Any], rewritten: Policy | None = None
) -> None:
    """Stop a stage whose rows the policy does not let through: a mixture, an alignment set, an export.

    `config` is the stage's own, `rewritten` the policy for what a teacher wrote. An export is judged for the uses it
    names (`uses`) and those of the policy.
    """
    gate = WALK[stage].gate
    if not gate or not RunFolder(run_folder).finished(CURATE):
        return  # the parent of a branch is in another run, and was judged there
    if gate == "mixture":
        weights = [phase.get("mixture") or {} for phase in config.get("phases", {}).values()]
        # A phase without a mixture reads every source.
        named = {source for phase in weights for source, weight in phase.items() if weight} if all(weights) else ()
        hold("the mixture", corpus(run_folder, policy, rewritten, sources=tuple(named), kind="document"))
    elif gate == "alignment set":
        hold("the alignment set", corpus(run_folder, policy, kind="conversation"))
    else:
        wanted, of_rewritten = (
            one.model_copy(update={"uses": tuple(dict.fromkeys([*one.uses, *config.get("uses", ())]))})
            for one in (policy, rewritten or policy)
        )
        named_path = str(config.get("checkpoint", ""))
        if any(c.path == named_path for c in read_checkpoints(run_folder)):
            hold("the export", checkpoint(run_folder, named_path, wanted, of_rewritten))


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


def _judged(tables: Tables, rows: str, policy: Policy, rewritten: Policy | None, **values: Any) -> list[Group]:
    tables.with_all_columns()
    weighed = "licence_confidence" in tables.column_names(rows.partition(" ")[0])
    columns = RIGHTS if weighed else RIGHTS.replace("licence_confidence", "'' licence_confidence")
    groups = []
    for row in tables.rows(
        f"select {columns}, count(*) documents, min(path) path from {rows} group by all order by all", **values
    ):
        about = {key: row.pop(key) for key in ("kind", "teacher", "documents")}
        claim = Claim(**{key: value or "" for key, value in row.items()})
        verdict = judge_row(claim, rewritten if rewritten and about["teacher"] else policy)
        groups.append(Group(claim, **about, verdict=verdict))
    return groups
