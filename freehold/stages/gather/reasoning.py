"""Questions with one right answer from reasoning-gym; held-out ones share no seed and no question with training."""

from __future__ import annotations

import difflib
import importlib.metadata
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from freehold.core.errors import ConfigError
from freehold.ledger.licence import of_distribution
from freehold.stages.gather.origins import date_of

# Seeds of training items lie below HELD_OUT_SEEDS, those of held-out items from there on.
SEEDS_PER_RUN = 1_000_000
HELD_OUT_SEEDS = 2_000_000_000
# This many repeated questions in a row mean that a small task has no more to ask.
EXHAUSTED = 200


@dataclass(frozen=True)
class Item:
    """One question with its answer; `place` says what it was made from: task and seed."""

    question: str
    answer: str
    place: str
    task: str


class Gym:
    """reasoning-gym's generators with our settings; an item is a pure function of its seed."""

    def __init__(self, settings: dict[str, dict[str, bool | int]], seed: int) -> None:
        self.base = seed % 1000 * SEEDS_PER_RUN
        self.seeds = {
            "train": [self.base, self.base + SEEDS_PER_RUN - 1],
            "held_out": [HELD_OUT_SEEDS + self.base, HELD_OUT_SEEDS + self.base + SEEDS_PER_RUN - 1],
        }
        self.settings = settings
        distribution = importlib.metadata.distribution("reasoning-gym")
        self.version = f"reasoning-gym=={distribution.version}"
        self.licence = of_distribution(distribution).expression or ""
        self.acquired = date_of(Path(str(distribution.locate_file("reasoning_gym"))) / "__init__.py")
        self.held: set[str] = set()

    def held_out(self, count: int) -> Iterator[Item]:
        """Yield `count` different questions, spread evenly over the tasks."""
        each = [count // max(len(self.settings), 1)] * len(self.settings)
        for index in range(count - sum(each) if each else 0):
            each[index] += 1
        for (task, settings), wanted in zip(sorted(self.settings.items()), each, strict=True):
            found = itertools.islice(self._items(task, settings, self.seeds["held_out"][0]), wanted)
            for item in found:
                self.held.add(" ".join(_words(item.question)))
                yield item

    def _is_held(self, question: str) -> bool:
        """Return whether the question is held out, or begins with one that is (`2 + 3` begins `2 + 3 + 4`)."""
        words = _words(question)
        return any(" ".join(words[:end]) in self.held for end in range(1, len(words) + 1))

    def train(self, offset: int) -> Iterator[Item]:
        """Yield different training questions, the tasks taking turns; call `held_out` first."""
        streams = [
            self._items(task, settings, self.seeds["train"][0] + offset)
            for task, settings in sorted(self.settings.items())
        ]
        while streams:
            alive = []
            for stream in streams:
                item = next(stream, None)
                if item is not None:
                    alive.append(stream)
                    yield item
            streams = alive

    def _items(self, task: str, settings: dict[str, bool | int], first_seed: int) -> Iterator[Item]:
        # Imported here: a second of sympy and friends that a dry run does not need.
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if task not in DATASETS:
            near = difflib.get_close_matches(task, DATASETS, n=1)
            raise ConfigError(
                "reasoning-gym has no such task",
                where="reasoning",
                found=task,
                todo=f"did you mean `{near[0]}`?" if near else "see reasoning_gym.factory.DATASETS",
            )
        try:
            dataset = reasoning_gym.create_dataset(task, seed=first_seed, size=SEEDS_PER_RUN // 2, **settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(
                "reasoning-gym does not take these settings", where=f"reasoning.{task}", found=settings, expected=error
            ) from error
        seen: set[str] = set()
        repeated = 0
        for index in range(SEEDS_PER_RUN // 2):
            entry = dataset[index]
            question, answer = " ".join(str(entry["question"]).split()), str(entry["answer"])
            if question in seen or self._is_held(question):
                repeated += 1
                if repeated > EXHAUSTED:
                    return
                continue
            repeated = 0
            seen.add(question)
            yield Item(question, answer, f"reasoning_gym/{task}#{first_seed + index}", task)


def _words(question: str) -> list[str]:
    return re.findall(r"[\w+*/=.-]+", question.lower().rstrip(".?"))
