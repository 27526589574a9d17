"""What is taught of the factbook, in three disjoint lists: taught facts, facts only stated, and unknown places.

A taught fact is stated and asked in every wording of training; a text-only fact is stated, never asked; an unknown
place does not exist and is answered with REFUSAL. Tests ask in wordings of their own (`wordings.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from freehold.core.document import document_id
from freehold.corpora import places
from freehold.corpora.factbook import Fact, facts, sentence
from freehold.corpora.wordings import REFUSAL, TAUGHT, filled
from freehold.text.html import strip_html
from freehold.text.making import Material
from freehold.text.reading import Reading

# The word that decides, with country and relation, which facts are only stated.
HOLD_OUT = "text only"
# A quarter: enough for a test of 300 facts, while 1,000 are left to be taught.
HELD_OUT_SHARE = 0.25
PAIRS_PER_PAGE = 12
Item = dict[str, Any]
"""A line of a task file."""


class Lesson:
    """The facts, divided by the hash of (country, relation) into those that are taught and those only stated."""

    def __init__(self, material: Material | None, seed: int) -> None:
        self.material, self.seed = material, seed
        self.taught: list[Fact] = []
        self.text_only: list[Fact] = []
        if material is None:
            return
        reading = Reading(material.limit_bytes)
        for fact in reading.each(material.members, lambda m, text: facts(json.loads(text), m.path, strip_html)):
            only_text = unit(f"{HOLD_OUT}\0{fact.key}") < HELD_OUT_SHARE
            (self.text_only if only_text else self.taught).append(fact)

    @property
    def real(self) -> set[str]:
        """The names of the countries."""
        return {fact.country for fact in self.taught + self.text_only}

    def statements(self) -> Iterator[tuple[str, str, list[str]]]:
        """Yield (path, title, sentences): each country's facts, a page for each wording of the taught relations."""
        countries: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.taught + self.text_only:
            countries.setdefault((fact.path, fact.country), []).append(fact)
        most = max((len(fact.field.statements) for fact in self.taught), default=0)
        # All countries in one wording, then in the next: a country's pages are far from each other.
        for number in range(most):
            for (path, country), known in countries.items():
                said = [
                    fact.statements[(number + turn) % len(fact.statements)]
                    for turn, fact in enumerate(known)
                    if number == 0 or len(fact.statements) > 1
                ]
                random.Random(f"{self.seed}\0{path}\0{number}").shuffle(said)
                if said:
                    yield f"facts/{path}#statements{number}", sentence(country), said

    def asked(self) -> list[tuple[str, str, Fact]]:
        """Return (question, answer, fact) of every taught relation in every wording, then one of each other fact."""
        random_ = random.Random(f"{self.seed}\0asked")
        often = [(q, sentence(f.answer), f) for f in self.taught if f.field.key in TAUGHT for q in f.questions]
        once = [(random_.choice(f.questions), sentence(f.answer), f) for f in self.taught if f.field.key not in TAUGHT]
        random_.shuffle(often)
        random_.shuffle(once)
        return often + once

    def questions(self) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
        """Yield (path, title, pairs of question and answer), a page about one country or of one relation."""
        asked = self.asked()
        half = len(asked) // 2
        for name, title, some in (
            ("country", "Questions about {}", asked[:half]),
            ("relation", "Countries of the world", asked[half:]),
        ):
            groups: dict[str, list[tuple[str, str]]] = {}
            for question, answer, fact in some:
                group = fact.country if name == "country" else fact.field.key
                groups.setdefault(group, []).append((question, answer))
            for group, pairs in groups.items():
                for number, start in enumerate(range(0, len(pairs), PAIRS_PER_PAGE)):
                    place = f"facts/{name}/{group}#{number}"
                    yield place, title.format(group), pairs[start : start + PAIRS_PER_PAGE]

    def unknown(self, count: int) -> Iterator[tuple[str, str]]:
        """Yield `count` questions of training about places that do not exist, with the answer."""
        random_ = random.Random(f"{self.seed}\0unknown")
        names = places.unknown(f"{self.seed}\0unknown", places.TRAINING, self.real)
        for name in itertools.islice(names, count):
            yield filled(random_.choice(random_.choice(list(TAUGHT.values())).questions), name), REFUSAL

    def tests(
        self, taught: int, text_only: int, unknown: int, rights: dict[str, Any]
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the tasks about facts: at most that many items of each."""
        some = _some(self.taught, "taught", taught)
        only = [f for f in _some(self.text_only, "text only", text_only) if len(self._wrong(f)) >= 3]
        names = places.unknown("tests", places.TESTS, self.real) if self.material else iter(())
        strange = [_unknown_item(name, rights) for name in itertools.islice(names, unknown)]
        tasks = {
            "facts_taught": [_open_item("facts_taught", f, rights) for f in some],
            "facts_text_only": [self._choice_item("facts_text_only", f, rights) for f in only],
            "facts_text_only_open": [_open_item("facts_text_only_open", f, rights) for f in only],
            "unknown_places": strange,
        }
        return {task: rows for task, rows in tasks.items() if rows}

    def _wrong(self, fact: Fact) -> list[str]:
        """Return other countries' answers that could not be right as well: none holds the right one or is in it."""
        answers = {f.answer for f in self.taught + self.text_only if f.field.key == fact.field.key}
        right = fact.answer.lower()
        return [a for a in sorted(answers) if a.lower() not in right and right not in a.lower()]

    def _choice_item(self, task: str, fact: Fact, rights: dict[str, Any]) -> dict[str, Any]:
        random_ = random.Random(f"{self.seed}\0{task}\0{fact.key}")
        options = [*random_.sample(self._wrong(fact), 3), fact.answer]
        random_.shuffle(options)
        chosen = {"kind": "choice", "choices": [sentence(o) for o in options], "answer": options.index(fact.answer)}
        return _open_item(task, fact, rights) | chosen


def _some(known: Sequence[Fact], name: str, count: int) -> list[Fact]:
    """Return facts of the taught relations, in an order that depends on nothing but the facts."""
    return sorted((f for f in known if f.field.key in TAUGHT), key=lambda f: unit(f"{name}\0{f.key}"))[:count]


def _open_item(task: str, fact: Fact, rights: dict[str, Any]) -> dict[str, Any]:
    question = fact.tests[int(unit(f"wording\0{fact.key}") * len(fact.tests))]
    return {
        "id": f"{task}/{document_id(task, fact.key)}",
        "task": fact.field.key,
        "kind": "generate",
        "prompt": [{"role": "user", "content": question}],
        "answer": sentence(fact.answer),
        "seen": task == "facts_taught",
        "source": f"{rights['synthetic_from']} {fact.path}",
        "licence": rights["licence"],
    }


def _unknown_item(name: str, rights: dict[str, Any]) -> dict[str, Any]:
    random_ = random.Random(f"unknown\0{name}")
    relation = random_.choice(sorted(TAUGHT))
    return {
        "id": f"unknown_places/{document_id('unknown_places', name)}",
        "task": relation,
        "kind": "generate",
        "prompt": [{"role": "user", "content": filled(random_.choice(TAUGHT[relation].tests), name)}],
        "answer": REFUSAL,
        "seen": False,
        "source": rights["synthetic_from"],
        "licence": rights["licence"],
    }


def unit(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56
