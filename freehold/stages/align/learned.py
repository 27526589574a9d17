"""Which words of a conversation are learned: turns, reasoning and calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from freehold.stages.align.rl_config import LearnConfig

Message = dict[str, Any]


def examples_of(messages: Sequence[Message], config: LearnConfig) -> list[list[Message]]:
    """Return the conversations that one becomes; those without anything to learn are dropped.

    With `reasoning: last` the context of a turn depends on the turn, so each learned turn gets an example of its own,
    in which it alone is learned: no turn counts twice.
    """
    chosen = _chosen(messages, config)
    if config.reasoning == "last" and any("reasoning_content" in message for message in messages):
        return [_until(messages, turn) for turn in chosen]
    found = [
        _without(message) if config.reasoning == "drop" else message
        for message in (_masked(message, at in chosen) for at, message in enumerate(messages))
    ]
    return [found] if chosen else []


def _chosen(messages: Sequence[Message], config: LearnConfig) -> list[int]:
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
    before = [_masked(_without(message), learned=False) for message in messages[:turn]]
    return [*before, messages[turn]]


def _masked(message: Message, learned: bool) -> Message:
    return message if learned or message["role"] != "assistant" else {**message, "train": False}


def _without(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "reasoning_content"}
