"""The user's own files as part of what gather is compared by: a changed file is noticed, whatever the recipe says.

Hashes are kept next to the log by size and time of change, so that an up-to-date run reads only what is new.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from freehold.core.artifact import sha256_file, sha256_json, write_json

OWN = ("folder", "warc", "jsonl", "parquet", "conversations")
"""Kinds of source that read files of the user's; packages and archives are pinned by version or hash."""
CACHE = "source_hashes.json"
MOST_FILES = 1_000_000


def digests(sources: dict[str, Any], log: Path) -> dict[str, str]:
    """Return one hash over names and bytes of the files of each source of the user's own; `log` keeps their hashes.

    A source whose files are not there is left to gather, which names it.
    """
    cache = _read(log / CACHE)
    seen: dict[str, list[Any]] = {}
    found = {}
    for name, source in sources.items():
        path = Path(str(getattr(source, "path", "") or ""))
        if getattr(source, "kind", "") in OWN and str(path) != "." and path.exists():
            files = [(file.relative_to(path).as_posix(), _digest(file, cache, seen)) for file in _files(path)]
            found[name] = sha256_json(files)
    if found and seen != cache and log.is_dir():  # a dry run of a new run writes nothing
        with contextlib.suppress(OSError):
            write_json(log / CACHE, seen)
    return found


def _files(path: Path) -> Iterator[Path]:
    """Yield the regular files of a source, sorted; links are not followed."""
    if path.is_file():
        yield path
        return
    count = 0
    for place, folders, names in os.walk(path, followlinks=False):
        folders.sort()
        for name in sorted(names):
            file = Path(place) / name
            if file.is_file() and not file.is_symlink():
                count += 1
                if count > MOST_FILES:
                    return
                yield file


def _digest(file: Path, cache: dict[str, list[Any]], seen: dict[str, list[Any]]) -> str:
    status = file.stat()
    mark = [status.st_size, status.st_mtime_ns]
    key = str(file)
    old = cache.get(key)
    seen[key] = old if isinstance(old, list) and old[:2] == mark else [*mark, sha256_file(file)]
    return str(seen[key][2])


def _read(path: Path) -> dict[str, list[Any]]:
    with contextlib.suppress(OSError, ValueError):
        data = json.loads(path.read_text(encoding="utf-8"))
        return data if isinstance(data, dict) else {}
    return {}
