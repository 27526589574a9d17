"""Files of many documents with words between them, read piece by piece: a file may be larger than memory."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from freehold.core.streams import Damaged, is_compressed, unpacked
from freehold.stages.gather.paths import Changed
from freehold.text.reading import Member, Part, Reading, unfit, without_thoughts

PIECE_BYTES = 1 << 20
MARKS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>", "<eos>", "[EOS]")
"""What other programs put between documents; met in one text again and again, it separates documents."""
LARGE_BYTES = 1_000_000
"""A text of this size, the only one of its source, is rather a corpus than a document: a long novel has 1.2 MB."""


def separated(member: Member, reading: Reading) -> Iterator[Part]:
    """Yield the documents of a file; one that is too long, damaged or empty is noted and passed over.

    Raises Changed when the file is not the one that was found.
    """
    try:
        for number, data in enumerate(_pieces(member, reading), 1):
            place = f"{member.path}#{number}"
            if data is None:
                reading.skipped.append((place, f"more than max_document_bytes = {reading.limit_bytes:,}"))
                continue
            try:
                text, reason = without_thoughts(data.decode("utf-8-sig" if number == 1 else "utf-8").strip("\n"))
                reason = reason or unfit(text)
            except UnicodeDecodeError as error:
                reason = f"not UTF-8: byte {error.start} is {data[error.start]:#04x}"
            if not reason:
                yield Part(member, str(number), text + "\n")
            elif data.strip():  # between two separators may be nothing
                reading.skipped.append((place, reason))
    except Damaged as error:
        reading.skipped.append((member.path, f"cannot be read: {error}"))


def _pieces(member: Member, reading: Reading) -> Iterator[bytes | None]:
    """Yield the bytes between separators, None for those above the limit, which are not held."""
    mark, limit = reading.separator.encode(), reading.limit_bytes
    held, too_long = b"", False
    for block in _blocks(member):
        *done, held = (held + block).split(mark)
        for piece in done:
            yield None if too_long or len(piece) > limit else piece
            too_long = False
        if len(held) > limit + len(mark):
            too_long, held = True, held[-len(mark) :]
    yield None if too_long or len(held) > limit else held


def _blocks(member: Member) -> Iterator[bytes]:
    """Yield a file's bytes with `\\n` line ends; a file on disk is opened, another one read in full."""
    opened = member.open() if member.open else io.BytesIO(member.read(member.size_bytes) or b"")
    with opened as file:
        hashed = _Hashed(file)
        stream = unpacked(io.BufferedReader(hashed)) if is_compressed(member.path) else hashed
        half = b""
        while block := stream.read(PIECE_BYTES):
            block, half = half + block, b""
            if block.endswith(b"\r"):  # perhaps half of a line end
                block, half = block[:-1], b"\r"
            yield block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield half.replace(b"\r", b"\n")
    if member.open and hashed.sha256.hexdigest() != member.sha256:
        raise Changed(
            "a file changed while gather was reading its source",
            where=member.path,
            expected=f"sha256 {member.sha256[:16]}, as it was when the run began",
            todo="wait until nothing writes there, and run again",
        )


class _Hashed(io.RawIOBase):
    """A file that hashes what is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.file.read(len(buffer))
        self.sha256.update(data)
        buffer[: len(data)] = data
        return len(data)


def hint(texts: list[tuple[str, str]], separator: str) -> str:
    """Return what a person should know of (path, text) pairs that hold several documents each, or are a corpus in one.

    Empty when there is nothing to say.
    """
    if separator:
        return ""
    marks = Counter({mark: sum(text.count(mark) for _, text in texts) for mark in MARKS})
    mark, count = marks.most_common(1)[0]
    if count > 1:
        return (
            f"`{mark}` is {count:,} times in the text, as ordinary characters; "
            f'separator: "{mark}" makes a document of each part'
        )
    if len(texts) == 1 and len(texts[0][1].encode()) > LARGE_BYTES:
        path = PurePosixPath(texts[0][0]).name
        return f"{path} is one document, so nothing is held out for validation; `separator` splits it"
    return ""
