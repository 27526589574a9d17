"""What the files of a source state about rights, each with its line: licence files, metadata, README files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from freehold.ledger.conflicts import Statement, by_name, conflicts, in_metadata, in_text, is_free, mentions
from freehold.ledger.evidence import licence_text
from freehold.stages.gather.config import FileSource, Folder
from freehold.stages.gather.origins import LICENCE_FILE, LICENCE_FOLDERS, METADATA_FILE, README_FILE, Origin

ABOUT_LICENCE = re.compile(r"licen[cs]e|copyright|public domain", re.I)


def of_source(source: FileSource, origin: Origin) -> list[Statement]:
    """Return what a source's files state: those in a folder above its texts, and the metadata of a package."""
    found = []
    if origin.wrapper_licence and not isinstance(source, Folder):
        found.append(Statement(origin.declared or "its metadata", origin.wrapper_licence, "metadata"))
    # A machine-readable copyright file speaks file by file.
    files = origin.licence_files if origin.copyright is None else []
    texts = {**dict(files), **dict(origin.statements)}
    members = [PurePosixPath(member.path) for member in origin.members]
    for path, text in sorted(texts.items()):
        if _governs(path, members):
            found += of_file(path, text, around=not isinstance(source, Folder))
    if isinstance(source, Folder):
        for path, text in origin.about:
            found += of_readme(path, text)
    return found


def _governs(path: str, members: Iterable[PurePosixPath]) -> bool:
    """Return whether a licence file is in a folder above one of the texts, or in one that is about a package."""
    folder = PurePosixPath(path).parent
    if folder.parts and (folder.parts[0].endswith(".dist-info") or folder.parts[:3] == ("usr", "share", "doc")):
        return True
    while folder.name in LICENCE_FOLDERS:
        folder = folder.parent
    return any(folder == PurePosixPath(".") or folder in member.parents for member in members)


def of_file(path: str, text: str, *, around: bool) -> list[Statement]:
    """Return what a licence file, a metadata file or a README states."""
    name = PurePosixPath(path).name
    if METADATA_FILE.fullmatch(name):
        return in_metadata(text, path)
    if README_FILE.match(name) and not LICENCE_FILE.match(name):
        return of_readme(path, text)
    if around and licence_text(text).opens_unread:
        return []  # the licence may be in the words that were not recognised
    return in_text(text, path) or ([] if around else by_name(text[:500], path))


def of_readme(path: str, text: str) -> list[Statement]:
    """Return what a README states: the front matter of a card, licence texts, and names in lines about a licence."""
    lines = text.split("\n")
    found = []
    if lines[0].strip() == "---" and "---" in [line.strip() for line in lines[1:200]]:
        end = 1 + [line.strip() for line in lines[1:200]].index("---")
        found += in_metadata("\n".join(lines[:end]), path)
    found += in_text(text, path)
    for number, line in enumerate(lines, 1):
        # A heading `License` and the line below belong together.
        around = " ".join(lines[max(0, number - 3) : number]) if line.strip() else ""
        if ABOUT_LICENCE.search(around):
            found += by_name(line[:500], path, number)
    return found


def against(licence: str, source: FileSource, origin: Origin) -> list[str]:
    """Return the statements of a source that disagree with the licence that its recipe gives, with file and line."""
    found = conflicts(licence, of_source(source, origin), around=not isinstance(source, Folder))
    return list(dict.fromkeys(map(str, found)))


def against_wrapper(licence: str, source: FileSource, origin: Origin) -> list[str]:
    """Return the licence files at the top of a package that ask for more than a notice under other terms only."""
    found = []
    for path, text in origin.licence_files if origin.copyright is None else ():
        stated = of_file(path, text, around=True)
        top = len(PurePosixPath(path).parts) <= 2 or PurePosixPath(path).parent.name == "licenses"
        if top and stated and not any(mentions(one.says, licence) for one in stated):
            found += [str(one) for one in stated if not is_free(one.says)]
    return found
