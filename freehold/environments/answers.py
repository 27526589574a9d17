"""Questions from conversations that the run has gathered: the last answer of each is what is right.

Rollouts inherit the licence of the conversation that they began with, and its take-down reaches them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from freehold.core.config import Config, fill
from freehold.core.errors import DataError
from freehold.environments.protocol import Conversations, Message, Reply, Split, Task, said, text_of
from freehold.environments.single import is_held_out
from freehold.environments.verifiers import final_answer, same_number, same_text


class AnswersSettings(Config):
    """Which conversations are asked, and how answers are compared."""

    source: str = Field(description="source of conversations in gather")
    numbers: bool = Field(False, description="compare the final answers as numbers, not as text")


class Answers:
    """Plain conversations of one source that end with an answer."""

    name, version = "answers", "1"

    def __init__(self, settings: Mapping[str, Any], seed: int, conversations: Conversations) -> None:
        self.settings = fill(AnswersSettings, dict(settings), "align.rl.environments.answers.settings")
        self.verify = same_number if self.settings.numbers else same_text
        rows = [row for row in conversations(self.settings.source) if _asks(row.messages)]
        rows.sort(key=lambda row: row.id)
        self.rows: dict[str, list[Any]] = {
            split: [row for row in rows if is_held_out(str(row.messages[-2])) == (split == "held_out")]
            for split in ("train", "held_out")
        }
        if not self.rows["train"] or not self.rows["held_out"]:
            raise DataError(
                "too few conversations to ask",
                where=f"source {self.settings.source}",
                found=f"{len(rows)} that end with an answer",
                expected="at least some for training and some held out",
                todo="name another source of gather, or raise its limit",
            )

    def task(self, split: Split, number: int) -> Task:
        """Return the conversation of a number, again from the first one after the last."""
        row = self.rows[split][number % len(self.rows[split])]
        prompt, answer = row.messages[:-1], row.messages[-1]["content"]
        return Task(
            f"answers/{row.id}",
            tuple(prompt),
            final_answer(answer),
            tuple(row.messages[0].get("tools") or ()),
            row.source,
            row.id,
            row.licence,
        )

    def start(self, task: Task) -> None:
        """Return no state."""

    def step(self, task: Task, state: Any, turn: Message) -> Reply:
        """End the episode."""
        return Reply(state)

    def reward(self, task: Task, state: Any, turns: Sequence[Message]) -> Mapping[str, float]:
        """Return whether the final answer is the recorded one."""
        return {"correct": self.verify(text_of(turns), task.answer)}

    def gold(self, task: Task) -> list[list[Message]]:
        """Return the recorded answer."""
        return [said(task.answer)]

    def wrong(self, task: Task) -> list[list[Message]]:
        """Return answers that say nothing."""
        return [said(text) for text in ("", "Answer:", f"{task.answer}\nor something else")]


def _asks(messages: Sequence[Message]) -> bool:
    last = messages[-1]
    plain = last["role"] == "assistant" and not {"rejected", "label", "tool_calls"} & set(last)
    return plain and len(messages) > 1 and messages[-2]["role"] == "user" and bool(final_answer(last["content"] or ""))
