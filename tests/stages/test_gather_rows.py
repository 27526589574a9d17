from __future__ import annotations

import json
from pathlib import Path

import pytest
from gather_fixtures import (
    FREE,
    country,
    documents,
    gather,
    report,
)

from freehold.core.errors import DataError, LicenceError
from freehold.stages.gather.config import Folder, JsonLines
from freehold.stages.gather.origins import find
from freehold.stages.gather.rows import row_documents


def test_json_lines_are_judged_row_by_row(tmp_path: Path) -> None:
    own = {"licence": "MIT", "licence_evidence": "own work"}
    lines = [{"text": "one", **own}, {"text": "two"}, {"text": "three", **own, "licence": "GPL-3.0-only"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(LicenceError) as caught:
        gather(tmp_path / "out", {"rows": {"kind": "jsonl", "path": str(path)}})
    assert "rows, rows.jsonl#2: wrapper unknown, content unknown" in str(caught.value)
    assert "rows, rows.jsonl#3" in str(caught.value)
    assert "stops 2 of" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_bad_json_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "good"}\nnot json\n[1]\n{"text": ""}\n{"no": 1}\n{"text": "\xff"}\n')
        file.write(b'{"text": "' + b"x" * 30_000 + b'"}\n{"text": "last"}')
    gather(tmp_path / "out", {"rows": {"kind": "jsonl", "path": str(path), "max_document_bytes": 1000, **FREE}})
    assert sorted(r.text for r in documents(tmp_path / "out", "rows")) == ["good", "last"]
    skipped = report(tmp_path / "out", "rows")["skipped"]
    assert skipped["count"] == 6
    assert "rows.jsonl#7" in {s["path"] for s in skipped["named"]}
    capped = {"kind": "jsonl", "path": str(path), "max_document_bytes": 1000, "max_bytes": 5, **FREE}
    assert gather(tmp_path / "capped", {"rows": capped})["documents"] == 1
    wrong = {"kind": "jsonl", "path": str(path), "text_key": "body", **FREE}
    with pytest.raises(DataError, match=r"(?s)8 skipped: rows\.jsonl#1, not a JSON object with a `body`.*text_key"):
        gather(tmp_path / "wrong", {"rows": wrong})


def test_one_rule_says_what_is_no_text(tmp_path: Path) -> None:
    """A NUL in a file, in a row of JSON, or behind an escape that only a reader resolves."""
    reason = "binary: it has NUL characters"
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"text": "a\0b"}) + '\n{"text": 3}\n{"text": "a", "licence_evidence": "\\ud800"}\n{"text": "b"}'
    )
    gather(tmp_path / "rows", {"rows": {"kind": "jsonl", "path": str(path), **FREE}})
    assert [r.text for r in documents(tmp_path / "rows", "rows")] == ["b"]
    assert [s["reason"] for s in report(tmp_path / "rows", "rows")["skipped"]["named"]] == [
        reason,
        "its `text` is not text",
        "holds half a character (a lone surrogate)",
    ]
    book = tmp_path / "book"
    book.mkdir()
    (book / "a.json").write_text(country("Alia", 1))
    (book / "b.json").write_text(country("Bor", 2, History={"Past": "x\0" * 40}))
    (book / "c.json").write_text(country("Cen", 3, History={"Past": "\ud800" * 80}))
    folder = {"kind": "folder", "path": str(book), "members": ["*.json"], "reader": "factbook", **FREE}
    gather(tmp_path / "out", {"book": folder})
    assert [r.path for r in documents(tmp_path / "out", "book")] == ["a.json"]
    assert report(tmp_path / "out", "book")["skipped"]["named"] == [
        {"path": "b.json", "reason": reason},
        {"path": "c.json", "reason": "holds half a character (a lone surrogate)"},
    ]


def test_names_and_texts_that_are_not_unicode_are_skipped(tmp_path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_text("words")
    with open(folder.as_posix().encode() + b"/b\xffd.txt", "w") as file:
        file.write("words")
    source = Folder.model_validate(
        {"kind": "folder", "path": str(folder), "licence": "MIT", "licence_evidence": {"rule": "x"}}
    )
    origin = find("mine", source, tmp_path)
    assert [m.path for m in origin.members] == ["good.txt"]
    assert [reason for _, reason in origin.skipped] == ["its name is not UTF-8"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "half \\ud800 character"}\n{"text": "whole"}\n')
    lines = JsonLines.model_validate(
        {"kind": "jsonl", "path": str(rows), "licence": "MIT", "licence_evidence": {"rule": "x"}}
    )
    skipped: list[tuple[str, str]] = []
    assert [row.text for row in row_documents("mine", lines, skipped)] == ["whole"]
    assert skipped == [("rows.jsonl#1", "holds half a character (a lone surrogate)")]
