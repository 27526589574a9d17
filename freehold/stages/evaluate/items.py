"""Task items: their form on disk, when an answer counts, and how sure an accuracy is.

`tasks/<task>.jsonl`, one item a line. Its `task` names a part of the file's task (`gcd` in `reasoning`), for which
accuracy is counted apart as well; further keys are the writer's own notes:
- generate: `{"id", "task", "kind": "generate", "prompt": [message...], "answer": "42"}`
- choice: `{"id", "task", "kind": "choice", "prompt": [message...], "choices": ["a", "b"...], "answer": 1}`
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from freehold.core.errors import DataError
from freehold.core.statistics import Z95, wilson


class Item(pydantic.BaseModel):
    """One held-out item; `answer` is the text of a generate item and the index of a choice item."""

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore", strict=True)

    id: str
    task: str
    kind: Literal["generate", "choice"]
    prompt: list[dict[str, Any]] = pydantic.Field(min_length=1)
    answer: str | int
    choices: list[str] | None = None

    @pydantic.model_validator(mode="after")
    def _kind_fits(self) -> Item:
        if self.kind == "generate" and not (isinstance(self.answer, str) and self.choices is None):
            raise ValueError("a generate item has a text `answer` and no `choices`")
        if self.kind == "choice":
            if not isinstance(self.answer, int) or not self.choices or len(self.choices) < 2 or not all(self.choices):
                raise ValueError("a choice item has two or more non-empty `choices` and the index of one as `answer`")
            if not 0 <= self.answer < len(self.choices):
                raise ValueError("`answer` is not an index of `choices`")
        return self

    @property
    def chance(self) -> float:
        """Return how often blind guessing is right; 0 for generate items."""
        return 1 / len(self.choices) if self.choices else 0.0


def read_items(folder: Path, limit: int | None = None) -> dict[str, list[Item]]:
    """Return the items of each `<task>.jsonl` in `folder`, at most `limit` of each, in file order.

    DataError names file and line of what is not an item, and of an item whose kind differs from those before it.
    """
    found = {path.stem: _read(path, limit) for path in sorted(folder.glob("*.jsonl"))}
    return {task: items for task, items in found.items() if items}


def read_files(files: Mapping[str, Path], limit: int | None, taken: Container[str] = ()) -> dict[str, list[Item]]:
    """Return the items of task files by task name; DataError also for a missing or empty file and a name `taken`."""
    found = {}
    for task, path in files.items():
        if task in taken or not path.is_file():
            raise DataError(
                "a task of this name is there already" if task in taken else "no such task file",
                where=f"evaluate.files.{task}",
                found=path,
                todo="give another name" if task in taken else "mend the path",
            )
        found[task] = _read(path, limit)
        if not found[task]:
            raise DataError("a task file is empty", where=path, expected="one item a line")
    return found


def _read(path: Path, limit: int | None) -> list[Item]:
    items: list[Item] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:limit], 1):
        try:
            item = Item.model_validate(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError("a task item is not JSON", where=f"{path}:{number}", found=error) from error
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            found = f"{'.'.join(map(str, problem['loc'])) or 'item'}: {problem['msg']}"
            raise DataError("not a task item", where=f"{path}:{number}", found=found) from error
        if items and item.kind != items[0].kind:
            raise DataError(
                "a task file holds items of one kind",
                where=f"{path}:{number}",
                found=item.kind,
                expected=items[0].kind,
            )
        items.append(item)
    return items


def normalise(text: str) -> str:
    """Return an answer in the form in which it is compared: one line, single spaces, no case, no final dot."""
    return " ".join(text.split()).casefold().rstrip(".").rstrip()


def macro(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean accuracy of a task's parts, each counting the same, and its 95 % interval.

    The interval is that of a mean of independent shares, by the normal approximation.
    """
    shares = [(part["accuracy"], part["items"]) for part in parts.values()]
    mean = sum(share for share, _ in shares) / len(shares)
    error = math.sqrt(sum(share * (1 - share) / items for share, items in shares)) / len(shares)
    low, high = max(0.0, mean - Z95 * error), min(1.0, mean + Z95 * error)
    return {"macro": round(mean, 6), "macro_low": round(low, 6), "macro_high": round(high, 6)}


def score(correct: list[bool], chances: list[float]) -> dict[str, Any]:
    """Return items, correct, accuracy, its 95 % interval (`low`, `high`) and the chance level."""
    low, high = wilson(sum(correct), len(correct))
    return {
        "items": len(correct),
        "correct": sum(correct),
        "accuracy": round(sum(correct) / len(correct), 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "chance": round(sum(chances) / len(chances), 6),
    }
