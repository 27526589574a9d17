import hashlib
from pathlib import Path
from typing import Any

import pytest

from freehold.core.artifact import Workspace, hash_files, write_manifest
from freehold.core.document import Document, document_id, write_rows
from freehold.core.errors import ArtifactError, DataError
from freehold.core.log import Log
from freehold.data.shards import ShardSet
from freehold.stages.export.samples import KINDS, SCRIPTS
from freehold.stages.tokenize.config import TokenizeConfig, plan
from freehold.stages.tokenize.run import run, sample
from freehold.tokenizer.bpe import Tokenizer


def document(source: str, path: str, text: str, split: str) -> Document:
    rights = dict.fromkeys(["source_version", "wrapper_licence", "licence", "licence_evidence", "acquired"], "x")
    return Document(
        **rights,
        id=document_id(source, path),
        text=text,
        source=source,
        path=path,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        kind="prose",
        synthetic_from="",
        teacher="",
        split=split,
    )


def corpus() -> list[Document]:
    rows = [document("prose", name, text, "validation" if name == "drama" else "train") for name, text in KINDS.items()]
    rows += [document("scripts", name, text * 2, "train") for name, text in SCRIPTS.items()]
    return [*rows, document("prose", "special", "a <|im_end|> b", "train")]


def curated(folder: Path, rows: list[Document]) -> Path:
    for source in sorted({row.source for row in rows}):
        write_rows(folder / "documents" / f"{source}.parquet", [r for r in rows if r.source == source], Document)
    return folder


def tokenize(folder: Path, inputs: Path, seed: int = 0, **config: Any) -> dict[str, Any]:
    work = Workspace(folder, "tokenize", "test", seed, Log(quiet=True), {"curate": inputs})
    return run(TokenizeConfig(**{"vocab_size": 700, **config}), work)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return curated(tmp_path_factory.mktemp("curate"), corpus())


def test_every_text_comes_back_from_its_shard(inputs: Path, tmp_path: Path) -> None:
    counts = tokenize(tmp_path, inputs)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    write_manifest(tmp_path, kind="tokenize", counts=counts)
    shards = ShardSet.load(tmp_path / "tokens", verify=True, tokenizer_sha256=tokenizer.sha256)
    assert shards.vocab_size == tokenizer.vocab_size == counts["vocab_size"] == 700
    rows = {row.id: row for row in corpus()}
    for (name, split), shard in shards.shards.items():
        assert shard.ids == sorted(row.id for row in rows.values() if (row.source, row.split) == (name, split))
        for number, (identity, start, length) in enumerate(zip(shard.ids, shard.starts, shard.lengths, strict=True)):
            *text, end = shard.tokens(start, start + length).tolist()
            assert end == tokenizer.end_of_text
            assert not set(text) & set(range(32))
            assert tokenizer.decode(text) == rows[identity].text
            assert shard.bytes[number] == len(rows[identity].text.encode())
    assert sum(len(shard.ids) for shard in shards.shards.values()) == len(rows)


def test_counts_follow_from_the_content(inputs: Path, tmp_path: Path) -> None:
    counts = tokenize(tmp_path, inputs)
    texts = {split: [row.text for row in corpus() if row.split == split] for split in ("train", "validation")}
    for split, of in texts.items():
        assert counts[split]["documents"] == len(of)
        assert counts[split]["bytes"] == sum(len(text.encode()) for text in of)
        assert counts[split]["tokens"] == sum(shard[split]["tokens"] for shard in counts["sources"].values())
    prose = counts["sources"]["prose"]["train"]
    expected = prose["bytes"] / (prose["tokens"] - prose["documents"])
    assert counts["bytes_per_token"]["prose"] == pytest.approx(expected, abs=1e-4)
    assert 1 < counts["bytes_per_token"]["prose"] < 8


def test_same_documents_give_the_same_bytes(inputs: Path, tmp_path: Path) -> None:
    tokenize(tmp_path / "one", inputs, vocab_size=400, train_bytes=3000)
    again = curated(tmp_path / "shuffled", corpus()[::-1])
    tokenize(tmp_path / "two", again, vocab_size=400, train_bytes=3000, threads=1)
    assert hash_files(tmp_path / "one") == hash_files(tmp_path / "two")
    tokenize(tmp_path / "three", inputs, seed=1, vocab_size=400, train_bytes=3000)
    assert hash_files(tmp_path / "one") != hash_files(tmp_path / "three")


def test_sample_is_within_its_limit_and_in_proportion(inputs: Path, tmp_path: Path) -> None:
    work = Workspace(tmp_path, "tokenize", "test", 0, Log(quiet=True), {"curate": inputs})
    for limit in (1000, 10**9):
        taken = {}
        for path in sorted((inputs / "documents").glob("*.parquet")):
            taken[path.stem] = list(sample([path], limit, work))
        whole = {s: [r.text for r in corpus() if r.source == s and r.split == "train"] for s in taken}
        for source, texts in taken.items():
            size = sum(len(text.encode()) for text in texts)
            if limit == 1000:
                assert 1000 - 4 <= size <= 1000
            else:
                assert sorted(texts) == sorted(whole[source])
    both = sample(sorted((inputs / "documents").glob("*.parquet")), 1000, work)
    texts = list(both)
    assert 990 <= sum(len(text.encode()) for text in texts) <= 1000
    assert any("\u0e00" < c < "\u0e7f" or c > "\u0370" for text in texts for c in text)


def test_held_out_text_does_not_train_the_tokenizer(inputs: Path, tmp_path: Path) -> None:
    tokenize(tmp_path / "one", inputs)
    rows = [*corpus(), document("prose", "more", "zqzqzqzq " * 500, "validation")]
    tokenize(tmp_path / "two", curated(tmp_path / "curate", rows))
    assert Tokenizer.load(tmp_path / "one/tokenizer").sha256 == Tokenizer.load(tmp_path / "two/tokenizer").sha256


def test_a_given_tokenizer_is_used_as_it_is(inputs: Path, tmp_path: Path) -> None:
    tokenize(tmp_path / "one", inputs)
    few = curated(tmp_path / "curate", [document("talk", "x", "Hello there.", "train")])
    counts = tokenize(tmp_path / "two", few, tokenizer=tmp_path / "one/tokenizer")
    assert counts["vocab_size"] == 700
    assert hash_files(tmp_path / "one/tokenizer") == hash_files(tmp_path / "two/tokenizer")
    with pytest.raises(ArtifactError, match="no tokenizer here"):
        tokenize(tmp_path / "three", few, tokenizer=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "there are no documents"),
        ([document("a", "x", "text " * 9, "validation")], "no text is for training"),
        ([document("a", "x", "text " * 9, "train")], "too little text for this vocabulary"),
        ([document("a", "x", "text " * 9, "train"), document("a", "y", "t", "")], r"(?s)in no split.*a\.parquet"),
    ],
)
def test_unusable_documents(tmp_path: Path, rows: list[Document], says: str) -> None:
    (tmp_path / "curate/documents").mkdir(parents=True)
    with pytest.raises(DataError, match=says):
        tokenize(tmp_path / "out", curated(tmp_path / "curate", rows))


def test_given_tokenizer_needs_training_text_too(inputs: Path, tmp_path: Path) -> None:
    tokenize(tmp_path / "one", inputs)
    held = curated(tmp_path / "curate", [document("a", "x", "text", "validation")])
    with pytest.raises(DataError, match="no document is for training"):
        tokenize(tmp_path / "two", held, tokenizer=tmp_path / "one/tokenizer")


def test_plan_says_what_it_implies() -> None:
    assert "8,192 tokens = 32 specials + 256 bytes + 7,904 merges" in plan(TokenizeConfig())[0]
    assert "4 bytes a token" in plan(TokenizeConfig(vocab_size=200_000, digit_groups=True))[1]
    assert "used as it is" in plan(TokenizeConfig(tokenizer=Path("x")))[0]
