"""Gates: limits that a recipe or a promotion sets on measured figures, decided in one way everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from freehold.core.config import Config, unknown_key


class Gate(Config):
    """A limit on one figure; of a figure with an interval, `bound` says which end must keep it."""

    most: float | None = Field(None, description="the figure may not be above this")
    least: float | None = Field(None, description="the figure may not be below this")
    bound: Literal["value", "low", "high"] = Field("value", description="the estimate, or an end of its 95 % interval")

    @model_validator(mode="after")
    def _says_something(self) -> Gate:
        if self.most is None and self.least is None:
            raise ValueError("a gate needs `most` or `least`")
        return self


@dataclass(frozen=True)
class Verdict:
    """What a gate says of a figure."""

    metric: str
    found: float
    gate: Gate
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        limits = self.gate.model_dump(exclude_none=True)
        return {"metric": self.metric, "found": self.found, **limits, "passed": self.passed}


def decide(gates: Mapping[str, Gate], figures: Mapping[str, Any], where: str) -> list[Verdict]:
    """Return the verdict of each gate; ConfigError for one on a figure that was not measured."""
    verdicts = []
    for metric, gate in sorted(gates.items()):
        if metric not in figures:
            raise unknown_key(where, metric, sorted(figures))
        figure = figures[metric]
        found = float(figure[gate.bound] if isinstance(figure, Mapping) else figure)
        passed = (gate.most is None or found <= gate.most) and (gate.least is None or found >= gate.least)
        verdicts.append(Verdict(metric, found, gate, passed))
    return verdicts
