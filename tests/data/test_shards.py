import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from freehold.core.artifact import write_manifest
from freehold.core.errors import ArtifactError, DataError
from freehold.data.shards import Shard, ShardSet, dtype_for, write_index, write_shard

DOCUMENTS = [("a", [5, 6, 7, 1], 9), ("b", [1], 0), ("c", [300, 299, 1], 4)]


def arrays(documents=DOCUMENTS):
    return ((name, np.array(ids, np.uint32), size) for name, ids, size in documents)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished tokenize folder with one source; returns its `tokens/`."""
    tokens = tmp_path / "tokenize" / "tokens"
    counts = {
        "train": write_shard(tokens, "talk", "train", arrays(), dtype_for(512)),
        "validation": write_shard(tokens, "talk", "validation", iter(()), dtype_for(512)),
    }
    assert counts["train"] == {"tokens": 8, "documents": 3, "bytes": 13}
    assert counts["validation"] == {"tokens": 0, "documents": 0, "bytes": 0}
    write_index(tokens, 512, "f" * 64, {"talk": counts})
    write_manifest(tokens.parent, kind="tokenize")
    return tokens


def test_what_was_written_is_read(folder: Path) -> None:
    shards = ShardSet.load(folder, verify=True, tokenizer_sha256="f" * 64)
    assert (shards.vocab_size, shards.tokenizer_sha256, shards.dtype) == (512, "f" * 64, np.dtype("<u2"))
    shard = shards.shards["talk", "train"]
    assert shard.tokens(3, 6).tolist() == [1, 1, 300]
    assert isinstance(shard.data, np.memmap)
    for number, (name, ids, size) in enumerate(DOCUMENTS):
        start, length = int(shard.starts[number]), int(shard.lengths[number])
        assert (shard.ids[number], shard.bytes[number]) == (name, size)
        assert shard.tokens(start, start + length).tolist() == ids
    assert [shard.document_at(offset) for offset in range(8)] == [0, 0, 0, 0, 1, 2, 2, 2]
    for outside in (-1, 8):
        with pytest.raises(IndexError):
            shard.document_at(outside)


def test_loader_sees_every_split(folder: Path) -> None:
    shards = ShardSet.load(folder)
    source = shards.sources("train")["talk"]
    assert (source.name, source.total_tokens, list(source.ids)) == ("talk", 8, ["a", "b", "c"])
    assert source.starts.tolist() == [0, 4, 5]
    assert shards.document_bytes("train", "talk").tolist() == [9, 0, 4]
    assert shards.sources("validation")["talk"].total_tokens == 0


@pytest.mark.parametrize(("vocab_size", "name", "width"), [(65536, "uint16", 2), (65537, "uint32", 4)])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path: Path, vocab_size: int, name: str, width: int) -> None:
    dtype = dtype_for(vocab_size)
    counts = write_shard(tmp_path, "s", "train", arrays([("a", [vocab_size - 1, 1], 3)]), dtype)
    write_index(tmp_path, vocab_size, "0", {"s": {"train": counts}})
    assert json.loads((tmp_path / "index.json").read_text())["dtype"] == name
    assert (tmp_path / "s.train.bin").read_bytes() == (vocab_size - 1).to_bytes(width, "little") + b"\1" + bytes(
        width - 1
    )
    assert ShardSet.load(tmp_path).shards["s", "train"].tokens(0, 2).tolist() == [vocab_size - 1, 1]


def test_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shard(tmp_path / name, "s", "train", arrays(), dtype_for(512))
    for file in ("s.train.bin", "s.train.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_document_index_has_the_published_columns(folder: Path) -> None:
    assert pq.read_schema(folder / "talk.train.parquet") == pa.schema(
        [("id", pa.string()), ("start", pa.int64()), ("tokens", pa.int32()), ("bytes", pa.int32())]
    )


def test_truncated_shard_is_named_without_being_asked(folder: Path) -> None:
    path = folder / "talk.train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ArtifactError, match=r"(?s)truncated.*talk\.train\.bin.*14 bytes.*16 bytes"):
        ShardSet.load(folder)
    with pytest.raises(ArtifactError, match=r"(?s)truncated.*talk\.train\.bin"):
        ShardSet.load(folder, verify=True)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"(?s)missing.*talk\.train\.bin"):
        ShardSet.load(folder)


@pytest.mark.parametrize("file", ["talk.train.bin", "talk.train.parquet", "index.json"])
def test_flipped_bit_is_named_when_asked(folder: Path, file: str) -> None:
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / file).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"(?s)was changed.*tokens/{file}"):
        ShardSet.load(folder, verify=True)


def test_unfinished_folder_is_refused(folder: Path) -> None:
    (folder.parent / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="no manifest"):
        ShardSet.load(folder, verify=True)
    (folder / "index.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"(?s)not JSON.*index\.json"):
        ShardSet.load(folder)
    (folder / "index.json").unlink()
    with pytest.raises(ArtifactError, match=r"(?s)missing.*index\.json"):
        ShardSet.load(folder)


def test_another_tokenizer_is_refused_with_both_hashes(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"(?s)another tokenizer.*{'f' * 64}.*{'0' * 64}"):
        ShardSet.load(folder, tokenizer_sha256="0" * 64)


def test_identity_says_what_was_excluded(folder: Path) -> None:
    shards = ShardSet.load(folder, verify=True)
    whole = shards.identity("train")
    assert list(whole) == ["talk"]
    assert shards.identity("train", frozenset({"elsewhere"})) == whole
    less = [shards.identity("train", frozenset(ids))["talk"] for ids in ({"a"}, {"b"}, {"a", "b"}, {"b", "a", "x"})]
    assert len({whole["talk"], *less}) == 4
    assert less[2] == less[3]
    assert len(shards.sources("train", frozenset({"a", "x"}))["talk"].ids) == 2


def test_index_must_fit_the_shard(folder: Path) -> None:
    path = folder / "talk.train.bin"
    with pytest.raises(ArtifactError, match=r"(?s)not the document index.*3 rows.*4 rows"):
        Shard(path, np.dtype("<u2"), {"tokens": 8, "documents": 4, "bytes": 13})
    path.with_suffix(".parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="cannot read the document index"):
        ShardSet.load(folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "dtype": "uint32"}))
    with pytest.raises(ArtifactError, match=r"(?s)another type of ids.*uint32.*uint16"):
        ShardSet.load(folder)


def test_full_disk_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="could not write"):
        write_shard(tmp_path / "file", "s", "train", arrays(), dtype_for(512))
