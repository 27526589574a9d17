"""Held-out questions: training text that holds one word for word would make the evaluation a lie."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from freehold.core.document import Conversation
from freehold.core.errors import DataError
from freehold.stages.curate.config import Decontamination
from freehold.stages.curate.filters import Why
from freehold.stages.curate.words import WordHashes, ngrams, read_words

# Operators stay: `3 + 4` and `3 - 4` are different questions. So do comma and question mark: what begins like a
# held-out question and goes on (`2 cats?` in `2 cats, 1 dog?`) is another one.
_PUNCTUATION = re.compile(r"[^\w+\-*/=<>^%,?]+")
# One bit per low 20 bits of a hash: says "not a question" for almost every run of words without a search.
_TABLE_BITS = 20


def plain(text: str) -> str:
    """Return the text in lower case, words, operators, `,` and `?` only, one space between them, and around."""
    return f" {_PUNCTUATION.sub(' ', text.lower()).strip()} "


def read_questions(folder: Path) -> list[tuple[str, str]]:
    """Return (task item id, question) of each row of `tasks/*.jsonl`.

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
    """The held-out questions, ready to be looked for in documents and conversations."""

    def __init__(self, questions: list[tuple[str, str]], config: Decontamination) -> None:
        self.exact = {plain(text): identity for identity, text in reversed(questions)}
        # By number of words: {hash of the question's first words: [(id, plain question)]}.
        self.first: dict[int, dict[int, list[tuple[str, str]]]] = {}
        table = WordHashes()
        for identity, text in questions:
            hashes = read_words(text, table).hashes
            if len(hashes) >= config.min_question_words:
                n = min(config.ngram_words, len(hashes))
                key = int(ngrams(hashes[:n], n)[0])
                self.first.setdefault(n, {}).setdefault(key, []).append((identity, plain(text)))
        self.tables = {n: _bit_table(list(found)) for n, found in self.first.items()}

    def in_document(self, text: str, hashes: np.ndarray) -> Why | None:
        """Return the reason to drop when a question stands word for word in the text; `hashes` are its words."""
        whole = ""
        for n, found in self.first.items():
            runs = ngrams(hashes, n)
            hits = runs[self.tables[n][runs & np.uint64((1 << _TABLE_BITS) - 1)]]
            for key in sorted(set(hits.tolist()) & found.keys()):
                whole = whole or plain(text)
                for identity, question in found[key]:
                    if question in whole:
                        return "decontamination", f"holds the question of {identity}"
        return None

    def in_conversation(self, row: Conversation) -> Why | None:
        """Return the reason to drop when a user's turn is a held-out question."""
        for message in row.messages:
            if message.get("role") == "user":
                identity = self.exact.get(plain(str(message.get("content") or "")))
                if identity is not None:
                    return "decontamination", f"asks the question of {identity}"
        return None


def _bit_table(keys: list[int]) -> np.ndarray:
    table = np.zeros(1 << _TABLE_BITS, bool)
    table[np.array(keys, np.uint64) & np.uint64((1 << _TABLE_BITS) - 1)] = True
    return table
