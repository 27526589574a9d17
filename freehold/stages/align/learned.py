"""Which words of a conversation are learned: turns, reasoning and calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from freehold.stages.align.config import SftConfig

Message = dict[str, Any]


def examples_of(messages: Sequence[Message], config: SftConfig) -> list[list[Message]]:
    """Return the conversations that one becomes; those without anything to learn are dropped.

    With `reasoning: last` the context of a turn depends on the turn, so each learned turn gets an example of its own,
    in which it alone is learned: no turn counts twice.
    """
    chosen = _chosen(messages, config)
    if config.reasoning == "last" and any("reasoning_content" in message for message in messages):
        return [_until(messages, turn) for turn in chosen]
    found = [_masked(message, at in chosen) for at, message in enumerate(messages)]
    found = without_reasoning(found) if config.reasoning == "drop" else found
    return [found] if chosen else []


def without_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without what was thought."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def _chosen(messages: Sequence[Message], config: SftConfig) -> list[int]:
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if config.turns == "last":
        turns = turns[-1:]
    return [
        at
        for at in turns
        if messages[at].get("train") is not False and (config.calls or not messages[at].get("tool_calls"))
    ]


def _until(messages: Sequence[Message], turn: int) -> list[Message]:
    """Return a conversation up to a turn, which alone is learned; reasoning of earlier turns is removed."""
    before = [_masked(message, learned=False) for message in without_reasoning(messages[:turn])]
    return [*before, messages[turn]]


def _masked(message: Message, learned: bool) -> Message:
    return message if learned or message["role"] != "assistant" else {**message, "train": False}
