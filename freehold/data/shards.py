"""Token shards: one flat file of ids for each source and split, a document index next to it, `index.json` over all.

The format is described in `docs/formats.md`. Ids are little-endian uint16 when the vocabulary fits, else uint32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from freehold.core.artifact import read_json, read_manifest, sha256_json, verify_files, write_json
from freehold.core.document import write_table
from freehold.core.errors import ArtifactError, DataError
from freehold.core.machine import machine_limits
from freehold.data.loader import Source

INDEX = "index.json"
SPLITS = ("train", "validation")
_KINDS = ("bin", "parquet")
_SCHEMA = pa.schema([("id", pa.string()), ("start", pa.int64()), ("tokens", pa.int32()), ("bytes", pa.int32())])
ADDRESS = pa.field("address", pa.string())
"""A further column where documents have web addresses, so that what a site reserves is known in tokens."""


def dtype_for(vocab_size: int) -> np.dtype:
    """Return the type that holds every id of a vocabulary: little-endian uint16 or uint32."""
    # The byte order is fixed, so a shard written on one machine is read on any other.
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_shard(
    folder: Path,
    name: str,
    split: str,
    documents: Iterable[tuple[str, np.ndarray, int]],
    dtype: np.dtype,
    addresses: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Write documents (id, token ids with the ending one, UTF-8 bytes of the text) as they come.

    `addresses` holds the web addresses by id, of documents that have one. One document is in memory at a time.
    Returns counts: tokens, documents, bytes.
    """
    path = folder / f"{name}.{split}.bin"
    columns: dict[str, list[Any]] = {column: [] for column in _SCHEMA.names}
    start = 0
    with machine_limits(path):
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for document, ids, text_bytes in documents:
                # Straight to the file: a shard may be larger than memory, its index is not.
                file.write(ids.astype(dtype).tobytes())
                for column, value in zip(columns.values(), (document, start, len(ids), text_bytes), strict=True):
                    column.append(value)
                # Documents stand without gaps, each with its ending token: a start and a length find any of them.
                start += len(ids)
    table = pa.table(columns, schema=_SCHEMA)
    if addresses:
        table = table.append_column(ADDRESS, pa.array([addresses.get(one, "") for one in columns["id"]], pa.string()))
    write_table(path.with_suffix(".parquet"), table)
    return {"tokens": start, "documents": len(columns["id"]), "bytes": sum(columns["bytes"])}


def write_index(
    folder: Path, vocab_size: int, tokenizer_sha256: str, sources: dict[str, dict[str, dict[str, int]]]
) -> None:
    """Write `index.json` over the shards of a folder; `sources` holds the counts of `write_shard` by source, split."""
    write_json(
        folder / INDEX,
        {
            "dtype": dtype_for(vocab_size).name,
            "vocab_size": vocab_size,
            # Ids mean nothing without their tokenizer: a model of another one must refuse these shards.
            "tokenizer_sha256": tokenizer_sha256,
            "sources": sources,
        },
    )


class Shard:
    """One source and split, memory-mapped: tokens are read when they are asked for.

    Raises ArtifactError when a file is missing, damaged, or not as long as the counts say.
    """

    def __init__(self, path: Path, dtype: np.dtype, counts: dict[str, int]) -> None:
        self.path, self.counts = path, counts
        try:
            table = pq.read_table(path.with_suffix(".parquet"))
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(
                "cannot read the document index of a shard",
                where=path.with_suffix(".parquet"),
                found=error,
                todo="run tokenize again with --clean",
            ) from error
        # Sizes are checked at every start, hashes only with `verify`: reading 100 GB before each step one is no check
        # that people would keep on.
        if table.schema not in (_SCHEMA, _SCHEMA.append(ADDRESS)) or len(table) != counts["documents"]:
            raise ArtifactError(
                "not the document index of this shard",
                where=path.with_suffix(".parquet"),
                found=f"{len(table):,} rows of {', '.join(table.schema.names)}",
                expected=f"{counts['documents']:,} rows of {', '.join(_SCHEMA.names)}",
            )
        size, expected = path.stat().st_size if path.exists() else 0, counts["tokens"] * dtype.itemsize
        if size != expected or not path.exists():
            raise ArtifactError(
                "a shard is missing, truncated or has grown",
                where=path,
                found=f"{size:,} bytes",
                expected=f"{expected:,} bytes",
                todo="run tokenize again with --clean",
            )
        # An empty file cannot be mapped.
        self.data: np.ndarray = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
        self._table = table

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return a view of the ids from `start` to `stop` (not included), counted over the whole shard."""
        return self.data[start:stop]

    @cached_property
    def ids(self) -> list[str]:
        """The id of each document, in shard order."""
        return list(self._table["id"].to_pylist())

    @cached_property
    def starts(self) -> np.ndarray:
        """The first token of each document, int64."""
        return self._table["start"].to_numpy()

    @cached_property
    def lengths(self) -> np.ndarray:
        """The tokens of each document, the ending one included, int64."""
        return self._table["tokens"].to_numpy().astype(np.int64)

    @cached_property
    def bytes(self) -> np.ndarray:
        """The UTF-8 bytes of each document's text, int64."""
        return self._table["bytes"].to_numpy().astype(np.int64)

    def document_at(self, offset: int) -> int:
        """Return the number of the document that holds the token at `offset`; IndexError outside the shard."""
        if not 0 <= offset < len(self.data):
            raise IndexError(f"token {offset} is not in {self.path}, which has {len(self.data)}")
        return int(np.searchsorted(self.starts, offset, side="right")) - 1


class ShardSet:
    """All shards of a tokenize folder: `shards[name, split]`, and what `index.json` says of them."""

    def __init__(self, folder: Path, index: dict[str, Any], files: dict[str, dict[str, Any]] | None = None) -> None:
        self.folder, self._files = folder, files or {}
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_sha256: str = index["tokenizer_sha256"]
        self.dtype = dtype_for(self.vocab_size)
        if index["dtype"] != self.dtype.name:
            raise ArtifactError("another type of ids", where=folder, found=index["dtype"], expected=self.dtype.name)
        self.shards = {
            (name, split): Shard(folder / f"{name}.{split}.bin", self.dtype, counts)
            for name, splits in sorted(index["sources"].items())
            for split, counts in sorted(splits.items())
        }

    @classmethod
    def load(cls, folder: Path, *, verify: bool = False, tokenizer_sha256: str | None = None) -> ShardSet:
        """Open the shards of a `tokens/` folder.

        With `verify` every file is compared with the hash in tokenize's manifest: ArtifactError names the one that
        differs. With `tokenizer_sha256` the shards must be of that tokenizer: DataError names both otherwise.
        """
        path, files = folder / INDEX, None
        if verify:
            manifest = read_manifest(folder.parent, kind="tokenize")
            # The tokenizer has a hash of its own in each checkpoint; here only the tokens count.
            files = {k: v for k, v in manifest["files"].items() if k.startswith(f"{folder.name}/")}
            verify_files(folder.parent, {"files": files})
        index = read_json(path)
        if tokenizer_sha256 is not None and index["tokenizer_sha256"] != tokenizer_sha256:
            raise DataError(
                "the shards were made with another tokenizer",
                where=path,
                found=index["tokenizer_sha256"],
                expected=tokenizer_sha256,
                todo="run tokenize with this tokenizer, or use the one next to the shards",
            )
        return cls(folder, index, files)

    def identity(self, split: str, without: Set[str] = frozenset()) -> dict[str, str]:
        """Return a hash of each source's tokens, document index and left-out documents: which text a run reads.

        A source of which `without` names no document has the hash it has without it. Needs `verify` at load.
        """
        found = {}
        for (name, of), shard in self.shards.items():
            if of == split and shard.counts["tokens"]:
                files = [self._files[f"{self.folder.name}/{name}.{split}.{kind}"]["sha256"] for kind in _KINDS]
                # A take-down changes what a run reads without changing a file, so it must change the identity.
                excluded = sorted(without & set(shard.ids)) if without else []
                found[name] = sha256_json([*files, excluded] if excluded else files)
        return found

    def sources(self, split: str, without: Set[str] = frozenset()) -> dict[str, Source]:
        """Return the shards of one split as the loader takes them, by source; documents of `without` are skipped."""
        found = {}
        for (name, of), shard in self.shards.items():
            if of == split:
                starts, lengths, ids = shard.starts, shard.lengths, shard.ids
                if without:
                    kept = [number for number, document in enumerate(ids) if document not in without]
                    starts, lengths, ids = starts[kept], lengths[kept], [ids[number] for number in kept]
                found[name] = Source(name, shard.data, starts, lengths, ids)
        return found

    def document_bytes(self, split: str, name: str) -> np.ndarray:
        """Return the UTF-8 bytes of each document of a shard, int64."""
        return self.shards[name, split].bytes
