"""Five held-out questions at the end of a run, drawn by the commit: each with its answer and whether it is right.

The answers are those of the evaluation, which asked the finished checkpoint every held-out question. No one
chooses the five: the hash of the commit draws them, without git that of the recipe.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from freehold.core.artifact import read_manifest
from freehold.core.table import Table
from freehold.run.layout import EVALUATE, RunFolder
from freehold.stages.evaluate.config import MADE_BY

SETS: dict[str, tuple[str, str]] = {
    "taught fact": ("facts_taught", ""),
    "text-only fact": ("facts_text_only_open", ""),
    "unknown place": ("unknown_places", ""),
    "procedure": ("procedures", "!two_hop"),
    "two hops": ("procedures", "two_hop"),
}
"""What is asked: a task, and one of its parts (with ! any other part)."""
MOST_CHARS = 160


def five(run_folder: Path) -> Table | None:
    """Return the five questions of a run as a table; None when it did not evaluate such tasks."""
    run = RunFolder(run_folder)
    folder = run.stage(EVALUATE) / "answers"
    done = [path for name in reversed(MADE_BY) if (path := folder / f"{name}.jsonl").exists()]
    if not done or not run.finished(EVALUATE):
        return None
    answers = [json.loads(line) for line in done[0].read_text(encoding="utf-8").splitlines()]
    drawn_by, seed = _seed(run)
    rows = [_row(name, drawn) for name, (task, part) in SETS.items() if (drawn := _draw(answers, task, part, seed))]
    if not rows:
        return None
    return Table(
        f"Five questions to {done[0].stem}",
        ["held-out set", "question", "answer", "verdict"],
        rows,
        f"Drawn by {drawn_by} from the questions that training never asked; the rest: {done[0]}.",
        left=(0, 1, 2, 3),
    )


def _seed(run: RunFolder) -> tuple[str, str]:
    """Return what draws the questions, in words, and its hash: the commit of this code, else the recipe."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    if found:
        return f"commit {found[:10]}", found
    recipe = str(read_manifest(run.stage(EVALUATE))["config_sha256"])
    return f"the recipe's hash {recipe[:10]}", recipe


def _draw(answers: list[dict[str, Any]], task: str, part: str, seed: str) -> dict[str, Any] | None:
    """Return the answer whose id has the lowest hash under the seed."""
    within = [
        row
        for row in answers
        if row["task"] == task and (not part or (row["part"] == part.removeprefix("!")) != part.startswith("!"))
    ]
    return min(within, key=lambda row: hashlib.sha256(f"{seed}\0{row['id']}".encode()).digest(), default=None)


def _row(name: str, drawn: dict[str, Any]) -> list[str]:
    verdict = "right" if drawn["correct"] else f"wrong: {drawn['expected']}"
    return [name, _short(drawn["question"]), _short(drawn["answer"]), _short(verdict)]


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= MOST_CHARS else f"{one_line[:MOST_CHARS]}..."
