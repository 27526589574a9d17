"""What a file of conversations holds, before anything is trained on it: counts, lengths, and refused rows by number."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freehold.conversations.files import format_of, read
from freehold.conversations.formats import Format
from freehold.conversations.invariants import violations
from freehold.conversations.messages import Message
from freehold.tokenizer.chat import render, render_ids

if TYPE_CHECKING:
    from freehold.tokenizer.bpe import Tokenizer

SHOWN = 20
"""Refused rows that the text form names; the JSON form names all."""
PERCENTILES = (5, 50, 95, 100)


@dataclass
class Survey:
    """What was counted over the rows of one file."""

    path: Path
    format: Format
    rows: int = 0
    refused: list[tuple[int, str]] = field(default_factory=list)
    roles: Counter[str] = field(default_factory=Counter)
    """Messages by role."""
    with_reasoning: int = 0
    with_tools: int = 0
    duplicates: int = 0
    turns: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    learned: list[float] = field(default_factory=list)
    """Share of each row's tokens that carry loss; empty without a tokenizer."""
    broken: list[tuple[int, str]] = field(default_factory=list)
    """Rows that break an invariant of the template, and which."""
    unit: str = "characters"

    @property
    def passed(self) -> bool:
        """Return whether every row can be learned from."""
        return self.rows > 0 and not self.refused and not self.broken

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for programs."""
        return {
            "file": str(self.path),
            "format": self.format,
            "rows": self.rows,
            "refused": [{"row": number, "reason": reason} for number, reason in self.refused],
            "roles": dict(sorted(self.roles.items())),
            "with_reasoning": self.with_reasoning,
            "with_tools": self.with_tools,
            "duplicates": self.duplicates,
            "turns": percentiles(self.turns),
            self.unit: percentiles(self.lengths),
            "learned_share": percentiles([round(share, 4) for share in self.learned]),
            "broken": [{"row": number, "invariant": name} for number, name in self.broken],
            "passed": self.passed,
        }

    def text(self) -> str:
        """Return the figures for readers."""
        good = self.rows - len(self.refused)
        lines = [
            f"{self.path}: {self.rows:,} rows of {self.format}, {good:,} can be used, {self.duplicates:,} come twice",
            "messages: " + ", ".join(f"{count:,} {role}" for role, count in self.roles.most_common()),
            f"with reasoning: {_share(self.with_reasoning, good)}, with tools: {_share(self.with_tools, good)}",
            f"turns: {_shown(self.turns)}; {self.unit}: {_shown(self.lengths)}",
        ]
        if self.learned:
            lines.append(f"share of tokens learned: {_shown([round(share, 3) for share in self.learned])}")
        lines += [f"row {number} refused: {reason}" for number, reason in self.refused[:SHOWN]]
        lines += [f"row {number}: not so: {name}" for number, name in self.broken[:SHOWN]]
        if len(self.refused) > SHOWN:
            lines.append(f"... and {len(self.refused) - SHOWN:,} more rows refused; --json names all")
        return "\n".join(lines)


def survey(path: Path, named: str = "auto", tokenizer: Tokenizer | None = None) -> Survey:
    """Read a file and count; lengths are tokens where a tokenizer is given. DataError when it has no known format."""
    found = Survey(path, format_of(path, named), unit="tokens" if tokenizer else "characters")
    seen: set[bytes] = set()
    for row in read(path, found.format):
        found.rows += 1
        if row.made is None:
            found.refused.append((row.number, row.reason))
            continue
        messages = row.made.messages
        digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()
        found.duplicates += digest in seen
        seen.add(digest)
        _count(found, messages, tokenizer)
    return found


def _count(found: Survey, messages: Sequence[Message], tokenizer: Tokenizer | None) -> None:
    found.roles.update(message["role"] for message in messages)
    found.turns.append(sum(message["role"] == "user" for message in messages))
    found.with_reasoning += any("reasoning_content" in message for message in messages)
    tools = messages[0].get("tools")
    found.with_tools += bool(tools) or any("tool_calls" in message for message in messages)
    if tokenizer is None:
        found.lengths.append(len(render(messages, tools=tools)))
        return
    ids, mask = render_ids(tokenizer, messages, tools=tools)
    found.lengths.append(len(ids))
    found.learned.append(sum(mask) / len(ids))
    if learns(messages):
        found.broken += [(found.rows, name) for name in violations(tokenizer, messages, (ids, mask))]


def learns(messages: Sequence[Message]) -> bool:
    """Return whether a row is a conversation to learn from, not a task or a pair."""
    said = [message for message in messages if message["role"] == "assistant" and message.get("train") is not False]
    return bool(said) and not any({"rejected", "label"} & set(message) for message in said)


def percentiles(values: Iterable[float]) -> Mapping[str, float]:
    """Return the 5th, 50th, 95th and 100th percentile, each a value that occurs."""
    ordered = sorted(values)
    return {f"p{p}": ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES} if ordered else {}


def _shown(values: Iterable[float]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in percentiles(values).items()) or "none"


def _share(count: int, rows: int) -> str:
    return f"{count:,} ({100 * count / rows:.0f} %)" if rows else str(count)
