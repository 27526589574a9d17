"""Questions with one right answer from reasoning-gym; held-out ones share no seed and no question with training."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from freehold.core.errors import ConfigError, DataError
from freehold.corpora.config import CORPUS_LINE, GYM
from freehold.ledger.licence import of_distribution

# The day this version was pinned: the rows made with it are the same whenever it is installed.
GYM_ACQUIRED = "2026-11-21"
# Seeds of training items are below HELD_OUT_SEEDS, those of held-out items from there on.
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
        distribution = importlib.metadata.distribution(GYM.distribution)
        self.version = f"{GYM.distribution}=={distribution.version}"
        self.licence = of_distribution(distribution).expression or ""
        self.acquired = GYM_ACQUIRED
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
        gym = load()
        known = gym.factory.DATASETS
        if task not in known:
            near = difflib.get_close_matches(task, known, n=1)
            raise ConfigError(
                "reasoning-gym has no such task",
                where="reasoning",
                found=task,
                todo=f"did you mean `{near[0]}`?" if near else "see reasoning_gym.factory.DATASETS",
            )
        try:
            dataset = gym.create_dataset(task, seed=first_seed, size=SEEDS_PER_RUN // 2, **settings)
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


def load() -> ModuleType:
    """Return the module `reasoning_gym`; DataError when it, or something that it imports, is not there.

    Imported only when called: it takes a second of sympy and friends, which a dry run does not need.
    """
    # pycosat is C that comes as source only, so it is not installed with the rest: of all tasks only zebra_puzzles
    # calls it. reasoning-gym imports it for every task, so something has to stand in its place meanwhile. It is taken
    # removed again immediately: sympy would solve with any module of that name.
    absent = importlib.util.find_spec("pycosat") is None
    if absent:
        sys.modules["pycosat"] = stand_in = ModuleType("pycosat")
        stand_in.__dict__.update(solve=_no_solver, itersolve=_no_solver)
    try:
        import reasoning_gym
    except ImportError as error:
        raise DataError("reasoning-gym cannot be imported", found=error, todo=CORPUS_LINE) from error
    finally:
        if absent:
            del sys.modules["pycosat"]
    return reasoning_gym


def _no_solver(*_: Any) -> None:
    raise ConfigError(
        "this reasoning-gym task needs pycosat, which is not installed",
        where="reasoning.zebra_puzzles",
        todo="take the task out, or (a C compiler is needed): pip install pycosat==0.6.6",
    )


def _words(question: str) -> list[str]:
    return re.findall(r"[\w+*/=.-]+", question.lower().rstrip(".?= "))
