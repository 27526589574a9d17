import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from freehold.core import artifact
from freehold.core.artifact import atomic_folder, read_json, read_manifest, write_atomic, write_json, write_manifest
from freehold.core.document import Conversation, Document, document_id, read_rows, replace, write_rows
from freehold.core.errors import ArtifactError, CheckpointError, ConfigError, DataError
from freehold.core.log import Log, read_metrics
from freehold.core.machine import check_memory_fits, machine_limits


def make(folder):
    write_atomic(folder / "data" / "x.bin", b"abc" * 100)
    write_atomic(folder / "log" / "attempt_1.txt", "noise")
    write_atomic(folder / "timing.json", "{}")
    return write_manifest(folder, kind="tokens", counts={"n": 3}, seconds=1.0)


def test_manifest_lists_content_only(tmp_path):
    manifest = make(tmp_path)
    assert list(manifest["files"]) == ["data/x.bin"]
    assert read_manifest(tmp_path, kind="tokens", verify=True)["counts"] == {"n": 3}


def test_content_hash_is_of_content_alone(tmp_path):
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    assert one["content_sha256"] == two["content_sha256"]
    (tmp_path / "b" / "data" / "x.bin").write_bytes(b"abd" * 100)
    assert write_manifest(tmp_path / "b", kind="tokens")["content_sha256"] != one["content_sha256"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "not JSON"),
        (lambda f: (f / "data/x.bin").write_bytes(b"abd" * 100), "hash differs"),
        (lambda f: (f / "data/x.bin").write_bytes(b"abc"), "truncated"),
        (lambda f: (f / "data/x.bin").unlink(), "missing"),
    ],
)
def test_damage_is_named(tmp_path, damage, says):
    make(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=says):
        read_manifest(tmp_path, kind="tokens", verify=True)


def test_other_kind_and_version(tmp_path):
    make(tmp_path)
    with pytest.raises(ArtifactError, match="another kind"):
        read_manifest(tmp_path, kind="checkpoint")
    manifest = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", manifest | {"format_version": 2})
    with pytest.raises(ArtifactError, match="format version"):
        read_manifest(tmp_path)


def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomic(path, "old")
    monkeypatch.setattr(artifact.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ArtifactError, match="No space left") as error:
        write_atomic(path, "new")
    assert "MB free" in str(error.value)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_atomic_folder(tmp_path):
    def fail_half_way():
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    for text in ("1", "2"):
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "x").write_text(text)
    assert (tmp_path / "a" / "x").read_text() == "2"


RIGHTS = {
    "source": "s", "source_version": "s==1", "path": "p", "sha256": "0", "wrapper_licence": "MIT", "licence": "MIT",
    "licence_evidence": "LICENSE", "acquired": "2026-01-01", "kind": "prose", "synthetic_from": "", "teacher": "",
    "split": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "is missing"), (b"{", "not JSON"), (b"\xff", "not JSON"), (b"[1]", "not a JSON object")],
)
def test_damaged_json_is_named(tmp_path, content, says):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"(?s){says}.*x\.json"):
        read_json(path, CheckpointError)


def refuse(error):
    with machine_limits(Path("here")):
        raise error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), r"(?s)No space.*here.*MB free"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), r"(?s)No space.*here.*MB free"),
        (PermissionError(13, "Permission denied"), r"(?s)Permission denied.*here"),
        (MemoryError(), r"(?s)not enough memory.*here"),
    ],
)
def test_what_the_machine_refuses(error, says):
    with pytest.raises(ArtifactError, match=says):
        refuse(error)
    with pytest.raises(FileNotFoundError):  # a mistake of ours
        refuse(FileNotFoundError(2, "No such file"))


@pytest.mark.parametrize("allocate", [lambda: np.empty(10**15), lambda: torch.empty(10**15)])
def test_libraries_that_run_out_of_memory(allocate):
    with pytest.raises(ArtifactError, match="not enough memory"), machine_limits():
        allocate()


def test_more_than_the_memory_is_refused_first():
    check_memory_fits(10**6, "little", "x")
    with pytest.raises(ConfigError, match="much: about 1,000,000 GB"):
        check_memory_fits(10**15, "much", "x")


def test_documents_and_conversations_round_trip(tmp_path):
    documents = [Document(id=document_id("s", str(i)), text=f"é\n{i}\0", **RIGHTS) for i in range(3)]
    talks = [Conversation(id="a", messages=[{"role": "user", "content": "ü"}], **RIGHTS)]
    assert write_rows(tmp_path / "d.parquet", documents, Document) == 3
    write_rows(tmp_path / "e.parquet", documents, Document)
    write_rows(tmp_path / "c.parquet", talks, Conversation)
    assert list(read_rows(tmp_path / "d.parquet", Document)) == documents
    assert list(read_rows(tmp_path / "c.parquet", Conversation)) == talks
    assert (tmp_path / "d.parquet").read_bytes() == (tmp_path / "e.parquet").read_bytes()


def test_rows_written_before_a_column_was_added_stay_readable(tmp_path):
    row = Document(id="1", text="t", **RIGHTS, licence_confidence="high")
    write_rows(tmp_path / "new.parquet", [row], Document)
    table = pq.read_table(tmp_path / "new.parquet")
    assert table.column_names[-1] == "licence_confidence"
    pq.write_table(table.drop_columns(["licence_confidence"]), tmp_path / "old.parquet")
    assert next(read_rows(tmp_path / "old.parquet", Document)) == replace(row, licence_confidence="")
    pq.write_table(table.drop_columns(["licence"]), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="not a Document file"):
        next(read_rows(tmp_path / "other.parquet", Document))


def test_rows_of_another_kind_or_damaged(tmp_path):
    write_rows(tmp_path / "c.parquet", [], Conversation)
    with pytest.raises(DataError, match="not a Document file"):
        list(read_rows(tmp_path / "c.parquet", Document))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="cannot read rows"):
        list(read_rows(tmp_path / "x.parquet", Document))


def test_log_keeps_attempts_and_rewinds(tmp_path, capsys):
    for text in ("one", "two"):
        log = Log(tmp_path)
        log.say(text)
        log.close()
    assert "one" in (tmp_path / "log/attempt_1.txt").read_text()
    assert "two" in (tmp_path / "log/attempt_2.txt").read_text()
    log = Log(tmp_path, quiet=True)
    for step in (1, 2, 3):
        log.metrics(step, {"loss/mean": float("nan") if step == 2 else step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    log.rewind(2)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss/mean": 1}, {"step": 2, "loss/mean": None}]
    assert list(log.track(range(3), "things")) == [0, 1, 2]
    assert "one\ntwo" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"step": 1, "loss/mean": 1}


@pytest.mark.parametrize("line", [b'{"step": 1, "x": "\xff"}\n', b"[1]\n", b'{"loss": 1}\n', b'{"step": "a"}\n'])
def test_damaged_metrics_are_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line)
    with pytest.raises(ArtifactError, match=r"(?s)damaged metrics.*metrics\.jsonl.*remove the file"):
        Log(tmp_path, quiet=True).rewind(1)
