"""From tokens to OpenAI's response bodies, whole or in chunks."""

from __future__ import annotations

import contextlib
import json
import math
import time
import uuid
from bisect import bisect_left
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from freehold.guard.stream import AnswerGuard
from freehold.infer.engine import Scored, Token, Top
from freehold.tokenizer.bpe import Tokenizer
from freehold.tokenizer.dialects import Piece
from freehold.tokenizer.output import AnswerParser, TextStream

Event = tuple[int, Token] | list[Scored]
Turns = Generator[Event | None]
"""What a request does in the worker's thread; None: nothing yet, others have their turn."""
Events = AsyncGenerator[Event, None]
"""Tokens with the number of their choice; before them, if asked for, what the prompts scored."""


@dataclass
class Choice:
    """One answer in the making."""

    text: TextStream
    parser: AnswerParser | None
    """None = plain text: tags are shown as they are."""
    guard: AnswerGuard | None = None
    """Judges what may be shown."""
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of its prompt that were read from kept pages."""
    reasoning_tokens: int = 0
    finish_reason: str | None = None
    said: list[Piece] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    """Those of which something is in the text, for the log-probabilities."""
    starts: list[int] = field(default_factory=list)
    """At which character of the text each of them begins."""

    def feed(self, token: Token) -> list[Piece]:
        """Take one token; return the pieces that are now certain. Sets `finish_reason` at the end."""
        if self.finish_reason:
            return []
        self.completion_tokens += 1
        self.cached_tokens += token.cached_tokens
        if self.parser is not None and self.parser.reasoning:
            self.reasoning_tokens += 1
        text = ""
        if token.finish_reason != "stop":  # a token that ends the answer is not in its text
            self.starts.append(self.text.decoded_chars)
            self.tokens.append(token)
            text = self.text.feed(token.id)
        if self.text.stopped or token.finish_reason:
            return self.end("stop" if self.text.stopped else token.finish_reason or "stop", text)
        pieces = self._say(text, last=False)
        # What is withheld is not made either: its end has come.
        return pieces + self.end("content_filter") if self.guard is not None and self.guard.blocked else pieces

    def withhold(self, message: str) -> list[Piece]:
        """End the answer before it begins, because of its prompt."""
        self.finish_reason, self.said = "content_filter", [Piece("content", message)]
        return self.said

    @property
    def certain(self) -> int:
        """How many of the tokens no stop string can take away any more."""
        if self.finish_reason or not self.text.stops:
            return len(self.tokens)
        return bisect_left(self.starts, self.text.returned_chars)

    def end(self, reason: str, text: str = "") -> list[Piece]:
        """Close the answer; return what was held back."""
        pieces = self._say(text + self.text.finish(), last=True)
        if self.text.stopped:
            reason = "stop"
            kept = bisect_left(self.starts, self.text.returned_chars)
            del self.tokens[kept:], self.starts[kept:]
        if self.guard is not None and self.guard.blocked:
            reason = "content_filter"
        calls = any(piece.kind == "call" for piece in self.said)
        self.finish_reason = "tool_calls" if calls and reason == "stop" else reason
        return pieces

    def _say(self, text: str, *, last: bool) -> list[Piece]:
        if self.parser is None:
            pieces = [Piece("content", text)] if text else []
        else:
            pieces = self.parser.feed(text) + (self.parser.finish() if last else [])
        if self.guard is not None:
            pieces = self.guard.feed(pieces) + (self.guard.finish() if last else [])
        self.said += pieces
        return pieces


async def collect(events: Events, choices: list[Choice]) -> AsyncGenerator[tuple[int, list[Piece]]]:
    """Feed the choices; yield (number, pieces) for each token until all have ended."""
    async with contextlib.aclosing(events):
        async for event in events:
            assert isinstance(event, tuple)
            number, token = event
            if choices[number].finish_reason is None:
                yield number, choices[number].feed(token)
            if all(choice.finish_reason for choice in choices):
                return
    for number, choice in enumerate(choices):
        if choice.finish_reason is None:  # asked for no tokens at all
            yield number, choice.end("length")


@dataclass(frozen=True)
class Head:
    """What every body of one answer begins with."""

    id: str
    model: str
    kind: str
    created: int

    @classmethod
    def new(cls, prefix: str, model: str, kind: str) -> Head:
        """Return a head with a new id and the time of now."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", model, kind, int(time.time()))

    def body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return a response or a chunk."""
        return {
            "id": self.id, "object": self.kind, "created": self.created, "model": self.model, "choices": choices, **more
        }  # fmt: skip


def usage(prompt_tokens: int, choices: Sequence[Choice], per_prompt: int | None = None) -> dict[str, Any]:
    """Return the token counts of a request; a prompt counts once, however many choices it has (None: all)."""
    completion = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached_tokens(choices, per_prompt)},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
    }


def cached_tokens(choices: Sequence[Choice], per_prompt: int | None = None) -> int:
    """Return how many tokens of the prompts were read from kept pages, by the first choice of each."""
    return sum(choice.cached_tokens for choice in choices[:: per_prompt or len(choices) or 1])


# --- chat ---------------------------------------------------------------------------------------------------------


def chat_message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return the assistant's message; reasoning and tool calls only when there are some."""
    texts = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("content", "reasoning")}
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.kind == "call":
            calls.append(_tool_call(piece.name))
        elif piece.kind == "arguments":
            calls[-1]["function"]["arguments"] += piece.text
    message: dict[str, Any] = {
        "role": "assistant", "content": texts["content"] or (None if calls else ""), "refusal": None
    }  # fmt: skip
    if texts["reasoning"]:
        message |= _reasoning(texts["reasoning"])
    if calls:
        message["tool_calls"] = calls
    return message


def chat_choice(number: int, choice: Choice, tokenizer: Tokenizer, logprobs: bool) -> dict[str, Any]:
    """Return one finished answer of a chat."""
    return {
        "index": number,
        "message": chat_message(choice.said),
        "logprobs": chat_logprobs(choice.tokens, tokenizer) if logprobs else None,
        "finish_reason": choice.finish_reason,
    }


def chat_delta(piece: Piece, call: int) -> dict[str, Any]:
    """Return one piece as a delta of a stream; `call` is the number of the tool call it belongs to."""
    if piece.kind == "call":
        return {"tool_calls": [{"index": call, **_tool_call(piece.name)}]}
    if piece.kind == "arguments":
        return {"tool_calls": [{"index": call, "function": {"arguments": piece.text}}]}
    return {"content": piece.text} if piece.kind == "content" else _reasoning(piece.text)


def _reasoning(text: str) -> dict[str, str]:
    """Return reasoning under both of its names: clients look for the one or the other."""
    return {"reasoning": text, "reasoning_content": text}


def _tool_call(name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": ""}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def chat_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return log-probabilities in the chat form."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = _bytes(tokenizer, token)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**entry(t.id, t.logprob), "top_logprobs": [entry(i, p) for i, p in t.top_logprobs]} for t in tokens
    ]  # fmt: skip
    return {"content": content, "refusal": None}


async def chat_chunks(
    head: Head, moves: AsyncIterator[tuple[int, list[Piece]]], choices: list[Choice], tokenizer: Tokenizer, *,
    logprobs: bool, usage_of_prompt_tokens: int | None,
) -> AsyncGenerator[dict[str, Any]]:  # fmt: skip
    """Yield the chunks of a streamed chat: the role first, the finish reason alone last, then the usage."""
    more = {} if usage_of_prompt_tokens is None else {"usage": None}
    sent = [0] * len(choices)

    def chunk(number: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}
        if logprobs and not reason:
            tokens = choices[number].tokens[sent[number] : choices[number].certain]
            choice["logprobs"] = chat_logprobs(tokens, tokenizer) if tokens else None
            sent[number] += len(tokens)
        return head.body([choice], **more)

    for number in range(len(choices)):
        yield head.body(
            [{
                "index": number,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }],
            **more,
        )  # fmt: skip
    calls = [-1] * len(choices)
    async for number, pieces in moves:
        for piece in pieces:
            calls[number] += piece.kind == "call"
            if piece.kind != "call_end":
                yield chunk(number, chat_delta(piece, calls[number]))
        reason = choices[number].finish_reason
        if reason:
            if logprobs and len(choices[number].tokens) > sent[number]:
                yield chunk(number, {})
            yield chunk(number, {}, reason)
    if usage_of_prompt_tokens is not None:
        yield head.body([], usage=usage(usage_of_prompt_tokens, choices))


# --- text completions ---------------------------------------------------------------------------------------------


@dataclass
class TextLogprobs:
    """Log-probabilities in the form of text completions; continues over the chunks of a stream.

    `offset` counts the characters of the text before a token: half a character and a hidden token are none.
    """

    tokenizer: Tokenizer
    top: int
    offset: int = 0

    def __post_init__(self) -> None:
        """Begin between two characters."""
        self._text = TextStream(self.tokenizer)

    def end_of_prompt(self) -> None:
        """Close the text of the prompt: half a character at its end is not continued by the answer."""
        self.offset += len(self._text.finish())
        self._text = TextStream(self.tokenizer)

    def block(self, ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[Top]) -> dict[str, Any]:
        """Return the block for some tokens; a token without log-probability (the first of a prompt) has None."""
        names: list[str] = []
        offsets: list[int] = []
        best: list[dict[str, float] | None] = []
        for token, logprob, top in zip(ids, logprobs, tops, strict=True):
            names.append(self._name(token))
            offsets.append(self.offset)
            self.offset += len(self._text.feed(token))
            if logprob is None:
                best.append(None)
                continue
            # The token itself is always among them, as OpenAI has it.
            table: dict[str, float] = {}
            for i, p in [*top[: self.top], (token, logprob)]:
                table.setdefault(self._name(i), _finite(p))
            best.append(table)
        values = [None if p is None else _finite(p) for p in logprobs]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}

    def _name(self, token: int) -> str:
        data = _bytes(self.tokenizer, token)
        try:
            return data.decode()
        except UnicodeDecodeError:  # half a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(frozen=True)
class Echo:
    """The prompt, given back before its completion."""

    text: str
    ids: Sequence[int]
    scored: Scored | None
    hidden: int = 0
    """How many ids before the text are ours: what begins a text was not in the request, so it is not given back."""


def text_choice(
    number: int, choice: Choice, echo: Echo | None, logprobs: TextLogprobs | None
) -> dict[str, Any]:  # fmt: skip
    """Return one finished text completion."""
    text = (echo.text if echo else "") + "".join(piece.text for piece in choice.said)
    block = text_logprobs(choice.tokens, echo, logprobs) if logprobs else None
    return {"index": number, "text": text, "logprobs": block, "finish_reason": choice.finish_reason}


def text_logprobs(tokens: Sequence[Token], echo: Echo | None, logprobs: TextLogprobs) -> dict[str, Any]:
    """Return the block for an echo, if any, and the tokens after it."""
    ids = [t.id for t in tokens]
    values: list[float | None] = [t.logprob for t in tokens]
    tops = [t.top_logprobs for t in tokens]
    if not (echo and echo.scored):
        return logprobs.block(ids, values, tops)
    asked = slice(echo.hidden, None)
    scores: list[float | None] = [None, *echo.scored.logprobs[1:]]
    block = logprobs.block(echo.ids[asked], scores[asked], echo.scored.top_logprobs[asked])
    logprobs.end_of_prompt()
    after = logprobs.block(ids, values, tops)
    return {name: [*block[name], *after[name]] for name in block}


async def text_chunks(
    head: Head, moves: AsyncIterator[tuple[int, list[Piece]]], choices: list[Choice], echoes: list[Echo | None],
    logprobs: list[TextLogprobs | None], *, usage_of_prompt_tokens: int | None, per_prompt: int,
) -> AsyncGenerator[dict[str, Any]]:  # fmt: skip
    """Yield the chunks of streamed text completions; the finish reason is on the last of each choice only."""
    more = {} if usage_of_prompt_tokens is None else {"usage": None}
    sent = [0] * len(choices)

    def chunk(number: int, text: str, echo: Echo | None = None, reason: str | None = None) -> dict[str, Any]:
        block, table = None, logprobs[number]
        tokens = choices[number].tokens[sent[number] : choices[number].certain]
        if table and (echo or tokens):
            block = text_logprobs(tokens, echo, table)
            sent[number] += len(tokens)
        return head.body([{"index": number, "text": text, "logprobs": block, "finish_reason": reason}], **more)

    for number, echo in enumerate(echoes):
        if echo:
            yield chunk(number, echo.text, echo)
    async for number, pieces in moves:
        text = "".join(piece.text for piece in pieces)
        reason = choices[number].finish_reason
        if text or reason:
            yield chunk(number, text, reason=reason)
    if usage_of_prompt_tokens is not None:
        yield head.body([], usage=usage(usage_of_prompt_tokens, choices, per_prompt))


def to_bytes(body: Any) -> bytes:
    """Return JSON in UTF-8; half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes `?`."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Return a token's bytes, control tokens by name; a row of the model that is no token has none."""
    return tokenizer.decode_bytes([token] if token < tokenizer.vocab_size else [], skip_specials=False)


def _finite(value: float) -> float:
    """JSON knows no infinity; -9999 is what OpenAI reports for the impossible."""
    return value if math.isfinite(value) else -9999.0
