"""The environment `gym`: a task of reasoning-gym, judged by its own scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from freehold.core.config import Config, fill
from freehold.core.errors import ConfigError
from freehold.corpora.reasoning import HELD_OUT_SEEDS, SEEDS_PER_RUN, load
from freehold.environments.protocol import Conversations, Message, Reply, Split, Task, said, text_of
from freehold.environments.verifiers import final_answer


class GymSettings(Config):
    """Which task, and how hard."""

    task: str = Field(description="a name of reasoning_gym.factory.DATASETS")
    settings: dict[str, bool | int] = Field(default_factory=dict, description="what that task takes")


class Gym:
    """Items of one generator; held-out ones have other seeds."""

    name = "gym"

    def __init__(self, settings: Mapping[str, Any], seed: int, conversations: Conversations) -> None:
        where = "align.rl.environments.gym.settings"
        self.settings = fill(GymSettings, dict(settings), where)
        gym = load()
        self.version = f"reasoning-gym=={getattr(gym, '__version__', '')} {self.settings.task}"
        first = {"train": seed % 1000 * SEEDS_PER_RUN, "held_out": HELD_OUT_SEEDS + seed % 1000 * SEEDS_PER_RUN}
        try:
            self.data = {
                split: gym.create_dataset(self.settings.task, seed=at, size=SEEDS_PER_RUN, **self.settings.settings)
                for split, at in first.items()
            }
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError("reasoning-gym has no such task, or other settings", where=where, found=error) from error

    def task(self, split: Split, number: int) -> Task:
        """Return an item; its answer is the place from which the scorer reads it."""
        entry = self.data[split][number]
        return Task(f"gym/{split}/{number}", ({"role": "user", "content": entry["question"]},), [split, number])

    def start(self, task: Task) -> None:
        """Return no state."""

    def step(self, task: Task, state: Any, turn: Message) -> Reply:
        """End the episode."""
        return Reply(state)

    def reward(self, task: Task, state: Any, turns: Sequence[Message]) -> Mapping[str, float]:
        """Return 1 for what the scorer of reasoning-gym takes as fully right, else 0."""
        split, number = task.answer
        data = self.data[split]
        # Its partial scores reward the form of an answer that is wrong.
        return {"correct": float(data.score_answer(final_answer(text_of(turns)), data[number]) >= 1.0)}

    def gold(self, task: Task) -> list[list[Message]]:
        """Return the item's own answer."""
        split, number = task.answer
        return [said(str(self.data[split][number]["answer"]))]

    def wrong(self, task: Task) -> list[list[Message]]:
        """Return answers that say nothing."""
        return [said(text) for text in ("", "Answer:", task.messages[0]["content"])]
