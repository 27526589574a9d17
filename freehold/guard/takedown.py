"""What was asked to be removed, as salted hashes of word spans: recognised without being kept.

A document becomes the hashes of each run of SPAN_WORDS words in it; a shorter one the hash of all its words. Runs that
are also in texts which stay (quotations, phrases, licences) are not the document's own, and are left open.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.core.artifact import write_json
from freehold.core.errors import DataError
from freehold.guard.normal import Span

FORMAT_VERSION = 1
SPAN_WORDS = 10
FEWEST_WORDS = 4
"""Fewer words are said by chance."""
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# In scripts that write no spaces each letter is a word of its own.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Filter:
    """Hashes of spans, by how many words a span has."""

    salt: bytes
    spans: Mapping[int, frozenset[str]]

    def find(self, text: str) -> Iterator[Span]:
        """Yield where a span begins and ends."""
        words = _words(text)
        for size, known in self.spans.items():
            for at in range(len(words) - size + 1):
                if _hash(self.salt, [word for word, _, _ in words[at : at + size]]) in known:
                    yield words[at][1], words[at + size - 1][2]


def build(removed: Iterable[str], others: Iterable[str] = (), salt: bytes | None = None) -> Filter:
    """Return the filter of some texts; spans that also occur in `others`, which stay, are not in the filter."""
    salt = secrets.token_bytes(16) if salt is None else salt
    spans: dict[int, set[str]] = {}
    for text in removed:
        words = [word for word, _, _ in _words(text)]
        size = min(SPAN_WORDS, len(words))
        if size >= FEWEST_WORDS:
            spans.setdefault(size, set()).update(_hashes(salt, words, size))
    for text in others:
        words = [word for word, _, _ in _words(text)]
        for size, known in spans.items():
            known.difference_update(_hashes(salt, words, size))
    return Filter(salt, {size: frozenset(known) for size, known in spans.items() if known})


def merged(one: Filter, other: Filter) -> Filter:
    """Return both in one; DataError when their salts differ, since hashes of one mean nothing under the other's."""
    if one.salt != other.salt:
        raise DataError("two filters with different salts", expected="the second built with the salt of the first")
    sizes = sorted({*one.spans, *other.spans})
    empty: frozenset[str] = frozenset()
    return Filter(one.salt, {size: one.spans.get(size, empty) | other.spans.get(size, empty) for size in sizes})


def save(path: Path, found: Filter) -> None:
    """Write a filter; the same filter gives the same bytes."""
    spans = {str(size): sorted(known) for size, known in sorted(found.spans.items())}
    write_json(
        path, {"kind": "takedown_filter", "format_version": FORMAT_VERSION, "salt": found.salt.hex(), "spans": spans}
    )


def load(path: Path) -> Filter:
    """Read a filter; DataError when the file is not one."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"longer than {MOST_BYTES:,} bytes")
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (data["kind"], data["format_version"]) != ("takedown_filter", FORMAT_VERSION):
            raise ValueError(f"kind {data['kind']!r}, format version {data['format_version']!r}")
        spans = {int(size): frozenset(map(str, known)) for size, known in data["spans"].items()}
        if not all(0 < size <= 1000 for size in spans):
            raise ValueError("a span of no words")
        return Filter(bytes.fromhex(data["salt"]), spans)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            "not a take-down filter", where=path, found=str(error)[:200],
            expected=f"what `freehold takedown --filter` writes, format version {FORMAT_VERSION}",
        ) from error  # fmt: skip


def _words(text: str) -> list[tuple[str, int, int]]:
    return [(match[0].casefold(), match.start(), match.end()) for match in _WORD.finditer(text)]


def _hashes(salt: bytes, words: list[str], size: int) -> Iterator[str]:
    return (_hash(salt, words[at : at + size]) for at in range(len(words) - size + 1))


def _hash(salt: bytes, words: list[str]) -> str:
    return hashlib.blake2b(" ".join(words).encode(errors="replace"), key=salt, digest_size=10).hexdigest()
