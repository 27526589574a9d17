"""The words that this repository does not use, and where they still are; `tests/test_words.py` holds the list."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

BANNED = {
    "told": r"told|tells?",
    "heed": r"heed(s|ed|ing)?",
    "deal": r"deals?|dealt|dealing",
    "anew": r"anew",
    "alike": r"alike",
    "nobody": r"nobody",
    "beside": r"besides?",
    "lies": r"lies?|lay|lain",
    "lay out": r"(lay|lays|laid|laying)[ _]out",
    "laid": r"laid",
    "leave out": r"(leave|leaves|left|leaving)[ _]out",
    "so many": r"so[ _]many",
    "at once": r"at once",
    "of it": r"of it",
    "go on": r"(go|goes|going|went|gone)[ _]on",
    "whole, a noun": r"(the|a) whole(?= of\b|\s*[.,;:)])",
    "must_x": r"def must_\w+",
    "heart": r"hearts?",
    "Spread": r"(?-i:Spread)|(dealt|spread) over",
    "fed": r"fed",
    "take over": r"(take|takes|taken|took|taking)[ _]over",
    "hand out": r"(hand|hands|handed|handing)[ _]out",
    "kept back": r"(keep|keeps|kept|keeping)[ _]back",
    "thereof": r"(there|where)(of|upon|to|from)",
    "what is to be": r"what is to be",
    "shall": r"shall",
    "hence": r"hither(to)?|hence|thence|whence",
}
"""Word -> the pattern of its forms. The field's words instead: configured or reported, handle, shard or assign, again,
the same, no one, next to, is or is stored, arrange, skip, that many, immediately or together, resume, `check_x`."""

KINDS = (".py", ".md", ".yaml", ".cpp", ".sh", ".toml", ".txt")
PLACES = ("freehold", "tests", "benchmarks", "docs", "recipes", "examples")
HISTORY = {"LOG.md", "benchmarks/words.py", "tests/test_words.py"}
"""The log is history; the other two must name the words."""

# A word ends where a letter does not follow: `_deal` and `deal_rows` count, and so does each word of CamelCase.
PATTERNS = {word: re.compile(rf"(?<![a-z0-9])({form})(?![a-z0-9])", re.I) for word, form in BANNED.items()}
_ANY = re.compile("|".join(p.pattern.replace("(?-i:Spread)", "spread") for p in PATTERNS.values()), re.I)
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def pages(tree: Path) -> Iterator[Path]:
    """Yield the files whose words count: the four rooms of code, the pages, the recipes and the examples."""
    for place in PLACES:
        yield from sorted(path for path in (tree / place).rglob("*") if path.suffix in KINDS)
    yield from sorted(
        path for path in tree.iterdir() if path.suffix == ".md" or path.name in {"Makefile", "Dockerfile"}
    )


def found(tree: Path, path: Path) -> Iterator[tuple[str, int, str]]:
    """Yield (banned word, line number, line) of each place in a file."""
    if path.relative_to(tree).as_posix() in HISTORY:
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        text = CAMEL.sub(" ", line)
        if _ANY.search(text):
            for word, pattern in PATTERNS.items():
                for _ in pattern.findall(text):
                    yield word, number, line.strip()


def counts(tree: Path, paths: Iterable[Path] | None = None) -> Counter[str]:
    """Return how often each banned word stands in the files of a checkout."""
    return Counter(word for path in paths or pages(tree) for word, _, _ in found(tree, path))


_FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_MARK = re.compile(r"[*_#>`]")


def sentences(text: str) -> list[str]:
    """Return the sentences of a Markdown page: paragraphs and list items, without code, tables and headings."""
    blocks: list[list[str]] = [[]]
    for line in _FENCE.sub("", text).splitlines():
        bare = line.strip()
        if not bare or bare.startswith(("|", "#", "<", "![")) or line.startswith("    "):
            blocks.append([])
        elif re.match(r"([-*]|\d+\.) ", bare):
            blocks.append([re.sub(r"^([-*]|\d+\.) ", "", bare)])
        else:
            blocks[-1].append(bare)
    prose = (_MARK.sub("", _LINK.sub(r"\1", " ".join(block))) for block in blocks if block)
    return [s for block in prose for s in re.split(r"(?<=[.?!])\s+", block) if len(s.split()) > 2]


def mean_sentence_words(paths: Iterable[Path]) -> float:
    """Return the mean number of words of a sentence over some Markdown pages."""
    lengths = [len(s.split()) for path in paths for s in sentences(path.read_text(encoding="utf-8"))]
    return sum(lengths) / len(lengths)
