"""Paths of a source: the files it names, and the globs that choose among them."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from freehold.core.config import user_path
from freehold.core.errors import DataError
from freehold.core.streams import plain_name
from freehold.stages.gather.config import Archive, Conversations, Debian, FileSource, JsonLines, Parquet, Rows, Warc

ROW_ENDINGS = {JsonLines: (".jsonl", ".ndjson"), Parquet: (".parquet", ".pq"), Warc: (".warc",)}
"""Endings of the files of rows or pages that are taken from a folder, whatever their case and compression."""
NAMED = 50
"""How many unmatched files sources.json names; the rest are counted."""


class Changed(DataError):
    """A file that is not what it was when this run first looked at it."""


def name_below(path: Path, named: str) -> str:
    """Return a file's path as documents name it: below the folder that the source names, or its name alone."""
    folder = user_path(named)
    return path.relative_to(folder).as_posix() if folder.is_dir() else path.name


def rows_files(source: Rows | Conversations | Warc) -> list[Path]:
    """Return the files of a source of rows: the one it names, or every file of its kind below the folder it names."""
    path = user_path(source.path)
    endings = next((ends for kind, ends in ROW_ENDINGS.items() if isinstance(source, kind)), ())
    if path.is_dir() and endings:
        found = (p for p in path.rglob("*") if plain_name(p.name).lower().endswith(endings))
        return sorted(p for p in found if p.is_file() and not p.is_symlink())
    return [path] if path.is_file() else []


def archive_path(source: Archive, corpus_dir: Path, pinned: bool) -> Path:
    """Return the path of an archive; of a Debian package that is not pinned, any version's file will do."""
    path = corpus_dir / source.file
    if isinstance(source, Debian) and not pinned and not path.exists():
        return max(corpus_dir.glob(f"{source.package}_*.deb"), default=path, key=lambda p: p.name)
    return path


def wanted(path: str, source: FileSource) -> bool:
    """Return whether a file's path matches the globs of a source."""
    return any(matches(path, glob) for glob in source.members) and not any(
        matches(path, glob) for glob in source.exclude
    )


def matches(path: str, glob: str) -> bool:
    """Return whether a path matches a glob; the case of the ending does not matter: `*.txt` takes `README.TXT`."""
    return fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(_lower_ending(path), _lower_ending(glob))


def _lower_ending(path: str) -> str:
    stem, dot, ending = path.rpartition(".")
    return path if "/" in ending else f"{stem}{dot}{ending.lower()}"


def idle_globs(source: FileSource, paths: Iterable[str]) -> list[str]:
    """Return the globs that the recipe gives and that match none of the paths: a misspelt one takes nothing."""
    paths = list(paths)
    given = []
    for key in ("members", "exclude"):
        globs = getattr(source, key)
        if globs != type(source).model_fields[key].default:
            given += [f"{key}: {glob}" for glob in globs if not any(matches(path, glob) for path in paths)]
    return given


def unmatched(paths: Iterable[str], source: FileSource) -> dict[str, Any]:
    """Return what sources.json says of the files that no glob of `members` matches; empty when there are none."""
    left = sorted(p for p in paths if not any(matches(p, glob) for glob in (*source.members, *source.exclude)))
    endings = Counter(PurePosixPath(path).suffix or PurePosixPath(path).name for path in left)
    return {"count": len(left), "endings": dict(endings.most_common(20)), "named": left[:NAMED]} if left else {}
