"""Measure the source: lines by room, longest things, rooms and arrows, cycles, settings, comments, words.

    python benchmarks/house.py                       this checkout
    python benchmarks/house.py --tree OTHER --json   another one; nothing in that tree is imported

Everything is read with `ast` and `tokenize`, so one script measures any commit. Code lines are lines that hold code:
no blank lines, no comments, no docstrings. A setting is one (class, field) pair of a pydantic declaration that the
config of a stage, `PlanConfig` or the head of a recipe can reach; a field that a subclass inherits or gives another
default counts once, and so does a class that several stages use.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import words

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
CORE_ROOMS = ("model", "optim", "data", "trainer", "infer", "parallel")
HEADS = {"RecipeHead", "Head", "PlanConfig"}


@cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path, root: Path) -> str:
    """Return the room of a file: the first folder or file below the package."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def lines_of(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_bytes().splitlines())


def lines_by_room(root: Path, suffixes: tuple[str, ...] = (".py", ".cpp")) -> dict[str, int]:
    """Return the lines of each room below `root`, most first, and the total of them."""
    rooms: dict[str, int] = defaultdict(int)
    for path in root.rglob("*"):
        if path.suffix in suffixes:
            rooms[room_of(path, root)] += lines_of(path)
    return {"total": sum(rooms.values())} | dict(sorted(rooms.items(), key=lambda item: -item[1]))


def longest(root: Path) -> dict[str, Any]:
    """Return the largest file and class of a package, and how long its functions are."""
    files = {path.relative_to(root).as_posix(): lines_of(path) for path in root.rglob("*.py")}
    spans = [(node, path) for path in root.rglob("*.py") for node in ast.walk(parsed(path))]
    classes = {f"{room_of(p, root)}.{n.name}": length(n) for n, p in spans if isinstance(n, ast.ClassDef)}
    functions = sorted(length(n) for n, _ in spans if isinstance(n, Function))
    return {
        "largest files": most(files, 3),
        "largest classes": most(classes, 3),
        "functions": len(functions),
        "function p50": statistics.median_low(functions),
        "function p90": functions[len(functions) * 90 // 100],
        "function most": functions[-1],
    }


def length(node: Any) -> int:
    """Return the lines of a class or function, decorators not counted."""
    return node.end_lineno - node.lineno + 1


def most(values: dict[str, int], number: int) -> dict[str, int]:
    """Return the few largest of some named values."""
    return dict(sorted(values.items(), key=lambda item: -item[1])[:number])


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a file of the package."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path, modules: set[str]) -> Iterator[tuple[str, bool]]:
    """Yield (module of ours, whether the import is lazy: in a function or for type checking only)."""
    stack: list[tuple[ast.AST, bool]] = [(parsed(path), False)]
    while stack:
        node, lazy = stack.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == root.name:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in modules else node.module), lazy
        later = (
            lazy or isinstance(node, Function) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        )
        stack += [(child, later) for child in ast.iter_child_nodes(node)]


def graph(root: Path) -> dict[str, Any]:
    """Return the rooms, the arrows between them, and the circles of files, without and with lazy imports."""
    files = {module_name(path, root): path for path in root.rglob("*.py")}
    rooms = {name: room_of(path, root) for name, path in files.items()}
    eager: set[tuple[str, str]] = set()
    every: set[tuple[str, str]] = set()
    for name, path in files.items():
        for other, lazy in imports_of(path, root, set(files)):
            every.add((name, other))
            if not lazy:
                eager.add((name, other))
    return {
        "rooms": len(set(rooms.values()) - {"__init__"}),
        "edges": len(between(eager, rooms)),
        "edges with lazy": len(between(every, rooms)),
        "cycles": circles(eager),
        "cycles with lazy": circles(every),
        "room cycles with lazy": circles(between(every, rooms)),
    }


def between(arrows: set[tuple[str, str]], rooms: dict[str, str]) -> set[tuple[str, str]]:
    """Return the arrows between different rooms; the package's own `__init__` is none."""
    pairs = {(rooms[a], rooms[b]) for a, b in arrows}
    return {(a, b) for a, b in pairs if a != b and "__init__" not in (a, b)}


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other (strongly connected components of two or more)."""
    following: dict[str, set[str]] = defaultdict(set)
    for start, end in arrows:
        following[start].add(end)
    reach = {node: reached(node, following) for node in list(following)}
    groups = {frozenset(o for o in ends if node in reach.get(o, ())) for node, ends in reach.items() if node in ends}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reached(start: str, following: dict[str, set[str]]) -> set[str]:
    """Return the nodes that some arrows lead to from a start, itself if they lead back."""
    seen: set[str] = set()
    todo = list(following[start])
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += following.get(node, ())
    return seen


class Declarations:
    """The names of a package that annotations can mean: classes and aliases, each in its module."""

    def __init__(self, root: Path) -> None:
        self.files = {module_name(path, root): path for path in root.rglob("*.py")}
        self.names: dict[str, dict[str, ast.AST]] = {}
        self.imported: dict[str, dict[str, tuple[str, str]]] = {}
        for module, path in self.files.items():
            self.names[module] = {}
            self.imported[module] = {}
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.ImportFrom) and node.module:
                    for alias in node.names:
                        self.imported[module][alias.asname or alias.name] = (node.module, alias.name)
            for node in parsed(path).body:
                targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
                for name in [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]:
                    if name:
                        self.names[module][name] = node

    def resolve(self, module: str, node: ast.AST) -> list[tuple[str, str]]:
        """Return the (module, name) pairs of ours that an annotation or a base mentions."""
        found = []
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isidentifier():
                found += self.find(module, part.value)
            elif isinstance(part, ast.Name):
                found += self.find(module, part.id)
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                package, name = self.imported[module].get(part.value.id, ("", ""))
                found += self.find(f"{package}.{name}", part.attr)
        return found

    def find(self, module: str, name: str) -> list[tuple[str, str]]:
        """Return where a name of a module is defined, following imports; nothing when it is not ours."""
        if name in self.names.get(module, {}):
            return [(module, name)]
        if name in self.imported.get(module, {}):
            return self.find(*self.imported[module][name])
        return []

    def fields(self, module: str, node: ast.ClassDef) -> list[tuple[str, ast.AST]]:
        """Return the (field, annotation) pairs that a class declares and its bases do not."""
        inherited: set[str] = set()
        for base in node.bases:
            for where, name in self.resolve(module, base):
                parent = self.names[where][name]
                if isinstance(parent, ast.ClassDef):
                    inherited |= self.every_field(where, parent)
        return [(name, annotation) for name, annotation in declared(node) if name not in inherited]

    def every_field(self, module: str, node: ast.ClassDef) -> set[str]:
        """Return the names of the fields of a class and of its bases."""
        found = {name for name, _ in declared(node)}
        for base in node.bases:
            for where, name in self.resolve(module, base):
                parent = self.names[where][name]
                found |= self.every_field(where, parent) if isinstance(parent, ast.ClassDef) else set()
        return found


def declared(node: ast.ClassDef) -> list[tuple[str, ast.expr]]:
    """Return the (field, annotation) pairs in the body of a class."""
    own = [(n.target, n.annotation) for n in node.body if isinstance(n, ast.AnnAssign)]
    return [(t.id, a) for t, a in own if isinstance(t, ast.Name) and "ClassVar" not in ast.unparse(a)]


def settings(root: Path) -> dict[str, int]:
    """Return how many settings each room declares that a recipe or a plan can set, and the total."""
    known = Declarations(root)
    todo = [
        (module, name)
        for module, names in known.names.items()
        for name, node in names.items()
        if isinstance(node, ast.ClassDef)
        and (name in HEADS or (".stages." in module and module.endswith(".config") and name.endswith("Config")))
    ]
    seen: set[tuple[str, str]] = set()
    rooms: dict[str, int] = defaultdict(int)
    while todo:
        module, name = todo.pop()
        node = known.names[module][name]
        if (module, name) in seen:
            continue
        seen.add((module, name))
        if isinstance(node, ast.ClassDef):
            fields = known.fields(module, node) if node.bases else []
            rooms[".".join(module.split(".")[1 : 3 if ".stages." in module else 2])] += len(fields)
            for part in [*node.bases, *(annotation for _, annotation in fields)]:
                todo += known.resolve(module, part)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            todo += known.resolve(module, node.value)
    return {"total": sum(rooms.values())} | dict(sorted(rooms.items(), key=lambda item: -item[1]))


def code_and_comments(path: Path) -> tuple[int, int]:
    """Return how many lines of a file hold code, and how many hold a comment and nothing else."""
    source = path.read_text(encoding="utf-8")
    code: set[int] = set()
    comments = set()
    silent = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if not token.line[: token.start[1]].strip():
                comments.add(token.start[0])
        elif token.type not in silent:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(parsed(path)):
        # A docstring, or a string below an assignment that documents it.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code.difference_update(range(node.lineno, node.end_lineno + 1))  # type: ignore[operator]
    return len(code), len(comments - code)


def comments_by_room(root: Path) -> dict[str, float]:
    """Return the own-line comments for each 100 lines of code, of the package and of each room."""
    rooms: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path in root.rglob("*.py"):
        code, comments = code_and_comments(path)
        for room in ("all", room_of(path, root)):
            rooms[room][0] += code
            rooms[room][1] += comments
    return {room: round(100 * comments / max(code, 1), 1) for room, (code, comments) in sorted(rooms.items())}


def measure(tree: Path) -> dict[str, Any]:
    """Return every measure of a checkout."""
    root = tree / "freehold"
    counts = words.counts(tree)
    return {
        "product": lines_by_room(root),
        "tests": lines_by_room(tree / "tests"),
        "benchmarks": {"total": lines_by_room(tree / "benchmarks")["total"]},
        **longest(root),
        **graph(root),
        "settings": settings(root),
        "own-line comments per 100 code lines": comments_by_room(root),
        "banned words": {"total": sum(counts.values())} | dict(counts.most_common()),
        "words a sentence": {
            "README": round(words.mean_sentence_words([tree / "README.md"]), 1),
            "docs": round(words.mean_sentence_words(sorted((tree / "docs").rglob("*.md"))), 1),
        },
    }


def shown(value: Any) -> str:
    """Return a measure as one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:,}" for name, number in value.items())
    if isinstance(value, list):
        return f"{len(value)}" + "".join(f"; {len(group)}: {' '.join(group)}" for group in value)
    return f"{value:,}"


def main() -> int:
    """Measure a checkout and print or write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parent.parent, help="a checkout")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--words", action="store_true", help="print each place that holds a banned word, and stop")
    args = parser.parse_args()
    tree = args.tree.resolve()
    if args.words:
        for path in words.pages(tree):
            for word, number, line in words.found(tree, path):
                print(f"{path.relative_to(tree)}:{number}: [{word}] {line}")
        return 0
    found = measure(tree)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name}: {shown(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
