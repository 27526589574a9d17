"""Readers of pages and PDF files, and what they say of their own rights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gather_fixtures import FREE, WORDS, documents, gather, page, read, report

from freehold.core.errors import ConfigError


def html_folder(tmp_path: Path, **pages: bytes) -> dict[str, Any]:
    folder = tmp_path / "pages"
    folder.mkdir(exist_ok=True)
    for name, data in pages.items():
        (folder / f"{name}.html").write_bytes(data)
    return {
        "kind": "folder", "path": str(folder), "members": ["*.html"], "reader": "auto", "licence": "detect",
        "refused": "drop",
    }  # fmt: skip


def test_pages_say_their_licence_by_links(tmp_path: Path) -> None:
    by = '<a rel="license" href="https://creativecommons.org/licenses/by/4.0/">CC</a>'
    nc = by.replace("/by/", "/by-nc/")
    loose = '<a href="https://creativecommons.org/publicdomain/zero/1.0/">this picture</a>'
    body = f"<nav>menu</nav><main><h1>H</h1><p>{WORDS}</p></main><footer>%s</footer>"
    source = html_folder(
        tmp_path,
        by=page("By", body % by),
        nc=page("Nc", body % nc),
        loose=page("Loose", body % loose),
        reserved=page("R", body % by, '<meta name="tdm-reservation" content="1">'),
        noai=page("N", body % by, '<meta name="robots" content="noindex, noai">'),
        none=page("None", body % ""),
    )
    policy = {"allow": ["CC-BY-4.0", "CC0-1.0"], "review": []}
    gather(tmp_path / "out", {"pages": source}, policy=policy)
    rows = documents(tmp_path / "out", "pages")
    assert [(r.path, r.licence, r.licence_confidence) for r in rows] == [
        ("by.html", "CC-BY-4.0", "high"),
        ("loose.html", "CC0-1.0", "medium"),
    ]
    assert rows[0].text == "By\n\nH\n\n" + WORDS.strip() + "\n"
    refused = {s["path"]: s["reason"] for s in report(tmp_path / "out", "pages")["refused"]["named"]}
    assert set(refused) == {"nc.html", "reserved.html", "noai.html", "none.html"}
    assert "forbids commercial use" in refused["nc.html"]
    assert "tdm-reservation: 1" in refused["reserved.html"]
    assert "robots: noindex, noai" in refused["noai.html"]


def test_pages_in_other_encodings_and_broken_ones(tmp_path: Path) -> None:
    latin = '<html><head><meta charset="iso-8859-1"><title>T</title></head><body>caf\xe9 and more</body></html>'
    source = html_folder(
        tmp_path, latin=latin.encode("latin-1"), bad=b"<html>caf\xe9", empty=b"<html><nav>x</nav></html>",
        unclosed=b"<p>open <b>words <i>here", wide=b'<meta charset="utf-16"><p>not so wide',
    ) | {"refused": "stop", **FREE}  # fmt: skip
    gather(tmp_path / "out", {"pages": source})
    assert {r.path: r.text for r in documents(tmp_path / "out", "pages")} == {
        "latin.html": "T\n\ncafé and more\n",
        "unclosed.html": "open words here\n",
        "wide.html": "not so wide\n",
    }
    assert {s["path"]: s["reason"] for s in report(tmp_path / "out", "pages")["skipped"]["named"]} == {
        "bad.html": "not UTF-8: byte 9 is 0xe9",
        "empty.html": "no text in it",
    }
    with pytest.raises(ConfigError, match=r"(?s)not a CSS selector.*div\[\["):
        gather(tmp_path / "out", {"pages": {**source, "select": "div[["}})


def pdf(*pages: str) -> bytes:
    """Return a PDF with a line of text for each line of a page."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    parts = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, lines_of in enumerate(pages):
        lines = "".join(f"({line}) Tj T*\n" for line in lines_of.split("\n"))
        stream = f"BT /F1 12 Tf 20 700 Td 14 TL\n{lines}ET".encode()
        parts.append(
            f"<< /Type /Page /Parent 2 0 R /Contents {5 + 2 * n} 0 R /Resources << /Font << /F1 3 0 R >> >> "
            "/MediaBox [0 0 600 800] >>".encode()
        )
        parts.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    out, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(parts) + 1
    start = len(out)
    return out + b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        size, table, size, start,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pages", "text"),
    [
        # A table of one page; the last line looks like a page number, and nothing shows that it is one.
        (["Seats\n730\nPoints\n5\nin\n1987\n- 3 -"], "Seats\n730\nPoints\n5\nin\n1987\n- 3 -"),
        (["one\n12\n1", "two\n7\n2", "three\n3"], "one\n12\ntwo\n7\nthree"),
        (["Page 8 of 9\none", "Page 9 of 9\ntwo"], "one\ntwo"),
        # Numbers at the same place that do not count the pages.
        (["one\n1987", "two\n1991", "three\n1993"], "one\n1987\ntwo\n1991\nthree\n1993"),
        (["one\n4", "two\n4"], "one\n4\ntwo\n4"),
    ],
)
def test_pdf_keeps_numbers_that_are_text(pages: list[str], text: str, tmp_path: Path) -> None:
    parts, skipped = read("pdf", **{"a.pdf": pdf(*pages)})
    assert [line for line in parts[0].text.split("\n") if line] == text.split("\n")
    assert not skipped


SAID = WORDS.strip()
MANY = f"<p>{WORDS}</p>"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (f"<form id='aspnetForm'><input type='hidden' value='x'/><div><h1>H</h1>{MANY}</div></form>", f"H\n\n{SAID}"),
        (f"<form><nav>menu</nav><main>{MANY}</main><select><option>de</option></select></form>", SAID),
        (f"<main>{MANY}<form>Your name <input><button>Send</button></form></main>", SAID),
        (f"<header>{MANY}</header><p>The end.</p>", f"{SAID}\n\nThe end."),
        (f"<div aria-hidden='true'>{MANY}</div><div>Please accept.</div>", f"{SAID}\n\nPlease accept."),
        (f"<header>Site</header>{MANY}<aside>More</aside><footer>End</footer>", SAID),
        (f"<main></main><div>{MANY}</div>", SAID),
        ("<article><p>First one.</p></article><article><p>Second one.</p></article>", "First one.\n\nSecond one."),
        ("<p>so <math alttext='E=mc^2'><mi>E</mi></math> holds</p>", "so E=mc^2 holds"),
        ("<p>so <math><mi>E</mi><mo>=</mo><mn>1</mn></math> holds</p>", "so E = 1 holds"),
    ],
)
def test_main_text_is_found_wherever_it_is(body: str, text: str) -> None:
    parts, skipped = read("html", **{"a.html": page("", body)})
    assert ([part.text for part in parts], skipped) == ([text + "\n"], [])


@pytest.mark.parametrize(
    "body", ["<nav>a b c d</nav>", "<form><select><option>de</option></select></form>", "<script>x</script>"]
)
def test_page_without_text_is_named(body: str) -> None:
    assert read("html", **{"a.html": page("", body)}) == ([], [("a.html", "no text in it")])


def test_reads_pdf_and_names_what_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.pdf").write_bytes(pdf("Words on a page."))
    (folder / "scan.pdf").write_bytes(pdf(""))
    (folder / "no.pdf").write_bytes(b"%PDF-1.4 and nothing else")
    cipher = b"".join(b"/%s<%s>" % (key, b"00" * n) for key, n in ((b"O", 48), (b"U", 48), (b"OE", 32), (b"UE", 32)))
    cipher += b"/CF<</StdCF<</CFM/AESV3>>>>/StmF/StdCF/StrF/StdCF/Perms<%s>" % (b"00" * 16)
    aes = b"/ID[<00><00>]/Encrypt<</Filter/Standard/V 5/R 6/Length 256/P -4%s>>" % cipher
    (folder / "aes.pdf").write_bytes(pdf("Hidden.").replace(b"/Root", aes + b"/Root"))
    source = {"kind": "folder", "path": str(folder), "members": ["*.pdf"], "reader": "pdf", **FREE}
    gather(tmp_path / "out", {"files": source})
    assert [r.text for r in documents(tmp_path / "out", "files")] == ["Words on a page.\n"]
    reasons = {s["path"]: s["reason"] for s in report(tmp_path / "out", "files")["skipped"]["named"]}
    assert reasons["scan.pdf"] == "no text in it: a scan?"
    assert reasons["aes.pdf"] == "an encrypted PDF"
    assert reasons["no.pdf"].startswith("not a PDF that can be read")


def test_a_dictionary_becomes_pages_of_entries(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    entries = [f"word{n}\n     n 1: what word {n} means, in a few words more".encode() for n in range(400)]
    entries[7] = b"caf\xe9\n     bad"
    (folder / "d.dict").write_bytes(b"00-database-short\n     a name\n" + b"\n".join(entries))
    source = {"kind": "folder", "path": str(folder), "members": ["*.dict"], "reader": "dictd", **FREE}
    gather(tmp_path / "out", {"files": source})
    rows = documents(tmp_path / "out", "files")
    assert [r.path for r in rows] == ["d.dict#00000", "d.dict#00001"]
    assert rows[0].text.startswith("word0\n     n 1: what word 0 means")
    assert sum(r.text.count("n 1:") for r in rows) == 399
    assert "00-database" not in rows[0].text
    assert report(tmp_path / "out", "files")["skipped"]["named"][0]["reason"] == "1 of 401 entries are not UTF-8"
