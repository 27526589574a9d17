"""`freehold experts`, `prune`, `grow` and `retrain`: what experts do, and models made from others."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freehold.cli.exporting import model_folder, run_of
from freehold.cli.parser import verb
from freehold.core.config import fill, override
from freehold.core.errors import ConfigError, DataError
from freehold.run.layout import TOKENIZE, RunFolder

if TYPE_CHECKING:
    from freehold.stages.reshape.model import Opened

EXPERTS = """examples:
  freehold experts runs/laptop --text law.txt --output out/experts.json           one domain, next to held-out text
  freehold experts MODEL/ --text law.txt --text code.txt --reference all.txt --output out/experts.json
Writes the scores as JSON, a picture next to it (.png), and bits per token with fewer experts a token.
More: docs/domains.md"""
PRUNE = """examples:
  freehold prune runs/laptop keep=8 --text law.txt --output out/law
  freehold prune MODEL/ keep=64 score=saliency --text law.txt --other code.txt --output out/law
The folder is a checkpoint: serve, export, align and a recipe's pretrain.parent take it. More: docs/domains.md"""
GROW = """examples:
  freehold grow runs/laptop/pretrain/base experts=32 --output out/grown       copies; the same function at step 0
  freehold grow dense/ experts=7 --output out/moe                            dense layers cut into experts
Then train it: a recipe that begins with `base: out/grown/recipe.yaml`. More: docs/retrain.md"""


RETRAIN = """examples:
  freehold retrain runs/laptop --with law.yaml                        branch off the stable phase, 5 % replay
  freehold retrain runs/laptop --with law.yaml --from final --replay 0.25
RECIPE has a name and gather.sources; the rest comes from the run. Nothing that was taken down is replayed.
More: docs/retrain.md"""


def add_reshaping(verbs: Any) -> None:
    """Add the verbs of this module to the parser."""
    experts = verb(
        verbs, "experts", "what each expert does for a domain: share, mass, saliency, lift; a picture", _experts
    )
    _common(experts, EXPERTS)
    _texts(experts, several=True)
    experts.add_argument("--output", type=Path, required=True, metavar="FILE", help="report to write (.json)")
    prune = verb(verbs, "prune", "a model with fewer experts, chosen by a domain, next to random controls", _prune)
    _common(prune, PRUNE)
    _texts(prune, several=False)
    prune.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder of the new checkpoint")
    grow = verb(verbs, "grow", "a model with more experts that computes the same at first", _grow)
    _common(grow, GROW)
    grow.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder of the new checkpoint")
    _add_retrain(verbs)
    for parser in (prune, grow):
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")


def _add_retrain(verbs: Any) -> None:
    retrain = verb(verbs, "retrain", "teach a run's model new sources, with replay of its old ones", _retrain)
    retrain.epilog, retrain.formatter_class = RETRAIN, argparse.RawDescriptionHelpFormatter
    retrain.add_argument("path", type=Path, help="run folder")
    retrain.add_argument(
        "--with", type=Path, required=True, dest="recipe", metavar="RECIPE", help="recipe of new sources"
    )
    retrain.add_argument(
        "--from", choices=["stable", "final"], default="stable", dest="start", help="where it branches"
    )
    retrain.add_argument("--replay", type=float, default=0.05, metavar="SHARE", help="of the tokens (default 0.05)")
    retrain.add_argument(
        "--sources", action="append", default=[], metavar="NAME", help="old source to replay; repeatable (default: all)"
    )
    retrain.add_argument("--steps", type=int, default=200, metavar="N", help="optimizer steps in all (default 200)")
    retrain.add_argument("--usd-hour", type=float, default=0.0, metavar="USD", help="price of an hour of this machine")
    retrain.add_argument("--dry-run", action="store_true", help="draw the replay and write the recipe; train nothing")
    retrain.add_argument("--json", action="store_true", help="machine-readable result on stdout")


def _common(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.epilog, parser.formatter_class = examples, argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", type=Path, help="run folder, checkpoint, or Hugging Face folder")
    parser.add_argument("--json", action="store_true", help="machine-readable report on stdout")


def _texts(parser: argparse.ArgumentParser, *, several: bool) -> None:
    extra: dict[str, Any] = {"action": "append"} if several else {}
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text of the domain", **extra)
    if several:
        parser.add_argument("--reference", type=Path, metavar="FILE", help="text of all domains, for the lift "
                            "(default: the held-out text of the run)")  # fmt: skip
    else:
        parser.add_argument("--other", type=Path, action="append", default=[], metavar="FILE", help="text outside the "
                            "domain, for the report (default: the held-out text of the run)")  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=32_768, metavar="N", help="most tokens of each text (default 32768)"
    )


class _Reader:
    """Turns texts into chunks of ids for a model."""

    def __init__(self, parent: Opened, tokens: int) -> None:
        from freehold.tokenizer.bpe import Tokenizer

        self.parent, self.tokens, self.tokenizer = parent, tokens, Tokenizer.load(parent.folder)
        self.begin = list(parent.facts.get("begins_with") or self.tokenizer.prefix)

    def file(self, path: Path) -> list[list[int]]:
        """Return the chunks of a file."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("not a text file", where=path, found=error, expected="UTF-8 text") from error
        return self.ids(self.tokenizer.encode(text))

    def ids(self, ids: list[int]) -> list[list[int]]:
        """Return the chunks of some ids."""
        from freehold.stages.reshape.scores import chunks_of

        return chunks_of(ids, self.begin, self.tokens)

    def held_out(self, path: Path) -> list[list[int]] | None:
        """Return the chunks of a run's held-out text; None for a model that is in no run."""
        run = run_of(self.parent.folder)
        if run is None or not RunFolder(run).finished(TOKENIZE):
            return None
        from freehold.data.shards import ShardSet

        shards = ShardSet.load(RunFolder(run).stage(TOKENIZE) / "tokens").shards
        parts = [(shard.tokens(0, shard.counts["tokens"])) for (_, split), shard in shards.items() if split != "train"]
        each = max(1, self.tokens // max(1, len(parts)))
        return self.ids([int(i) for part in parts for i in part[:each]])


def _experts(args: argparse.Namespace) -> int:
    """Score the experts of a model by domain."""
    if args.output.suffix != ".json" or args.tokens < 2:
        raise ConfigError(
            "not what a report of experts can do", where="--output, --tokens", found=f"{args.output}, {args.tokens}",
            expected="FILE.json, at least 2 tokens",
        )  # fmt: skip
    from freehold.core.artifact import write_atomic, write_json
    from freehold.run.figure import draw_experts
    from freehold.stages.reshape.model import open_model
    from freehold.stages.reshape.report import experts_report

    parent = open_model(model_folder(args.path))
    reader = _Reader(parent, args.tokens)
    chunks = {path.stem: reader.file(path) for path in args.text}
    reference = reader.file(args.reference) if args.reference else reader.held_out(args.path)
    found = experts_report(parent, chunks, reference)
    write_json(args.output, found)
    write_atomic(args.output.with_suffix(".png"), draw_experts(found))
    print(json.dumps(found) if args.json else _experts_text(found, args.output))
    return 0


def _experts_text(found: dict[str, Any], output: Path) -> str:
    lines = [f"{output}: {len(found['domains'])} domains, {found['experts']} experts, {found['top_k']} a token"]
    for name, domain in found["domains"].items():
        lines.append(f"{name}: a quarter of the experts has {100 * domain['quarter']:.0f} % of the gate mass")
        lines += [f"  {what}: {row['bits']:.4f} bits a token, {row['experts']:.2f} experts a token"
                  for what, row in domain["fewer"].items()]  # fmt: skip
    return "\n".join(lines)


def _prune(args: argparse.Namespace) -> int:
    """Prune a model and report what it cost."""
    from freehold.stages.reshape.config import PruneConfig

    settings = fill(PruneConfig, override({"tokens": args.tokens}, args.overrides), "prune")
    from freehold.stages.reshape.model import open_model, save_model
    from freehold.stages.reshape.prune import prune, report_table

    parent = open_model(model_folder(args.path))
    reader = _Reader(parent, settings.tokens)
    chunks = {args.text.stem: reader.file(args.text)} | {path.stem: reader.file(path) for path in args.other}
    if not args.other and (held := reader.held_out(args.path)):
        chunks["held-out"] = held
    config, state, report = prune(parent, chunks, settings)
    save_model(args.output, parent, config, state, report, _record(parent.folder))
    print(json.dumps(report) if args.json else report_table(report).text() + f"wrote {args.output}")
    return 0


def _grow(args: argparse.Namespace) -> int:
    """Grow a model, and prove that it computes the same."""
    from freehold.stages.reshape.config import GrowConfig

    settings = fill(GrowConfig, override({}, args.overrides), "grow")
    from freehold.stages.reshape.grow import grow
    from freehold.stages.reshape.model import open_model, save_model
    from freehold.stages.reshape.report import largest_difference

    parent = open_model(model_folder(args.path))
    config, state = grow(parent.config, parent.state, settings)
    jump = largest_difference(parent, config, state)
    made = {"how": "grown", "experts": [parent.config.num_experts, config.num_experts], "largest_difference": jump,
            "settings": settings.model_dump(mode="json")}  # fmt: skip
    save_model(args.output, parent, config, state, made, _record(parent.folder))
    print(json.dumps(made) if args.json else
          f"{args.output}: {config.num_experts} experts, largest difference of a logit {jump:.1e}")  # fmt: skip
    return 0


def _retrain(args: argparse.Namespace) -> int:
    """Draw replay, write the recipe, train, and compare."""
    from freehold.run import retrain

    request = retrain.Request(args.path, args.recipe, args.start, args.replay, tuple(args.sources), args.steps)
    path = retrain.write_recipe(request)
    if args.dry_run:
        print(json.dumps({"recipe": str(path)}) if args.json else f"{path}\nfreehold run {path}")
        return 0
    from freehold.run import processes, walk
    from freehold.run.recipe import resolve

    plan = resolve(path)
    with processes.locked(plan.run) as lock:
        walk.run_walk(plan, processes.Options(quiet=args.json), lock)
        found = retrain.compare(args.path, plan.run_folder)
        table = retrain.write_report(plan.run_folder, found, args.usd_hour)
    print(json.dumps({"run": str(plan.run_folder), **found}) if args.json else table.text())
    return 0


def _record(folder: Path) -> dict[str, Any]:
    """Return the record of rights of a model, which its descendants inherit."""
    from freehold.run.ancestry import record_of

    return record_of(folder).to_dict()
