"""Debian's copyright files: which licence holds for which file, in SPDX ids.

The format is DEP-5 (https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/). Its globs name files of the
source package; a binary package holds other paths, so a lookup says how near the glob came.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from freehold.core.errors import LicenceError
from freehold.ledger.evidence import agreement, licence_text
from freehold.ledger.licence import normalise

# Short names of DEP-5 and names in use next to them, in lower case, where they are not SPDX ids already.
NAMES = {
    "expat": "MIT",
    "x11": "X11",
    "artistic": "Artistic-1.0-Perl",
    "artistic-1": "Artistic-1.0",
    "artistic-2": "Artistic-2.0",
    "apache": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "bsd-4-clause": "BSD-4-Clause",
    "cc0": "CC0-1.0",
    "linux-man-pages-copyleft": "Linux-man-pages-copyleft",
    "psf-2": "PSF-2.0",
    "public-domain": "LicenseRef-PD-dedicated",
    "python-2": "Python-2.0",
    "wordnet3.0": "LicenseRef-WordNet",
}
GNU = re.compile(r"(a?gpl|lgpl|gfdl|opl)-?v?(\d+(?:\.\d+)*)(\+?)(?:-only|-or-later)?(?:-niv)?$", re.I)
# So much of a paragraph must be known words for it to be taken for that licence.
MOST = 0.6
VERSIONED = re.compile(r"([A-Za-z][A-Za-z-]*?)-?(\d+(?:\.\d+)*)\+$")


@dataclass(frozen=True)
class Paragraph:
    """The terms of some files."""

    globs: tuple[str, ...]
    name: str
    """The licence as the paragraph names it."""
    expression: str
    """The same as an SPDX expression; a name that SPDX does not know becomes a LicenseRef-."""
    contradiction: str
    """Empty, or why the text that goes with the name is that of another licence."""


@dataclass(frozen=True)
class Copyright:
    """A copyright file of DEP-5."""

    paragraphs: tuple[Paragraph, ...]

    def of(self, path: str) -> tuple[Paragraph, str] | None:
        """Return the paragraph that holds for a file and the glob that matched; the last one that matches wins.

        A glob other than `*` matches when the end of the path does, for a binary package has the source's files
        elsewhere; `debian/` names the packaging, never its text. None when nothing matches.
        """
        # `doc/*` is a folder of the source package; the one below usr/share holds the files of every package.
        parts = path.removeprefix("usr/share/doc/").split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        for paragraph in reversed(self.paragraphs):
            for glob in paragraph.globs:
                if glob == "*" or (not glob.startswith("debian/") and any(_matches(glob, end) for end in ends)):
                    return paragraph, glob
        return None


def parse(text: str) -> Copyright | None:
    """Return what a copyright file says, or None when it is not in the machine-readable format."""
    blocks = [_fields(block) for block in re.split(r"\n(?:[ \t]*\n)+", text.strip().replace("\r\n", "\n"))]
    if not blocks or "copyright-format" not in blocks[0].get("format", blocks[0].get("format-specification", "")):
        return None
    bodies: dict[str, str] = {}
    for block in blocks:
        name, _, body = block.get("license", "").partition("\n")
        if body.strip():
            bodies.setdefault(name.strip().lower(), body)
    found = []
    for block in blocks:
        if "files" in block:
            name, _, body = block.get("license", "").partition("\n")
            body = body if body.strip() else bodies.get(name.strip().lower(), "")
            expression = _recognised(spdx(name), body)
            globs = tuple(block["files"].split())
            found.append(Paragraph(globs, name.strip(), expression, _contradiction(expression, body)))
    return Copyright(tuple(found))


def spdx(name: str) -> str:
    """Return a DEP-5 licence name (`GPL-2+ or Artistic`) as an SPDX expression; unknown names become LicenseRefs."""
    # A comma binds weaker than `and` and `or` do.
    parts = [part for part in re.split(r",\s*(?:and\b)?", name.strip()) if part.strip()]
    joined = [re.split(r" (and|or) ", " ".join(part.split()), flags=re.I) for part in parts]
    said = []
    for words in joined:
        ids = [word.upper() if word.lower() in {"and", "or"} else _spdx_id(word) for word in words]
        said.append(f"({' '.join(ids)})" if len(ids) > 1 and len(joined) > 1 else " ".join(ids))
    expression = " AND ".join(said)
    try:
        return normalise(expression)
    except LicenceError:
        return _reference(name)


def _spdx_id(name: str) -> str:
    base, with_, exception = re.sub(r"\s+", " ", name.strip(" ()")).partition(" with ")
    if with_:
        # An exception only adds permission; its names are not those of SPDX.
        return _spdx_id(base)
    known = NAMES.get(base.lower())
    if known:
        return known
    gnu = GNU.match(base)
    if gnu:
        family, version, later = (
            gnu[1].upper(),
            gnu[2],
            "-or-later" if gnu[3] or base.endswith("-or-later") else "-only",
        )
        version = version if "." in version else f"{version}.0"
        if family == "OPL":
            return "LicenseRef-OPL-1.0"
        version = version.removesuffix(".0") if family == "GFDL" and version.count(".") > 1 else version
        candidate = f"{family}-{version}{later}"
    else:
        versioned = VERSIONED.match(base)
        candidate = f"{versioned[1]}-{versioned[2]}" if versioned else base
    try:
        return normalise(candidate)
    except LicenceError:
        return _reference(base)


def _reference(name: str) -> str:
    return "LicenseRef-" + (re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "unnamed")


def _fields(block: str) -> dict[str, str]:
    """Return the fields of a paragraph, names in lower case; a line of ` .` stands for an empty one."""
    fields: dict[str, str] = {}
    name = ""
    for line in block.split("\n"):
        if line[:1] in {" ", "\t"} and name:
            fields[name] += "\n" + ("" if line.strip() == "." else line.strip())
        elif ":" in line and not line.startswith("#"):
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def _matches(glob: str, path: str) -> bool:
    """Return whether a DEP-5 glob matches: `*` and `?` also match `/`, a backslash takes the next one as it is."""
    first, *others = _pieces(glob)
    if not others:
        return bool(first.fullmatch(path))
    start = first.match(path)
    if start is None:
        return False
    # Each piece where it is first found: no piece is tried again, however many stars there are.
    place = start.end()
    for piece in others[:-1]:
        found = piece.search(path, place)
        if found is None:
            return False
        place = found.end()
    last = len(path) - _length(others[-1])
    return last >= place and bool(others[-1].fullmatch(path, last))


@lru_cache(maxsize=4096)
def _pieces(glob: str) -> list[re.Pattern[str]]:
    """Return the parts of a glob between its stars; each matches a fixed number of characters."""
    pieces = [""]
    for part in re.findall(r"\\.|.", glob, re.S):
        if part == "*":
            pieces.append("")
        else:
            pieces[-1] += "." if part == "?" else re.escape(part.removeprefix("\\"))
    return [re.compile(piece, re.S) for piece in pieces]


@lru_cache(maxsize=4096)
def _length(piece: re.Pattern[str]) -> int:
    return len(re.findall(r"\\.|.", piece.pattern, re.S))


def _recognised(expression: str, body: str) -> str:
    """Return the licence whose text goes with a name that SPDX does not know, else the expression as it is."""
    if expression.startswith("LicenseRef-") and " " not in expression and not expression.startswith("LicenseRef-PD"):
        found = licence_text(body)
        if len(found.ids) == 1 and found.explained > MOST:
            return found.ids[0]
    return expression


def _contradiction(expression: str, body: str) -> str:
    found = licence_text(body)
    if found.explained < MOST:  # a pointer to /usr/share/common-licenses, words of their own, or nothing
        return ""
    if agreement(expression, found) == "contradicts":
        return f"named {expression}, but its text is that of {', '.join(found.ids)}"
    return ""
