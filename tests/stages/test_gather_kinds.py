"""Files as people have them: endings, kinds of strings, compression, one big file; what is not read is named."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gather_fixtures import FREE, GRANTED, MIT, WORDS, documents, gather, report, sdist

from freehold.core.errors import ConfigError, DataError
from freehold.stages.gather.separated import PIECE_BYTES

STRINGS: dict[str, pa.DataType] = {
    "string": pa.string(), "large": pa.large_string(), "view": pa.string_view(), "binary": pa.binary(),
    "binary_view": pa.binary_view(), "fixed": pa.binary(11), "dictionary": pa.dictionary(pa.int8(), pa.string()),
    "large_dictionary": pa.dictionary(pa.int32(), pa.large_string()),
    "binary_dictionary": pa.dictionary(pa.int32(), pa.binary()),
}  # fmt: skip


@pytest.mark.parametrize("stored", [True, False], ids=["arrow schema", "plain schema"])
@pytest.mark.parametrize("kind", STRINGS)
def test_parquet_text_of_every_kind_of_string_is_read(kind: str, stored: bool, tmp_path: Path) -> None:
    texts = ["hello world", "hallo welt!", None]
    value = STRINGS[kind].value_type if pa.types.is_dictionary(STRINGS[kind]) else STRINGS[kind]
    raw = [t and t.encode() for t in texts] if "binary" in str(value) else texts
    array = pa.array(raw, value).dictionary_encode() if pa.types.is_dictionary(STRINGS[kind]) else pa.array(raw, value)
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet", store_schema=stored)
    gather(tmp_path / "out", {"a": {"kind": "parquet", "path": str(tmp_path / "a.parquet"), **FREE}})
    assert [d.text for d in documents(tmp_path / "out", "a")] == texts[:2]
    assert [s["reason"] for s in report(tmp_path / "out", "a")["skipped"]["named"]] == ["empty"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress,
                                  lambda data: pa.compress(data, "zstd", asbytes=True)],
                         ids=["gz", "bz2", "xz", "zst"])  # fmt: skip
def test_compressed_rows_give_what_the_plain_file_gives(pack: Any, tmp_path: Path) -> None:
    plain = b"\xef\xbb\xbf" + b"".join(json.dumps({"text": f"{n} {WORDS}"}).encode() + b"\r\n" for n in range(5))
    (tmp_path / "rows.jsonl").write_bytes(plain)
    (tmp_path / "packed").write_bytes(pack(plain))  # recognised by its bytes, not by its name
    for name, file in (("plain", "rows.jsonl"), ("packed", "packed")):
        gather(tmp_path / "out" / name, {"a": {"kind": "jsonl", "path": str(tmp_path / file), **FREE}})
    texts = [[d.text for d in documents(tmp_path / "out" / name, "a")] for name in ("plain", "packed")]
    assert texts[0] == texts[1] == [f"{n} {WORDS}" for n in range(5)]


def test_folders_of_rows_are_read_and_other_files_named(tmp_path: Path) -> None:
    folder = tmp_path / "rows" / "deep"
    folder.mkdir(parents=True)
    row = json.dumps({"text": WORDS}).encode()
    (folder / "A.JSONL").write_bytes(row)
    (folder / "b.ndjson.gz").write_bytes(gzip.compress(row))
    gather(tmp_path / "out", {"a": {"kind": "jsonl", "path": str(tmp_path / "rows"), **FREE}})
    assert [d.path for d in documents(tmp_path / "out", "a")] == ["deep/A.JSONL#1", "deep/b.ndjson.gz#1"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"PK\x03\x04....", "found:    a zip archive"),
        (b"PAR1....", "write `kind: parquet`"),
        (b"\xff\xfe{\0}\0", "UTF-16"),
        (gzip.compress(b"x" * 100_000)[:40], "cannot be unpacked"),
    ],
    ids=["zip", "parquet", "utf16", "cut gzip"],
)
def test_files_that_are_no_json_lines_are_one_error(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=says):
        gather(tmp_path / "out", {"a": {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), **FREE}})


def test_a_row_that_is_not_utf8_is_named_by_its_byte(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "caf\xe9 au lait"}\n{"text": "plain"}\n')
    gather(tmp_path / "out", {"a": {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), **FREE}})
    (skipped,) = report(tmp_path / "out", "a")["skipped"]["named"]
    assert skipped == {"path": "rows.jsonl#1", "reason": "not UTF-8: byte 13 is 0xe9"}


def test_a_packed_parquet_file_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(DataError, match=r"unpack it: it is a \.gz file"):
        gather(tmp_path / "out", {"a": {"kind": "parquet", "path": str(tmp_path / "a.parquet"), **FREE}})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "Sub").mkdir(parents=True)
    for name in ("plain.txt", "UPPER.TXT", "Sub/Readme.MD", "notes.markdown", "data", ".hidden", "LICENSE"):
        (folder / name).write_text(MIT if name == "LICENSE" else f"{name} {WORDS}")
    return folder


def test_endings_are_compared_without_case(texts: Path, tmp_path: Path) -> None:
    gather(tmp_path / "out", {"a": {"kind": "folder", "path": str(texts), **GRANTED, "licence": "MIT"}})
    assert [d.path for d in documents(tmp_path / "out", "a")] == ["Sub/Readme.MD", "UPPER.TXT", "plain.txt"]
    unmatched = report(tmp_path / "out", "a")["unmatched"]
    assert unmatched == {"count": 2, "endings": {".markdown": 1, "data": 1}, "named": ["data", "notes.markdown"]}


def test_what_matches_nothing_is_named_with_its_folder(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"kind": "folder", "path": str(texts), **FREE, "settled": "LICENSE is of the program"}
    gather(tmp_path / "out", {"a": {**source, "members": ["*.txt", "*.rst"], "exclude": ["Subs/*"]}})
    (idle, unread) = report(tmp_path / "out", "a")["warnings"]
    assert idle == f"no file in {texts} matches members: *.rst; exclude: Subs/*"
    assert unread.startswith(f"3 files of {texts} match none of *.txt, *.rst and are not read: ")
    with pytest.raises(DataError, match=r"(?s)0 bytes of text; no file in .*texts matches members: \*\.rst"):
        gather(tmp_path / "none", {"a": {**source, "members": ["*.rst"]}})


def test_home_is_a_folder_of_a_recipe(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = {"a": {"kind": "folder", "path": "~/texts", **GRANTED, "licence": "MIT"}}
    gather(tmp_path / "out", sources, corpus_dir="~/corpus")
    assert len(documents(tmp_path / "out", "a")) == 3
    assert str(tmp_path) not in (tmp_path / "out" / "sources.json").read_text()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": WORDS}))
    gather(tmp_path / "rows", {"a": {"kind": "jsonl", "path": "~/rows.jsonl", **FREE}})
    with pytest.raises(ConfigError, match="its home folder is unknown"):
        gather(tmp_path / "no", {"a": {**sources["a"], "path": "~no-such-user-here/texts"}})


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_separator_makes_documents_of_one_file(packed: bool, tmp_path: Path) -> None:
    long = "word " * (PIECE_BYTES // 4)  # longer than a piece, with a line end at its border
    parts = ["first\r\nline", long, "", "caf\udce9", "last"]
    data = "\r\n<|endoftext|>\r\n".join(parts).encode(errors="surrogateescape")
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / ("all.txt.gz" if packed else "all.txt")).write_bytes(gzip.compress(data) if packed else data)
    source = {"kind": "folder", "path": str(folder), "members": ["*"], "separator": "<|endoftext|>", **FREE}
    gather(tmp_path / "out", {"a": {**source, "max_document_bytes": 2_000_000}})
    rows = {d.path.rpartition("#")[2]: d.text for d in documents(tmp_path / "out", "a")}
    assert rows == {"1": "first\nline\n", "2": long + "\n", "5": "last\n"}
    assert "not UTF-8" in report(tmp_path / "out", "a")["skipped"]["named"][0]["reason"]
    gather(tmp_path / "short", {"a": {**source, "max_document_bytes": 1000}})
    assert [d.text for d in documents(tmp_path / "short", "a")] == ["first\nline\n", "last\n"]
    assert report(tmp_path / "short", "a")["skipped"]["named"][0]["reason"] == "more than max_document_bytes = 1,000"


def test_separator_is_for_the_text_reader(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`separator` is for the reader `text`"):
        gather(tmp_path, {"a": {"kind": "folder", "path": "x", "reader": "html", "separator": "---", **FREE}})


def test_separators_in_an_archive_split_too(tmp_path: Path) -> None:
    sha256 = sdist(tmp_path / "a.tar.gz", {"a-1/all.txt": b"one\n---\ntwo", "a-1/LICENSE": MIT.encode()})
    source = {"kind": "sdist", "distribution": "a", "version": "1", "file": "a.tar.gz", "sha256": sha256,
              "members": ["*.txt"], "separator": "\n---\n", **GRANTED, "licence": "MIT"}  # fmt: skip
    gather(tmp_path / "out", {"a": source}, corpus_dir=str(tmp_path))
    assert [d.text for d in documents(tmp_path / "out", "a")] == ["one\n", "two\n"]


def test_one_document_alone_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "a.txt").write_text("one <|endoftext|> two <|endoftext|> three")
    gather(tmp_path / "out", {"a": {"kind": "folder", "path": str(folder), **FREE}})
    (line,) = report(tmp_path / "out", "a")["warnings"]
    assert line.startswith("`<|endoftext|>` is 2 times in the text")
    (folder / "a.txt").write_text("word " * 300_000)
    gather(tmp_path / "out", {"a": {"kind": "folder", "path": str(folder), **FREE}})
    (line,) = report(tmp_path / "out", "a")["warnings"]
    assert line.startswith("a.txt is one document, so nothing is held out")


def test_thoughts_of_a_model_are_no_text(tmp_path: Path) -> None:
    rows = ["<think>\nOkay, the user wants.\n</think>\n\nThe answer.", "<thinking>a</thinking><think>b</think>Two.",
            "<think> no end", "A text about <think> and </think> tags."]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    gather(tmp_path / "out", {"a": {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), **FREE}})
    assert [d.text for d in documents(tmp_path / "out", "a")] == ["The answer.", "Two.", rows[3]]
    (skipped,) = report(tmp_path / "out", "a")["skipped"]["named"]
    assert skipped == {"path": "rows.jsonl#3", "reason": "only the thoughts of a model, no answer"}


def test_a_dictionary_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    array = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), ["ab " * 230_000])
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet", store_schema=False, compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    source = {"kind": "parquet", "path": str(tmp_path / "a.parquet"), "max_unpacked_bytes": 50_000_000, **FREE}
    with pytest.raises(DataError, match="holds more text than it may"):
        gather(tmp_path / "out", {"a": source})
    with pytest.raises(DataError, match="a parquet file unpacks to more than it may"):
        gather(tmp_path / "out", {"a": {**source, "max_unpacked_bytes": 500_000}})


def test_a_line_bomb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b" " * 3_000_000))
    source = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl.gz"), "max_document_bytes": 1000, **FREE}
    with pytest.raises(DataError, match="holds more text than it may"):
        gather(tmp_path / "out", {"a": {**source, "max_unpacked_bytes": 2_000_000}})


def _sdist(path: Path, *infos: tarfile.TarInfo) -> dict[str, Any]:
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(b"0" * info.size))

    return {"kind": "sdist", "distribution": "a", "version": "1", "file": path.name, "members": ["*"],
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **FREE}  # fmt: skip


def test_a_long_header_in_a_tar_is_refused(tmp_path: Path) -> None:
    long = tarfile.TarInfo("a" * 3_000_000)
    source = _sdist(tmp_path / "a.tar.gz", long)
    with pytest.raises(DataError, match="a header of 3,000,0"):
        gather(tmp_path / "out", {"a": source}, corpus_dir=str(tmp_path))


def test_sparse_members_are_named_and_counted(tmp_path: Path) -> None:
    def sparse(name: str, size: int) -> bytes:
        info = tarfile.TarInfo(f"a-1/{name}")
        info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
        head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        head[386:410] = b"%011o\0%011o\0" % (size - 1, 0)  # one hole up to the end
        head[483:495] = b"%011o\0" % size
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return bytes(head)

    def archive(*parts: bytes) -> dict[str, Any]:

        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"".join(parts) + b"\0" * 1024))
        return {"kind": "sdist", "distribution": "a", "version": "1", "file": "a.tar.gz", "members": ["*"],
                "sha256": hashlib.sha256((tmp_path / "a.tar.gz").read_bytes()).hexdigest(), **FREE}  # fmt: skip

    text = tarfile.TarInfo("a-1/b.txt")
    text.size = len(WORDS)
    plain = text.tobuf() + WORDS.encode().ljust(512, b"\0")
    gather(tmp_path / "out", {"a": archive(sparse("a.txt", 1000), plain)}, corpus_dir=str(tmp_path))
    assert report(tmp_path / "out", "a")["skipped"]["named"] == [{"path": "a.txt", "reason": "a sparse file"}]
    with pytest.raises(DataError, match="unpacks to more than it may"):
        gather(tmp_path / "out", {"a": archive(*[sparse("a", 8_000_000_000)] * 3)}, corpus_dir=str(tmp_path))
