"""The command line: one line a verb. A stage is imported only when it runs, so help and errors answer at once."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freehold import __version__
from freehold.core.errors import FreeholdError

STAGES = {
    "gather": "sources -> documents with licence evidence; the policy gate refuses what may not be used",
    "curate": "documents -> clean, de-duplicated documents; every drop has a reason",
    "tokenize": "documents -> tokenizer and token shards",
    "pretrain": "tokens -> TrueBase and Base",
    "align": "Base and conversations -> Preview",
    "evaluate": "bits per byte and tasks, before and after alignment",
    "export": "Preview -> HF folder and GGUF files, proven equal or refused",
}

EXAMPLES = """examples:
  freehold run recipes/laptop.yaml                    the whole walk, redoing only what is missing
  freehold run recipes/laptop.yaml --dry-run          what it would do
  freehold pretrain recipes/laptop.yaml optim.lr=3e-4 --fork lr3e-4
  freehold chat runs/laptop                           talk to the model
  freehold serve runs/laptop --port 8000              OpenAI-compatible server
  freehold trace sotu                                 where did this source go?
  freehold takedown sotu runs/laptop                  what learned from it, and the cheapest way back
  freehold lineage runs/laptop                        from sources to GGUF
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 well, 2 the user's mistake, 130 stopped."""
    # Threads that wait by spinning for long make a step five times slower as soon as anything else runs.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    for item in rest:  # argparse takes positionals in one place only; overrides may stand anywhere
        if item.startswith("-") or "=" not in item or not hasattr(args, "overrides"):
            parser.error(f"unrecognized argument: {item}")
        args.overrides.append(item)
    if not hasattr(args, "do"):
        parser.print_help()
        return 2
    try:
        return int(args.do(args) or 0)
    except FreeholdError as error:
        if getattr(args, "json", False):
            fields = ("what", "where", "found", "expected", "todo")
            print(json.dumps({"error": {f: _text(getattr(error, f)) for f in fields}}))
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "code", 2)
    except BrokenPipeError:
        return 0
    except OSError as error:
        # A full or read-only disk, a folder that may not be written, a file where a folder should be.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
                               errno.EEXIST, errno.EISDIR):  # fmt: skip
            raise
        print(
            f"error: cannot write or read here: {error.strerror}\n  where:    {error.filename or ''}\n"
            "  to do:    free some space or choose another runs_dir; nothing finished was touched",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="freehold",
        description="Own a Trinity-class language model outright: data, training, alignment, proof, serving.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"freehold {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    walk = _verb(verbs, "run", "run a recipe's whole walk, redoing only what is missing or changed", _run)
    _recipe_arguments(walk)
    for stage, text in STAGES.items():
        _recipe_arguments(_verb(verbs, stage, text, _stage, stage=stage))
    serve = _verb(verbs, "serve", "serve a checkpoint, an HF folder or a GGUF over an OpenAI-compatible API", _serve)
    serve.add_argument("path", help="run folder, checkpoint, HF folder, .gguf file, or a recipe for the walk's check")
    serve.add_argument("overrides", nargs="*", metavar="key=value", help="settings; see `freehold schema serve`")
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default 8000)")
    _walk_flags(serve)
    chat = _verb(verbs, "chat", "talk to a model in the terminal", _chat)
    chat.add_argument("path", help="run folder, checkpoint or HF folder")
    chat.add_argument("overrides", nargs="*", metavar="key=value", help="settings; see `freehold schema chat`")
    trace = _verb(verbs, "trace", "which steps and checkpoints saw this document, source or licence; or back", _trace)
    trace.add_argument(
        "document", nargs="?", help="document id, part of its path, source, licence; or a checkpoint or export"
    )
    trace.add_argument("--step", type=int, help="instead: the documents of one optimizer step")
    trace.add_argument("--stage", default="pretrain", choices=["pretrain", "align"], help="whose step")
    trace.add_argument("--run", type=Path, help="run folder (default: the newest below runs/)")
    trace.add_argument("--json", action="store_true", help="machine-readable answer")
    takedown = _verb(
        verbs, "takedown", "what a source, document or licence reached, and the cheapest way back", _takedown
    )
    takedown.add_argument("document", help="document id, part of its path, source, or licence expression")
    takedown.add_argument("run", nargs="?", type=Path, help="run folder (default: the newest below runs/)")
    takedown.add_argument("--widen", action="store_true", help="also copies of it, and what was perhaps made from it")
    takedown.add_argument(
        "--apply", action="store_true", help="write the recipe of the run without it; deletes nothing"
    )
    takedown.add_argument("--out", type=Path, default=Path(), help="folder for that recipe (default: this one)")
    takedown.add_argument("--json", action="store_true", help="machine-readable answer")
    lineage = _verb(verbs, "lineage", "draw the chain from sources to exports", _lineage)
    lineage.add_argument("run", nargs="?", type=Path, help="run folder (default: the newest below runs/)")
    lineage.add_argument("--mermaid", action="store_true", help="as a mermaid graph")
    lineage.add_argument("--json", action="store_true", help="machine-readable graph")
    card = _verb(verbs, "card", "write the data card and the regulators' documents of a run from its ledger", _card)
    card.add_argument("run", nargs="?", type=Path, help="run folder (default: the newest below runs/)")
    card.add_argument("--kind", action="append", choices=["data", "eu", "ab2013", "croissant"], help="default: all")
    card.add_argument("--out", type=Path, help="folder to write to (default: card/ in the run folder)")
    card.add_argument(
        "--told", type=Path, metavar="FILE", help="YAML of statements that no ledger holds (docs/rights.md)"
    )
    card.add_argument("--check", action="store_true", help="write nothing; exit 1 when what lies there is out of date")
    card.add_argument("--diff", type=Path, metavar="RUN", help="write nothing; show what changed since this other run")
    report = _verb(verbs, "report", "write report.md and report.png of a run, and show its summary", _report)
    report.add_argument("run", nargs="?", type=Path, help="run folder (default: the newest below runs/)")
    schema = _verb(verbs, "schema", "print the JSON Schema of a stage's section of the recipe", _schema)
    schema.add_argument("stage", choices=[*STAGES, "serve", "chat"])
    return parser


def _verb(verbs: Any, name: str, text: str, do: Any, **defaults: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(do=do, **defaults)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML recipe, e.g. recipes/laptop.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. optim.lr=3e-4")
    _walk_flags(parser)


def _walk_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show the filled recipe and what it implies; do nothing")
    parser.add_argument(
        "--clean",
        action="store_true",
        help="make again what is damaged or was made by another recipe or code; a single stage: always",
    )
    parser.add_argument("--fork", default="", metavar="NAME", help="keep this run; make the changed one as runs/NAME")
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)


def _run(args: argparse.Namespace) -> int:
    from freehold import walk

    recipe = walk.resolve(args.recipe, args.overrides, fork=args.fork)
    if args.dry_run:
        return _show_plan(recipe, list(walk.WALK), args.json)
    options = walk.Options(clean=args.clean, fork=args.fork, quiet=args.quiet or args.json)
    with walk.locked(recipe.run_folder) as lock:
        done = walk.run_walk(recipe, options, lock)
        from freehold import report

        if "made" in done.values() or not (recipe.run_folder / "report.md").exists():
            report.write_report(recipe.run_folder)
    if args.json:
        stages = {s: {"state": what, "folder": str(recipe.run_folder / s)} for s, what in done.items()}
        print(json.dumps({"run": str(recipe.run_folder), "stages": stages}))
    elif not args.quiet:
        if "made" not in done.values():
            print(f"{recipe.run_folder}: everything is up to date, nothing was redone", file=sys.stderr)
        print(report.summary(recipe.run_folder))
    return 0


def _stage(args: argparse.Namespace) -> int:
    from freehold import walk

    recipe = walk.resolve(args.recipe, args.overrides, stage=args.stage, fork=args.fork)
    if args.dry_run:
        return _show_plan(recipe, [args.stage], args.json)
    options = walk.Options(clean=args.clean, fork=args.fork, quiet=args.quiet or args.json)
    if args.parent:
        walk.die_with(args.parent)
        manifest = walk.run_stage(recipe, args.stage, options)
    else:
        with walk.locked(recipe.run_folder):
            if args.fork:
                walk.take_over_before(recipe, args.stage)
            manifest = walk.run_stage(recipe, args.stage, options)
    if args.json:
        print(json.dumps({"folder": str(recipe.run_folder / args.stage), "counts": manifest["counts"]}))
    return 0


def _show_plan(recipe: Any, stages: list[str], as_json: bool) -> int:
    import importlib

    from freehold import walk
    from freehold.core.config import to_yaml
    from freehold.core.errors import ArtifactError

    plans = {}
    for stage in stages:
        config = recipe.stages[stage]
        try:
            state, changes = walk.state_of(recipe, stage)
        except ArtifactError:
            state, changes = "waits for its inputs", []
        lines = importlib.import_module(f"freehold.stages.{stage}.config").plan(config)
        plans[stage] = {"state": state, "changes": changes, "plan": lines, "config": config.model_dump(mode="json")}
    if as_json:
        print(json.dumps({"run": str(recipe.run_folder), "stages": plans}))
        return 0
    print(to_yaml({**recipe.head.model_dump(mode="json"), **{s: p["config"] for s, p in plans.items()}}))
    for stage, told in plans.items():
        print(f"{stage}: {told['state']}")
        for line in [*told["plan"], *(f"changed: {c}" for c in told["changes"])]:
            print(f"  {line}")
    return 0


def _serve(args: argparse.Namespace) -> int:
    if args.path.endswith((".yaml", ".yml")):
        args.recipe, args.stage = Path(args.path), "serve"
        return _stage(args)
    from freehold.core.config import fill, override
    from freehold.stages.serve.config import StageConfig

    data = override({"path": args.path}, args.overrides)
    data |= {key: getattr(args, key) for key in ("host", "port") if getattr(args, key) is not None}
    config = fill(StageConfig, data, "serve")
    if args.parent:
        from freehold import walk

        walk.die_with(args.parent)
    from freehold.stages.serve.run import serve

    serve(config)
    return 0


def _chat(args: argparse.Namespace) -> int:
    from freehold.core.config import fill, override
    from freehold.stages.chat.config import StageConfig

    config = fill(StageConfig, override({"path": args.path}, args.overrides), "chat")
    from freehold.stages.chat.run import chat

    chat(config)
    return 0


def _trace(args: argparse.Namespace) -> int:
    from freehold.core.errors import ConfigError
    from freehold.ledger import trace

    if (args.document is None) == (args.step is None):
        raise ConfigError(
            "give a document, source, licence, checkpoint or export, or --step N", todo="see `freehold trace --help`"
        )
    run = _run_folder(args.run)
    if args.step is not None:
        answer = trace.trace_step(run, args.step, stage=args.stage)
    elif checkpoint := trace.find_checkpoint(run, args.document):
        answer = trace.trace_checkpoint(run, checkpoint)
    else:
        answer = trace.trace_document(run, args.document)
    print(json.dumps(answer, indent=1) if args.json else trace.render(answer))
    return 0


def _takedown(args: argparse.Namespace) -> int:
    from freehold.ledger import takedown

    run = _run_folder(args.run)
    answer = takedown.takedown(run, args.document, widen=args.widen)
    if args.apply:
        answer["applied"] = takedown.write_recipe(run, answer, args.out)
    if args.json:
        print(json.dumps(answer, indent=1))
    else:
        from freehold.ledger.trace_text import render_takedown

        print(render_takedown(answer, 120))
    return 0


def _lineage(args: argparse.Namespace) -> int:
    from freehold.ledger import lineage

    graph = lineage.lineage(_run_folder(args.run))
    print(json.dumps(graph.to_dict(), indent=1) if args.json else lineage.draw(graph, mermaid=args.mermaid))
    return 0


def _card(args: argparse.Namespace) -> int:
    from freehold.ledger import card, documents

    run, told = _run_folder(args.run), card.read_told(args.told)
    kinds = list(dict.fromkeys(args.kind or documents.MAKERS))
    facts = card.facts(run)
    texts = documents.make(facts, told, kinds)
    folder = args.out or run / "card"
    if args.diff or args.check:
        if args.diff:
            old, name = documents.make(card.facts(_run_folder(args.diff)), told, kinds), args.diff.as_posix()
        else:
            old, name = documents.read(folder, list(texts)), folder.as_posix()
        changes = documents.difference(old, texts, (name, run.as_posix()))
        print(changes, end="")
        return 1 if changes else 0
    documents.write(folder, texts)
    if "data" in kinds:
        from freehold import report

        report.write_data_picture(folder / documents.PICTURE, facts)
    for name in texts:
        print(folder / name)
    return 0


def _report(args: argparse.Namespace) -> int:
    from freehold import report

    run = _run_folder(args.run)
    print(report.write_report(run))
    print(report.summary(run))
    return 0


def _schema(args: argparse.Namespace) -> int:
    from freehold import walk

    print(json.dumps(walk.stage_config_class(args.stage).model_json_schema(), indent=1))
    return 0


def _run_folder(given: Path | None) -> Path:
    """Return the run folder asked for, or the newest below runs/; ArtifactError when there is none."""
    from freehold.core.errors import ArtifactError

    if given is not None:
        if not given.is_dir():
            raise ArtifactError("no such run folder", where=given, todo="run folders lie below runs/")
        return given
    runs = sorted((p for p in Path("runs").glob("*") if p.is_dir()), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise ArtifactError("there is no run yet", where="runs/", todo="freehold run recipes/laptop.yaml")
    return runs[-1]


def _text(value: object) -> str | None:
    return None if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
