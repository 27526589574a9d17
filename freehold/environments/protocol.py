"""What an environment is, what asks it, and what learns from it.

An environment is found by name through the entry point group `freehold.environments`. Its value is called with
(settings, seed, conversations) and returns an `Environment`; docs/alignment.md has an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from freehold.core.document import Conversation
from freehold.core.errors import FreeholdError

GROUP = "freehold.environments"
OWN_LICENCE = "LicenseRef-Freehold-Generated"
"""Of tasks that this program writes."""

Message = Mapping[str, Any]
Split = Literal["train", "held_out"]
Conversations = Callable[[str], Iterable[Conversation]]
"""Returns the training conversations of a source by its name."""


class EnvironmentFault(FreeholdError):
    """An environment that raised, did not return, or gave a reward that is no number: never a reward of 0."""


@dataclass(frozen=True)
class Task:
    """One question or goal."""

    id: str
    """Unique within the environment; the same id is the same task."""
    messages: tuple[Message, ...]
    """The prompt."""
    answer: Any
    """What the verifier compares with, as JSON; the policy never sees it."""
    tools: tuple[Message, ...] = ()
    source: str = ""
    """Source of the prompt; empty: written by the environment."""
    document: str = ""
    """Id of the row that the prompt comes from, for trace and take-down."""
    licence: str = OWN_LICENCE
    """Terms of the prompt and of what tools return; a rollout inherits them."""

    @property
    def traced(self) -> str:
        """Return the id by which the trace knows the prompt; empty for what this program wrote under its own terms."""
        return traced(self.document, self.id, self.licence)


def traced(document: str, task: str, licence: str) -> str:
    """Return the id by which the trace knows a prompt: a prompt under others' terms is never left untraced."""
    return document or ("" if licence == OWN_LICENCE else task)


@dataclass(frozen=True)
class Reply:
    """What an environment says to a turn of the assistant."""

    state: Any
    """JSON; nothing else of an episode is remembered."""
    messages: tuple[Message, ...] = ()
    """Results of tools, or what the user says next."""
    done: bool = True


class Environment(Protocol):
    """Tasks and their verifier: pure functions of (seed, split, number) and of what was said. No clock, no network."""

    name: str
    version: str
    """Changes whenever a reward could."""

    def task(self, split: Split, number: int) -> Task:
        """Return a task; no task of one split is in the other."""
        ...

    def start(self, task: Task) -> Any:
        """Return the state in which an episode begins, as JSON."""
        ...

    def step(self, task: Task, state: Any, turn: Message) -> Reply:
        """Return what follows a turn of the assistant."""
        ...

    def reward(self, task: Task, state: Any, turns: Sequence[Message]) -> Mapping[str, float]:
        """Return the named parts of the reward, `correct` (0 to 1) among them; their sum is the reward."""
        ...

    def gold(self, task: Task) -> list[list[Message]]:
        """Return transcripts (the assistant's turns) that must score 1."""
        ...

    def wrong(self, task: Task) -> list[list[Message]]:
        """Return transcripts that look like answers and must score 0."""
        ...


@dataclass(frozen=True)
class Answer:
    """What a policy said in one turn."""

    ids: list[int]
    logprobs: list[float]
    """Natural, one for each id, of the distribution that it was drawn from."""
    finish_reason: str
    """`stop` or `length`."""


class Policy(Protocol):
    """Who answers: the engine here, or a server that takes and returns token ids."""

    version: str
    """Names the weights; every rollout carries it."""

    def answer(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Answer]:
        """Return one answer a prompt; the same prompt, seed and version give the same answer."""
        ...


class Learner(Protocol):
    """Who learns from rollouts: the training loop here (`freehold.trainer.loop.Trainer`)."""

    def train_step(self, batch: Any) -> Mapping[str, float]:
        """Take one optimizer step on a batch of rollouts; return its figures."""
        ...


def total(parts: Mapping[str, float], where: str) -> float:
    """Return the sum of the parts; EnvironmentFault when one of them is no finite number or `correct` is missing."""
    wrong = {
        name: value
        for name, value in parts.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    }
    if wrong or "correct" not in parts:
        raise EnvironmentFault(
            "a verifier gave a reward that is no number",
            where=where,
            found=wrong or sorted(parts),
            expected="finite numbers by name, `correct` among them",
            todo="repair the environment; the rollouts of finished steps are kept",
        )
    return float(sum(parts[name] for name in sorted(parts)))


def text_of(turns: Sequence[Message]) -> str:
    """Return what the assistant said in its last turn."""
    return str(turns[-1].get("content") or "") if turns else ""


def said(text: str, **more: Any) -> list[Message]:
    """Return a transcript of one turn."""
    return [{"role": "assistant", "content": text, **more}]
