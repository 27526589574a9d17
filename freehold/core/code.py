"""Which of our modules a module can reach, read from the source with `ast`; nothing is imported."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# What is found by entry point is imported nowhere: a module that imports the finder can run these rooms.
FINDER, FOUND_ROOMS = "freehold.core.extensions", ("corpora",)


def module_path(module: str) -> Path | None:
    """Return the file of one of our modules (`freehold.core.log`), or None when there is no such module."""
    base = PACKAGE.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            return path
    return None


@cache
def imports(path: Path) -> frozenset[str]:
    """Return every `freehold...` module that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.split(".")[0] == PACKAGE.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == PACKAGE.name:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if module_path(inner) else str(node.module))
    return frozenset(found)


@cache
def reachable(module: str) -> tuple[Path, ...]:
    """Return the files of `module` and of everything of ours it can import, find or build, in path order."""
    seen: dict[Path, None] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = module_path(name)
        if path is not None and path not in seen:
            seen[path] = None
            todo += imports(path)
            if FINDER in imports(path):
                todo += [
                    f"{PACKAGE.name}.{room}.{p.stem}" for room in FOUND_ROOMS for p in (PACKAGE / room).glob("*.py")
                ]
            if "." in name:
                todo.append(name.rpartition(".")[0])
    built = [path.with_suffix(".cpp") for path in seen]
    return tuple(sorted([*seen, *(path for path in built if path.exists())]))


def code_sha256(module: str) -> str:
    """Return one hash over the source of everything `module` can run: part of every cache key."""
    digest = hashlib.sha256()
    for path in reachable(module):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
