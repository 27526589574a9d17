"""Readers of general formats: text, HTML, PDF, Python; the others are found by entry point."""

from __future__ import annotations

import ast
import codecs
import collections
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from freehold.core.errors import ConfigError
from freehold.core.extensions import load
from freehold.core.streams import plain_name
from freehold.ledger.evidence import Finding, of_cc_url
from freehold.stages.gather.config import GENERAL
from freehold.stages.gather.separated import separated
from freehold.stages.gather.warc import TEXT_MEDIA
from freehold.stages.gather.worker import Worker
from freehold.text.html import page_text
from freehold.text.reading import READERS, Member, Part, Reader, Reading, encoding_named, unfit

# Documentation and code shorter than this say little by themselves.
MIN_DOCSTRING_CHARS = 200
MIN_CODE_CHARS = 200

# What is never text of a page, what is around it, and what is around it unless most of the text is inside: ASP.NET and
# Oracle's systems put a whole page into one form, others into a header.
CODE = "script, style, noscript, template, svg, button, iframe, select, input, textarea"
AROUND = (
    "nav, [role=navigation], [role=search], .navheader, .navfooter, .headerlink, .sphinxsidebar, .related, "
    ".breadcrumb, .breadcrumbs, .toc, #toc"
)
MAYBE_AROUND = "form, header, footer, aside, [role=banner], [role=contentinfo], [aria-hidden=true]"
MAIN = ("main", "[role=main]", "article", "#main-content", "#content", "div.body", "div.document", "body")
# `7`, `- 7 -`, `Page 7`, `7 of 90`, `7/90`
PAGE_NUMBER = re.compile(
    r"[-\u2013\u2014|\s]*(?:(?:page|seite|p\.|s\.)\s*)?(\d{1,5})(?:\s*(?:of|/|von|\|)\s*\d{1,5})?[-\u2013\u2014|\s.]*",
    re.I,
)
CHARSET = re.compile(rb"""charset\s*=\s*["']?\s*([A-Za-z0-9._:-]{2,40})""", re.I)


@dataclass(frozen=True)
class PerFile:
    """A reader of one document a file: `pick` says how a file of that name is read."""

    pick: Callable[[Member], str]
    many_per_file: bool = False

    def read(self, members: list[Member], reading: Reading) -> Iterator[Part]:
        """Yield the texts of the files in their order; no file is opened before its turn."""
        with Worker(read_one, reading.file_s) as worker:
            for member in members:
                name = self.pick(member)
                if reading.separator:
                    yield from separated(member, reading)
                elif name not in ISOLATED:
                    yield from reading.each([member], lambda member, text: TEXT[name](member, text, reading))  # noqa: B023
                elif (data := reading.data(member)) is not None:
                    yield from worker.parts(name, member, data, reading)


def find_reader(name: str, where: str) -> Reader:
    """Return the reader of that name: one of ours here, or one that a package declares.

    Raises ConfigError when the name is unknown or the package's reader cannot be used.
    """
    if name in GENERAL:
        return PerFile(_by_kind if name == "auto" else lambda _: name)
    found: Reader = load(READERS, name, where, ("read", "many_per_file"))
    return found


def read_one(name: str, member: Member, data: bytes, reading: Reading) -> Iterator[Part]:
    """Yield the texts of one file, already read; what its reader does not expect is noted."""
    if name in BYTES:
        return reading.each_bytes([member], lambda member, data: BYTES[name](member, data, reading))
    return reading.each([member], lambda member, text: TEXT[name](member, text, reading))


def _by_kind(member: Member) -> str:
    if member.web is not None:
        return TEXT_MEDIA.get(member.web.media, "text")
    ending = plain_name(member.path).lower().rpartition(".")[2]
    return {"html": "html", "htm": "html", "xhtml": "html", "py": "python", "pdf": "pdf"}.get(ending, "text")


def read_text(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """One document a file; runs of blank lines shortened, line ends trimmed."""
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    yield Part(member, "", re.sub(r"\n{4,}", "\n\n\n", lines).strip("\n") + "\n")


def read_html(member: Member, data: bytes, reading: Reading) -> Iterator[Part]:
    """One document a page: its main text under its title, with what the page says of its licence."""
    from selectolax.lexbor import LexborHTMLParser, SelectolaxError

    text = reading.decoded(member, data, _encoding(member, data))
    if text is None:
        return
    tree = LexborHTMLParser(text)
    findings = tuple(_page_rights(tree, member.path))
    title = tree.css_first("title")
    heading = " ".join(title.text().split()) if title else ""
    _drop_around(tree)
    try:
        found = _main_text(tree, (reading.select,) if reading.select else MAIN)
    except SelectolaxError as error:
        raise ConfigError("not a CSS selector", where="select", found=reading.select, todo=str(error)) from error
    if not found:
        reading.skipped.append((member.path, f"no text in {reading.select}" if reading.select else "no text in it"))
        return
    opening = "" if not heading or found.startswith(heading) else f"{heading}\n\n"
    yield Part(member, "", f"{opening}{found}\n", findings)


def _encoding(member: Member, data: bytes) -> str:
    """Return the encoding of a page: by its first bytes, its server, its own words, in this order."""
    declared = CHARSET.search(data[:2048])
    served = member.web.charset if member.web else ""
    named = "" if data.startswith(codecs.BOM_UTF8) else encoding_named(served)
    if not named and declared and not data.startswith(codecs.BOM_UTF8):
        named = encoding_named(declared[1].decode("ascii"))
    return named or "utf-8-sig"


def _drop_around(tree: Any) -> None:
    """Take out of a page what is around its text."""
    for node in tree.css("math"):
        tex = node.css_first("annotation[encoding*=tex]")
        formula = node.attributes.get("alttext") or (tex.text() if tex else node.text(separator=" "))
        node.replace_with(f" {formula} ")
    # Inner elements first, so that what is asked for its text still has all that stays in it, and nothing else.
    for selector in (CODE, AROUND):
        for node in reversed(tree.css(selector)):
            node.decompose()
    most = len(_words(tree.body)) / 2 if tree.body else 0
    for node in reversed(tree.css(MAYBE_AROUND)):
        if len(_words(node)) <= most:
            node.decompose()


def _words(node: Any) -> str:
    return " ".join(node.text(separator=" ").split())


def _main_text(tree: Any, choices: tuple[str, ...]) -> str:
    """Return the text of the first choice of elements that has some; of several articles, that of all."""
    for choice in choices:
        chosen = tree.css("article:not(article article)") if choice == "article" else [tree.css_first(choice)]
        found = "\n\n".join(filter(None, (page_text(node.html or "") for node in chosen if node is not None)))
        if found:
            return found
    return ""


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
    """One document a file: the text of its pages without their page numbers; scans have none."""
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
    text = "\n".join(line for page in without_page_numbers(pages) for line in page).strip()
    reason = unfit(text)
    if reason:
        reading.skipped.append((member.path, "no text in it: a scan?" if reason == "empty" else reason))
        return
    yield Part(member, "", text + "\n")


def without_page_numbers(pages: list[str]) -> list[list[str]]:
    """Return the lines of each page without its page number.

    A page number is a number alone on the first or last line of pages, growing by one from page to page, on at least
    two pages and most of those that have text. Any other number is text: a cell of a table, a year, an amount.
    """
    split = [[line.rstrip() for line in page.split("\n")] for page in pages]
    for end in (0, -1):
        lines = {n: [i for i, line in enumerate(page) if line.strip()] for n, page in enumerate(split)}
        places = {n: found[end] for n, found in lines.items() if found}
        numbers = {n: PAGE_NUMBER.fullmatch(split[n][place].strip()) for n, place in places.items()}
        starts = collections.Counter(int(found[1]) - n for n, found in numbers.items() if found)
        start, count = starts.most_common(1)[0] if starts else (0, 0)
        if count >= 2 and count > len(places) / 2:
            for n, found in numbers.items():
                if found and int(found[1]) - n == start:
                    del split[n][places[n]]
    return split


def read_python(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """One document a module, as it is; modules with next to nothing in them are skipped."""
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


TEXT: dict[str, Callable[[Member, str, Reading], Iterator[Part]]] = {
    "text": read_text,
    "python": read_python,
    "docstrings": read_docstrings,
}
ISOLATED = {"html", "pdf", "docstrings"}
"""Readers whose parsers may need any time and memory for a file that is made for it; they run in a process apart."""
BYTES: dict[str, Callable[[Member, bytes, Reading], Iterator[Part]]] = {"html": read_html, "pdf": read_pdf}


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_DOCSTRING_CHARS:
            called = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
            yield f"{name}{called}\n\n{text}"
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}")
