"""Which code made which part of a stage: recorded as spans, so that a run survives an update of the program.

What decides bytes by contract has a version of its own (`CONTRACT` in a module); everything else may change under a
run that is started or finished. Each span is [first step or part, hash of the source, version of Freehold].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from freehold.core.version import VERSION


@dataclass(frozen=True)
class Span:
    """The code that made a stage from `first` on, up to the next span."""

    first: int
    sha256: str
    version: str = ""
    """Empty: of a manifest that did not record it."""

    def __str__(self) -> str:
        """Return version and hash, short."""
        return f"freehold {self.version or 'unknown'} ({self.sha256[:8]})"

    def to_dict(self) -> dict[str, Any]:
        """Return the span as a manifest keeps it."""
        return asdict(self)


def read_spans(record: Mapping[str, Any]) -> tuple[Span, ...]:
    """Return the spans of a manifest or key file; one of before there were spans has a single hash."""
    if "code" in record:
        return tuple(Span(int(s["first"]), str(s["sha256"]), str(s["version"])) for s in record["code"])
    old = record.get("code_sha256")
    return (Span(0, str(old), str(record.get("freehold_version", ""))),) if old else ()


def add_span(spans: tuple[Span, ...], first: int, sha256: str) -> tuple[Span, ...]:
    """Return the spans when this program continues at `first`; unchanged when its code made the last part too."""
    if spans and spans[-1].sha256 == sha256:
        return spans
    kept = tuple(span for span in spans if span.first < first)  # a span without a step or part made nothing
    return (*kept, Span(first, sha256, VERSION))


def other_code(record: Mapping[str, Any], sha256: str) -> str:
    """Return what made a stage when that is not this program's code, as `theirs -> ours`; else an empty text."""
    others = [span for span in read_spans(record) if span.sha256 != sha256]
    return f"{', '.join(map(str, others))} -> {Span(0, sha256, VERSION)}" if others else ""


def other_contract(recorded: Mapping[str, int], current: Mapping[str, int]) -> list[str]:
    """Return one line for each contract version that differs; a module without one has version 1."""
    names = sorted({*recorded, *current})
    pairs = {name: (recorded.get(name, 1), current.get(name, 1)) for name in names}
    return [f"contract.{name}: {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
