"""WordNet as dictd prints it, as data: the senses of its words, and questions that its own definitions answer."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

PARTS = {"n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb"}
SENSE = re.compile(r" {4}(?:(n|v|adj|adv) )?\d*: ?")  # continued lines are indented further
NAMED = re.compile(r"\[(syn|ant|also): ([^\[\]]*)\]")
QUOTED = re.compile(r"(?<!\s)\s*+(?:[;:,]\s*+)?\"")
WORD = re.compile(r"[a-z]{3,14}")
DEFINITION_CHARS = (15, 120)
# What is not asked: definitions with labels or parts, and words that somebody is insulted with, in whichever sense.
PARTED = re.compile(r"[\[\](){}\"`;:]")
UNCLEAN = re.compile(r"\b(?:offensive|slur|obscene|vulgar|disparag\w+|derogat\w+|sexual\w*)\b", re.I)
# Insults that WordNet has without a label.
INSULT = re.compile(
    r"\b(?:\w*(?:shit|fuck|cocksuck|bitch|bastard|golliwog|asshole|arsehole)\w*"
    r"|(?:piss|slut|whore|wank|bugger|sodom|siss[iy]|cissy|nigg(?!l)|retard|moron|cretin|imbecil|idiot|spastic|cripple"
    r"|mulatto|mongoloid|trollop|strumpet|huss(?:y|ies)|flooz|bimbo|midget|dickhead|prickteas)\w*"
    r"|rap(?:ed?|er|ing|ist)s?|squaws?|gyps?|boobs?|tits?|tramps?|hags?|crones?|dagos?|wops?|wogs?|darky|negress"
    r"|jackass|redskin)\b",
    re.I,
)
MEANING = (
    "What does the {part} “{word}” mean?",
    "Define the {part} “{word}”.",
    "What is meant by the {part} “{word}”?",
)


@dataclass(frozen=True)
class Sense:
    """One meaning of a word."""

    word: str
    part: str
    """noun, verb, adjective or adverb"""
    definition: str
    synonyms: tuple[str, ...]
    antonyms: tuple[str, ...]
    first: bool
    """Whether it is the first, commonest meaning of the word as this part of speech."""


def senses(entry: str) -> Iterator[Sense]:
    """Yield the senses of an entry: a line with the word, then numbered definitions, indented."""
    word, *lines = entry.split("\n")
    found: list[tuple[str, bool, list[str]]] = []
    for line in lines:
        start = SENSE.match(line)
        if start:
            part = start[1] or (found[-1][0] if found else "")
            found.append((part, bool(start[1]), [line[start.end() :]]))
        elif found:
            found[-1][2].append(line.strip())
    for part, first, texts in found:
        text = " ".join(texts)
        named: dict[str, tuple[str, ...]] = {
            kind: tuple(re.findall(r"\{([^{}]*)\}", names)) for kind, names in NAMED.findall(text)
        }
        text = re.split(r"(?<!\s)\s*\[(?:syn|ant|also):", text)[0]
        definition = QUOTED.split(text)[0].strip()
        if part and definition:
            others = tuple(name for name in named.get("syn", ()) if name != word)
            yield Sense(word, PARTS[part], definition, others, named.get("ant", ()), first)


class Lexicon:
    """All senses of a dictionary, and those of them that make good questions, in an order of the seed's."""

    def __init__(self, entries: Iterable[str], seed: int) -> None:
        every = [sense for entry in entries for sense in senses(entry)]
        self.seed = seed
        self.meaning: dict[str, set[str]] = defaultdict(set)
        """{definition: the words that have it, in any sense}"""
        self.about: dict[str, set[str]] = defaultdict(set)
        """{word: the longer words in its definitions}"""
        self.unclean: set[str] = set()
        """words that are offensive in any sense, also one that only another word's entry has"""
        for sense in every:
            self.meaning[sense.definition] |= {sense.word, *sense.synonyms}
            self.about[sense.word] |= _longer(sense.definition)
            if UNCLEAN.search(sense.definition):
                self.unclean |= {name.lower() for name in (sense.word, *sense.synonyms)}
        self.askable = [sense for sense in every if _is_askable(sense) and self._is_clean(sense.word)]
        random.Random(f"{seed}\0words").shuffle(self.askable)
        self.words: dict[str, list[str]] = defaultdict(list)
        for sense in self.askable:
            self.words[sense.part].append(sense.word)

    def _is_clean(self, name: str) -> bool:
        return name.lower() not in self.unclean and not INSULT.search(name)

    def questions(self, sense: Sense) -> list[tuple[str, str]]:
        """Return every question about a sense with its answer: what it means, which word it is, its like and opposite.

        A wrong choice is no synonym, and none of its definitions has a longer word in common with the one asked for.
        """
        dice = random.Random(f"{self.seed}\0{sense.part}\0{sense.word}")
        words = {"part": sense.part, "word": sense.word}
        found = [(dice.choice(MEANING).format(**words), sense.definition)]
        right = self.meaning[sense.definition]
        others = self.words[sense.part]
        others = dice.sample(others, min(12, len(others)))
        wrong = [w for w in others if w not in right and not self.about[w] & _longer(sense.definition)][:3]
        if len(wrong) == 3:
            *start, last = dice.sample([*wrong, sense.word], 4)
            options = f"{', '.join(start)} or {last}"
            found.append((f"Which of these words means “{sense.definition}”: {options}?", sense.word))
        if right == {sense.word}:
            found.append((f"Which {sense.part} means “{sense.definition}”?", sense.word))
        like = [name for name in sense.synonyms if name.islower() and self._is_clean(name)]
        if like:
            asked = f"Which other word means the same as the {sense.part} “{sense.word}” in the sense of"
            found.append((f"{asked} “{sense.definition}”?", like[0]))
        against = [name for name in sense.antonyms if self._is_clean(name)]
        if against:
            found.append((f"What is the opposite of the {sense.part} “{sense.word}”?", against[0]))
        return found

    def pairs(self, which: Sequence[Sense]) -> Iterator[tuple[str, str]]:
        """Yield one question with its answer for each of some senses."""
        dice = random.Random(f"{self.seed}\0pairs")
        return (dice.choice(self.questions(sense)) for sense in which)


def _longer(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


def _is_askable(sense: Sense) -> bool:
    least, most = DEFINITION_CHARS
    return bool(
        sense.first
        and WORD.fullmatch(sense.word)
        and least <= len(sense.definition) <= most
        and sense.word[:5] not in sense.definition.lower()
        and not PARTED.search(sense.definition)
        and not INSULT.search(sense.definition)
    )
