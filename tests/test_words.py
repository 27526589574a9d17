"""The words of the repository: some do not come back, test names stay short, and sentences do not grow."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import words

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = json.loads((ROOT / "tests/words_left.json").read_text(encoding="utf-8"))
"""How often each banned word may occur: in licence texts, recorded keys, data, and Python's `tell`; only lowered."""

LONGEST_TEST_NAME = 60
MOST_WORDS_A_SENTENCE = {"README.md": 14, "docs": 18}


def test_banned_words_do_not_return():
    counts = words.counts(ROOT)
    grown = {word: number for word, number in counts.items() if number > ALLOWED["words"].get(word, 0)}
    assert not grown, f"more than tests/words_left.json allows: {grown}; python benchmarks/house.py --words lists them"


def test_banned_words_are_found_in_names_and_prose():
    text = "def must_deal(x): ...  # what it was told\nclass RankToldError: ...\n"
    found = {word for word, pattern in words.PATTERNS.items() if pattern.search(words.CAMEL.sub(" ", text))}
    assert found == {"told", "deal", "must_x"}


def test_test_names_are_short():
    functions = [node for path in ROOT.glob("tests/**/*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = [node.name for node in functions if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    long = [name for name in names if len(name) > LONGEST_TEST_NAME]
    assert len(long) <= ALLOWED["long test names"], long


def test_sentences_are_short():
    docs = sorted((ROOT / "docs").rglob("*.md"))
    means = {
        "README.md": words.mean_sentence_words([ROOT / "README.md"]),
        "docs": words.mean_sentence_words(docs),
    }
    print({page: round(mean, 1) for page, mean in means.items()})
    assert all(mean <= MOST_WORDS_A_SENTENCE[page] for page, mean in means.items()), means
