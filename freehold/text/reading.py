"""Files become texts: what a reader gets, what it yields, and how it notes what it skips."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol, TypeVar

from freehold.ledger.evidence import Finding

T = TypeVar("T")

READERS = "freehold.readers"
"""The group of entry points that readers are declared in."""
HALF_CHARACTER = "holds half a character (a lone surrogate)"


@dataclass(frozen=True)
class Web:
    """What a web archive says of a page."""

    address: str
    fetched: str
    """ISO date."""
    media: str
    """Media type in lower case, without parameters."""
    charset: str
    headers: Mapping[str, str]
    """HTTP headers, names in lower case."""


@dataclass(frozen=True)
class Member:
    """One file of a source. `read(limit)` returns its bytes, or None when there are more than `limit`."""

    path: str
    sha256: str
    size_bytes: int
    read: Callable[[int], bytes | None]
    open: Callable[[], BinaryIO] | None = None
    """Opens the file as it is stored, where it is on disk: for readers that take a large one piece by piece."""
    web: Web | None = None
    """Where on the web it was read from, for a page of a web archive."""


@dataclass(frozen=True)
class Part:
    """One text read from a member; `anchor` says which, when a member holds several."""

    member: Member
    anchor: str
    text: str
    findings: tuple[Finding, ...] = ()
    """What the file says about its rights where the text does not: links and marks of a page."""

    @property
    def path(self) -> str:
        """Place of the text in its source."""
        return f"{self.member.path}#{self.anchor}" if self.anchor else self.member.path


@dataclass
class Reading:
    """How to read: the limit for one file, where to note what was skipped, and which texts were read already."""

    limit_bytes: int
    select: str = ""
    """CSS selector of a page's main text."""
    separator: str = ""
    """Words between the documents of a text file; empty: a file is one document."""
    file_s: float = 60.0
    """CPU time for one file whose parser may need any; a PDF of a thousand pages takes half as much."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    """Texts that a reader takes only once from all files together."""

    def data(self, member: Member) -> bytes | None:
        """Return a member's bytes, or None (and a note why not); DataError when they changed since they were found."""
        try:
            data = member.read(self.limit_bytes)
        except (OSError, EOFError, zlib.error) as error:
            self.skipped.append((member.path, f"cannot be read: {error}"))
            return None
        if data is None:
            self.skipped.append((member.path, f"more than max_document_bytes = {self.limit_bytes:,} (unpacked)"))
        return data

    def text(self, member: Member) -> str | None:
        """Return a member's text with `\\n` line ends, or None (and a note why not)."""
        data = self.data(member)
        encoding = encoding_named(member.web.charset) if member.web else ""
        return None if data is None else self.decoded(member, data, encoding or "utf-8-sig")

    def decoded(self, member: Member, data: bytes, encoding: str = "utf-8-sig") -> str | None:
        """Return bytes as text, or None (and a note why not)."""
        try:
            text = data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
            reason = unfit(text)
            if not reason:
                return text
        except UnicodeDecodeError as error:
            name = "UTF-8" if encoding == "utf-8-sig" else encoding
            reason = f"not {name}: byte {error.start} is {error.object[error.start]:#04x}"
        self.skipped.append((member.path, reason))
        return None

    def each(self, members: Iterable[Member], read: Callable[[Member, str], Iterable[T]]) -> Iterator[T]:
        """Yield what `read` makes of each member's text; a member that makes it fail is skipped and noted."""
        for member in members:
            text = self.text(member)
            if text is not None:
                yield from self._careful(member, lambda text=text, member=member: read(member, text))  # type: ignore[misc]

    def each_bytes(self, members: Iterable[Member], read: Callable[[Member, bytes], Iterable[T]]) -> Iterator[T]:
        """Do the same with the bytes of each member."""
        for member in members:
            data = self.data(member)
            if data is not None:
                yield from self._careful(member, lambda data=data, member=member: read(member, data))  # type: ignore[misc]

    def _careful(self, member: Member, read: Callable[[], Iterable[T]]) -> list[T]:
        # A file is read to its end before any of its texts counts: half of a damaged file is not a document.
        try:
            return list(read())
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            self.skipped.append((member.path, f"not what its reader expects: {error!r}"))
            return []


def encoding_named(name: str) -> str:
    """Return Python's name of an encoding that a file or a server names; empty when there is none of that name."""
    try:
        found = codecs.lookup(name).name if name else ""
    except LookupError:
        return ""
    # Where the bytes of ASCII could be read, it cannot be UTF-16, whatever it says (so the HTML standard).
    return "utf-8-sig" if found == "utf-8" or found.startswith(("utf-16", "utf-32")) else found


class Reader(Protocol):
    """What an entry point of `freehold.readers` names: a module or an object that turns files into texts.

    Rights: a reader decides none. gather adds the source's licence and evidence to each part; what the file itself
    says about its licence goes into `Part.findings`, and the strictest term wins.
    Errors: what one file does wrong is noted in `reading.skipped` as (path, reason), and reading continues. `each` and
    `each_bytes` do that for AttributeError, LookupError, RecursionError, TypeError and ValueError. A mistake in the
    recipe is a ConfigError; anything else is a bug and stops the run.
    """

    @property
    def many_per_file(self) -> bool:
        """Whether a file holds many documents.

        Then all files are read before `max_bytes` chooses among the documents; otherwise a file that is not needed is
        not opened. A plain attribute will do.
        """
        ...

    def read(self, members: list[Member], reading: Reading) -> Iterator[Part]:
        """Yield the texts of files, in the order of the files, opening each in its turn; a pure function of them."""
        ...


def unfit(text: str) -> str:
    """Return why a text cannot be a document, or an empty string; one rule for files, JSON rows and readers."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "binary: it has NUL characters"
    return "" if encodable(text) else HALF_CHARACTER


def encodable(text: str) -> bool:
    """Return whether text can be written as UTF-8: names of files and escapes in JSON can hold lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


THOUGHTS = ("think", "thinking", "thought", "reasoning")
"""Tags that reasoning models put around their thoughts."""


def without_thoughts(text: str) -> tuple[str, str]:
    """Return a text without the thoughts of a model in front, and why it has nothing else; empty when it has.

    What a reasoning model wrote comes as `<think> ... </think>` and then its answer, where no parser took the thoughts
    off. Only thoughts that begin a text count: further on, a text may speak of such tags.
    """
    answer, closed = text, True
    while closed and (tag := next((t for t in THOUGHTS if answer.lstrip().startswith(f"<{t}>")), "")):
        _, closed, answer = answer.partition(f"</{tag}>")  # type: ignore[assignment]
    if answer is text:
        return text, ""
    return answer.lstrip(), "" if closed and answer.strip() else "only the thoughts of a model, no answer"
