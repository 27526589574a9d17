"""What a dry run shows: thirty lines that matter first, then every setting."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from freehold.core.config import to_yaml
from freehold.core.errors import ArtifactError, ConfigError
from freehold.core.log import printable
from freehold.run.layout import PRETRAIN, TOKENIZE
from freehold.run.recipe import Plan
from freehold.run.walk import state_of

MOST_OF_STAGE = (2, 4)
"""Lines shown of a stage, and of pre-training: with nine stages, thirty in all."""


@dataclass(frozen=True)
class StageView:
    """One stage of a dry run."""

    state: str
    """done | stale | damaged | started | absent | waits for its inputs"""
    changes: list[str]
    plan: list[str]
    config: dict[str, Any]


def look(plan: Plan, stages: list[str], *, strict_code: bool = False) -> dict[str, StageView]:
    """Return what each stage would do; a stage whose inputs will be made again is stale, whatever its folder says.

    Raises ConfigError for what is wrong with the recipe already now.
    """
    if PRETRAIN in stages:
        check_vocabulary(plan)
    views: dict[str, StageView] = {}
    again: dict[str, str] = {}  # stages that will be made again, and why
    for name in plan.stages:  # the inputs of a stage asked for count, asked for or not
        each = plan.stages[name]
        try:
            found = state_of(each, strict_code=strict_code)
            state, changes = str(found.what), list(found.changes)
        except ArtifactError:
            state, changes = "waits for its inputs", []
        stale = [i for i in each.stage.inputs if i in again]
        if stale and state in ("done", "started"):
            state, changes = "stale", [f"inputs.{i}: {again[i]}" for i in stale]
        if state != "done":
            again[name] = f"{state}, so it is made again"
        if name in stages:
            views[name] = StageView(state, changes, each.stage.plan(each.config), each.config.model_dump(mode="json"))
    return views


def check_vocabulary(plan: Plan) -> None:
    """Raise ConfigError when the model has not as many ids as the tokenizer that the recipe trains."""
    wanted, model = plan.stages[TOKENIZE].config, plan.stages[PRETRAIN].config.model
    if wanted.tokenizer is None and wanted.vocab_size != model.vocab_size:
        raise ConfigError(
            "the model and the tokenizer disagree about the vocabulary",
            where="pretrain.model.vocab_size",
            found=model.vocab_size,
            expected=f"{wanted.vocab_size}, as tokenize.vocab_size says",
            todo=f"set pretrain.model.vocab_size={wanted.vocab_size}, or tokenize.vocab_size={model.vocab_size}",
        )


def to_dict(plan: Plan, views: dict[str, StageView]) -> dict[str, Any]:
    """Return the view for programs."""
    return {"run": str(plan.run_folder), "stages": {name: asdict(view) for name, view in views.items()}}


def text(plan: Plan, views: dict[str, StageView]) -> str:
    """Return the view for people: states, what they imply, differences; then the filled recipe."""
    lines = [f"{plan.run_folder}, until {plan.head.until}"]
    for name, view in views.items():
        most = MOST_OF_STAGE[name == PRETRAIN]
        shown = [*(f"changed: {change}" for change in view.changes), *view.plan]
        if len(shown) == 1:
            lines.append(f"{name}: {view.state}; {shown[0]}")
            continue
        lines += [f"{name}: {view.state}", *(f"  {line}" for line in shown[:most])]
        if len(shown) > most:
            lines[-1] += f" (and {len(shown) - most} more lines with --json)"
    settings = {**plan.head.model_dump(mode="json"), **{name: view.config for name, view in views.items()}}
    return printable("\n".join([*lines, "", "every setting, as filled:", to_yaml(settings)]))
