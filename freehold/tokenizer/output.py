"""From generated ids to what a reader sees: text as it becomes certain, stop strings, thoughts and tool calls.

Everything here works a token at a time and gives the same result however the text is cut into pieces.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
TAGS = (THINK, THINK_END, CALL, CALL_END)

Kind = Literal["content", "reasoning", "tool_call"]


class Vocabulary(Protocol):
    """What is needed of a tokenizer here."""

    vocab_size: int

    def decode_bytes(self, ids: Iterable[int], *, skip_specials: bool = True) -> bytes:
        """Return the bytes of some tokens, without control tokens but with tags."""
        ...


class TextStream:
    """Turns token ids into text: whole characters only, nothing that may be part of a stop string.

    After a stop string `stopped` is True; neither it nor anything after it is returned. An id beyond the
    vocabulary (a model may have more rows than its tokenizer has tokens) is no text.
    """

    def __init__(self, tokenizer: Vocabulary, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self.decoded_chars = self.returned_chars = 0
        """Characters there are, held ones included, and those that were returned."""
        self._tokenizer, self.stops = tokenizer, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def feed(self, token: int) -> str:
        """Take one token; return the text that is now certain."""
        known = token < self._tokenizer.vocab_size
        return self._cut(self._decoder.decode(self._tokenizer.decode_bytes([token] if known else [])), last=False)

    def finish(self) -> str:
        """Return what was held back; half a character becomes a replacement character."""
        return self._cut(self._decoder.decode(b"", final=True), last=True)

    def _cut(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        self.decoded_chars += len(text)
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        self.stopped = bool(found)
        keep = 0 if last or found else partial(text, self.stops)
        cut = min(found, default=len(text) - keep)
        self._held = "" if found else text[cut:]
        self.returned_chars += cut
        return text[:cut]


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: text of one kind, or one whole tool call."""

    kind: Kind
    text: str
    """Content, reasoning, or a tool call's arguments as JSON."""
    name: str = ""
    """The tool that is called."""


class AnswerParser:
    """Splits an answer into content, reasoning and tool calls; no tag of either ever becomes text.

    Thinking that is cut off stays reasoning. A tool call that is not JSON, or comes without tools being offered,
    becomes text of what surrounds it. White space between a tag and text is the template's, and dropped.
    """

    def __init__(self, *, thinking: bool = False, tools: bool = True) -> None:
        self._kind: Kind = "reasoning" if thinking else "content"
        self._tools = tools
        self._in_call = False
        self._after_tag = thinking
        self._buffer = ""

    def feed(self, text: str) -> list[Piece]:
        """Take some text; return the pieces that are now certain."""
        self._buffer += text
        pieces: list[Piece] = []
        while True:
            tags = (CALL_END,) if self._in_call else TAGS
            found = [(at, tag) for at, tag in ((self._buffer.find(tag), tag) for tag in tags) if at >= 0]
            if not found:
                break
            at, tag = min(found)
            before, self._buffer = self._buffer[:at], self._buffer[at + len(tag) :]
            self._at_tag(before, tag, pieces)
        if not self._in_call:
            keep = partial(self._buffer, TAGS)
            # White space may turn out to stand before a tag.
            sure = self._buffer[: len(self._buffer) - keep].rstrip()
            self._say(sure, pieces)
            self._buffer = self._buffer[len(sure) :]
        return pieces

    def finish(self) -> list[Piece]:
        """Return what was held back; a tool call without its end tag counts if it is whole."""
        pieces: list[Piece] = []
        if self._in_call:
            self._call(self._buffer, pieces)
        else:
            self._say(self._buffer, pieces)
        self._buffer = ""
        return pieces

    def _at_tag(self, before: str, tag: str, pieces: list[Piece]) -> None:
        if self._in_call:
            self._call(before, pieces)
            return
        turns = tag == CALL or tag == (THINK if self._kind == "content" else THINK_END)
        self._say(before.rstrip() if turns else before, pieces)
        if tag == CALL:
            self._in_call = True
        elif turns:
            self._kind = "reasoning" if tag == THINK else "content"
            self._after_tag = True

    def _call(self, text: str, pieces: list[Piece]) -> None:
        self._in_call = False
        call = parse_call(text) if self._tools else None
        if call is not None:
            pieces.append(call)
            self._after_tag = True
        else:
            self._say(text, pieces)

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if self._after_tag:
            text = text.lstrip()
        if text:
            self._after_tag = False
            pieces.append(Piece(self._kind, text))


def parse_call(text: str) -> Piece | None:
    """Read `{"name": ..., "arguments": {...}}`; None when it is something else."""
    try:
        call: Any = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, dict):
        return Piece("tool_call", json.dumps(arguments, ensure_ascii=False), call["name"])
    return Piece("tool_call", arguments, call["name"]) if isinstance(arguments, str) else None


def partial(text: str, marks: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that is the beginning, but not the whole, of a mark."""
    longest = min(len(text), max((len(mark) - 1 for mark in marks), default=0))
    return next((n for n in range(longest, 0, -1) if any(m.startswith(text[-n:]) and len(m) > n for m in marks)), 0)
