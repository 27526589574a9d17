"""Documents to token shards: train the tokenizer (or take one), encode each source in the order of its ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from freehold.core.artifact import Workspace
from freehold.core.document import Document, read_rows
from freehold.core.errors import DataError
from freehold.data.shards import SPLITS, dtype_for, write_index, write_shard
from freehold.stages.tokenize.config import TokenizeConfig
from freehold.tokenizer.bpe import END_OF_TEXT, Tokenizer, train

BATCH = 64
"""Documents encoded together."""


def run(config: TokenizeConfig, work: Workspace) -> dict[str, Any]:
    """Write `tokenizer/` and `tokens/`; one source is in memory at a time.

    Returns tokens, documents, bytes and bytes per token of each source and split. Raises DataError when there is no
    text, too little for the vocabulary, or a document without a split.
    """
    paths = sorted((p for made in work.inputs.values() for p in made.glob("documents/*.parquet")), key=lambda p: p.stem)
    only_talk = config.tokenizer is not None and any((work.input("curate") / "conversations").glob("*.parquet"))
    if not paths and not only_talk:
        raise DataError(
            "there are no documents", where=work.input("curate") / "documents", expected="*.parquet", todo="run curate"
        )
    if config.tokenizer:
        tokenizer = Tokenizer.load(config.tokenizer)
        work.log.say(f"tokenizer: {config.tokenizer}, {tokenizer.vocab_size:,} tokens")
    else:
        texts = sample(paths, config.train_bytes, work)
        tokenizer = train(texts, config.vocab_size, work.log, digit_groups=config.digit_groups)
    tokenizer.save(work.folder / "tokenizer")
    index: dict[str, dict[str, dict[str, int]]] = {}
    for path in paths:
        rows = read_source(path)
        index[path.stem] = {
            split: write_shard(
                work.folder / "tokens",
                path.stem,
                split,
                encode([row for row in rows if row.split == split], tokenizer, config.threads, work),
                dtype_for(tokenizer.vocab_size),
                {row.id: row.address for row in rows if row.address},
            )
            for split in SPLITS
        }
        work.log.say(f"  {path.stem}: " + "; ".join(f"{s} {_said(c)}" for s, c in index[path.stem].items()))
    write_index(work.folder / "tokens", tokenizer.vocab_size, tokenizer.sha256, index)
    counts: dict[str, Any] = {
        split: {key: sum(of[split][key] for of in index.values()) for key in ("tokens", "documents", "bytes")}
        for split in SPLITS
    }
    if paths and not counts["train"]["tokens"]:
        raise DataError("no document is for training", where=paths[0].parent, expected="split: train")
    work.log.say(f"{len(index)} sources: train {_said(counts['train'])}; validation {_said(counts['validation'])}")
    ratios = {name: _ratio(of["train"]) for name, of in index.items()}
    return {"vocab_size": tokenizer.vocab_size, **counts, "sources": index, "bytes_per_token": ratios}


def read_source(path: Path) -> list[Document]:
    """Return a source's documents by id; DataError for one whose split is not decided."""
    rows = sorted(read_rows(path, Document), key=lambda row: row.id)
    for row in rows:
        if row.split not in SPLITS:
            raise DataError(
                "a document is in no split",
                where=f"{path} ({row.id})",
                found=repr(row.split),
                expected=" or ".join(SPLITS),
                todo="run curate again",
            )
    return rows


def sample(paths: Sequence[Path], limit_bytes: int, work: Workspace) -> Iterator[str]:
    """Yield training texts of at most `limit_bytes`, from each source in proportion to its size.

    Within a source the documents come in the order of a hash of seed and id, the last one cut to fit.
    """
    sizes = {p: sum(len(r.text.encode()) for r in read_rows(p, Document) if r.split == "train") for p in paths}
    total = sum(sizes.values())
    if not total:
        raise DataError("no text is for training", where=paths[0].parent, expected="documents with split: train")
    share = min(1.0, limit_bytes / total)
    work.log.say(f"training the tokenizer on {share * total / 1e6:.1f} of {total / 1e6:.1f} MB")
    for path in paths:
        left = int(sizes[path] * share)
        rows = [row for row in read_source(path) if row.split == "train"]
        rows.sort(key=lambda row: hashlib.sha256(f"{work.seed}\0{row.id}".encode()).digest())
        for row in rows:
            if left <= 0:
                break
            data = row.text.encode()[:left]
            left -= len(data)
            yield data.decode(errors="ignore")


def encode(
    rows: Sequence[Document], tokenizer: Tokenizer, threads: int, work: Workspace
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield (id, token ids and the ending one, bytes of the text) of each document, in order."""
    ending = np.array([END_OF_TEXT], np.uint32)
    with ThreadPoolExecutor(threads) as pool:
        for first in work.log.track(range(0, len(rows), BATCH), "encode", unit="batches"):
            batch = rows[first : first + BATCH]
            for row, ids in zip(batch, pool.map(tokenizer.encode_array, [row.text for row in batch]), strict=True):
                yield row.id, np.concatenate([ids, ending]), len(row.text.encode())


def _ratio(counts: dict[str, int]) -> float:
    """Return bytes a token; the ending tokens have none."""
    return round(counts["bytes"] / max(counts["tokens"] - counts["documents"], 1), 4)


def _said(counts: dict[str, int]) -> str:
    return f"{counts['tokens']:,} tokens of {counts['documents']:,} documents, {_ratio(counts):.2f} bytes a token"
