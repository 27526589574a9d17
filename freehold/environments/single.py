"""Environments of one question and one answer: makers of questions with a verifier each."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from freehold.environments.protocol import Message, Reply, Split, Task, said, text_of

HELD_OUT = 8
"""One question of this many is held out, by its hash: so no split has a question of the other."""
TRIES = 1000


@dataclass(frozen=True)
class Item:
    """One question as a maker gives it."""

    question: str
    answer: Any
    gold: str
    """An answer that is right."""
    wrong: tuple[str, ...] = ()
    """Answers that are not, next to those that every question has."""


Maker = Callable[[random.Random], Item]
Verifier = Callable[[str, Any], float]


class Single:
    """Questions of one maker; the answer is judged by one verifier."""

    def __init__(self, name: str, version: str, make: Maker, verify: Verifier, seed: int) -> None:
        self.name, self.version, self.make, self.verify, self.seed = name, version, make, verify, seed

    def task(self, split: Split, number: int) -> Task:
        """Return a question; the same number is the same question."""
        item = self._item(split, number)
        return Task(f"{self.name}/{split}/{number}", ({"role": "user", "content": item.question},), item.answer)

    def start(self, task: Task) -> None:
        """Return no state: there is one turn."""

    def step(self, task: Task, state: Any, turn: Message) -> Reply:
        """End the episode: one turn is all."""
        return Reply(state)

    def reward(self, task: Task, state: Any, turns: Sequence[Message]) -> Mapping[str, float]:
        """Return whether the answer is right."""
        return {"correct": self.verify(text_of(turns), task.answer)}

    def gold(self, task: Task) -> list[list[Message]]:
        """Return the right answer."""
        _, split, number = task.id.rsplit("/", 2)
        return [said(self._item(split, int(number)).gold)]  # type: ignore[arg-type]

    def wrong(self, task: Task) -> list[list[Message]]:
        """Return answers that say nothing, echo the question, keep the form only, or are wrong."""
        _, split, number = task.id.rsplit("/", 2)
        item = self._item(split, int(number))  # type: ignore[arg-type]
        every = ["", item.question, "Answer:", "\\boxed{}"]
        if isinstance(item.answer, str):
            # Behind a mark of a comment, and hedged.
            every += [f"# {item.answer}", f"{item.answer}\nor something else"]
        return [said(text) for text in (*every, *item.wrong)]

    def _item(self, split: Split, number: int) -> Item:
        draw = random.Random(f"{self.seed} {self.name} {split} {number}")
        for _ in range(TRIES):
            item = self.make(draw)
            if is_held_out(item.question) == (split == "held_out"):
                return item
        raise AssertionError(f"{self.name} has no question for {split}")


def is_held_out(question: str) -> bool:
    """Return whether a question is among those that are never trained."""
    return hashlib.blake2b(question.encode(), digest_size=4).digest()[0] % HELD_OUT == 0
