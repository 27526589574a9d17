"""What a run may delete in a stage's folder: what it recorded or is known to write there, and nothing else.

Folder names such as `export` or `serve` are ordinary names: what a person put there stops the run by its name. Links
are not followed. A link that stands where a stage's file belongs is removed as a link.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from freehold.core.artifact import KEY, MANIFEST
from freehold.core.errors import ArtifactError
from freehold.run.layout import KEPT_WHEN_MADE_AGAIN, METRICS, Stage

RECORDS = (MANIFEST, KEY, "resolved" + ".yaml", "timing" + ".json", METRICS)
"""What the walk itself writes into the folder of any stage."""
MOST_NAMED = 5


def remove_stage(stage: Stage, folder: Path, records: list[dict[str, Any]], *, begun: bool) -> None:
    """Delete what a stage wrote; keep its log and what a teacher answered.

    `records` are its key and manifest, as far as they can be read, and the settings of today; `begun` says whether one
    of the files is there, for without them nothing in the folder is the run's. Raises ArtifactError, before anything
    is deleted, when the folder or something in it is not the run's own.
    """
    if folder.is_symlink():
        raise ArtifactError(
            "a stage's folder is a link: nothing behind it is deleted",
            where=folder,
            found=f"a link to {os.readlink(folder)}",
            todo="remove the link, or empty that folder yourself",
        )
    if not folder.exists():
        return
    entries = list(_entries(folder))
    patterns = own_patterns(stage, records) if begun else ()
    recorded = {name for record in records for name in record.get("files") or {}}
    foreign = [name for name in entries if not _is_own(name, patterns, recorded)]
    if foreign:
        more = len(foreign) - MOST_NAMED
        raise ArtifactError(
            "files that the run did not write are in a stage's folder",
            where=folder,
            found=", ".join(foreign[:MOST_NAMED]) + (f" and {more} more" if more > 0 else ""),
            expected=f"an empty folder, or one that `freehold {stage.name}` made",
            todo="move them elsewhere, or give the run another name or runs_dir",
        )
    for name in entries:
        (folder / name).unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        path = Path(place)
        if path != folder and not any(path.iterdir()):
            path.rmdir()


def remove_leftovers(stage: Stage, folder: Path, records: list[dict[str, Any]]) -> None:
    """Delete unfinished files and folders (`NAME.tmp`) that a killed stage left; others stay."""
    patterns = own_patterns(stage, records)
    for name in list(_entries(folder)):
        first = Path(name).parts[0]
        if first.endswith(".tmp") and _is_own(name, patterns, set()):
            (folder / name).unlink()
    for path in folder.glob("*.tmp"):
        if path.is_dir() and not path.is_symlink():
            for place, _, _ in os.walk(path, topdown=False):
                if not any(Path(place).iterdir()):
                    Path(place).rmdir()


def own_patterns(stage: Stage, records: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return globs of what a stage writes, the checkpoints that its settings name included."""
    named = set()
    for config in (record.get("config") or {} for record in records):
        phases = config.get("phases")
        if isinstance(phases, dict):
            named |= {str(p["checkpoint"]) for p in phases.values() if isinstance(p, dict) and p.get("checkpoint")}
        if config.get("parent"):
            named.add(Path(str(config["parent"])).name)
    return (*stage.writes, *(f"{name}/*" for name in sorted(named) if stage.trains))


def _is_own(name: str, patterns: tuple[str, ...], recorded: set[str]) -> bool:
    plain = "/".join(part.removesuffix(".tmp") for part in name.split("/"))
    return name in recorded or plain in RECORDS or any(fnmatchcase(plain, pattern) for pattern in patterns)


def _entries(folder: Path) -> Iterator[str]:
    """Yield every file and link below a stage's folder but those that stay, relative; links are not followed."""
    for place, folders, files in os.walk(folder, followlinks=False):
        here = Path(place)
        if here == folder:
            folders[:] = [name for name in folders if name not in KEPT_WHEN_MADE_AGAIN]
            files = [name for name in files if name not in KEPT_WHEN_MADE_AGAIN]
        links = [name for name in folders if (here / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (here / name).relative_to(folder).as_posix()
