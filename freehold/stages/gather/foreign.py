"""Readers that packages declare, run in a process of their own: a file that takes too much is skipped and named."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable, Iterator

from freehold.ledger.evidence import Finding
from freehold.stages.gather.isolated import EndedError, Item, isolated
from freehold.text.reading import Member, Part, Reader, Reading

WORD = 8
"""Bytes of the number of the file that the child opened last."""


def read_foreign(reader: Reader, members: list[Member], reading: Reading) -> Iterator[Part]:
    """Yield what a reader yields for files; after a file that ended it, it begins again with the files behind."""
    first = seen = 0
    while first < len(members):
        # Shared with the child, which dies without a word.
        with mmap.mmap(-1, WORD) as opened:
            opened[:] = first.to_bytes(WORD, "big")
            try:
                for head, text in isolated(lambda: _items(reader, members, first, reading, opened), reading.file_s):  # noqa: B023
                    reading.said |= set(head["said"])
                    reading.skipped += [(path, reason) for path, reason in head["skipped"]]
                    if head["member"] >= 0:
                        seen = head["member"] + 1
                        findings = tuple(Finding(**one) for one in head["findings"])
                        decoded = text.decode("utf-8", "surrogatepass")
                        yield Part(members[head["member"]], head["anchor"], decoded, findings)
                return
            except EndedError as error:
                at = int.from_bytes(opened[:], "big")
                # What it noted of these went with it.
                silent = members[max(first, seen) : at]
                reading.skipped += [(member.path, "no text in it, as its reader says") for member in silent]
                reading.skipped.append((members[at].path, str(error)))
                first = at + 1


def _items(reader: Reader, members: list[Member], first: int, reading: Reading, opened: mmap.mmap) -> Iterator[Item]:
    """Yield the parts of a reader, and what it noted since the part before."""
    watched = [
        dataclasses.replace(member, read=_noting(number, member, opened))
        for number, member in enumerate(members)
        if number >= first
    ]
    numbers = {member.path: number for number, member in enumerate(members)}
    skipped, said = len(reading.skipped), set(reading.said)
    for part in reader.read(watched, reading):
        found = [dataclasses.asdict(one) for one in part.findings]
        head = {"member": numbers[part.member.path], "anchor": part.anchor, "findings": found}
        news = {"said": sorted(reading.said - said), "skipped": reading.skipped[skipped:]}
        skipped, said = len(reading.skipped), set(reading.said)
        yield {**head, **news}, part.text.encode("utf-8", "surrogatepass")
    yield {"member": -1, "said": sorted(reading.said - said), "skipped": reading.skipped[skipped:]}, b""


def _noting(number: int, member: Member, opened: mmap.mmap) -> Callable[[int], bytes | None]:
    def read(limit: int) -> bytes | None:
        opened[:] = number.to_bytes(WORD, "big")
        return member.read(limit)

    return read
