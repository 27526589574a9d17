"""Documents that their sites reserve today are skipped, with rule and date, and counted by site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gather_fixtures import FREE, WORDS, documents, gather, report
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.core.errors import ConfigError, DataError
from freehold.ledger.reservations import Snapshot, host_and_path, matches

ROBOTS = """# robots of a site
User-agent: GPTBot
User-agent: CCBot
Disallow: /private/
Allow: /private/press/

User-agent: *
Disallow: /*.cgi$
Disallow:
"""


def snapshot(folder: Path, **files: str) -> Snapshot:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Snapshot(folder, "2026-11-01")


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("https://a.example/private/x.html", 4),
        ("http://A.EXAMPLE./private/x.html?y=1", 4),
        ("https://a.example/%70rivate/x", 4),
        ("https://www.a.example/private/", 4),
        ("https://a.example/private/press/1", None),
        ("https://a.example/run.cgi", 8),
        ("https://a.example/run.cgi?x=1", None),
        ("https://a.example/open", None),
        ("https://b.example/private/", None),
        ("ftp://a.example/private/", None),
        ("a.example/private", None),
        ("https://[::1", None),
    ],
)
def test_robots_rules_hold_by_agent_and_length(address: str, line: int | None, tmp_path: Path) -> None:
    rule = snapshot(tmp_path, **{"a.example/robots.txt": ROBOTS}).rule(address)
    assert (rule and rule.place.rpartition("/")[2]) == (line and f"robots.txt:{line}")


@pytest.mark.parametrize(
    ("file", "text", "place"),
    [
        ("robots.txt", "User-agent: *\nDisallow: /\n", "robots.txt:2"),
        ("robots.txt", "\ufeffuser-agent:gptbot\ndisallow:/ # all\n", "robots.txt:2"),
        ("robots.txt", "User-agent: *\nContent-Signal: search=yes, ai-train=no\n", "robots.txt:2"),
        ("robots.txt", "User-agent: *\nDisallowAITraining: /\n", "robots.txt:2"),
        ("ai.txt", "User-Agent: *\nDisallow: *.html\n", "ai.txt:2"),
        ("tdmrep.json", '[{"location": "/texts/*", "tdm-reservation": 1}]', "tdmrep.json#1"),
        (".well-known/tdmrep.json", '[{"location": "/", "tdm-reservation": 1}]', "tdmrep.json#1"),
        ("headers.json", '{"/texts/": {"TDM-Reservation": "1"}}', "headers.json, /texts/"),
        ("headers.json", '{"/": {"X-Robots-Tag": "noindex, noai"}}', "headers.json, /"),
        ("robots.txt", "User-agent: *\nDisallow:\n", None),
        ("robots.txt", "User-agent: SomeSearch\nDisallow: /\n", None),
        (
            "tdmrep.json",
            '[{"location": "/texts/", "tdm-reservation": 0}, {"location": "/", "tdm-reservation": 1}]',
            None,
        ),
        ("tdmrep.json", "not JSON", None),
        ("headers.json", '["/"]', None),
    ],
)
def test_every_form_of_reservation_is_read(file: str, text: str, place: str | None, tmp_path: Path) -> None:
    rule = snapshot(tmp_path, **{f"a.example/{file}": text}).rule("https://a.example/texts/one.html")
    assert (rule and rule.place) == (place and f"a.example/{place}")


@settings(max_examples=60, deadline=None)
@given(st.text("ab/*$", max_size=8), st.text("ab/", max_size=8))
def test_patterns_match_as_written(pattern: str, path: str) -> None:
    import re

    body = pattern.removesuffix("$")
    want = re.match("".join(".*" if c == "*" else re.escape(c) for c in body) + ("$" if pattern != body else ""), path)
    assert matches(pattern, path) == bool(want)


def test_patterns_of_many_stars_take_linear_time() -> None:
    assert not matches("/" + "a*" * 10_000 + "b$", "/" + "a" * 30_000)


def test_addresses_cannot_leave_the_snapshot(tmp_path: Path) -> None:
    (tmp_path / "robots.txt").write_text("User-agent: *\nDisallow: /\n")
    made = snapshot(tmp_path / "sites", **{"a.example/robots.txt": ROBOTS})
    assert made.rule("https://../x") is None
    assert host_and_path("https://user:secret@a.example:8080/x?y#z") == ("a.example", "/x?y")


def test_reserved_documents_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot(tmp_path / "sites", **{"a.example/robots.txt": ROBOTS, "b.example/ai.txt": "User-agent: *\nDisallow: /"})
    rows = [{"text": WORDS, "url": f"https://{site}/{path}"} for site in ("a.example", "b.example", "c.example")
            for path in ("private/1", "open/2")] + [{"text": WORDS}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source: dict[str, Any] = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), **FREE}
    reservations = {"snapshot": str(tmp_path / "sites"), "date": "2026-11-01"}
    gather(tmp_path / "out", {"web": source}, reservations=reservations)
    assert [d.path for d in documents(tmp_path / "out", "web")] == [f"rows.jsonl#{n}" for n in (2, 5, 6, 7)]
    found = report(tmp_path / "out", "web")
    size = len(WORDS.encode())
    assert (found["reserved"]["documents"], found["reserved"]["bytes"]) == (3, 3 * size)
    assert found["reserved"]["hosts"]["b.example"] == {
        "documents": 2, "bytes": 2 * size, "date": "2026-11-01",
        "rule": "b.example/ai.txt:2: User-agent: * Disallow: / (for *)",
    }  # fmt: skip
    named = found["skipped"]["named"][0]
    assert named["reason"].startswith("reserved by its site on 2026-11-01, a.example/robots.txt:4: User-agent: gptbot")
    gather(tmp_path / "all", {"web": source})
    assert len(documents(tmp_path / "all", "web")) == 7
    with pytest.raises(DataError, match="the snapshot of what sites reserve is empty"):
        gather(tmp_path / "no", {"web": source}, reservations={**reservations, "snapshot": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match=r"reservations\.date"):
        gather(tmp_path / "no", {"web": source}, reservations={"snapshot": "x", "date": "yesterday"})


def test_a_mirrored_site_is_compared_by_its_origin(tmp_path: Path) -> None:
    snapshot(tmp_path / "sites", **{"a.example/robots.txt": ROBOTS})
    (tmp_path / "mirror/private").mkdir(parents=True)
    (tmp_path / "mirror/private/a.txt").write_text(WORDS)
    (tmp_path / "mirror/b.txt").write_text(WORDS)
    source = {"kind": "folder", "path": str(tmp_path / "mirror"), "origin": "https://a.example/", **FREE}
    reservations = {"snapshot": str(tmp_path / "sites"), "date": "2026-11-01", "agents": ["CCBot"]}
    gather(tmp_path / "out", {"web": source}, reservations=reservations)
    assert [d.path for d in documents(tmp_path / "out", "web")] == ["b.txt"]
    assert report(tmp_path / "out", "web")["reserved"]["hosts"]["a.example"]["documents"] == 1
