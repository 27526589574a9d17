"""Readers of single packages: what they take, what they skip, and that a damaged file is only skipped."""

from __future__ import annotations

import json
import re

import pytest
from gather_fixtures import country, read


def test_the_bible_module_is_read_by_book_and_chapter() -> None:
    text = 'bible = Bible(V, """In the beginning. God`s word. New chapter. Exit.""",\n'
    text += "    {\n 1001001: 0,\n 1001002: 18,\n 1002001: 30,\n 2001001: 43,\n },\n"
    text += "    {\n 1001001: 18,\n 1001002: 30,\n 1002001: 43,\n 2001001: 48,\n },\n"
    text += '    {\n Book.GENESIS: "Genesis",\n Book.EXODUS: "Exodus",\n },\n)\n'
    parts, skipped = read("bible", **{"web.py": text.encode(), "other.py": b"print('x')"})
    assert [(p.path, p.text) for p in parts] == [
        ("web.py#01", "Genesis\n\nChapter 1\n\nIn the beginning. God's word.\n\nChapter 2\n\nNew chapter.\n"),
        ("web.py#02", "Exodus\n\nChapter 1\n\nExit.\n"),
    ]
    assert skipped == [("other.py", "not a module of the pythonbible family")]


def test_the_factbook_becomes_pages_without_html() -> None:
    parts, skipped = read("factbook", **{"al.json": country("Alia", 3).encode(), "b.json": b"{}", "c.json": b"{"})
    assert parts[0].text.startswith(
        "Alia\n\nIntroduction\n\nBackground: Alia was first seen by sailors & settled many years later.\n"
    )
    assert "Capital, name: Alia City (Old Town)" in parts[0].text
    assert not re.search(r"<[a-z/]|&[a-z]+;", parts[0].text)
    assert [path for path, _ in skipped] == ["b.json", "c.json"]


def test_botocore_takes_the_newest_version_and_each_text_once() -> None:
    long = "Creates a thing and waits until it is there. " * 4
    said = f"<p>{long}<a href='x'>More</a></p><ul><li><p>one</p></li></ul>"
    model = {
        "metadata": {"serviceFullName": "Amazon Thing"},
        "documentation": "<p>A <b>service</b>.</p>",
        "operations": {"Create": {"documentation": said}},
        "shapes": {"S": {"documentation": "short", "members": {"m": {"documentation": said.replace(" href='x'", "")}}}},
    }
    old = {"metadata": {"serviceFullName": "Old"}}
    files = {
        "b/thing/2020/service-2.json.gz": json.dumps(old).encode(),
        "b/thing/2023/service-2.json.gz": json.dumps(model).encode(),
        "b/twin/2023/service-2.json.gz": json.dumps(model | {"metadata": {"serviceFullName": "Twin"}}).encode(),
    }
    parts, _ = read("botocore", **files)
    assert [part.text for part in parts] == [
        f"Amazon Thing\n\nA service.\n\n\nCreate\n\n{long}More\n- one\n",
        "Twin\n\nA service.\n",
    ]


LONG = "Creates a thing and waits until it is there. " * 4


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        ("botocore", '{"operations": [1]}'),
        ("botocore", json.dumps({"operations": {"b": {"documentation": LONG}, "a": {"documentation": None}}})),
        ("botocore", '{"metadata": 3}'),
        ("botocore", '{"documentation": null}'),
        ("botocore", '{"metadata": {"serviceFullName": 1}}'),
        ("botocore", "[1]"),
        ("botocore", "{"),
        ("botocore", "[" * 100_000),
        ("factbook", "[1]"),
        ("factbook", "9" * 5000),
        (
            "bible",
            'x("""In the beginning."""\n{1001001: 0,\n1001002: 3,\n}\n{1001001: 3,\n}\nBook.GENESIS: "Genesis"',
        ),
    ],
)
def test_a_file_that_is_not_what_its_reader_expects_is_skipped(reader: str, text: str) -> None:
    good = {
        "botocore": json.dumps({"documentation": "A service.", "operations": {"Create": {"documentation": LONG}}}),
        "factbook": country("Alia", 3),
        "bible": 'x("""In the beginning."""\n{1001001: 0,\n}\n{1001001: 17,\n}\nBook.GENESIS: "Genesis"',
    }[reader]
    files = {"a/1/s.json": text.encode(), "b/1/s.json": good.encode()}
    parts, skipped = read(reader, **files)
    assert [part.member.path for part in parts] == ["b/1/s.json"]
    # What was only said in the skipped file still counts as not said.
    assert parts[0].text == read(reader, **{"b/1/s.json": good.encode()})[0][0].text
    assert [path for path, _ in skipped] == ["a/1/s.json"]
    assert skipped[0][1].startswith("not what its reader expects: ")
