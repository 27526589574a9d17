"""Readers: files become texts. Each picks one rendering of a document and strips what is not text."""

from __future__ import annotations

import ast
import codecs
import html
import io
import itertools
import json
import logging
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from freehold.core.errors import ConfigError
from freehold.ledger.evidence import Finding, of_cc_url
from freehold.stages.gather import factbook
from freehold.stages.gather.origins import HALF_CHARACTER, Member, encodable

T = TypeVar("T")

# Documentation shorter than this says little by itself.
MIN_DOCSTRING_CHARS = 200
MIN_API_CHARS = 120
MIN_CODE_CHARS = 200
# Entries of a dictionary make pages of about this size.
PAGE_CHARS = 16_000

# What is around the text of a page.
AROUND = (
    "script, style, noscript, template, svg, math, nav, header, footer, aside, form, button, iframe, select, "
    "[role=navigation], [role=banner], [role=contentinfo], [role=search], [aria-hidden=true], .navheader, .navfooter, "
    ".headerlink, .sphinxsidebar, .related, .breadcrumb, .breadcrumbs, .toc, #toc"
)
MAIN = ("main", "[role=main]", "article", "#main-content", "#content", "div.body", "div.document", "body")
CHARSET = re.compile(rb"""charset\s*=\s*["']?\s*([A-Za-z0-9._:-]{2,40})""", re.I)

BLOCK = re.compile(r"</?(?:p|div|br|ul|ol|dl|dt|dd|table|tr|h[1-6]|note|important|pre|section|title)\b[^<>]*>", re.I)
ITEM = re.compile(r"<li\b[^<>]*>(?:\s*<p>)?", re.I)
TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*)?/?>")
LISTING = re.compile(r"<pre\b[^<>]*>(.*?)</pre>", re.I | re.S)
CELL = re.compile(r"</t[dh]>", re.I)
DROPPED = re.compile(r"<(script|style)\b.*?</\1>", re.I | re.S)


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
    """How to read: the limit for one file, where to note what was skipped, and what was said already."""

    limit_bytes: int
    select: str = ""
    """CSS selector of a page's main text."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    """Texts that a reader takes only once from all files together."""

    def data(self, member: Member) -> bytes | None:
        """Return a member's bytes, or None (and a note why not); Changed when they are not those that were found."""
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
        return None if data is None else self.decoded(member, data)

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
        """Yield what `read` makes of each member's text; a member that it stumbles over is skipped whole, and noted."""
        for member in members:
            text = self.text(member)
            if text is not None:
                yield from self.careful(member, lambda text=text, member=member: read(member, text))  # type: ignore[misc]

    def careful(self, member: Member, read: Callable[[], Iterable[T]]) -> list[T]:
        """Return what `read` makes of a member; nothing, and a note, when the file is not what it expects."""
        try:
            return list(read())
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            self.skipped.append((member.path, f"not what its reader expects: {error!r}"))
            return []


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


def page_text(text: str) -> str:
    """Return the text of a page's HTML: blocks a blank line apart, list items close together, listings as they are."""
    blocks: list[str] = []
    for number, piece in enumerate(LISTING.split(text)):
        if number % 2:
            listing = html.unescape(TAG.sub("", piece)).replace("\u00a0", " ").strip("\n")
            blocks += [listing] if listing.strip() else []
            continue
        # In a page a line break is a space, and cells stand apart.
        lines = strip_html(CELL.sub(" ", " ".join(piece.split()))).split("\n")
        for line in filter(None, lines):
            if blocks and line.startswith("- ") and blocks[-1].startswith("- "):
                blocks[-1] += f"\n{line}"
            else:
                blocks.append(line)
    return "\n\n".join(blocks)


def read(reader: str, members: list[Member], reading: Reading) -> Iterator[Part]:
    """Yield the texts that a reader finds in files, in the order of the files; no file is opened before its turn."""
    for member in _newest(members) if reader == "botocore" else members:
        name = _by_ending(member.path) if reader == "auto" else reader
        if name in BYTE_READERS:
            data = reading.data(member)
            if data is not None:
                yield from reading.careful(member, lambda: BYTE_READERS[name](member, data, reading))  # noqa: B023
        else:
            yield from reading.each([member], lambda member, text: READERS[name](member, text, reading))  # noqa: B023


def _by_ending(path: str) -> str:
    ending = path.lower().removesuffix(".gz").rpartition(".")[2]
    return {"html": "html", "htm": "html", "xhtml": "html", "py": "python", "pdf": "pdf"}.get(ending, "text")


def read_text(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """One document a file; runs of blank lines shortened, line ends trimmed."""
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    yield Part(member, "", re.sub(r"\n{4,}", "\n\n\n", lines).strip("\n") + "\n")


def read_html(member: Member, data: bytes, reading: Reading) -> Iterator[Part]:
    """One document a page: its main text under its title, with what the page says of its licence."""
    from selectolax.lexbor import LexborHTMLParser, SelectolaxError

    declared = CHARSET.search(data[:2048])
    encoding = "utf-8-sig"
    if declared and not data.startswith(codecs.BOM_UTF8):
        try:
            name = codecs.lookup(declared[1].decode("ascii")).name
            # Where the bytes of ASCII could be read, it cannot be UTF-16, whatever it says (so the HTML standard).
            encoding = "utf-8-sig" if name.startswith(("utf-16", "utf-32")) else name
        except LookupError:
            encoding = "utf-8-sig"
    text = reading.decoded(member, data, "utf-8-sig" if encoding == "utf-8" else encoding)
    if text is None:
        return
    tree = LexborHTMLParser(text)
    findings = tuple(_page_rights(tree, member.path))
    title = tree.css_first("title")
    heading = " ".join(title.text().split()) if title else ""
    for node in tree.css(AROUND):
        node.decompose()
    choices = (reading.select,) if reading.select else MAIN
    try:
        main = next(filter(None, (tree.css_first(choice) for choice in choices)), None)
    except SelectolaxError as error:
        raise ConfigError("not a CSS selector", where="select", found=reading.select, todo=str(error)) from error
    found = page_text(main.html or "") if main is not None else ""
    if not found:
        reading.skipped.append((member.path, f"no text in {reading.select}" if reading.select else "no text in it"))
        return
    opening = "" if not heading or found.startswith(heading) else f"{heading}\n\n"
    yield Part(member, "", f"{opening}{found}\n", findings)


def _page_rights(tree: Any, place: str) -> Iterator[Finding]:
    """Yield what a page says of its licence: links with rel=license, other Creative Commons links, reservations."""
    seen = set()
    for node in tree.css("a[href], link[href]"):
        href = node.attributes.get("href") or ""
        marked = "license" in (node.attributes.get("rel") or "").lower().split()
        says = of_cc_url(href)
        if says and (says, marked) not in seen:
            seen.add((says, marked))
            yield Finding("link", place, says, href[:120], sure=marked)
    for node in tree.css("meta[name]"):
        name, content = (node.attributes.get("name") or "").lower(), (node.attributes.get("content") or "").lower()
        # https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240510/
        if name == "tdm-reservation" and content.strip() == "1":
            yield Finding("restriction", place, "", "tdm-reservation: 1")
        elif name == "robots" and {"noai", "noimageai"} & set(re.split(r"[\s,]+", content)):
            yield Finding("restriction", place, "", f"robots: {content[:60]}")
        elif name in {"dcterms.license", "dc.rights", "dcterms.rights"} and of_cc_url(content):
            yield Finding("link", place, of_cc_url(content) or "", content[:120])


def read_pdf(member: Member, data: bytes, reading: Reading) -> Iterator[Part]:
    """One document a file: the text of its pages, without what looks like a page number; scans have none."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it says of a bad file is said here, in one line
    try:
        document = PdfReader(io.BytesIO(data))
        if document.is_encrypted:
            reading.skipped.append((member.path, "an encrypted PDF"))
            return
        pages = [page.extract_text() for page in document.pages]
    except DependencyError:  # a cipher that pypdf leaves to others
        reading.skipped.append((member.path, "an encrypted PDF"))
        return
    except (PyPdfError, OSError, RuntimeError, ArithmeticError, AssertionError) as error:
        reading.skipped.append((member.path, f"not a PDF that can be read: {error}"))
        return
    lines = [line.rstrip() for page in pages for line in page.split("\n") if not line.strip().isdigit()]
    text = "\n".join(lines).strip()
    reason = unfit(text)
    if reason:
        reading.skipped.append((member.path, "no text in it: a scan?" if reason == "empty" else reason))
        return
    yield Part(member, "", text + "\n")


def dictd_entries(member: Member, data: bytes, reading: Reading) -> list[str]:
    """Return the entries of a dictionary in the format of dictd; those that are not UTF-8 are left out and counted.

    An entry begins with a line that is not indented, and those named `00-database...` are about the dictionary.
    """
    entries = re.split(rb"\n(?=[^\s])", data.replace(b"\r\n", b"\n"))
    good, bad = [], 0
    for entry in entries:
        try:
            text = entry.decode("utf-8").strip("\n")
        except UnicodeDecodeError:
            bad += 1
            continue
        if text.strip() and not text.startswith("00-database"):
            good.append(text)
    if bad:
        reading.skipped.append((member.path, f"{bad:,} of {len(entries):,} entries are not UTF-8"))
    return good


def read_dictd(member: Member, data: bytes, reading: Reading) -> Iterator[Part]:
    """Pages of entries of a dictionary in the format of dictd."""
    good = dictd_entries(member, data, reading)
    number, size = 0, 0
    page: list[str] = []
    for text in itertools.chain(good, [None]):
        if page and (text is None or size + len(text) > PAGE_CHARS):
            yield Part(member, f"{number:05d}", "\n\n".join(page) + "\n")
            number, page, size = number + 1, [], 0
        if text is not None:
            page.append(text)
            size += len(text)


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


BYTE_READERS: dict[str, Callable[[Member, bytes, Reading], Iterator[Part]]] = {
    "html": read_html,
    "pdf": read_pdf,
    "dictd": read_dictd,
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
