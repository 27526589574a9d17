"""Shows conversations token by token, coloured by what is learned: what a mask is, seen before it costs a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from freehold.conversations.files import format_of, read
from freehold.tokenizer.chat import render_ids

if TYPE_CHECKING:
    from freehold.tokenizer.bpe import Tokenizer

LEARNED, PLAIN, RESET = "\x1b[30;42m", "\x1b[90m", "\x1b[0m"


def shown(path: Path, named: str, tokenizer: Tokenizer, count: int, *, colour: bool) -> Iterator[str]:
    """Yield the first conversations of a file that can be learned from, each as text for a terminal."""
    good = (row for row in read(path, format_of(path, named)) if row.made is not None)
    for row in itertools.islice(good, count):
        assert row.made is not None
        messages = row.made.messages
        ids, mask = render_ids(tokenizer, messages, tools=messages[0].get("tools"))
        roles = " ".join(str(message["role"]) for message in messages)
        share = f"{sum(mask)} of {len(ids)} tokens learned"
        yield f"row {row.number}: {roles}; {share}\n{painted(tokenizer, ids, mask, colour=colour)}"


def painted(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool], *, colour: bool) -> str:
    """Return ids as text, a bar between tokens: learned ones on green, or in brackets where there is no colour."""
    parts = []
    for learned, group in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        text = "|".join(tokenizer.token_bytes(token).decode("utf-8", "replace") for token, _ in group)
        # A line break inside a colour would paint the rest of the terminal's line.
        text = text.replace("\n", "\u21b5\n")
        if colour:
            parts.append(f"{LEARNED if learned else PLAIN}{text}{RESET}")
        else:
            parts.append(f"[[{text}]]" if learned else text)
    return "".join(parts)
