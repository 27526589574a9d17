"""Held-out questions: training text that holds one, or a run of words that only it has, would make evaluation a lie."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from freehold.core.document import Conversation
from freehold.core.errors import DataError
from freehold.stages.curate.config import Decontamination
from freehold.stages.curate.filters import Why
from freehold.stages.curate.words import WORD, Lookup, Words, longer, ngrams, read_batch

# Operators stay: `3 + 4` and `3 - 4` are different questions. So do comma and question mark: what begins like a
# held-out question and goes on (`2 cats?` in `2 cats, 1 dog?`) is another one.
_PUNCTUATION = re.compile(r"[^\w+\-*/=<>^%,?]+")


def plain(text: str) -> str:
    """Return the text in lower case, words, operators, `,` and `?` only, one space between them, and around."""
    return f" {_PUNCTUATION.sub(' ', text.lower()).strip()} "


def read_questions(folder: Path) -> list[tuple[str, str]]:
    """Return (task item id, question) of each row of `tasks/*.jsonl`: every task that evaluate gives the model.

    A row's question is its `question`, else the last user message of its `prompt`, else the prompt itself. Rows
    marked `"seen": true` are passed over: they ask, on purpose, for what was trained on.
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
                    todo="make the gather stage again",
                ) from error
    return questions


def question_of(row: dict[str, Any]) -> str:
    """Return the question of one task item."""
    if "question" in row:
        return str(row["question"])
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    return str([m["content"] for m in prompt if m.get("role", "user") == "user"][-1])


class Questions:
    """The held-out questions, ready to be looked for in documents and conversations.

    A document holds a question when the whole of it stands there, or one run of `ngram_words` words of it (Brown et
    al. 2020, appendix C, "Language Models are Few-Shot Learners"), operators included. Runs that several questions
    have are the wording of an exercise, which training may share. Of a question with such runs, half of those that are
    its own must be there; and where they are the fewer, only the whole question counts.
    """

    def __init__(self, questions: list[tuple[str, str]], config: Decontamination) -> None:
        self.exact = {plain(text): identity for identity, text in reversed(questions)}
        self.needed: dict[int, int] = {}
        """{number of the question: how many of its own runs a text must hold}"""
        self.ids = [identity for identity, _ in questions]
        # By words in the run: {hash: [(number of the question, what must stand in the plain text, is it the whole)]}.
        found: dict[int, dict[int, list[tuple[int, str, bool]]]] = defaultdict(lambda: defaultdict(list))
        shared: dict[int, set[str]] = defaultdict(set)
        runs: dict[int, list[tuple[int, str]]] = {}
        for number, one in enumerate(read_batch([text for _, text in questions])):
            if len(one.hashes) < config.min_question_words:
                continue
            n = min(config.ngram_words, len(one.hashes))
            hashes = ngrams(one.hashes, n).tolist()
            whole = plain(questions[number][1])
            found[n][hashes[0]].append((number, whole, True))
            if len(hashes) > 1:
                spans = [match.span() for match in WORD.finditer(whole)]
                parts = [whole[spans[i][0] : spans[i + n - 1][1]] for i in range(len(hashes))]
                runs[number] = list(zip(hashes, parts, strict=True))
                for key in hashes:
                    shared[key].add(whole)
        for number, mine in runs.items():
            own = [(key, part) for key, part in mine if len(shared[key]) <= config.max_shared]
            self.needed[number] = 1 if len(own) == len(mine) else (len(own) + 1) // 2
            for key, part in own if 2 * len(own) > len(mine) else ():
                found[config.ngram_words][key].append((number, part, False))
        self.by_length = {
            n: (Lookup(np.array(list(keys), np.uint64)), list(keys.values())) for n, keys in sorted(found.items())
        }

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
            inside = positions + n <= ends[texts_hit]
            for number, place in sorted(set(zip(texts_hit[inside].tolist(), places[inside].tolist(), strict=True))):
                whole = plains.get(number) or plains.setdefault(number, plain(texts[number]))
                for question, part, is_whole in entries[place]:
                    if why[number] is None and part in whole:
                        held[number, question] += not is_whole
                        if is_whole:
                            why[number] = ("decontamination", f"holds the question of {self.ids[question]}")
                        elif held[number, question] >= self.needed[question]:
                            why[number] = (
                                "decontamination",
                                f"holds {n} words of the question of {self.ids[question]}",
                            )
        return why

    def in_conversations(self, rows: Sequence[Conversation]) -> list[Why | None]:
        """Return for each conversation the reason to drop it: a turn is or holds a question."""
        turns = [
            (number, str(message.get("role")), str(message.get("content") or ""))
            for number, row in enumerate(rows)
            for message in row.messages
            if message.get("content")
        ]
        texts = [text for _, _, text in turns]
        why: list[Why | None] = [None] * len(rows)
        for (number, role, text), held in zip(turns, self.in_documents(texts, read_batch(texts)), strict=True):
            identity = self.exact.get(plain(text)) if role == "user" else None
            asked: Why | None = ("decontamination", f"asks the question of {identity}") if identity else held
            why[number] = why[number] or asked
        return why
