"""Settings of the guardrails; imports without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from freehold.core.config import Config
from freehold.guard.personal import EVERYTHING

Place = Literal["prompt", "tools", "answer"]
Action = Literal["block", "redact", "flag"]
MOST_RULES = 100


class _Rule(Config):
    on: tuple[Place, ...] = Field(
        ("prompt", "tools", "answer"), min_length=1, description="Where it looks: prompts, tool results, answers."
    )
    action: Action = Field(
        "block", description="block: nothing of the answer is shown; redact: it is replaced; flag: it is counted."
    )


class PersonalRule(_Rule):
    """Personal data and secrets, as curate finds them."""

    kind: Literal["personal"] = "personal"
    find: tuple[str, ...] = Field(EVERYTHING, description=f"Which: {', '.join(EVERYTHING)}.")
    action: Action = Field("redact", description="As for every rule.")

    @field_validator("find")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(EVERYTHING))
        if unknown:
            raise ValueError(f"{unknown[0]} is no kind of personal data; there are: {', '.join(EVERYTHING)}")
        return value


class PatternRule(_Rule):
    """Regular expressions of the owner."""

    kind: Literal["pattern"] = "pattern"
    patterns: tuple[str, ...] = Field(min_length=1, description="Regular expressions; (?i) ignores case.")

    @field_validator("patterns")
    @classmethod
    def _compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                empty = re.compile(pattern).search("") is not None
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
            if empty:
                raise ValueError(f"{pattern!r} matches the empty text, so it would be found everywhere")
        return value


class TakedownRule(_Rule):
    """What was asked to be removed, as hashes of word spans: said no more, from the day of the request."""

    kind: Literal["takedown"] = "takedown"
    filter: Path = Field(description="The file that `freehold takedown --filter` writes; read again when it changes.")
    on: tuple[Place, ...] = Field(("answer",), min_length=1, description="As for every rule.")


Rule = Annotated[PersonalRule | PatternRule | TakedownRule, Field(discriminator="kind")]


class GuardConfig(Config):
    """Which rules hold on which route."""

    rules: dict[str, Rule] = Field(default_factory=dict, max_length=MOST_RULES, description="By a name of your own.")
    routes: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="Names of rules by route, e.g. /v1/completions; other routes have all rules."
    )
    hold: Literal["auto", "answer", "window"] = Field(
        "auto",
        description="answer: judged when complete; window: shown as soon as two passages were judged, so that a block "
        "can come after what stands before it. auto = answer where a rule blocks answers, else window.",
    )
    message: str = Field("This answer was withheld by a policy.", description="What is shown in place of an answer.")
    budget_ms: float = Field(50, gt=0, description="A judgement that takes longer is logged and counted.")

    @model_validator(mode="after")
    def _known_rules(self) -> GuardConfig:
        for route, names in self.routes.items():
            for name in names:
                if name not in self.rules:
                    raise ValueError(f"routes.{route} names {name}, which is no rule; rules: {', '.join(self.rules)}")
        return self
