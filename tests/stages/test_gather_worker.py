"""Files that take their reader's time or memory are skipped and named; the others are read."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from gather_fixtures import member, page

from freehold.core.errors import ConfigError
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
