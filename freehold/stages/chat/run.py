"""A conversation in the terminal: streaming, history, a few commands; or one answer a line, from a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO

from freehold import api
from freehold.infer.engine import ContextOverflow
from freehold.infer.sampler import Sampling
from freehold.stages.chat.config import StageConfig

HELP = "/reset forgets the conversation · /system TEXT sets the system message · /quit ends · Ctrl-C stops an answer"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def chat(config: StageConfig, lines: TextIO | None = None, out: TextIO | None = None) -> None:
    """Talk until /quit or the end of the input.

    On a terminal the answers are streamed and the conversation goes on; from a pipe each line is a conversation
    of its own and each answer one line.
    """
    lines, out = lines or sys.stdin, out or sys.stdout
    loaded = api.load(config.path, config.dtype)
    talk = Talk(loaded, config, out)
    if not lines.isatty():
        for line in lines:
            if line.strip():
                talk.reset()
                talk.say(line.strip())
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
        except KeyboardInterrupt:
            print("\n(/quit ends)", file=out)
            continue
        if line == "/quit":
            return
        if line:
            talk.command(line) if line.startswith("/") else talk.say(line)


class Talk:
    """One conversation with a model."""

    def __init__(self, loaded: api.Loaded, config: StageConfig, out: TextIO) -> None:
        self.loaded, self.config, self.out = loaded, config, out
        self.system = config.system
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
        """Answer one message; what was interrupted stays in the conversation as far as it came."""
        self.messages.append({"role": "user", "content": text})
        content = ""
        try:
            content = self._answer()
        except ContextOverflow as error:
            print(f"({error.what}: {error.found}, {error.expected}; /reset begins anew)", file=self.out)
            self.messages.pop()
            return
        self.messages.append({"role": "assistant", "content": content})

    def _answer(self) -> str:
        """Show an answer as it comes; return its content."""
        c = self.config
        sampling = Sampling(
            c.temperature, c.top_p, c.top_k, max_tokens=c.max_tokens, seed=c.seed, stop_ids=self.loaded.stop_ids
        )
        live = self.out.isatty()
        content, shown = "", "content"
        try:
            for piece in self.loaded.answer(self.messages, sampling):
                if live and piece.kind != shown:
                    print(PLAIN if piece.kind == "content" else DIM, end="", file=self.out)
                    print("" if shown == "content" and not content else "\n", end="", file=self.out)
                    shown = piece.kind
                if piece.kind == "content":
                    content += piece.text
                    if live:
                        print(piece.text, end="", file=self.out, flush=True)
                elif live and c.show_reasoning:
                    said = piece.text if piece.kind == "reasoning" else f"[calls {piece.name}({piece.text})]"
                    print(said, end="", file=self.out, flush=True)
        except KeyboardInterrupt:
            print("…", end="", file=self.out)
        if live:
            print(PLAIN if shown != "content" else "", file=self.out)
        else:
            print(" ".join(content.split("\n")), file=self.out, flush=True)
        return content
