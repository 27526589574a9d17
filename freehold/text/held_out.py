"""Held-out questions in other text: training on a question that evaluation asks makes its answer worthless."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from freehold.core.document import Conversation, said
from freehold.core.errors import DataError
from freehold.text import Why
from freehold.text.words import (
    Lookup,
    Words,
    is_word_part,
    longer,
    ngrams,
    read_batch,
    spaced,
    split_words,
    word_spans,
)

RUN_WORDS = 13
"""Words of a question that prove it by themselves (Brown et al. 2020, appendix C)."""
MOST_SHARED = 2
"""A run of words that more questions than this have is the wording of an exercise and proves nothing."""
LEAST_WORDS = 6
"""Shorter questions are too common to be looked for in documents; conversations are compared turn by turn."""

# Operators stay: `3 + 4` and `3 - 4` are different questions. So do comma and question mark: what begins like a
# held-out question and continues (`2 cats?` in `2 cats, 1 dog?`) is another one.
_KEPT = frozenset("+-*/=<>^%,?")
_PUNCTUATION = re.compile(r"[^\w+\-*/=<>^%,?]+")

# (number of the question, what must be in the plain text, whether that is the whole question)
_Entry = tuple[int, str, bool]


def plain(text: str) -> str:
    """Return the text in lower case, words, operators, `,` and `?` only, one space between them, and around."""
    lower = text.lower()
    if lower.isascii():
        return f" {_PUNCTUATION.sub(' ', lower).strip()} "
    # No expression of `re` names marks, and a letter that is a word of its own stands alone as words do.
    kept = "".join(c if c in _KEPT or is_word_part(c) else " " for c in spaced(lower))
    return f" {' '.join(kept.split())} "


def plain_words(text: str) -> str:
    """Return the words of a text alone, in lower case, one space between them, and around."""
    return f" {' '.join(split_words(text))} "


def read_questions(folder: Path) -> list[tuple[str, str]]:
    """Return (task item id, question) of each row of `tasks/*.jsonl`: every task that evaluate gives the model.

    Rows marked `"seen": true` are skipped: they ask, on purpose, for what was trained on. DataError names the line
    that is no task item.
    """
    questions = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                if not row.get("seen", False):
                    questions.append((str(row["id"]), question_of(row)))
            except (json.JSONDecodeError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise DataError(
                    "not a task item",
                    where=f"{path}:{number}",
                    found=repr(error),
                    expected="a JSON object with `id` and `prompt` or `question`",
                    todo="run the gather stage again",
                ) from error
    return questions


def question_of(row: dict[str, Any]) -> str:
    """Return the question of one task item: `question`, else the last user message of `prompt`, else the prompt."""
    if "question" in row:
        return str(row["question"])
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    return str([m["content"] for m in prompt if m.get("role", "user") == "user"][-1])


class Questions:
    """The held-out questions, indexed by the hashes of their words.

    A document holds a question when every word is there, or one run of RUN_WORDS of its words (Brown et al. 2020,
    appendix C), operators included. Runs that several questions have are the wording of an exercise, which training
    may share. Of a question with such runs, half of those that are its own must be there; and where those are the
    fewer, only the question as a whole counts.
    """

    def __init__(
        self,
        questions: Sequence[tuple[str, str]],
        *,
        least_words: int = LEAST_WORDS,
        plain: Callable[[str], str] = plain,
    ) -> None:
        """Index (id, question) pairs; `plain` gives the form in which a text and a question are compared."""
        self.ids = [identity for identity, _ in questions]
        self.plain = plain
        self.exact = {plain(text): identity for identity, text in reversed(questions)}
        self.needed: dict[int, int] = {}
        """{number of the question: how many of its own runs a text must hold}"""
        found: dict[int, dict[int, list[_Entry]]] = defaultdict(lambda: defaultdict(list))
        runs: dict[int, list[tuple[int, str]]] = {}
        shared: dict[int, set[str]] = defaultdict(set)
        for number, one in enumerate(read_batch([text for _, text in questions])):
            # Two letters of a script without spaces say about what a word says.
            if len(one.hashes) - one.alone // 2 < least_words:
                continue
            n = min(RUN_WORDS, len(one.hashes))
            hashes = ngrams(one.hashes, n).tolist()
            whole = plain(questions[number][1])
            found[n][hashes[0]].append((number, whole, True))
            if len(hashes) > 1:
                starts, ends = word_spans(whole)
                parts = [whole[starts[i] : ends[i + n - 1]] for i in range(len(hashes))]
                runs[number] = list(zip(hashes, parts, strict=True))
                for key in hashes:
                    shared[key].add(whole)
        for number, mine in runs.items():
            own = [(key, part) for key, part in mine if len(shared[key]) <= MOST_SHARED]
            self.needed[number] = 1 if len(own) == len(mine) else (len(own) + 1) // 2
            for key, part in own if 2 * len(own) > len(mine) else ():
                found[RUN_WORDS][key].append((number, part, False))
        self.by_length = {
            n: (Lookup(np.array(list(keys), np.uint64)), list(keys.values())) for n, keys in sorted(found.items())
        }
        """{words of a run: (its hashes, the entries of each)}"""

    def in_documents(self, texts: Sequence[str], words: Sequence[Words]) -> list[Why | None]:
        """Return for each text the reason to drop it, when it holds a question; `words` are its words."""
        why: list[Why | None] = [None] * len(texts)
        if not self.by_length or not texts:
            return why
        flat = np.concatenate([one.hashes for one in words])
        ends = np.cumsum([len(one.hashes) for one in words])
        plains: dict[int, str] = {}
        held: Counter[tuple[int, int]] = Counter()
        runs = flat
        for n in range(1, max(self.by_length) + 1):
            runs = flat if n == 1 else longer(runs, flat, n)
            if n not in self.by_length:
                continue
            lookup, entries = self.by_length[n]
            positions, places = lookup.find(runs)
            texts_hit = np.searchsorted(ends, positions, "right")
            # The texts are hashed as one: a run that starts in one and ends in the next is in neither.
            inside = positions + n <= ends[texts_hit]
            for number, place in sorted(set(zip(texts_hit[inside].tolist(), places[inside].tolist(), strict=True))):
                whole = plains.get(number) or plains.setdefault(number, self.plain(texts[number]))
                for entry in entries[place]:
                    if why[number] is None and entry[1] in whole:
                        why[number] = self._proves(number, entry, held)
        return why

    def _proves(self, number: int, entry: _Entry, held: Counter[tuple[int, int]]) -> Why | None:
        """Return the reason to drop text `number`, now that it holds `entry`; None while that proves too little."""
        question, _, is_whole = entry
        if is_whole:
            return "decontamination", f"holds the question of {self.ids[question]}"
        held[number, question] += 1
        if held[number, question] < self.needed[question]:
            return None
        return "decontamination", f"holds {RUN_WORDS} words of the question of {self.ids[question]}"

    def in_conversations(self, rows: Sequence[Conversation]) -> list[Why | None]:
        """Return for each conversation the reason to drop it: a turn is or holds a question."""
        turns = [(number, role, text) for number, row in enumerate(rows) for role, text in said(row.messages)]
        texts = [text for _, _, text in turns]
        why: list[Why | None] = [None] * len(rows)
        for (number, role, text), held in zip(turns, self.in_documents(texts, read_batch(texts)), strict=True):
            identity = self.exact.get(self.plain(text)) if role == "user" else None
            asked: Why | None = ("decontamination", f"asks the question of {identity}") if identity else held
            why[number] = why[number] or asked
        return why
