"""How models write a tool call inside `<tool_call>`: one reader for each dialect, a few characters at a time.

    hermes   {"name": "add", "arguments": {"a": 1}}                            Trinity Nano, Mini, Preview; ours
    xml      <function=add><parameter=a>1</parameter></function>               Trinity Large Thinking (as Qwen3-Coder)

A reader yields the call as soon as its name is known and its arguments as JSON while they come, so that each prefix of
a right call is a prefix of right JSON. What a call is never depends on how its text was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Kind = Literal["content", "reasoning", "call", "arguments", "call_end"]
Tools = Sequence[Mapping[str, Any]]
HEADER_CHARS = 4096
"""A call is yielded early if its name is known within this many characters."""


@dataclass(frozen=True)
class Piece:
    """One event of an answer: some text, the beginning of a tool call, some of its arguments, or its end."""

    kind: Kind
    text: str = ""
    """Content, reasoning, or arguments as JSON."""
    name: str = ""
    """The tool that is called."""


class CallReader(Protocol):
    """Reads the text of one call."""

    begun: bool
    """Whether the call was yielded; until then its text may turn out to be none."""

    def feed(self, text: str) -> Iterator[Piece]:
        """Take some text; yield what is now certain."""
        ...

    def close(self) -> Iterator[Piece]:
        """Yield the rest, at the end tag or where the answer was cut."""
        ...


class Hermes:
    """A call as one JSON object; its arguments are passed on as the model writes them."""

    _header = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL)

    def __init__(self, tools: Tools = ()) -> None:
        self.begun = False
        self._text = ""
        self._depth = 0
        self._string = self._escape = self._ended = False

    def feed(self, text: str) -> Iterator[Piece]:
        """Take some text; yield what is now certain."""
        if not self.begun:
            self._text += text
            found = self._header.match(self._text, 0, HEADER_CHARS)
            name = _name(found[1]) if found else None
            if found is None or name is None:
                return
            self.begun, text = True, self._text[found.end() :]
            yield Piece("call", name=name)
        arguments = self._object(text)
        if arguments:
            yield Piece("arguments", arguments)

    def close(self) -> Iterator[Piece]:
        """Yield the rest: the whole call when it is written in another order, or without arguments."""
        if self.begun:
            yield Piece("call_end")
            return
        call = parse_call(self._text)
        if call is not None:
            self.begun = True
            yield from (Piece("call", name=call[0]), Piece("arguments", call[1]), Piece("call_end"))

    def _object(self, text: str) -> str:
        """Return as much of the text as belongs to the object of the arguments."""
        if self._ended:
            return ""
        for at, character in enumerate(text):
            if self._escape:
                self._escape = False
            elif self._string:
                self._escape, self._string = character == "\\", character != '"'
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._ended = True
                    return text[: at + 1]
        return text


def parse_call(text: str) -> tuple[str, str] | None:
    """Read `{"name": ..., "arguments": {...}}` into a name and JSON; None when it is something else."""
    try:
        call: Any = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, dict):
        return call["name"], json.dumps(arguments, ensure_ascii=False)
    return (call["name"], arguments) if isinstance(arguments, str) else None


def _name(quoted: str) -> str | None:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return None


class Xml:
    """A call as tags, one for each argument; a value is read by the type that the tool's schema gives it.

    Text stays as it is, but for one line break at each end, and is passed on as it comes. Any other value is JSON, and
    waits until it is complete; what is not of its type is text after all.
    """

    _function = re.compile(r"\s*<function=([^>]*)>")
    _parameter = re.compile(r"<parameter=([^<>]*)>")
    _ends = ("</parameter>", "<parameter=", "</function>")

    def __init__(self, tools: Tools = ()) -> None:
        self.begun = False
        self._tools = tools
        self._types: Mapping[str, set[str]] = {}
        self._text = ""
        self._take: Callable[[], Iterator[Piece] | None] = self._begin
        self._count = 0
        self._held: list[str] = []
        self._wanted: set[str] = set()
        self._is_text = self._first = False

    def feed(self, text: str) -> Iterator[Piece]:
        """Take some text; yield what is now certain."""
        self._text += text
        while (pieces := self._take()) is not None:
            yield from pieces

    def close(self) -> Iterator[Piece]:
        """Yield the rest; a value that was cut is left as it is, so that no one takes it for complete."""
        if self.begun:
            yield Piece("call_end")

    # Each state takes what it can from `_text` and returns the events, or None when it needs more text.

    def _begin(self) -> Iterator[Piece] | None:
        found = self._function.match(self._text, 0, HEADER_CHARS)
        if found is None:
            return None
        name, self._text = found[1].strip(), self._text[found.end() :]
        self.begun, self._types, self._take = True, _types_of(self._tools, name), self._between
        return iter([Piece("call", name=name), Piece("arguments", "{")])

    def _between(self) -> Iterator[Piece] | None:
        found, end = self._parameter.search(self._text), self._text.find("</function>")
        if end >= 0 and (found is None or end < found.start()):
            self._text, self._take = "", self._after
            return iter([Piece("arguments", "}")])
        if found is None:
            return None
        name, self._text = found[1].strip(), self._text[found.end() :]
        self._is_text, self._first, self._held = self._types.get(name, {"string"}) == {"string"}, True, []
        self._wanted, self._take = self._types.get(name, {"string"}), self._value
        key = f"{', ' if self._count else ''}{_json(name)}: {chr(34) if self._is_text else ''}"
        self._count += 1
        return iter([Piece("arguments", key)])

    def _value(self) -> Iterator[Piece] | None:
        if self._first and self._text:
            self._first, self._text = False, self._text.removeprefix("\n")
        ends = [(at, mark) for mark in self._ends if (at := self._text.find(mark)) >= 0]
        if not ends:
            # A line break before the end tag is not part of the value, so the last one waits, as does half a tag.
            keep = partial(self._text, [*self._ends, *("\n" + mark for mark in self._ends)])
            return self._more(len(self._text) - keep)
        at, mark = min(ends)
        value, self._text = self._text[:at].removesuffix("\n"), self._text[at:]
        self._text = self._text.removeprefix("</parameter>")
        self._take = self._between
        return iter([Piece("arguments", self._ended(value))])

    def _more(self, certain: int) -> Iterator[Piece] | None:
        if not certain:
            return None
        value, self._text = self._text[:certain], self._text[certain:]
        if not self._is_text:
            self._held.append(value)
            return iter(())
        return iter([Piece("arguments", _json(value)[1:-1])])

    def _ended(self, value: str) -> str:
        if self._is_text:
            return _json(value)[1:-1] + '"'
        return _typed("".join(self._held) + value, self._wanted)

    def _after(self) -> None:
        self._text = ""


def _types_of(tools: Tools, name: str) -> dict[str, set[str]]:
    """Return the JSON types that the parameters of a tool may have."""
    for tool in tools:
        function = tool.get("function", {})
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties")
            known = properties.items() if isinstance(properties, Mapping) else ()
            return {key: _types(schema) for key, schema in known}
    return {}


def _types(schema: Any) -> set[str]:
    """Return the types a schema names; all of them when it names none."""
    if not isinstance(schema, Mapping):
        return set(_TYPES)
    kinds = schema.get("type")
    if kinds is not None:
        return {kinds} if isinstance(kinds, str) else {kind for kind in kinds if isinstance(kind, str)}
    choices = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(choices, list):
        return set().union(*map(_types, choices))
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    return {kind for value in values for kind in _kinds(value)} or set(_TYPES)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "null": lambda value: value is None,
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
}


def _kinds(value: Any) -> set[str]:
    return {kind for kind, fits in _TYPES.items() if fits(value)}


def _typed(text: str, wanted: set[str]) -> str:
    """Return a value as JSON: as it is written if that is JSON of a type that is wanted, else as a string."""
    try:
        kinds = _kinds(json.loads(text, parse_constant=_refuse))
    except (ValueError, RecursionError):
        kinds = set()
    return text.strip() if (kinds - {"string"}) & wanted else _json(text)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def partial(text: str, marks: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that is the beginning of a mark, not all."""
    longest = min(len(text), max((len(mark) - 1 for mark in marks), default=0))
    return next((n for n in range(longest, 0, -1) if any(m.startswith(text[-n:]) and len(m) > n for m in marks)), 0)


DIALECTS: dict[str, type[Hermes] | type[Xml]] = {"hermes": Hermes, "xml": Xml}
