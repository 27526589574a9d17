"""The book-keeping of curation: what came in, what each step dropped and why, what went out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from freehold.core.document import Conversation, Document, write_table
from freehold.stages.curate.filters import Why


class Report:
    """Counts by source and step; everything in it follows from the content."""

    def __init__(self) -> None:
        self.drops: list[dict[str, Any]] = []
        self.sources: dict[str, dict[str, Any]] = {}
        self.conversations: dict[str, dict[str, Any]] = {}
        self.repaired: dict[str, Counter[str]] = defaultdict(Counter)
        self.redacted: dict[str, Counter[str]] = defaultdict(Counter)
        self.bytes_in = 0
        self._reasons: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self._size: dict[str, dict[str, int]] = {}

    def arrive(self, texts: Iterable[tuple[str, str]]) -> None:
        """Note what came in, as (source, text)."""
        self._size = _sizes(texts)
        for source, size in sorted(self._size.items()):
            self.sources[source] = {"in": size, "steps": [], "out": {"documents": 0, "bytes": 0}}
            self.bytes_in += size["bytes"]

    def drop(self, step: str, row: Document | Conversation, chars: int, why: Why) -> None:
        """Note one drop."""
        reason, detail = why
        self.drops.append(
            {
                "id": row.id,
                "source": row.source,
                "path": row.path,
                "reason": reason,
                "detail": detail,
                "chars": chars,
            }
        )
        self._reasons[row.source, step][reason] += 1

    def close(self, step: str, texts: Iterable[tuple[str, str]]) -> None:
        """Note what a step let through, as (source, text)."""
        after = _sizes(texts)
        for source, entry in self.sources.items():
            empty = {"documents": 0, "bytes": 0}
            entry["steps"].append(
                {
                    "step": step,
                    "in": self._size.get(source, empty),
                    "out": after.get(source, empty),
                    "dropped": dict(sorted(self._reasons[source, step].items())),
                }
            )
        self._size = after

    def leave(self, source: str, rows: list[tuple[str, int]]) -> None:
        """Note what was written of one source, as (split, bytes)."""
        entry = self.sources[source]
        entry["out"] = {"documents": len(rows), "bytes": sum(size for _, size in rows)}
        for split in ("train", "validation"):
            sizes = [size for name, size in rows if name == split]
            entry[split] = {"documents": len(sizes), "bytes": sum(sizes)}

    def talk(self, source: str, total: int, splits: Counter[str]) -> None:
        """Note what was written of one source's conversations."""
        self.conversations[source] = {
            "in": total,
            "out": splits.total(),
            "train": splits["train"],
            "validation": splits["validation"],
            "dropped": dict(sorted(self._reasons[source, "conversations"].items())),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the whole report."""
        for source, entry in self.sources.items():
            entry["repaired"] = dict(sorted(self.repaired[source].items()))
            entry["redacted"] = dict(sorted(self.redacted[source].items()))
        talk = {
            source: {**entry, "redacted": {} if source in self.sources else dict(sorted(self.redacted[source].items()))}
            for source, entry in self.conversations.items()
        }
        return {"sources": self.sources, "conversations": talk, "totals": self.totals()}

    def totals(self) -> dict[str, Any]:
        """Return the sums over all sources: the counts of the manifest."""
        entries = list(self.sources.values())
        talks = list(self.conversations.values())
        return {
            "documents": {
                way: sum(e[way]["documents"] for e in entries if way in e)
                for way in ("in", "out", "train", "validation")
            },
            "bytes": {
                way: sum(e[way]["bytes"] for e in entries if way in e) for way in ("in", "out", "train", "validation")
            },
            "conversations": {way: sum(t[way] for t in talks) for way in ("in", "out", "train", "validation")},
            "dropped": dict(sorted(Counter(drop["reason"] for drop in self.drops).items())),
            "repaired": dict(sorted(sum(self.repaired.values(), Counter[str]()).items())),
            "redacted": dict(sorted(sum(self.redacted.values(), Counter[str]()).items())),
        }

    def write_drops(self, path: Path) -> None:
        """Write every drop as parquet, by source, then by id."""
        import pyarrow as pa

        names = ("id", "source", "path", "reason", "detail")
        schema = pa.schema([*((name, pa.string()) for name in names), ("chars", pa.int64())])
        rows = sorted(self.drops, key=lambda drop: (drop["source"], drop["id"], drop["path"]))
        write_table(path, pa.Table.from_pylist(rows, schema=schema))


def _sizes(texts: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    sizes: dict[str, dict[str, int]] = {}
    for source, text in texts:
        size = sizes.setdefault(source, {"documents": 0, "bytes": 0})
        size["documents"] += 1
        size["bytes"] += len(text) if text.isascii() else len(text.encode())
    return sizes
