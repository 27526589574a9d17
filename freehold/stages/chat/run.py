"""A conversation in the terminal: streaming, history, a few commands; or one answer a line, from a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from freehold import api
from freehold.core.errors import RequestError
from freehold.guard.policy import Policy
from freehold.guard.stream import AnswerGuard
from freehold.infer.limits import ContextOverflow
from freehold.stages.chat.config import ChatConfig
from freehold.tokenizer.dialects import Piece

HELP = "/reset forgets the conversation · /system TEXT sets the system message · /quit ends · Ctrl-C stops an answer"
FAIR_SHARE = 4
"""An answer gets at least 1/FAIR_SHARE of the context, before older turns do."""
CHAT_ROUTE = "chat"
"""The name under which a policy can have rules for the terminal."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def chat(config: ChatConfig, lines: TextIO | None = None, out: TextIO | None = None) -> None:
    """Talk until /quit or the end of the input.

    On a terminal the answers are streamed and the conversation continues; from a pipe each line is a conversation
    of its own and each answer one line. ContextOverflow for a line of a pipe that does not fit the context.
    """
    lines, out = lines or sys.stdin, out or sys.stdout
    if isinstance(out, io.TextIOWrapper):  # a terminal that has no letter for a character shows another one
        out.reconfigure(errors="replace")
    loaded = api.load(
        config.path, config.dtype, device=config.device, max_batch=1, prefix_cache=True, answers_only=True
    )
    talk = Talk(loaded, config, out)
    if not lines.isatty():
        for number, line in enumerate(_decoded(lines), 1):
            if line.strip():
                talk.reset()
                try:
                    talk.say(line.strip())
                except ContextOverflow as error:
                    raise ContextOverflow(
                        error.what, where=f"line {number}", found=error.found, expected=error.expected
                    ) from None
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and editing)
    print(f"{loaded.folder}\n{HELP}", file=out)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=out)
            return
        except UnicodeDecodeError as error:
            print(f"(not UTF-8: {error})", file=out)
            continue
        except KeyboardInterrupt:
            print("\n(/quit ends)", file=out)
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            talk.command(line)
        elif line:
            try:
                talk.say(line)
            except ContextOverflow as error:
                print(f"({error.what}: {error.found}, {error.expected})", file=out)


def _decoded(lines: TextIO) -> Iterator[str]:
    """Yield the lines of a pipe as UTF-8 whatever the locale; RequestError names the first that is not."""
    binary = getattr(lines, "buffer", None)
    if binary is None:
        yield from lines
        return
    for number, line in enumerate(binary, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(
                "the input is not UTF-8",
                where=f"line {number}",
                found=error,
                expected="text in UTF-8",
                todo="convert it first, for example: iconv -f latin1 -t utf-8",
            ) from None


def printable(text: str) -> str:
    """Return text without control codes, which could write the clipboard, the title or over other lines."""
    return text.translate(_CONTROLS)


class Talk:
    """One conversation with a model."""

    def __init__(self, loaded: api.Loaded, config: ChatConfig, out: TextIO) -> None:
        self.loaded, self.config, self.out = loaded, config, out
        self.system = config.system
        self.policy = Policy(config.guard, CHAT_ROUTE)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []

    def command(self, line: str) -> None:
        """Obey a line that begins with a slash."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.reset()
            print("(forgotten)", file=self.out)
        elif name == "/system":
            self.system = rest.strip() or None
            self.reset()
            print(
                "(a new conversation with this system message)" if self.system else "(no system message)", file=self.out
            )
        else:
            print(HELP, file=self.out)

    def say(self, text: str) -> None:
        """Answer one message; what was interrupted stays in the conversation as far as it came.

        A conversation that became too long loses its oldest questions and answers. ContextOverflow when the message
        does not fit even alone; the conversation is then as it was.
        """
        asked = self.policy.judge(text, "prompt")
        if asked.blocked:
            print(self.policy.config.message, file=self.out)
            return
        text = asked.text
        kept, room_tokens = self._fitting([*self.messages, {"role": "user", "content": text}])
        lost = (len(self.messages) + 1 - len(kept)) // 2
        if lost and room_tokens > 0:
            what = "question and answer are" if lost == 1 else f"{lost} questions and answers are"
            print(f"(the conversation no longer fits the context: its oldest {what} forgotten)", file=self.out)
        self.messages = [*kept, {"role": "assistant", "content": self._answer(kept, room_tokens)}]

    def _fitting(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
        """Return the messages without the oldest turns that leave no fair room for an answer, and the room left."""
        limit = self.loaded.engine.limit_tokens
        fair = min(self.config.max_tokens or limit, limit // FAIR_SHARE)
        first = 1 if messages[0]["role"] == "system" else 0
        for cut in range(first, len(messages), 2):
            kept = messages[:first] + messages[cut:]
            room_tokens = limit - len(self.loaded.prompt_ids(kept))
            if room_tokens >= fair:
                break
        return kept, room_tokens

    def _guarded(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Yield what of an answer may be shown."""
        if not self.policy.acts("answer"):
            yield from pieces
            return
        guard = AnswerGuard(self.policy)
        for piece in pieces:
            yield from guard.feed([piece])
            if guard.blocked:
                break
        yield from guard.finish()

    def _answer(self, messages: list[dict[str, Any]], room_tokens: int) -> str:
        """Show an answer as it comes; return its content."""
        c = self.config
        # Without room the engine is to say so.
        longest = min(c.max_tokens or room_tokens, room_tokens) if room_tokens > 0 else None
        sampling = dataclasses.replace(self.loaded.sampling, max_tokens=longest, seed=c.seed)
        if c.temperature is not None:
            sampling = dataclasses.replace(sampling, temperature=c.temperature)
        live = self.out.isatty()
        content, shown = "", "content"
        try:
            for piece in self._guarded(self.loaded.answer(messages, sampling)):
                kind = piece.kind if piece.kind in ("content", "reasoning") else "call"
                if live and kind != shown:
                    print(PLAIN if kind == "content" else DIM, end="", file=self.out)
                    print("" if shown == "content" and not content else "\n", end="", file=self.out)
                    shown = kind
                if piece.kind == "content":
                    content += piece.text
                    if live:
                        print(printable(piece.text), end="", file=self.out, flush=True)
                elif live and c.show_reasoning:
                    said = {"call": f"[calls {piece.name}(", "call_end": ")]"}.get(piece.kind, piece.text)
                    print(printable(said), end="", file=self.out, flush=True)
        except KeyboardInterrupt:
            print("…", end="", file=self.out)
        if live:
            print(PLAIN if shown != "content" else "", file=self.out)
        else:
            print(" ".join(content.split("\n")), file=self.out, flush=True)
        return content
