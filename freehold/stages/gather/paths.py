"""Paths of a source: the files it names, and the globs that choose among them."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from freehold.core.errors import DataError
from freehold.stages.gather.config import Archive, Conversations, Debian, FileSource, Rows


class Changed(DataError):
    """A file that is not what it was when this run first looked at it."""


def rows_files(source: Rows | Conversations) -> list[Path]:
    """Return the files of a source of rows: the one it names, or every parquet file below the folder it names."""
    path = Path(source.path)
    if path.is_dir() and source.kind == "parquet":  # type: ignore[union-attr]
        return sorted(p for p in path.rglob("*.parquet") if p.is_file() and not p.is_symlink())
    return [path] if path.is_file() else []


def archive_path(source: Archive, corpus_dir: Path, pinned: bool) -> Path:
    """Return the path of an archive; of a Debian package that is not pinned, any version's file will do."""
    path = corpus_dir / source.file
    if isinstance(source, Debian) and not pinned and not path.exists():
        return max(corpus_dir.glob(f"{source.package}_*.deb"), default=path, key=lambda p: p.name)
    return path


def wanted(path: str, source: FileSource) -> bool:
    """Return whether a file's path matches the globs of a source."""
    return any(fnmatch.fnmatchcase(path, glob) for glob in source.members) and not any(
        fnmatch.fnmatchcase(path, glob) for glob in source.exclude
    )
