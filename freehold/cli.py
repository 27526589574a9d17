"""The command line: one line a verb. A stage is imported only when it runs, so help and errors answer at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from freehold.core.errors import ConfigError, FreeholdError
from freehold.core.version import VERSION
from freehold.run.layout import ALIGN, CHAT, IMPORT, PUBLISHED, SERVE, WALK

EXAMPLES = """examples:
  freehold run recipes/laptop.yaml                    the whole walk, redoing only what is missing
  freehold run recipes/laptop.yaml --dry-run          what it would do
  freehold pretrain recipes/laptop.yaml optim.lr=3e-4 --fork lr3e-4
  freehold chat runs/laptop                           talk to the model
  freehold serve runs/laptop --port 8000              OpenAI-compatible server
  freehold plan large                                 what training it takes, before anything starts
  freehold trace sotu                                 where did this source go?
  freehold takedown sotu runs/laptop                  what learned from it, and the cheapest way back
  freehold lineage runs/laptop                        from sources to GGUF
  freehold verify-resume recipes/laptop.yaml          kill it, go on, compare every bit
"""

TAUGHT = {
    "rephrase": """in the recipe, a teacher and what it is asked for:
  rephrase:
    teacher: {kind: endpoint, url: "http://localhost:8000/v1", model: NAME,
              licence: Apache-2.0, licence_evidence: "LICENSE of the weights"}
    strategies: {condensed: {sources: [sotu], passages: 2_000}, question_answer: {passages: 500}}
strategies: question_answer, pedagogical, condensed, restructured. Any OpenAI-compatible server is a teacher, or a GGUF
file with {kind: gguf, path: FILE}.

examples:
  freehold rephrase recipes/mine.yaml --dry-run              what would be asked, of whom; asks nothing
  freehold rephrase recipes/mine.yaml strategies.condensed.passages=50 --fork try
afterwards look at rephrase/report.json of the run: passages and rewrites, kept and dropped, with the reason.
A teacher that died: start it and type the same command; what it answered is not asked again.
More: docs/stages/rephrase.md"""
}
"""What the help of a stage says beside its options."""

# Read when a process starts (so by the stages of a walk) or loads PyTorch. Threads that wait by spinning for long make
# a step five times slower as soon as anything else runs; fresh pages for every large tensor cost a tenth of a step.
PROCESS = {
    "GOMP_SPINCOUNT": "3000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 well, 2 the user's mistake, 130 stopped, 137 killed."""
    for name, value in PROCESS.items():
        os.environ.setdefault(name, value)
    argv = sys.argv[1:] if argv is None else argv
    try:
        from freehold.core.machine import machine_limits

        with machine_limits():
            return _do(argv)
    except FreeholdError as error:
        return _fail(error, argv)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return _fail(Stopped("stopped", todo="run the same command again to go on"), argv)


class Stopped(FreeholdError):
    """The user stopped a command."""

    code = 130


def _fail(error: FreeholdError, argv: Sequence[str]) -> int:
    """Tell why a command failed, on stderr and with --json on stdout too; return its exit code.

    A stage of a walk hands the JSON to its parent, which tells it.
    """
    if "--json" in argv:
        print(json.dumps({"error": error.to_dict()}))
    if not ("--json" in argv and "--parent" in argv):
        print(f"error: {error}", file=sys.stderr)
    return getattr(error, "code", 2)


def _do(argv: Sequence[str]) -> int:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    for item in rest:  # argparse takes positionals in one place only; overrides may stand anywhere
        if item.startswith("-") or "=" not in item or not hasattr(args, "overrides"):
            parser.error(f"unrecognized argument: {item}")
        args.overrides.append(item)
    if not hasattr(args, "do"):
        parser.print_help()
        return 2
    return int(args.do(args) or 0)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one message, as JSON too."""

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError instead of leaving."""
        raise ConfigError(message, where=self.prog, todo=f"see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = _Parser(
        prog="freehold",
        description="Own a Trinity-class language model outright: data, training, alignment, proof, serving.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"freehold {VERSION}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    walk = _verb(verbs, "run", "run a recipe's whole walk, redoing only what is missing or changed", _run)
    _recipe_arguments(walk)
    for stage in WALK.values():
        if stage.name == SERVE:  # the verb serves any path, not only a run's
            continue
        made = _verb(verbs, stage.name, stage.summary, _stage, stage=stage.name)
        _recipe_arguments(made)
        made.epilog, made.formatter_class = TAUGHT.get(stage.name), argparse.RawDescriptionHelpFormatter
        if stage.name == ALIGN:
            _check_arguments(made)
    _import_arguments(_verb(verbs, IMPORT, PUBLISHED.summary, _import))
    serve = _verb(verbs, SERVE, WALK[SERVE].summary, _serve)
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
    rights = _verb(verbs, "rights", "may this corpus or checkpoint be used like that? judged row by row", _rights)
    rights.add_argument("run", nargs="?", type=Path, help="run folder (default: the newest below runs/)")
    rights.add_argument("--of", help="what a checkpoint or export learned from, e.g. export/hf (default: the corpus)")
    rights.add_argument("--policy", type=Path, help="YAML file with the keys of gather.policy (default: the run's own)")
    rights.add_argument(
        "--use",
        action="append",
        choices=["train", "distill", "redistribute", "commercial"],
        help="what it must be free for (default: the policy's uses)",
    )
    rights.add_argument("--json", action="store_true", help="machine-readable answer")
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
    plan = _verb(
        verbs, "plan", "memory, time, money and failures of a run, from its recipe alone; starts nothing", _plan
    )
    plan.add_argument("recipe", help="YAML recipe, or a preset: nano, mini, large, trillion, deepseek-v3, ...")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.shard=64 machine.device=h200")
    plan.add_argument("--search", action="store_true", help="propose degrees that fit, the fastest first")
    plan.add_argument("--picture", type=Path, metavar="FILE", help="also draw the plan as a PNG")
    plan.add_argument("--json", action="store_true", help="machine-readable plan on stdout")
    verify = _verb(
        verbs,
        "verify-resume",
        "kill a recipe's training, go on, and compare every tensor with a run left alone",
        _verify,
    )
    verify.add_argument("recipe", type=Path, help="YAML recipe, e.g. recipes/laptop.yaml")
    verify.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    verify.add_argument("--first", type=int, default=6, metavar="N", help="steps before the kill (default 6)")
    verify.add_argument("--more", type=int, default=6, metavar="M", help="steps after it (default 6)")
    verify.add_argument(
        "--world", type=int, action="append", default=[], metavar="W", help="also go on with W processes; repeatable"
    )
    verify.add_argument(
        "--tolerance", type=float, default=0.02, help="how far a weight may differ there, of its norm (default 0.02)"
    )
    verify.add_argument("--keep", action="store_true", help="keep the runs, in verify-resume/ of the run folder")
    verify.add_argument("--json", action="store_true", help="machine-readable answer")
    schema = _verb(verbs, "schema", "print the JSON Schema of a stage's section of the recipe", _schema)
    schema.add_argument("stage", choices=[*WALK, CHAT, IMPORT])
    return parser


def _verb(verbs: Any, name: str, text: str, do: Any, **defaults: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(do=do, **defaults)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML recipe, e.g. recipes/laptop.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. optim.lr=3e-4")
    _walk_flags(parser)


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="folder with config.json, safetensors and, for text, tokenizer.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings; see `freehold schema import`")
    parser.add_argument("--name", required=True, help="name of the run folder that the model becomes a root of")
    parser.add_argument("--licence", required=True, help="SPDX expression of the weights, e.g. Apache-2.0")
    parser.add_argument(
        "--evidence", required=True, help="what shows it: `FILE: words quoted from that file`, or a statement"
    )
    parser.add_argument("--clean", action="store_true", help="import again in place of what is there")
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")


def _import(args: argparse.Namespace) -> int:
    from freehold.core.artifact import read_manifest
    from freehold.core.config import fill, override
    from freehold.stages.importing.config import ImportConfig

    file, _, quote = args.evidence.partition(": ")
    quoted = bool(quote) and any(Path(args.path).glob(file))
    evidence = {"file": file, "quote": quote} if quoted else {"rule": args.evidence}
    data = {"path": args.path, "name": args.name, "licence": args.licence, "licence_evidence": evidence}
    config = fill(ImportConfig, override(data, args.overrides), IMPORT)
    from freehold.stages.importing.run import import_model

    folder = import_model(config, clean=args.clean, quiet=args.quiet or args.json)
    if args.json:
        print(json.dumps({"folder": str(folder), "counts": read_manifest(folder)["counts"]}))
    elif not args.quiet:
        print(f"try `freehold chat {folder.parent}`, or begin a recipe with `base: {folder / 'recipe.yaml'}`")
    return 0


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="in place of a recipe: count a file of conversations or pairs"
    )
    parser.add_argument("--format", default="auto", help="format of that file's rows (default: by their keys)")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="count its lengths in tokens")
    recipe = next(action for action in parser._actions if action.dest == "recipe")
    recipe.nargs = "?"


def _check(args: argparse.Namespace) -> int:
    """Count a file of conversations; exit code 1 when a row is refused."""
    from freehold.conversations.formats import FORMATS
    from freehold.conversations.survey import survey
    from freehold.core.config import unknown_key

    if args.format not in ("auto", *FORMATS):
        raise unknown_key("--format", args.format, ["auto", *FORMATS])
    tokenizer = None
    if args.tokenizer:
        from freehold.tokenizer.bpe import Tokenizer

        tokenizer = Tokenizer.load(args.tokenizer)
    found = survey(args.check, args.format, tokenizer)
    print(json.dumps(found.to_dict()) if args.json else found.text())
    return 0 if found.passed else 1


def _walk_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show the filled recipe and what it implies; do nothing")
    parser.add_argument(
        "--clean",
        action="store_true",
        help="make again what is damaged or was made by another recipe or code; a single stage: always",
    )
    parser.add_argument("--fork", default="", metavar="NAME", help="keep this run; make the changed one as runs/NAME")
    parser.add_argument(
        "--strict-code", action="store_true", help="refuse stages that other code made, instead of warning"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)


def _run(args: argparse.Namespace) -> int:
    from freehold.parallel import launch
    from freehold.run import processes, walk
    from freehold.run.recipe import resolve

    if launch.place() is not None:
        raise ConfigError(
            "a launcher starts ranks of one stage, not of a whole walk",
            where="RANK and WORLD_SIZE are set",
            expected="freehold pretrain RECIPE, or freehold align RECIPE",
            todo="run the other stages without the launcher: `freehold run RECIPE until=tokenize`",
        )

    recipe = resolve(args.recipe, args.overrides, fork=args.fork)
    if args.dry_run:
        return _show_plan(recipe, list(recipe.stages), args.json, args.strict_code)
    options = processes.Options(
        clean=args.clean, fork=args.fork, strict_code=args.strict_code, quiet=args.quiet or args.json
    )
    with processes.locked(recipe.run) as lock:
        done = walk.run_walk(recipe, options, lock)
        from freehold.run import report

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
    if getattr(args, "check", None):
        return _check(args)
    if args.recipe is None:
        raise ConfigError("a recipe is missing", where=f"freehold {args.stage}", todo="see `freehold align --help`")
    from freehold.parallel import launch
    from freehold.run import processes, walk
    from freehold.run.recipe import resolve

    recipe = resolve(args.recipe, args.overrides, stage=args.stage, fork=args.fork)
    if args.dry_run:
        return _show_plan(recipe, [args.stage], args.json, args.strict_code)
    quiet = args.quiet or (args.json and not args.parent)
    options = processes.Options(clean=args.clean, fork=args.fork, strict_code=args.strict_code, quiet=quiet)
    if args.parent:
        processes.die_with(args.parent)
        manifest = walk.run_stage(recipe, args.stage, options)
    elif not launch.leads():  # the first rank holds the folder
        manifest = walk.run_stage(recipe, args.stage, options)
    else:
        with processes.locked(recipe.run):
            if args.fork:
                walk.reuse_before(recipe, args.stage, options)
            manifest = walk.run_stage(recipe, args.stage, options)
    if args.json:
        print(json.dumps({"folder": str(recipe.run_folder / args.stage), "counts": manifest["counts"]}))
    return 0


def _show_plan(recipe: Any, stages: list[str], as_json: bool, strict_code: bool = False) -> int:
    from freehold.core.config import to_yaml
    from freehold.core.errors import ArtifactError
    from freehold.run import walk

    plans = {}
    for stage in stages:
        each = recipe.stages[stage]
        config, lines = each.config, each.stage.plan(each.config)
        try:
            found = walk.state_of(each, strict_code=strict_code)
            state, changes = str(found.what), list(found.changes)
        except ArtifactError:
            state, changes = "waits for its inputs", []
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
    from freehold.stages.serve.config import ServeConfig

    data = override({"path": args.path}, args.overrides)
    data |= {key: getattr(args, key) for key in ("host", "port") if getattr(args, key) is not None}
    config = fill(ServeConfig, data, "serve")
    if args.parent:
        from freehold.run import processes

        processes.die_with(args.parent)
    from freehold.stages.serve.run import serve

    serve(config)
    return 0


def _chat(args: argparse.Namespace) -> int:
    from freehold.core.config import fill, override
    from freehold.stages.chat.config import ChatConfig

    config = fill(ChatConfig, override({"path": args.path}, args.overrides), "chat")
    from freehold.stages.chat.run import chat

    chat(config)
    return 0


def _trace(args: argparse.Namespace) -> int:
    from freehold.run import trace

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
    from freehold.run import takedown

    run = _run_folder(args.run)
    answer = takedown.takedown(run, args.document, widen=args.widen)
    if args.apply:
        answer["applied"] = takedown.write_recipe(run, answer, args.out)
    if args.json:
        print(json.dumps(answer, indent=1))
    else:
        from freehold.run.trace_text import render_takedown

        print(render_takedown(answer, 120))
    return 0


def _rights(args: argparse.Namespace) -> int:
    from freehold.core.artifact import MANIFEST, read_manifest
    from freehold.core.config import fill, load_yaml
    from freehold.ledger.policy import Policy
    from freehold.run import policy_check, trace, trace_text

    run = _run_folder(args.run)

    def policy_of(stage: str) -> Policy:
        told = load_yaml(args.policy) if args.policy else read_manifest(run / stage).get("config", {}).get("policy", {})
        return fill(Policy, {**told, **({"uses": args.use} if args.use else {})}, str(args.policy or f"{stage}.policy"))

    policy = policy_of("gather")
    rewritten = policy_of("rephrase") if (run / "rephrase" / MANIFEST).exists() else None
    if args.of:
        groups = policy_check.checkpoint(run, trace.find_checkpoint(run, args.of) or args.of, policy, rewritten)
    else:
        groups = policy_check.corpus(run, policy, rewritten)
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

    graph = lineage.lineage(_run_folder(args.run))
    print(json.dumps(graph.to_dict(), indent=1) if args.json else lineage.draw(graph, mermaid=args.mermaid))
    return 0


def _card(args: argparse.Namespace) -> int:
    from freehold.run import card, disclosure

    run, told = _run_folder(args.run), card.read_told(args.told)
    kinds = list(dict.fromkeys(args.kind or disclosure.MAKERS))
    facts = card.facts(run)
    texts = disclosure.make(facts, told, kinds)
    folder = args.out or run / "card"
    if args.diff or args.check:
        if args.diff:
            old, name = disclosure.make(card.facts(_run_folder(args.diff)), told, kinds), args.diff.as_posix()
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

    run = _run_folder(args.run)
    print(report.write_report(run))
    print(report.summary(run))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from freehold.core.config import fill, override, unknown_key
    from freehold.planner import show
    from freehold.planner.config import PlanConfig, plan_of_recipe
    from freehold.planner.estimate import estimate, search
    from freehold.planner.published import PRESETS

    if args.recipe.endswith((".yaml", ".yml")):
        from freehold.run.recipe import resolve

        recipe = resolve(Path(args.recipe))
        data = plan_of_recipe(recipe.head.name, recipe.stages["pretrain"].config.model_dump(mode="json"))
    elif args.recipe in PRESETS:
        data = {"name": args.recipe, **PRESETS[args.recipe]}
    else:
        raise unknown_key("plan", args.recipe, [*PRESETS, "RECIPE.yaml"])
    config = fill(PlanConfig, override(data, args.overrides), "plan")
    proposals = search(config) if args.search else []
    plan = estimate(config)
    if args.picture:
        from freehold.core.artifact import write_atomic
        from freehold.run.figure import draw_plan

        write_atomic(args.picture, draw_plan(show.to_json(plan)))
    if args.json:
        degrees = {"search": [p.model_dump(mode="json") for p in proposals]} if args.search else {}
        print(json.dumps({**show.to_json(plan), **degrees}))
        return 0
    print(f"{plan['name']}\n\n{show.assumptions(config)}\n")
    for table in [*show.tables(plan), *([show.search_table(proposals)] if args.search else [])]:
        print(table.text())
    for sentence in plan["problems"]:
        print(sentence)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from freehold.run import verify

    answer = verify.verify_resume(
        args.recipe,
        args.overrides,
        first=args.first,
        more=args.more,
        worlds=args.world,
        tolerance=args.tolerance,
        keep=args.keep,
    )
    print(json.dumps(answer) if args.json else verify.table(answer))
    return 0 if answer["passed"] else 1


def _schema(args: argparse.Namespace) -> int:
    from freehold.run.layout import TALK

    stage = {**WALK, TALK.name: TALK, IMPORT: PUBLISHED}[args.stage]
    print(json.dumps(stage.config_class().model_json_schema(), indent=1))
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


if __name__ == "__main__":
    sys.exit(main())
