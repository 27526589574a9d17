"""The book-keeping of curation: what came in, what each step dropped and why, what went out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from freehold.core.document import write_table
from freehold.stages.curate.steps import Tally

ALL = "all"
"""Name of the slice of everything."""


class Report:
    """Counts by source and step; everything in it follows from the content."""

    def __init__(self) -> None:
        self.came: dict[str, list[int]] = {}
        self.tallies: dict[str, Tally] = {}
        self.left: dict[str, dict[str, dict[str, int]]] = {}
        self.conversations: dict[str, dict[str, Any]] = {}
        self.talk_redacted: dict[str, Counter[str]] = defaultdict(Counter)
        self.talk = Tally()
        self.more: dict[str, Any] = {}
        """What single steps have to say of themselves: bias, classifier."""

    def arrive(self, source: str, came: list[int], tally: Tally) -> None:
        """Note what came in of a source, as [documents, bytes], and what the first steps did to it."""
        old = self.came.setdefault(source, [0, 0])
        self.came[source] = [a + b for a, b in zip(old, came, strict=True)]
        self.tallies.setdefault(source, Tally()).add(tally)

    def leave(self, source: str, rows: Iterable[tuple[str, int]]) -> None:
        """Note what was written of one source, as (split, bytes)."""
        sizes: dict[str, list[int]] = {"train": [], "validation": []}
        for split, size in rows:
            sizes[split].append(size)
        self.left[source] = {name: {"documents": len(one), "bytes": sum(one)} for name, one in sizes.items()}

    def converse(self, source: str, total: int, splits: Counter[str], dropped: Counter[str]) -> None:
        """Note what was written of one source's conversations."""
        self.conversations[source] = {
            "in": total,
            "out": splits.total(),
            "train": splits["train"],
            "validation": splits["validation"],
            "dropped": dict(sorted(dropped.items())),
        }

    def drops(self) -> list[dict[str, Any]]:
        """Return every drop."""
        return [drop for tally in [*self.tallies.values(), self.talk] for drop in tally.drops]

    def sources(self) -> dict[str, Any]:
        """Return the entry of each source: what came, each step, what went."""
        entries = {}
        for source, tally in sorted(self.tallies.items()):
            before = self.came[source]
            entry: dict[str, Any] = {"in": _size(before), "steps": []}
            for name, step in tally.steps.items():
                entry["steps"].append(
                    {
                        "step": name,
                        "in": _size(before),
                        "out": _size(step["out"]),
                        "dropped": dict(sorted(step["dropped"].items())),
                        **({"measured": _measured(step["measured"])} if step["measured"] else {}),
                    }
                )
                before = step["out"]
            left = self.left.get(source, {})
            entry["out"] = {
                unit: sum(one[unit] for one in left.values()) if left else 0 for unit in ("documents", "bytes")
            }
            entry |= left
            entry["repaired"] = dict(sorted(tally.repaired.items()))
            entry["redacted"] = dict(sorted((tally.redacted + self.talk_redacted[source]).items()))
            entries[source] = entry
        return entries

    def as_dict(self) -> dict[str, Any]:
        """Return the whole report."""
        talk = {
            source: {
                **entry,
                "redacted": {} if source in self.came else dict(sorted(self.talk_redacted[source].items())),
            }
            for source, entry in self.conversations.items()
        }
        everything = Tally()
        for tally in [*self.tallies.values(), self.talk]:
            everything.add(tally)
        samples: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for name, found in sorted(everything.samples.items()):
            step, _, reason = name.partition(" ")
            for sample in found:
                shown = {key: value for key, value in sample.items() if key != "order"}
                samples[step].append({"reason": reason, **shown})
        return {
            "sources": self.sources(),
            "conversations": talk,
            "totals": self.totals(),
            "measured": {
                name: _measured(step["measured"]) for name, step in everything.steps.items() if step["measured"]
            },
            "samples": samples,
            **self.more,
        }

    def totals(self) -> dict[str, Any]:
        """Return the sums over all sources: the counts of the manifest."""
        entries = list(self.sources().values())
        talks = list(self.conversations.values())
        redacted = sum((Counter(entry["redacted"]) for entry in entries), Counter[str]())
        redacted += sum((n for s, n in self.talk_redacted.items() if s not in self.came), Counter[str]())
        return {
            "documents": {
                way: sum(e[way]["documents"] for e in entries if way in e)
                for way in ("in", "out", "train", "validation")
            },
            "bytes": {
                way: sum(e[way]["bytes"] for e in entries if way in e) for way in ("in", "out", "train", "validation")
            },
            "conversations": {way: sum(t[way] for t in talks) for way in ("in", "out", "train", "validation")},
            "dropped": dict(sorted(Counter(drop["reason"] for drop in self.drops()).items())),
            "repaired": dict(sorted(sum((Counter(e["repaired"]) for e in entries), Counter[str]()).items())),
            "redacted": dict(sorted(redacted.items())),
        }

    def write_drops(self, path: Path) -> None:
        """Write every drop as parquet, by source, then by id."""
        import pyarrow as pa

        names = ("id", "source", "path", "reason", "detail")
        schema = pa.schema([*((name, pa.string()) for name in names), ("chars", pa.int64())])
        rows = sorted(self.drops(), key=lambda drop: (drop["source"], drop["id"], drop["path"]))
        write_table(path, pa.Table.from_pylist(rows, schema=schema))


def _size(pair: list[int]) -> dict[str, int]:
    return {"documents": pair[0], "bytes": pair[1]}


def _measured(entry: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    return {reason: {"documents": n, "chars": chars} for reason, (n, chars) in sorted(entry.items())}
