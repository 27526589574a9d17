"""Three disjoint lists, wordings of tests that share nothing with those of training, and procedures that are right."""

from __future__ import annotations

import itertools
import re

import pytest

from freehold.corpora import places, procedures
from freehold.corpora.wordings import TAUGHT, filled, four_words

REAL = {"Armenia", "Norway", "the Faroe Islands", "New Zealand"}


@pytest.mark.parametrize("relation", sorted(TAUGHT))
def test_test_wordings_share_no_four_words_with_training(relation: str) -> None:
    training = [text for one in TAUGHT.values() for text in (*one.questions, *one.statements)]
    used = set().union(*map(four_words, training))
    for question in TAUGHT[relation].tests:
        assert four_words(question)
        assert not four_words(question) & used, question
    assert len(set(TAUGHT[relation].questions)) >= 8
    assert len(set(TAUGHT[relation].statements)) >= 5


def test_four_words_sees_a_shared_run() -> None:
    assert four_words("Say what {p} capital is.") & four_words("Ask what {c}'s capital is, please.")


def test_possessives_and_capital_letters_of_names() -> None:
    assert filled("{p} capital is {a}.", "the Bahamas", "Nassau") == "The Bahamas' capital is Nassau."
    assert filled("What is {p} capital?", "Peru") == "What is Peru's capital?"


def test_unknown_names_of_training_and_tests_differ() -> None:
    training = list(itertools.islice(places.unknown("a", places.TRAINING, REAL), 1500))
    tests = list(itertools.islice(places.unknown("a", places.TESTS, REAL), 200))
    assert len(set(training)) == 1500
    assert not set(training) & set(tests)
    assert not set(places.TRAINING) & set(places.TESTS)
    words = {word.lower() for name in REAL for word in name.split()} - {"new", "the", "islands"}
    cores = {word.lower() for name in training + tests for word in name.split()}
    assert not [core for core in cores for word in words if places.within_one_letter(core, word)]


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [("arm", "arm", True), ("arm", "farm", True), ("armed", "arme", True), ("arm", "art", True), ("arm", "rat", False)],
)
def test_words_within_one_letter(one: str, other: str, near: bool) -> None:
    assert places.within_one_letter(one, other) is near


def test_procedures_are_right_by_another_way() -> None:
    found = list(itertools.islice(procedures.items("a", lambda _: True), 500))
    assert {item.task for item in found} == set(procedures.PROCEDURES)
    assert len({item.question for item in found}) == 500
    for item in found:
        quoted, numbers = re.findall(r'"(\w+)"', item.question), [int(n) for n in re.findall(r"\d+", item.question)]
        if item.task == "letters":
            assert int(item.answer) == sum(letter == quoted[0] for letter in quoted[1])
        elif item.task == "arithmetic":
            less = "-" in item.question or "minus" in item.question
            assert int(item.answer) == (numbers[0] - numbers[1] if less else sum(numbers))
        elif item.task == "sorting":
            words = item.question.partition(": ")[2].rstrip(".").split(", ")
            assert item.answer.split(", ") == sorted(words)
        elif item.task == "spelling" and "backward" in item.question:
            assert [part.replace(" ", "")[::-1] for part in item.answer.split(", ")] == quoted
        elif item.task == "two_hop":
            assert all(step in item.question for step in item.steps)
            assert item.answer in item.steps[1]
