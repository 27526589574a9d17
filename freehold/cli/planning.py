"""`freehold plan NAME --serve`, `--adapt` and `--whole`, and `freehold plan all`: what a plan says beyond a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from freehold.core.errors import ConfigError
from freehold.core.table import Table

if TYPE_CHECKING:
    from freehold.planner.config import PlanConfig

ALL = "all"
"""The name that stands for every preset."""


def part_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the parts of a plan beyond the run."""
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--serve", action="store_true", help="which machines hold it, tokens a second, long contexts")
    part.add_argument("--adapt", action="store_true", help="LoRA and QLoRA by format and place of the experts")
    part.add_argument("--whole", action="store_true", help="curation, synthesis, rollouts, evaluation, interconnect")


def asks_part(args: argparse.Namespace) -> bool:
    """Whether a part is asked for, not the run."""
    return bool(args.serve or args.adapt or args.whole or args.recipe == ALL)


def plan_all(args: argparse.Namespace) -> int:
    """Print the table of all presets."""
    from freehold.planner.whole import presets_table

    return _print([presets_table()], args.json)


def plan_part(args: argparse.Namespace, config: PlanConfig) -> int:
    """Print one part of a plan; ConfigError for a shape whose layers are not AFMoE's."""
    from freehold.model.config import PRESETS
    from freehold.planner import adapting, serving, whole

    if config.parts:
        raise ConfigError(
            "the model is of another architecture", where=f"freehold plan {config.name}",
            expected="an AFMoE shape: caches and adapters are counted by its layers",
        )  # fmt: skip
    models = {**PRESETS, config.name: config.model}
    if args.serve:
        return _print(
            serving.serve_tables(config.name, models), args.json, rows=serving.serve_json(config.name, models)
        )
    if args.adapt:
        return _print(adapting.adapt_tables(config), args.json, said=adapting.qlora_answer(config))
    if not config.tokens:
        raise ConfigError("the plan has no tokens", where="tokens", expected="tokens=... of the run")
    return _print([whole.whole_table(config, PRESETS["mini"]), whole.interconnect(config)], args.json)


def _print(tables: Sequence[Table], as_json: bool, said: str = "", rows: object = None) -> int:
    if as_json:
        plain = [{"title": t.title, "header": t.header, "rows": t.rows, "note": t.note} for t in tables]
        print(json.dumps({"tables": plain, "said": said, "data": rows}))
        return 0
    for table in tables:
        print(table.text())
    if said:
        print(said)
    return 0
