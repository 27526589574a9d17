"""Needle tasks with known truth: facts hidden in licensed text, then asked for. RULER's idea, generated offline.

A fact is a key, a value and a wording. Several keys in one text make the others distractors ("multi-key"). Words, keys
and wordings are ours; the text around them is a corpus's own. One fifth of all (key, value) pairs, chosen by hash, is
never trained on: a model that answers those has read the text and not remembered the pair.
Source of the task: RULER (Hsieh et al. 2024, arXiv:2404.06654), niah_single and niah_multikey.

Shapes: L tokens of one task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from freehold.core.errors import DataError

Encode = Callable[[str], Sequence[int]]
Part = Literal["train", "test"]

_KEYS = (
    "anchor apple arrow barrel basket bell bridge candle carpet castle chain clock coat corner cradle crown "
    "desk door drum engine feather fence flag forest garden gate glass hammer harbour helmet horse island "
    "kettle kitchen ladder lamp letter market mirror mountain needle orchard palace pillow pocket river saddle ship"
)
_VALUES = (
    "silver golden copper iron marble cotton velvet amber crimson purple yellow orange green blue black white "
    "north south east west winter summer spring autumn morning evening thunder lightning snow rain wind fire "
    "water stone sand clay wheat barley honey sugar pepper salt bread cheese butter wine milk oil"
)
KEYS, VALUES = tuple(_KEYS.split()), tuple(_VALUES.split())
WORDINGS = (
    ("\n{key}: {value}\n", "\n{key}:"),
    ("\nThe password of the {key} is {value}.\n", "\nThe password of the {key} is"),
    ("\nNote that the {key} goes with {value}.\n", "\nWhat goes with the {key}? The {key} goes with"),
    (
        "\nOne of the special magic words for {key} is: {value}.\n",
        "\nThe special magic word for {key} mentioned in the text is:",
    ),
)
"""How a fact is stated, and how it is asked for: a pair alone, which is learned first, then sentences. The last one is
RULER's."""
SHORTEST_TASK = 64
"""Tokens below which a text has no room for a fact and its question."""


@dataclass(frozen=True)
class Fact:
    """A pair to find, and how it is put into words."""

    key: str
    value: str
    wording: int

    def stated(self) -> str:
        """Return the sentence that is hidden in the text."""
        return WORDINGS[self.wording][0].format(key=self.key, value=self.value)

    def asked(self) -> str:
        """Return the question; the value, with a space before it, is its answer."""
        return WORDINGS[self.wording][1].format(key=self.key)


@dataclass(frozen=True)
class Task:
    """One text with hidden facts and questions at its end."""

    ids: np.ndarray
    """int64 [L]"""
    answers: np.ndarray
    """bool [L]: which tokens are those of an answer"""
    text_tokens: int
    """How many of the tokens are the corpus's own."""


def part_of(key: str, value: str) -> Part:
    """Return whether a pair belongs to training or to tests; the hash decides, so that both sides agree for ever."""
    return "test" if hashlib.sha256(f"{key}\0{value}".encode()).digest()[0] % 5 == 0 else "train"


def draw_facts(rng: np.random.Generator, count: int, part: Part, wordings: int = len(WORDINGS)) -> list[Fact]:
    """Return `count` facts with different keys, all of one part and one of the first `wordings` wordings."""
    wording, facts = int(rng.integers(wordings)), list[Fact]()
    for number in rng.permutation(len(KEYS))[:count]:
        key = KEYS[number]
        values = [value for value in VALUES if part_of(key, value) == part]
        facts.append(Fact(key, values[int(rng.integers(len(values)))], wording))
    return facts


def hide(text: np.ndarray, stated: Sequence[Sequence[int]], places: Sequence[float]) -> np.ndarray:
    """Return the text [N] with each statement inserted at its place (0: the start, 1: the end)."""
    parts, at = [], 0
    for place, ids in sorted(zip(places, stated, strict=True), key=lambda pair: pair[0]):
        end = round(place * len(text))
        parts += [text[at:end], np.asarray(ids, np.int64)]
        at = end
    return np.concatenate([*parts, text[at:]]).astype(np.int64)


def training_task(
    rng: np.random.Generator, encode: Encode, text: np.ndarray, length: int, keys: int, wordings: int = len(WORDINGS)
) -> Task:
    """Return a task of exactly `length` tokens that asks for every hidden key, in another order.

    All keys are asked, so that a row has many answers to learn from. Raises DataError when `length` has no room.
    """
    for count in range(keys, 0, -1):
        facts = draw_facts(rng, count, "train", wordings)
        stated = [encode(fact.stated()) for fact in facts]
        asked: list[tuple[Sequence[int], bool]] = []
        for number in rng.permutation(count):
            fact = facts[number]
            asked += [(encode(fact.asked()), False), (encode(f" {fact.value}"), True), (encode(".\n"), False)]
        room = length - sum(map(len, stated)) - sum(len(ids) for ids, _ in asked)
        # Fewer keys where they would leave less text than they take.
        if room >= length // 3 and len(text) >= room:
            break
    else:
        raise DataError("a row is too short for a needle task", found=f"{length} tokens", todo="needles: 0")
    body = hide(text[:room], stated, rng.random(count).tolist())
    end = np.concatenate([np.asarray(ids, np.int64) for ids, _ in asked])
    answers = np.concatenate([np.full(len(ids), answer) for ids, answer in asked])
    return Task(np.concatenate([body, end]), np.concatenate([np.zeros(len(body), bool), answers]), room)


@dataclass(frozen=True)
class Question:
    """A prompt, and the ids of the only right answer."""

    prompt: list[int]
    answer: list[int]
    depth: float


def held_out_question(
    rng: np.random.Generator,
    encode: Encode,
    text: np.ndarray,
    length: int,
    keys: int,
    depth: float,
    wordings: int = len(WORDINGS),
) -> Question:
    """Return one question whose prompt and answer are `length` tokens; its fact stands at `depth` of the text.

    The pair is one that training never states; the other keys are distractors at random places.
    """
    facts = draw_facts(rng, keys, "test", wordings)
    stated, asked, answer = (
        [encode(f.stated()) for f in facts],
        encode(facts[0].asked()),
        encode(f" {facts[0].value}"),
    )
    room = length - sum(map(len, stated)) - len(asked) - len(answer)
    if room < 0 or len(text) < room:
        raise DataError(
            "there is no room, or no text, for a needle",
            found=f"{length} tokens with {keys} keys, {len(text):,} tokens of text",
            todo="longer lengths, fewer keys, or more held-out text",
        )
    body = hide(text[:room], stated, [depth, *rng.random(keys - 1).tolist()])
    return Question([*body.tolist(), *asked], list(answer), depth)
