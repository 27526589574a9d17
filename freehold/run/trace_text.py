"""The answers of `trace` as text for a terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from freehold.core.log import printable
from freehold.run.takedown_answer import Restart, Takedown
from freehold.run.takedown_recipe import Applied
from freehold.run.trace import CheckpointTrace, DocumentTrace, StepTrace, TracedDocument

MOST_ROWS = 12


def render(answer: DocumentTrace | StepTrace | CheckpointTrace, width: int = 120) -> str:
    """Return an answer of `trace_document`, `trace_step` or `trace_checkpoint` as text for a terminal."""
    if isinstance(answer, CheckpointTrace):
        return render_checkpoint(answer, width)
    return render_step(answer, width) if isinstance(answer, StepTrace) else render_document(answer, width)


def render_document(answer: DocumentTrace, width: int) -> str:
    """Return where documents went: rights, fate, steps, checkpoints, exports."""
    out = _console(width)
    found = answer.found
    out.print(f"{answer.query}: {found:,} document{'s' * (found != 1)} by {answer.matched_by} in {answer.run}\n")
    rights = _table("source", "version", "content licence", "package licence", "evidence", "documents")
    for right in answer.rights[:MOST_ROWS]:
        rights.add_row(
            right.source,
            right.source_version,
            right.licence,
            right.wrapper_licence,
            _short(right.licence_evidence, 60),
            f"{right.documents:,}",
        )
    out.print(rights, "")
    _more(out, answer.rights)
    fate = _table("source", "fate", "reason", "documents")
    for fated in answer.fate[:MOST_ROWS]:
        fate.add_row(fated.source, fated.fate, fated.reason, f"{fated.documents:,}")
    out.print(fate, "")
    _more(out, answer.fate)
    if answer.matched_by == "id" or found <= MOST_ROWS:
        _documents(out, answer.documents)
    if answer.seen:
        seen = _table("stage", "phase", "documents", "tokens seen", "steps", "which")
        for part in answer.seen:
            seen.add_row(
                part.stage,
                part.phase,
                f"{part.documents:,}",
                f"{part.tokens:,}",
                f"{part.steps:,}",
                _runs(part.ranges),
            )
        out.print(seen, "")
    elif not answer.missing:
        out.print("no step saw it\n")
    if answer.checkpoints:
        checkpoints = _table("checkpoint", "what", "steps", "saw", "content")
        for checkpoint in answer.checkpoints:
            checkpoints.add_row(
                checkpoint.path,
                checkpoint.stage_type,
                f"{checkpoint.step:,}",
                f"{checkpoint.documents:,} of {found:,}",
                checkpoint.content_sha256[:12],
            )
        out.print(checkpoints, "")
    for export in answer.exports:
        out.print(f"exported in {export.path}")
    _missing(out, answer)
    return _text(out)


def render_rights(answer: dict[str, Any], width: int) -> str:
    """Return what a policy says of a corpus or checkpoint: the decision, and by source and licence why."""
    out = _console(width)
    out.print(f"{answer['of']} of {answer['run']}, for {', '.join(answer['uses'])}: {answer['decision']}\n")
    table = _table("decision", "source", "licence", "confidence", "rows", "why")
    for row in answer["rows"][: 2 * MOST_ROWS]:
        why = row["reason"] if row["decision"] != "allow" else _short(row["evidence"], 60)
        table.add_row(row["decision"], row["source"], row["licence"], row["confidence"], f"{row['documents']:,}", why)
    out.print(table, "")
    for note in dict.fromkeys(note for row in answer["rows"] for note in row["notes"]):
        out.print(note)
    return _text(out)


def render_step(answer: StepTrace, width: int) -> str:
    """Return what one step saw."""
    out = _console(width)
    about = "" if answer.tokens_exact else "about "
    out.print(
        f"{answer.stage} step {answer.step} (of {answer.steps[0]} to {answer.steps[1]}), "
        f"phase {answer.phase}: {len(answer.documents):,} documents, {about}{answer.tokens:,} tokens\n"
    )
    if answer.changed_nothing:
        out.print("this step was skipped: its loss or gradient was not finite, the weights did not change\n")
    for what, by_name in (("source", answer.sources), ("licence", answer.licences)):
        table = _table(what, "documents", "tokens")
        for name, sums in by_name.items():
            table.add_row(name, f"{sums.documents:,}", f"{sums.tokens:,}")
        out.print(table, "")
    documents = _table("document", "source", "path", "licence", "tokens")
    rows = sorted(answer.documents, key=lambda row: -row.tokens)
    for row in rows[:MOST_ROWS]:
        documents.add_row(row.id, row.source, row.path or "", row.licence or "", f"{row.tokens:,}")
    out.print(documents, "")
    _more(out, rows)
    if answer.checkpoints:
        out.print("in the checkpoints " + ", ".join(answer.checkpoints))
    _missing(out, answer)
    return _text(out)


def render_checkpoint(answer: CheckpointTrace, width: int) -> str:
    """Return what a checkpoint learned from."""
    out = _console(width)
    made = answer.checkpoint
    name = f" ({made.stage_type})" if made.stage_type else ""
    out.print(
        f"{made.path}{name} of {answer.run}, {made.step:,} steps of {made.stage}, phase {made.phase}: "
        f"learned from {answer.found:,} documents, {answer.tokens:,} tokens\n"
    )
    sources = _table("source", "version", "kind", "documents", "tokens")
    for source in answer.sources[:MOST_ROWS]:
        cells = [source.source or "unknown", source.source_version or "", source.kind or ""]
        sources.add_row(*cells, f"{source.documents:,}", f"{source.tokens:,}")
    out.print(sources, "")
    _more(out, answer.sources)
    licences = _table("content licence", "package licence", "documents", "tokens")
    for licence in answer.licences[:MOST_ROWS]:
        cells = [licence.licence or "unknown", licence.wrapper_licence or ""]
        licences.add_row(*cells, f"{licence.documents:,}", f"{licence.tokens:,}")
    out.print(licences, "")
    _more(out, answer.licences)
    documents = _table("document", "source", "path", "licence", "tokens")
    for document in answer.documents[:MOST_ROWS]:
        cells = [document.id, document.source or "unknown", _short(document.path or "", 50), document.licence or ""]
        documents.add_row(*cells, f"{document.tokens:,}")
    out.print(documents, "")
    left = answer.found - min(MOST_ROWS, len(answer.documents))
    if left > 0:
        out.print(f"and {left:,} more documents (`freehold trace ID` follows one)\n")
    for export in answer.exports:
        out.print(f"exported in {export.path}")
    _missing(out, answer)
    return _text(out)


def render_takedown(answer: Takedown, width: int, applied: Applied | None = None) -> str:
    """Return what a take-down reaches, run by run, and the cheapest way back."""
    out = _console(width)
    also = f", {answer.derived:,} of them made from it" if answer.derived else ""
    out.print(f"{answer.query}: {answer.rows:,} rows by {answer.matched_by} in {answer.run}{also}\n")
    rights = _table("source", "version", "licence", "documents")
    for right in answer.rights[:MOST_ROWS]:
        rights.add_row(right.source, right.source_version, right.licence, f"{right.documents:,}")
    out.print(rights, "")
    _more(out, answer.rights)
    for run in answer.runs:
        out.print(f"run {run.run}")
        for shard in run.shards:
            out.print(f"  shard {shard.shard}: {shard.documents:,} documents, {shard.tokens:,} tokens")
        for part in run.seen:
            out.print(
                f"  {part.stage}: {part.documents:,} documents, {part.tokens:,} tokens, "
                f"in {part.steps:,} steps: {_runs(part.ranges)}"
            )
        for checkpoint in run.checkpoints:
            name = f" ({checkpoint.stage_type})" if checkpoint.stage_type else ""
            out.print(
                f"  affected: {checkpoint.path}{name}, step {checkpoint.step:,}, {checkpoint.documents:,} documents"
            )
        for path in run.exports:
            out.print(f"  affected: {path}")
        for path in run.unknown:
            out.print(f"  unknown:  {path}: what its steps saw is not recorded")
        out.print(f"  last clean checkpoint: {run.last_clean or 'none'}")
        out.print(f"  {_restart(run.restart)}\n", soft_wrap=True)
    for origin in answer.perhaps_derived:
        if not origin.certain:
            taken = "taken in" if answer.widened else "not taken in, --widen does"
            out.print(f"perhaps made from it: {origin.documents:,} rows from {origin.synthetic_from} ({taken})")
    for twin in answer.twins[:MOST_ROWS]:
        out.print(f"a copy that stays: {twin.id} {twin.source} {twin.path} ({twin.licence}); --widen takes it in")
    _more(out, answer.twins)
    _missing(out, answer)
    if applied:
        out.print(f"\nwrote {applied.recipe}; nothing was deleted. Make the run without it:")
        out.print(f"  {applied.command}", soft_wrap=True)
    return _text(out)


def _restart(restart: Restart | None) -> str:
    if restart is None:
        return "no restart needed: no checkpoint learned from it"
    parts = [f"{n:,} steps of {stage}" for stage, n in restart.steps.items() if n]
    hours = "time unknown: no step was measured" if restart.hours is None else _hours(restart.hours)
    place = f"from {restart.origin} (step {restart.from_step:,})" if restart.origin else "from nothing"
    if restart.blocked:
        return f"no restart from here: {restart.blocked}"
    note = "" if restart.certain else "; needed only if an unknown checkpoint is not clean"
    return f"cheapest restart: {place}: {' and '.join(parts) or 'no step'}, {hours}{note}"


def _hours(hours: float) -> str:
    return f"{hours:,.2f} hours" if hours >= 0.1 else f"{hours:.4f} hours ({3600 * hours:,.0f} s)"


def _documents(out: Console, documents: Sequence[TracedDocument]) -> None:
    table = _table("document", "path", "fate", "shard", "tokens at", "steps")
    for document in documents:
        shard = document.shard
        fate = document.fate + (f" ({document.reason}: {document.detail})" if document.reason else "")
        place = f"{shard.start:,} + {shard.tokens:,}" if shard else ""
        steps = "; ".join(f"{s.stage} {s.phase}: {_list(s.steps)}" for s in document.seen)
        table.add_row(
            document.id, _short(document.path, 40), _short(fate, 50), shard.shard if shard else "", place, steps
        )
    out.print(table, "")


def _console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False)


def _text(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return printable("\n".join(line.rstrip() for line in out.file.getvalue().rstrip().split("\n")))


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        right = (
            name in ("documents", "tokens", "tokens seen", "steps", "saw") and columns[-1] != name or name == "tokens"
        )
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table


def _runs(runs: list[list[int]]) -> str:
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:6])
    return shown + (f" and {len(runs) - 6} more runs" if len(runs) > 6 else "")


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:8])) + (f" and {len(steps) - 8} more" if len(steps) > 8 else "")


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def _more(out: Console, rows: Sequence[Any]) -> None:
    left = len(rows) - MOST_ROWS
    if left > 0:
        out.print(f"and {left:,} more (--json shows them)\n")


def _missing(out: Console, answer: DocumentTrace | StepTrace | CheckpointTrace | Takedown) -> None:
    for line in answer.missing:
        out.print(f"not answered: {line}")
