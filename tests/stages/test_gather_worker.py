"""Files that take their reader's time or memory are skipped and named; the others are read."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from gather_fixtures import member, page

from freehold.core.errors import ConfigError, DataError
from freehold.stages.gather import rows
from freehold.stages.gather.config import JsonLines
from freehold.stages.gather.foreign import read_foreign
from freehold.stages.gather.readers import find_reader
from freehold.stages.gather.worker import Worker
from freehold.text.reading import Member, Part, Reading


def behave(name: str, member: Member, data: bytes, reading: Reading) -> Iterator[Part]:
    """Do what the file says."""
    what = data.decode()
    if what == "loop":
        while True:
            pass
    elif what == "memory":
        bytearray(3_000_000_000)
    elif what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "exit":
        os._exit(3)
    elif what == "bug":
        raise KeyError("a mistake of ours")
    elif what == "config":
        raise ConfigError("not a selector", where="select")
    yield Part(member, "1", f"{what} {os.getpid()}")


def test_files_that_take_too_much_are_skipped_and_named() -> None:
    reading = Reading(1000)
    names = ["one", "loop", "two", "memory", "three", "crash", "exit", "four", "five"]
    with Worker(behave, 0.3, 300_000_000) as worker:
        files = [(member(name, name.encode()), name.encode()) for name in names]
        parts = [part for of, data in files for part in worker.parts("", of, data, reading)]
        child = worker.child
    assert [part.text.split()[0] for part in parts] == ["one", "two", "three", "four", "five"]
    assert reading.skipped == [
        ("loop", "its reader took more than 0.3 s"),
        ("memory", "its reader needed more than 0.3 GB"),
        ("crash", "its reader was ended by SIGSEGV"),
        ("exit", "its reader needed more than 0.3 GB"),
    ]
    with pytest.raises(ChildProcessError):  # it is gone
        os.waitpid(child, os.WNOHANG)
    assert len({part.text.split()[1] for part in parts}) == 3


def test_mistakes_in_a_worker_are_raised_where_it_was_asked() -> None:
    with Worker(behave, 5) as worker:
        with pytest.raises(ConfigError, match="not a selector"):
            worker.parts("", member("a", b"config"), b"config", Reading(1000))
        with pytest.raises(RuntimeError, match="(?s)reading a failed.*a mistake of ours"):
            worker.parts("", member("a", b"bug"), b"bug", Reading(1000))
        assert worker.parts("", member("a", b"well"), b"well", Reading(1000))


def test_a_page_of_many_attributes_costs_itself_only() -> None:
    hostile = page("H", "<p " + " ".join(f"a{n}=1" for n in range(200_000)) + ">text</p>")
    reading = Reading(8_000_000, file_s=0.5)
    files = [member("a.html", hostile), member("b.html", page("B", "<main><p>fine words</p></main>"))]
    parts = list(find_reader("html", "reader").read(files, reading))
    assert [part.text for part in parts] == ["B\n\nfine words\n"]
    assert reading.skipped == [("a.html", "its reader took more than 0.5 s")]


class Tales:
    """A reader of a package that does what its files say, in turn."""

    many_per_file = True

    def read(self, members: list[Member], reading: Reading) -> Iterator[Part]:
        for one in members:
            data = reading.data(one)
            assert data is not None
            if data.decode() in reading.said:
                reading.skipped.append((one.path, "said already"))
                continue
            reading.said.add(data.decode())
            yield from behave("", one, data, reading)


def test_a_package_reader_that_dies_skips_the_file() -> None:
    names = ["one", "loop", "two", "twin", "crash", "three"]
    files = [member(name, b"two" if name == "twin" else name.encode()) for name in names]
    reading = Reading(1000, file_s=0.3)
    parts = list(read_foreign(Tales(), files, reading))
    assert [part.text.split()[0] for part in parts] == ["one", "two", "three"]
    assert [part.member for part in parts] == [files[0], files[2], files[5]]
    assert reading.skipped == [
        ("loop", "its reader took more than 0.3 s"),
        ("twin", "no text in it, as its reader says"),
        ("crash", "its reader was ended by SIGSEGV"),
    ]
    assert all(part.text.split()[1] != str(os.getpid()) for part in parts)
    for name, error in (("config", ConfigError), ("bug", RuntimeError)):
        with pytest.raises(error):
            list(read_foreign(Tales(), [member("a", name.encode())], Reading(1000)))


def test_rows_that_take_too_much_end_the_source_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object) -> Iterator[rows.Row]:
        yield rows.Row("a.jsonl#1", "0" * 64, {"text": "a", "License": "MIT", "other": 1})
        while True:
            pass

    (tmp_path / "a.jsonl").write_text("{}")
    source = JsonLines(path=str(tmp_path / "a.jsonl"), licence="MIT")
    monkeypatch.setattr(rows, "ROW_S", 0.2)
    found = rows._apart(endless, tmp_path / "a.jsonl", source, [])
    assert next(found).fields == {"text": "a", "License": "MIT"}
    with pytest.raises(DataError, match="took more than 0.2 s, after 1 rows"):
        next(found)
