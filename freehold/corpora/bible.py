"""A reader of modules of the pythonbible family: one document a book."""

from __future__ import annotations

import re
from collections.abc import Iterator

from freehold.text.reading import Member, Part, Reading

many_per_file = True


def read(members: list[Member], reading: Reading) -> Iterator[Part]:
    """Yield the books of each module, which is read as text and never imported."""
    return reading.each(members, lambda member, text: books(member, text, reading))


def books(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """Yield one document a book; each chapter becomes a paragraph.

    The module holds one string and two tables {verse id: offset} of starts and ends; a verse id is
    book * 1,000,000 + chapter * 1,000 + verse.
    """
    body = re.search(r'"""(.*?)"""', text, re.S)
    tables = re.findall(r"\{((?:\s*\d+: \d+,)+)\s*\}", text)
    names = dict(re.findall(r'Book\.(\w+): "([^"]+)"', text))
    if body is None or len(tables) < 2 or not names:
        reading.skipped.append((member.path, "not a module of the pythonbible family"))
        return
    verses = body.group(1)
    starts, ends = (dict(_pairs(table)) for table in tables[:2])
    chapters: dict[int, dict[int, list[str]]] = {}
    for verse, start in starts.items():
        book, chapter = verse // 1_000_000, verse // 1000 % 1000
        words = " ".join(verses[start : ends[verse]].replace("`", "'").split())
        chapters.setdefault(book, {}).setdefault(chapter, []).append(words)
    for number, title in enumerate(names.values(), start=1):
        if number in chapters:
            paragraphs = [f"Chapter {c}\n\n" + " ".join(filter(None, v)) for c, v in chapters[number].items()]
            yield Part(member, f"{number:02d}", f"{title}\n\n" + "\n\n".join(paragraphs) + "\n")


def _pairs(table: str) -> Iterator[tuple[int, int]]:
    for key, value in re.findall(r"(?<!\d)(\d+): (\d+)", table):
        yield int(key), int(value)
