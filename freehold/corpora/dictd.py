"""A reader of dictionaries in the format of dictd: pages of entries."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from freehold.text.reading import Member, Part, Reading

many_per_file = True
# Entries make pages of about this size.
PAGE_CHARS = 16_000


def read(members: list[Member], reading: Reading) -> Iterator[Part]:
    """Yield pages of entries."""
    return reading.each_bytes(members, lambda member, data: pages(member, data, reading))


def entries(member: Member, data: bytes, reading: Reading) -> list[str]:
    """Return the entries of a dictionary in the format of dictd; those that are not UTF-8 are skipped and counted.

    An entry begins with a line that is not indented, and those named `00-database...` are about the dictionary.
    """
    pieces = re.split(rb"\n(?=[^\s])", data.replace(b"\r\n", b"\n"))
    good, bad = [], 0
    for entry in pieces:
        try:
            text = entry.decode("utf-8").strip("\n")
        except UnicodeDecodeError:
            bad += 1
            continue
        if text.strip() and not text.startswith("00-database"):
            good.append(text)
    if bad:
        reading.skipped.append((member.path, f"{bad:,} of {len(pieces):,} entries are not UTF-8"))
    return good


def pages(member: Member, data: bytes, reading: Reading) -> Iterator[Part]:
    """Pages of entries of a dictionary in the format of dictd."""
    good = entries(member, data, reading)
    number, size = 0, 0
    page: list[str] = []
    for text in itertools.chain(good, [None]):
        if page and (text is None or size + len(text) > PAGE_CHARS):
            yield Part(member, f"{number:05d}", "\n\n".join(page) + "\n")
            number, page, size = number + 1, [], 0
        if text is not None:
            page.append(text)
            size += len(text)
