"""The verbs that read run folders: trace, take-down, lineage, rights, cards, the report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from freehold.cli.parser import run_folder, verb
from freehold.core.errors import ConfigError
from freehold.run.layout import GATHER, PRETRAIN, REPHRASE, RunFolder, training


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this module to the parser."""
    for add in (_add_trace, _add_takedown, _add_lineage, _add_rights, _add_card):
        add(verbs)
    report = verb(verbs, "report", "write report.md and report.png of a run, and show its summary", _report)
    _run_argument(report)
    _add_overview(verbs)


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", type=Path, help="run folder (default: the newest below runs/)")


def _json_flag(parser: argparse.ArgumentParser, what: str = "answer") -> None:
    parser.add_argument("--json", action="store_true", help=f"machine-readable {what}")


def _add_overview(verbs: Any) -> None:
    runs = verb(verbs, "runs", "list the runs with stage, age, size and figures", _runs)
    runs.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="folder of runs (default: runs/)")
    _json_flag(runs, "list")
    watch = verb(verbs, "watch", "follow a run that trains: loss, bits per byte, load, speed, memory, events", _watch)
    _run_argument(watch)
    watch.add_argument("--once", action="store_true", help="show it once and leave")
    watch.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default 2)")
    _json_flag(watch, "view; implies --once")


def _add_trace(verbs: Any) -> None:
    trace = verb(verbs, "trace", "which steps and checkpoints saw this document, source or licence; or back", _trace)
    trace.add_argument(
        "document", nargs="?", help="document id, part of its path, source, licence; or a checkpoint or export"
    )
    trace.add_argument("--step", type=int, help="instead: the documents of one optimizer step")
    trace.add_argument("--stage", default=PRETRAIN, choices=training(), help="whose step")
    trace.add_argument("--run", type=Path, help="run folder (default: the newest below runs/)")
    _json_flag(trace)


def _add_takedown(verbs: Any) -> None:
    text = "what a source, document or licence reached, and the cheapest way back"
    takedown = verb(verbs, "takedown", text, _takedown)
    about = "document id, part of its path, source, licence, web address or site; or `reserved`: what its sites reserve"
    takedown.add_argument("document", help=about)
    _run_argument(takedown)
    _add_reservations(takedown)
    takedown.add_argument("--widen", action="store_true", help="also its copies, and what was perhaps made from it")
    takedown.add_argument(
        "--apply",
        action="store_true",
        help="write the recipe of the run without it, and note it as pending here; deletes nothing",
    )
    takedown.add_argument(
        "--filter", type=Path, metavar="FILE", help="write or extend the filter by which serve does not say it any more"
    )
    takedown.add_argument("--out", type=Path, default=Path(), help="folder for that recipe (default: this one)")
    _json_flag(takedown)


def _add_reservations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reservations", type=Path, metavar="FOLDER", help="snapshot of what sites reserve (default: the recipe's)"
    )
    parser.add_argument("--date", metavar="DAY", help="ISO date of that snapshot (default: today)")


def _reservations(args: argparse.Namespace, run: Path) -> Any:
    """Return what sites reserve: as typed, else as the run's recipe says; None where neither says anything."""
    from freehold.core.config import fill
    from freehold.ledger.reservations import Reservations
    from freehold.run.policy_check import recorded_reservations

    if args.reservations is None:
        return recorded_reservations(RunFolder(run))
    typed = {"snapshot": str(args.reservations), "date": args.date or time.strftime("%Y-%m-%d", time.gmtime())}
    return fill(Reservations, typed, "--reservations")


def _add_lineage(verbs: Any) -> None:
    lineage = verb(verbs, "lineage", "draw the chain from sources to exports", _lineage)
    _run_argument(lineage)
    lineage.add_argument("--mermaid", action="store_true", help="as a mermaid graph")
    _json_flag(lineage, "graph")


def _add_rights(verbs: Any) -> None:
    rights = verb(verbs, "rights", "may this corpus or checkpoint be used like that? judged row by row", _rights)
    _run_argument(rights)
    rights.add_argument("--of", help="what a checkpoint or export learned from, e.g. export/hf (default: the corpus)")
    rights.add_argument("--policy", type=Path, help="YAML file with the keys of gather.policy (default: the run's own)")
    rights.add_argument(
        "--use",
        action="append",
        choices=["train", "distill", "redistribute", "commercial"],
        help="what it must be free for (default: the policy's uses)",
    )
    _add_reservations(rights)
    _json_flag(rights)


def _add_card(verbs: Any) -> None:
    card = verb(verbs, "card", "write the data card and the regulators' documents of a run from its ledger", _card)
    _run_argument(card)
    card.add_argument("--kind", action="append", choices=["data", "eu", "ab2013", "croissant"], help="default: all")
    card.add_argument("--out", type=Path, help="folder to write to (default: card/ in the run folder)")
    card.add_argument(
        "--statements", type=Path, metavar="FILE", help="YAML of what no ledger can know (docs/rights.md)"
    )
    card.add_argument("--check", action="store_true", help="write nothing; exit 1 when the documents are out of date")
    card.add_argument("--diff", type=Path, metavar="RUN", help="write nothing; show what changed since this other run")


def _trace(args: argparse.Namespace) -> int:
    from freehold.run import trace
    from freehold.run.checkpoints import find_checkpoint
    from freehold.run.trace_text import render

    if (args.document is None) == (args.step is None):
        raise ConfigError(
            "give a document, source, licence, checkpoint or export, or --step N", todo="see `freehold trace --help`"
        )
    run = run_folder(args.run)
    answer: trace.DocumentTrace | trace.StepTrace | trace.CheckpointTrace
    if args.step is not None:
        answer = trace.trace_step(run, args.step, stage=args.stage)
    elif checkpoint := find_checkpoint(run, args.document):
        answer = trace.trace_checkpoint(run, checkpoint)
    else:
        answer = trace.trace_document(run, args.document)
    print(json.dumps(asdict(answer), indent=1) if args.json else render(answer))
    return 0


def _takedown(args: argparse.Namespace) -> int:
    from freehold.run.pending import note
    from freehold.run.takedown import RESERVED, takedown
    from freehold.run.takedown_filter import write_filter
    from freehold.run.takedown_recipe import write_recipe
    from freehold.run.trace_text import render_takedown

    run = run_folder(args.run)
    asked = _reservations(args, run) if args.document == RESERVED or args.reservations else None
    answer = takedown(run, args.document, widen=args.widen, reservations=asked)
    applied = write_recipe(run, answer, args.out, asked) if args.apply else None
    if applied:
        note(run, args.document, args.widen, asked)
    filtered = write_filter(run, answer, args.filter) if args.filter else None
    if args.json:
        more = {"applied": applied, "filtered": filtered}
        made = {name: asdict(value) for name, value in more.items() if value is not None}
        print(json.dumps(answer.to_dict() | made, indent=1))
    else:
        print(render_takedown(answer, 120, applied))
        if filtered:
            print(f"filter: {filtered.filter}, {filtered.rows} texts, {filtered.spans:,} spans; serve reads it again")
    return 0


def _rights(args: argparse.Namespace) -> int:
    from freehold.core.artifact import read_manifest
    from freehold.core.config import fill, load_yaml
    from freehold.ledger.policy import Policy
    from freehold.run import policy_check, trace_text
    from freehold.run.checkpoints import find_checkpoint

    run = run_folder(args.run)
    folder = RunFolder(run)

    def policy_of(stage: str) -> Policy:
        recorded = {} if args.policy else read_manifest(folder.stage(stage)).get("config", {}).get("policy", {})
        stated = load_yaml(args.policy) if args.policy else recorded
        uses = {"uses": args.use} if args.use else {}
        return fill(Policy, {**stated, **uses}, str(args.policy or f"{stage}.policy"))

    policy = policy_of(GATHER)
    rewritten = policy_of(REPHRASE) if folder.finished(REPHRASE) else None
    asked = _reservations(args, run)
    snapshot = asked.open() if asked else None
    if args.of:
        groups = policy_check.checkpoint(run, find_checkpoint(run, args.of) or args.of, policy, rewritten, snapshot)
    else:
        groups = policy_check.everything(run, policy, rewritten, snapshot)
    answer = {
        "run": run.name,
        "of": args.of or "corpus",
        "uses": list(policy.uses),
        "decision": policy_check.worst(groups),
    }
    answer["rows"] = policy_check.table(groups)
    print(json.dumps(answer, indent=1) if args.json else trace_text.render_rights(answer, 120))
    return 0 if answer["decision"] == "allow" else 1


def _lineage(args: argparse.Namespace) -> int:
    from freehold.run import lineage

    graph = lineage.lineage(run_folder(args.run))
    print(json.dumps(graph.to_dict(), indent=1) if args.json else lineage.draw(graph, mermaid=args.mermaid))
    return 0


def _card(args: argparse.Namespace) -> int:
    from freehold.run import card, disclosure

    run, stated = run_folder(args.run), card.read_statements(args.statements)
    kinds = list(dict.fromkeys(args.kind or disclosure.MAKERS))
    facts = card.facts(run)
    texts = disclosure.make(facts, stated, kinds)
    folder = args.out or RunFolder(run).card
    if args.diff or args.check:
        if args.diff:
            old, name = disclosure.make(card.facts(run_folder(args.diff)), stated, kinds), args.diff.as_posix()
        else:
            old, name = disclosure.read(folder, list(texts)), folder.as_posix()
        changes = disclosure.difference(old, texts, (name, run.as_posix()))
        print(changes, end="")
        return 1 if changes else 0
    disclosure.write(folder, texts)
    if "data" in kinds:
        from freehold.run import report

        report.write_data_picture(folder / disclosure.PICTURE, facts)
    for name in texts:
        print(folder / name)
    return 0


def _report(args: argparse.Namespace) -> int:
    from freehold.run import report

    run = run_folder(args.run)
    print(report.write_report(run))
    print(report.summary(run))
    return 0


def _runs(args: argparse.Namespace) -> int:
    from freehold.run import overview

    lines = overview.list_runs(args.folder)
    print(json.dumps([asdict(line) for line in lines], indent=1) if args.json else overview.runs_text(lines))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from freehold.run import overview

    run = run_folder(args.run)
    if args.every <= 0:
        raise ConfigError("not a time to wait", where="--every", found=args.every, expected="seconds above 0")
    while True:
        found = overview.watch(run)
        text = json.dumps(asdict(found), indent=1) if args.json else overview.watch_text(found)
        live = not (args.once or args.json or found.finished) and sys.stdout.isatty()
        # On a terminal the view is drawn over the one before it.
        print(f"\x1b[H\x1b[2J{text}" if live else text, flush=True)
        if args.once or args.json or found.finished:
            return 0
        time.sleep(args.every)
