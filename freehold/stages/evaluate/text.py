"""Held-out text: which bytes are measured, what xz and zstd make of them, and a model's bits for them."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from freehold.core.document import Conversation, Document, read_rows, said
from freehold.core.errors import DataError
from freehold.core.log import Log
from freehold.stages.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from freehold.api import Loaded

# source -> [(text, whole)]: `whole` is False for the one text that the byte limit cut short.
HeldOut = dict[str, list[tuple[str, bool]]]


def held_out(curated: Path, limit_bytes: int | None) -> HeldOut:
    """Return the validation documents of each source, in file order, up to `limit_bytes` of each.

    The document that crosses the limit is cut between characters. Of a run without documents, what is said in its
    held-out conversations is the text. DataError when there are none at all.
    """
    found: HeldOut = {}
    documents = sorted((curated / "documents").glob("*.parquet"))
    for path in documents or sorted((curated / "conversations").glob("*.parquet")):
        texts, left = [], limit_bytes
        for row_text, split in _texts(path):
            if split != "validation" or left == 0:
                continue
            data = row_text.encode()
            whole = left is None or len(data) <= left
            texts.append((row_text if whole else data[:left].decode(errors="ignore"), whole))
            if left is not None:
                left = left - len(data) if whole else 0
        if any(text for text, _ in texts):
            found[path.stem] = texts
    if not found:
        raise DataError(
            "there is no held-out text to evaluate on",
            where=curated / "documents",
            found="no document whose split is `validation`",
            todo="raise the validation share of `curate`",
        )
    return found


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (text, split) of each row of a table of documents or conversations."""
    if path.parent.name == "documents":
        yield from ((row.text, row.split) for row in read_rows(path, Document))
    else:
        for row in read_rows(path, Conversation):
            yield "\n\n".join(text for _, text in said(row.messages)), row.split


def joined(texts: list[tuple[str, bool]]) -> bytes:
    """Return the held-out text of a source as one run of UTF-8 bytes, nothing between the documents."""
    return "".join(text for text, _ in texts).encode()


def compressors(texts: HeldOut) -> dict[str, Any]:
    """Return bytes, documents and bits per byte of `xz -9` and `zstd -19`, per source and for all as one run."""
    parts = {source: joined(rows) for source, rows in texts.items()}
    counts = {source: len(rows) for source, rows in texts.items()}
    everything = _compressed(b"".join(parts.values()), sum(counts.values()))
    return {"sources": {s: _compressed(data, counts[s]) for s, data in parts.items()}, "overall": everything}


def bits_per_byte(loaded: Loaded, texts: HeldOut, config: EvaluateConfig, log: Log, name: str) -> dict[str, Any]:
    """Return a model's bits, tokens and bits per byte, per source and overall.

    A document is coded as in training: after what begins it (given, not paid for), its tokens, then
    the end-of-text token that ends it (paid for: a code must say where a document stops).
    """
    from freehold.data.packing import cut
    from freehold.stages.evaluate.likelihood import score

    end = loaded.tokenizer.end_of_text
    begin = loaded.begins_with or (end,)
    found: dict[str, Any] = {}
    for source, rows in texts.items():
        encoded = loaded.tokenizer.encode_batch([text for text, _ in rows])
        windows: list[list[int]] = []
        for ids, (_, whole) in zip(encoded, rows, strict=True):
            windows += cut([*begin, *ids, end] if whole else [*begin, *ids], config.context_tokens)
        values = score(loaded.engine, windows, batch_items=config.batch_items, log=log, what=f"{name}: {source}")
        nats = -math.fsum(value for window in values for value in window)
        found[source] = _rate(nats / math.log(2), sum(map(len, values)), len(joined(rows)))
    overall = _rate(*(sum(record[key] for record in found.values()) for key in ("bits", "tokens", "bytes")))
    return {"sources": found, "overall": overall}


def _rate(bits: float, tokens: int, size_bytes: int) -> dict[str, Any]:
    return {"bits": round(bits, 3), "tokens": tokens, "bytes": size_bytes, "bits_per_byte": round(bits / size_bytes, 6)}


def _compressed(data: bytes, documents: int) -> dict[str, Any]:
    xz = len(lzma.compress(data, preset=9))
    zstd = pa.Codec("zstd", compression_level=19).compress(data, asbytes=True)
    return {
        "bytes": len(data),
        "documents": documents,
        "xz": round(8 * xz / len(data), 6),
        "zstd": round(8 * len(zstd) / len(data), 6),
    }
