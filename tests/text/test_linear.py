"""Every pattern of the source takes linear time: found by reading the source, pumped by what its repeats accept.

A pattern that backtracks over what it has read takes hours on a text of a few thousand characters that is made for it.
"""

from __future__ import annotations

import ast
import itertools
import re
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import freehold

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from re import _constants as codes  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]

ROOT = Path(freehold.__file__).parent
CALLS = {"compile", "search", "match", "fullmatch", "sub", "subn", "split", "findall", "finditer"}
SHORT, CHARS = 500, 16_000
SUSPECT_S, MOST_S = 0.001, 0.03
"""CPU time for one call on 2,000 and on 16,000 characters; a linear pattern needs far less, a quadratic one more."""
OURS = {
    "core/", "run/", "planner/", "parallel/", "kernels/", "checkpoint/", "trainer/", "proof/", "model/", "cli.py",
}  # fmt: skip
"""Rooms whose patterns meet what we or the user's own files write: recipes, logs, names of tensors."""


@dataclass(frozen=True)
class Found:
    place: str
    pattern: str
    flags: int
    methods: frozenset[str]


def literal(node: ast.expr) -> str | None:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def flags_of(call: ast.Call) -> int:
    names = [n.attr for argument in [*call.args[1:], *[k.value for k in call.keywords]] for n in ast.walk(argument)
             if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "re"]  # fmt: skip
    return sum(
        {getattr(re, name) for name in names if isinstance(getattr(re, name, None), re.RegexFlag)}, re.RegexFlag(0)
    )


def patterns() -> Iterator[Found]:
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if place.startswith(tuple(OURS)):
            continue
        source = path.read_text()
        tree = ast.parse(source)
        names = {id(n.value): n.targets[0].id for n in ast.walk(tree)
                 if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}  # fmt: skip
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "re" and node.func.attr in CALLS):
                continue
            pattern = literal(node.args[0])
            if pattern is None:
                continue
            methods = {node.func.attr}
            if node.func.attr == "compile":
                name = names.get(id(node))
                methods = set(re.findall(rf"\b{name}\.(\w+)\(", source)) & CALLS if name else set()
                # In a table: by the name that the loop over it has.
                methods = methods or set(re.findall(r"\bpattern\.(\w+)\(", source)) & CALLS or {"search"}
            yield Found(f"{place}:{node.lineno}", pattern, int(flags_of(node)), frozenset(methods))


def compiled() -> Iterator[Found]:
    """Yield the patterns that are put together when a module is read: tables of names and words."""
    from freehold.ledger import conflicts, evidence

    for name, _, pattern in [*evidence.RESTRICTIONS, *evidence.FOREIGN, *evidence.MARKS]:
        yield Found(f"ledger/evidence.py: {name}", pattern.pattern, pattern.flags, frozenset({"search"}))
    named = conflicts._NAMED
    yield Found("ledger/conflicts.py: names", named.pattern, named.flags, frozenset({"search"}))


def sample(node: Any) -> str:
    """Return a short text that a parsed pattern matches."""
    return "".join(_sample(op, value) for op, value in node)


def _sample(op: Any, value: Any) -> str:
    if op in (codes.LITERAL,):
        return chr(value)
    if op == codes.NOT_LITERAL:
        return "a" if value != ord("a") else "b"
    if op == codes.ANY:
        return "a"
    if op == codes.IN:
        return _member(value)
    if op == codes.BRANCH:
        return sample(value[1][0])
    if op == codes.SUBPATTERN:
        return sample(value[3])
    if op in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
        return sample(value[2]) * max(value[0], 1 if value[1] else 0)
    return sample(value) if op == codes.ATOMIC_GROUP else ""


def _member(items: Any) -> str:
    negated = items[0][0] == codes.NEGATE
    probe = re.compile("[" + "".join(_class(op, value) for op, value in items) + "]")
    order = "a 1A-.\n<>\"'/_#,;:\t([{é中" if not negated else "a1 -x\n"
    return next(
        (c for c in order if probe.match(c)), next((chr(i) for i in range(1, 0x3000) if probe.match(chr(i))), "a")
    )


def _class(op: Any, value: Any) -> str:
    if op == codes.NEGATE:
        return "^"
    if op == codes.LITERAL:
        return re.escape(chr(value))
    if op == codes.RANGE:
        return f"{re.escape(chr(value[0]))}-{re.escape(chr(value[1]))}"
    names = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}
    name = str(value).removeprefix("CATEGORY_")
    return names[name.removeprefix("NOT_")].upper() if name.startswith("NOT_") else names[name]


def repeats(nodes: Any, before: str = "") -> Iterator[tuple[str, str]]:
    """Yield (text up to a repeat, what it repeats), outer ones and those inside."""
    for op, value in nodes:
        if op in (codes.MAX_REPEAT, codes.MIN_REPEAT) and value[1] > 30:
            yield before, sample(value[2])
            yield from repeats(value[2], before)
        elif op == codes.SUBPATTERN:
            yield from repeats(value[3], before)
        elif op == codes.BRANCH:
            for branch in value[1]:
                yield from repeats(branch, before)
        before += _sample(op, value)


def pumps(pattern: str, flags: int, chars: int) -> list[str]:
    """Return texts of about `chars` characters that a pattern may try again and again."""
    texts = []
    for before, unit in dict.fromkeys(repeats(parser.parse(pattern, flags))):
        for part in dict.fromkeys((unit, before + unit, before + " ")):
            texts += [before + part * (chars // max(len(part), 1)) + "\x01"]
        texts += [unit * (chars // max(len(unit), 1)) + "\x01", before + unit * 4 + " " * chars + "\x01"]
    return texts


def seconds(found: Found, method: str, text: str) -> float:
    """Return the CPU time of one call; it is stopped when it takes ten times what it may."""
    compiled = re.compile(found.pattern, found.flags)

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10 * MOST_S)
    start = time.process_time()
    try:
        if method in {"sub", "subn"}:
            getattr(compiled, method)(lambda m: m[0], text)
        elif method in {"finditer", "compile"}:
            list(compiled.finditer(text))
        else:
            getattr(compiled, method)(text)
    except TimeoutError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return time.process_time() - start


def slow(found: Found) -> Iterator[str]:
    """Yield the texts on which a pattern takes too long: more than linear on short ones, too long on a long one."""
    methods = sorted(found.methods)
    texts = [pumps(found.pattern, found.flags, chars) for chars in (SHORT, 4 * SHORT, CHARS)]
    for short, longer, long in zip(*texts, strict=True):
        for method in methods:
            took = seconds(found, method, longer)
            if took < SUSPECT_S or (took < MOST_S and took < 7 * seconds(found, method, short)):
                continue
            took = min(seconds(found, method, long) for _ in range(2))
            if took > MOST_S:
                yield (f"{found.place} {method}({found.pattern!r}) takes {took:.2f} s on {long[:40]!r} ...")


def test_every_pattern_over_outside_text_is_linear() -> None:
    found = [*patterns(), *compiled()]
    assert len(found) > 100
    assert [line for one in found for line in itertools.islice(slow(one), 1)] == []


@pytest.mark.parametrize(
    ("pattern", "method"),
    [(r"(a+)+b", "search"), (r"\s+x", "search"), (r"^a*a*a*$", "match"), (r"(<b>.*)*</b>", "search")],
)
def test_patterns_that_backtrack_are_found(pattern: str, method: str) -> None:
    assert next(slow(Found("here", pattern, re.S, frozenset({method}))))


def test_patterns_that_do_not_backtrack_are_let_through() -> None:
    for pattern in (r"a{0,20}b", r"(?:^|\n)[^\n]*\n", r"\bword\b", r"(?<!\s)\s+"):
        assert list(slow(Found("here", pattern, 0, frozenset({"search"})))) == []
