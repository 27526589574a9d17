"""Five questions at the end of a run: drawn by the commit, shown with a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from freehold.core.artifact import write_manifest
from freehold.run import questions


def answer(task: str, part: str, number: int, correct: bool) -> dict[str, Any]:
    return {
        "id": f"{task}/{part}/{number}", "task": task, "part": part, "question": f"{part} {number}?\nIn short.",
        "expected": "yes", "answer": "yes" if correct else "no", "correct": correct,
    }  # fmt: skip


def evaluated(folder: Path, rows: list[dict[str, Any]], name: str = "preview") -> Path:
    path = folder / "evaluate" / "answers" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_manifest(folder / "evaluate", kind="evaluate", config_sha256="ab" * 32)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    rows = [answer("facts_taught", "capital", n, True) for n in range(30)]
    rows += [answer("procedures", part, n, False) for part in ("sorting", "two_hop") for n in range(30)]
    return evaluated(tmp_path, rows)


def test_verdict_says_what_would_have_been_right(run_folder: Path) -> None:
    table = questions.five(run_folder)
    assert table is not None
    assert [row[0] for row in table.rows] == ["taught fact", "procedure", "two hops"]
    assert [row[3] for row in table.rows] == ["right", "wrong: yes", "wrong: yes"]
    assert table.rows[0][1].startswith("capital ")
    assert table.rows[1][1].startswith("sorting ")
    assert table.rows[2][1].endswith("? In short.")


def test_another_commit_draws_other_questions(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(commit: str) -> list[str]:
        monkeypatch.setattr(questions, "_seed", lambda run: (commit, commit))
        table = questions.five(run_folder)
        assert table is not None
        return [row[1] for row in table.rows]

    assert drawn("a" * 40) == drawn("a" * 40)
    assert len({tuple(drawn(letter * 40)) for letter in "abcdef"}) > 3


def test_without_git_the_recipe_draws(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    table = questions.five(run_folder)
    assert table is not None
    assert "recipe's hash abababab" in table.note


def test_thinking_is_asked_where_there_is_one(run_folder: Path) -> None:
    evaluated(run_folder, [answer("unknown_places", "capital", 1, True)], "thinking")
    table = questions.five(run_folder)
    assert table is not None
    assert [row[0] for row in table.rows] == ["unknown place"]
    assert "thinking" in table.title


def test_run_without_such_tasks_shows_none(tmp_path: Path) -> None:
    assert questions.five(tmp_path) is None
    assert questions.five(evaluated(tmp_path, [answer("reasoning", "gcd", 1, True)])) is None
