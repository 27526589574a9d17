"""From generated ids to what a reader sees: text as it becomes certain, stop strings, thoughts and tool calls.

Everything here works a token at a time and gives the same result however the text is cut into pieces.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from freehold.core.errors import CheckpointError
from freehold.tokenizer.dialects import DIALECTS, CallReader, Kind, Piece, Tools, partial

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
TAGS = (THINK, THINK_END, CALL, CALL_END)
RECORDED = "answer_format"
"""The key of `tokenizer_config.json` that records an AnswerFormat."""


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


class AnswerParser:
    """Splits an answer into content, reasoning and tool calls; no tag of either ever becomes text.

    Thinking that is cut off stays reasoning. What is between the tags of a call but is none, or comes without tools
    being offered, becomes text of what surrounds it. White space between a tag and text is the template's, and
    dropped. `thinking`: the prompt has opened the reasoning already. `tools`: those offered; None = none, and then no
    call is one. `calls_in_reasoning`: a call while the model thinks counts; else it stays a thought.
    """

    def __init__(
        self,
        *,
        thinking: bool = False,
        tools: Tools | None = (),
        dialect: str = "hermes",
        calls_in_reasoning: bool = True,
    ) -> None:
        self._kind: Kind = "reasoning" if thinking else "content"
        self._tools, self._dialect = tools, DIALECTS[dialect]
        self._reasoning_tags = TAGS if calls_in_reasoning else TAGS[:2]
        self._reader: CallReader | None = None
        self._in_call = False
        self._after_tag = thinking
        self._buffer = self._call_text = ""

    def feed(self, text: str) -> list[Piece]:
        """Take some text; return the pieces that are now certain."""
        self._buffer += text
        pieces: list[Piece] = []
        while found := [(at, tag) for tag in self._tags if (at := self._buffer.find(tag)) >= 0]:
            at, tag = min(found)
            before, self._buffer = self._buffer[:at], self._buffer[at + len(tag) :]
            self._at_tag(before, tag, pieces)
        sure = self._buffer[: len(self._buffer) - partial(self._buffer, self._tags)]
        if self._in_call:
            self._read_call(sure, pieces)
        else:  # white space may turn out to stand before a tag
            sure = sure.rstrip()
            self._say(sure, pieces)
        self._buffer = self._buffer[len(sure) :]
        return pieces

    def finish(self) -> list[Piece]:
        """Return what was held back; a tool call without its end tag counts if it has begun or is complete."""
        pieces: list[Piece] = []
        if self._in_call:
            self._read_call(self._buffer, pieces)
            self._end_call(pieces)
        else:
            self._say(self._buffer, pieces)
        self._buffer = ""
        return pieces

    @property
    def reasoning(self) -> bool:
        """Whether the model thinks at this point."""
        return self._kind == "reasoning"

    @property
    def _tags(self) -> tuple[str, ...]:
        """The tags that count here."""
        if self._in_call:
            return (CALL_END,)
        return self._reasoning_tags if self._kind == "reasoning" else TAGS

    def _at_tag(self, before: str, tag: str, pieces: list[Piece]) -> None:
        if self._in_call:
            self._read_call(before, pieces)
            self._end_call(pieces)
            return
        turns = tag == CALL or tag == (THINK if self._kind == "content" else THINK_END)
        self._say(before.rstrip() if turns else before, pieces)
        if tag == CALL:
            self._in_call, self._call_text = True, ""
            self._reader = None if self._tools is None else self._dialect(self._tools)
        elif turns:
            self._kind = "reasoning" if tag == THINK else "content"
            self._after_tag = True

    def _read_call(self, text: str, pieces: list[Piece]) -> None:
        if self._reader is None or not self._reader.begun:
            self._call_text += text
        if self._reader is not None:
            pieces += self._reader.feed(text)

    def _end_call(self, pieces: list[Piece]) -> None:
        self._in_call = False
        if self._reader is not None:
            pieces += self._reader.close()
        if self._reader is None or not self._reader.begun:
            self._say(self._call_text, pieces)
        else:
            self._after_tag = True

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if self._after_tag:
            text = text.lstrip()
        if text:
            self._after_tag = False
            pieces.append(Piece(self._kind, text))


@dataclass(frozen=True)
class AnswerFormat:
    """How a model was taught to write reasoning and tool calls; recorded next to its chat template."""

    dialect: str = "hermes"
    thinking: bool = False
    """Whether the template opens the reasoning at the end of the prompt."""
    calls_in_reasoning: bool = True
    """Whether a tool call while the model thinks counts."""

    def parser(self, tools: Tools | None = None) -> AnswerParser:
        """Return a parser for one answer; `tools` are those offered."""
        return AnswerParser(
            thinking=self.thinking, tools=tools, dialect=self.dialect, calls_in_reasoning=self.calls_in_reasoning
        )


def read_format(folder: Path) -> AnswerFormat:
    """Return the format recorded in a model's `tokenizer_config.json`, or what its chat template shows.

    Raises CheckpointError when what is recorded is none.
    """
    path = folder / "tokenizer_config.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        recorded = facts.get(RECORDED)
        if recorded is not None:
            found = AnswerFormat(**recorded)
            if found.dialect not in DIALECTS or {type(found.thinking), type(found.calls_in_reasoning)} != {bool}:
                raise ValueError(recorded)
            return found
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{RECORDED} is not a format of answers",
            where=path,
            found=str(error)[:200],
            expected=f"dialect: {' or '.join(DIALECTS)}; thinking, calls_in_reasoning: true or false",
        ) from error
    jinja = folder / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8", errors="replace") if jinja.is_file() else facts.get("chat_template")
    text = template if isinstance(template, str) else json.dumps(template)
    _, _, prompt = text.rpartition("add_generation_prompt")
    return AnswerFormat("xml" if "<function=" in text else "hermes", thinking=THINK in prompt)


__all__ = ["AnswerFormat", "AnswerParser", "Piece", "TextStream", "partial", "read_format"]
