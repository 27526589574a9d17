"""Readers: files become texts. Each picks one rendering of a document and strips what is not text."""

from __future__ import annotations

import ast
import html
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from freehold.stages.gather import factbook
from freehold.stages.gather.origins import HALF_CHARACTER, Member, encodable

T = TypeVar("T")

# Documentation shorter than this says little by itself.
MIN_DOCSTRING_CHARS = 200
MIN_API_CHARS = 120
MIN_CODE_CHARS = 200

BLOCK = re.compile(r"</?(?:p|div|br|ul|ol|dl|dt|dd|table|tr|h[1-6]|note|important|pre|section|title)\b[^<>]*>", re.I)
ITEM = re.compile(r"<li\b[^<>]*>(?:\s*<p>)?", re.I)
TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*)?/?>")
DROPPED = re.compile(r"<(script|style)\b.*?</\1>", re.I | re.S)


@dataclass(frozen=True)
class Part:
    """One text read from a member; `anchor` says which, when a member holds several."""

    member: Member
    anchor: str
    text: str

    @property
    def path(self) -> str:
        """Place of the text in its source."""
        return f"{self.member.path}#{self.anchor}" if self.anchor else self.member.path


@dataclass
class Reading:
    """How to read: the limit for one file, where to note what was skipped, and what was said already."""

    limit_bytes: int
    skipped: list[tuple[str, str]] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    """Texts that a reader takes only once from all files together."""

    def text(self, member: Member) -> str | None:
        """Return a member's text with `\\n` line ends, or None (and a note why not)."""
        reason = "cannot be read"
        try:
            data = member.read(self.limit_bytes)
            if data is None:
                reason = f"more than max_document_bytes = {self.limit_bytes:,} (unpacked)"
            else:
                text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
                reason = unfit(text)
                if not reason:
                    return text
        except UnicodeDecodeError as error:
            reason = f"not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        except (OSError, EOFError, zlib.error) as error:
            reason = f"cannot be read: {error}"
        self.skipped.append((member.path, reason))
        return None

    def each(self, members: Iterable[Member], read: Callable[[Member, str], Iterable[T]]) -> Iterator[T]:
        """Yield what `read` makes of each member's text; a member that it stumbles over is skipped whole, and noted."""
        for member in members:
            text = self.text(member)
            if text is None:
                continue
            try:
                found = list(read(member, text))
            except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
                self.skipped.append((member.path, f"not what its reader expects: {error!r}"))
            else:
                yield from found


def unfit(text: str) -> str:
    """Return why a text cannot be a document, or an empty string; one rule for files, JSON rows and readers."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "binary: it has NUL characters"
    return "" if encodable(text) else HALF_CHARACTER


def strip_html(text: str) -> str:
    """Return the text of an HTML fragment: paragraphs on lines of their own, list items behind dashes."""
    if "<" in text:
        text = DROPPED.sub(" ", text)
        text = ITEM.sub("\n- ", text)
        text = BLOCK.sub("\n", text)
        text = TAG.sub("", text)
    text = html.unescape(text).replace("\u00a0", " ")
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return "\n".join(line for line in lines if line and line != "-")


def read(reader: str, members: list[Member], reading: Reading) -> Iterator[Part]:
    """Yield the texts that a reader finds in files, in the order of the files; no file is opened before its turn."""
    chosen = _newest(members) if reader == "botocore" else members
    return reading.each(chosen, lambda member, text: READERS[reader](member, text, reading))


def read_text(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """One document a file; runs of blank lines shortened, line ends trimmed."""
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    yield Part(member, "", re.sub(r"\n{4,}", "\n\n\n", lines).strip("\n") + "\n")


def read_python(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """One document a module, as it is; modules with next to nothing in them are left out."""
    if len(text) < MIN_CODE_CHARS:
        reading.skipped.append((member.path, f"fewer than {MIN_CODE_CHARS} characters"))
    else:
        yield Part(member, "", text)


def read_docstrings(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """One document a module: its longer docstrings under the names and signatures they belong to."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reading.skipped.append((member.path, f"not Python: {error}"))
        return
    module = member.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = list(_docstrings(tree, module))
    if found:
        yield Part(member, "", "\n\n\n".join(found) + "\n")
    else:
        reading.skipped.append((member.path, f"no docstring over {MIN_DOCSTRING_CHARS} characters"))


def read_bible(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """One document a book, from a module of the pythonbible family, read as text and never imported.

    The module holds one string and two tables {verse id: offset} of starts and ends; a verse id is
    book * 1,000,000 + chapter * 1,000 + verse. Each chapter becomes a paragraph.
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


def read_factbook(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """One document a country: its longer fields as paragraphs under the section they belong to."""
    page = factbook.page(json.loads(text), strip_html)
    if page:
        yield Part(member, "", page)
    else:
        reading.skipped.append((member.path, "no text in it"))


def read_botocore(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """One document a service: what its API description says, each sentence block once in all services."""
    model = json.loads(text)
    title = model.get("metadata", {}).get("serviceFullName", "")
    opening = strip_html(model.get("documentation", ""))
    blocks = [opening if opening.startswith(title) else f"{title}\n\n{opening}"]
    said: set[str] = set()
    for name, html_text in _documentation(model):
        plain = strip_html(html_text)
        if len(plain) >= MIN_API_CHARS and plain not in reading.said and plain not in said:
            said.add(plain)
            blocks.append(f"{name}\n\n{plain}")
    reading.said |= said
    yield Part(member, "", "\n\n\n".join(block.strip() for block in blocks) + "\n")


READERS: dict[str, Callable[[Member, str, Reading], Iterator[Part]]] = {
    "text": read_text,
    "python": read_python,
    "docstrings": read_docstrings,
    "bible": read_bible,
    "factbook": read_factbook,
    "botocore": read_botocore,
}


def _newest(members: list[Member]) -> list[Member]:
    """Return the newest description of each service; paths are `.../<service>/<date>/<file>`."""
    newest: dict[str, str] = {}
    for member in members:
        service = member.path.rsplit("/", 2)[0]
        newest[service] = max(newest.get(service, ""), member.path)
    return [member for member in members if member.path in newest.values()]


def _documentation(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, operation in model.get("operations", {}).items():
        yield name, operation.get("documentation", "")
    for name, shape in model.get("shapes", {}).items():
        yield name, shape.get("documentation", "")
    for name, shape in model.get("shapes", {}).items():  # last: the most, and the most alike
        for member, inner in shape.get("members", {}).items():
            yield f"{name}.{member}", inner.get("documentation", "")


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_DOCSTRING_CHARS:
            called = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
            yield f"{name}{called}\n\n{text}"
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}")


def _pairs(table: str) -> Iterator[tuple[int, int]]:
    for key, value in re.findall(r"(\d+): (\d+)", table):
        yield int(key), int(value)
