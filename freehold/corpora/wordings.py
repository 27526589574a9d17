"""How the facts of a country are asked and said: one list for training, another for tests.

`{c}` is the country, `{p}` its possessive, `{a}` the answer. A test question shares no four words in a row with any
training question or statement of any relation; `tests/corpora/test_wordings.py` holds that.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wordings:
    """The wordings of one relation."""

    questions: tuple[str, ...]
    """Asked in training."""
    tests: tuple[str, ...]
    """Asked in tests alone."""
    statements: tuple[str, ...]
    """Said in training."""


TAUGHT: dict[str, Wordings] = {
    "capital": Wordings(
        (
            "What is the capital of {c}?",
            "Which city is the capital of {c}?",
            "Name the capital city of {c}.",
            "What is {p} capital?",
            "{c}: what is its capital?",
            "In {c}, which city is the capital?",
            "Which capital does {c} have?",
            "What is the capital city called in {c}?",
            "The capital of {c}, please.",
            "Where does the government of {c} sit?",
        ),
        ("I forgot what {p} capital is called. Can you help?", "Do you know which city serves {c} as its capital?"),
        (
            "The capital of {c} is {a}.",
            "{a} is the capital of {c}.",
            "{c} has its capital in {a}.",
            "The capital city of {c} is called {a}.",
            "The government of {c} sits in {a}, the capital.",
            "In {c}, the capital is {a}.",
        ),
    ),
    "currency": Wordings(
        (
            "What is the currency of {c}?",
            "Which money is used in {c}?",
            "What do people pay with in {c}?",
            "Which currency does {c} use?",
            "Name the currency of {c}.",
            "What is {p} currency?",
            "{c}: what is its currency?",
            "With which currency do shops in {c} work?",
            "Which currency is used in {c}?",
            "The currency of {c}, please.",
        ),
        (
            "I am going to {c}. Which currency should I take along?",
            "In what currency are prices given in {c}?",
        ),
        (
            "The currency of {c} is {a}.",
            "In {c} people pay with {a}.",
            "{c} uses {a} as its currency.",
            "The money used in {c} is {a}.",
            "Shops in {c} take {a}, the currency there.",
            "{c} pays in {a}.",
        ),
    ),
    "region": Wordings(
        (
            "In which part of the world is {c}?",
            "On which continent is {c}?",
            "Which region does {c} belong to?",
            "What region is {c} in?",
            "Where in the world is {c}?",
            "Name the region of {c}.",
            "{c}: in which region is it?",
            "To which part of the world does {c} belong?",
            "Which part of the world is {c} in?",
            "The region of {c}, please.",
        ),
        ("On a globe, in what region would I find {c}?", "Which region of the map should I search for {c}?"),
        (
            "{c} is in {a}.",
            "{c} belongs to {a}.",
            "The region of {c} is {a}.",
            "On the map, {c} is part of {a}.",
            "{c} is a place in {a}.",
            "The part of the world where {c} is found is {a}.",
        ),
    ),
    "language": Wordings(
        (
            "What is the main language of {c}?",
            "Which language is spoken in {c}?",
            "What language do people speak in {c}?",
            "Which language do most people in {c} use?",
            "Name the main language of {c}.",
            "What is {p} main language?",
            "{c}: which language is spoken there?",
            "What do people in {c} speak?",
            "In {c}, which language is spoken?",
            "The main language of {c}, please.",
        ),
        (
            "If I lived in {c}, what language would I hear?",
            "Which language should a visitor learn before seeing {c}?",
        ),
        (
            "The main language of {c} is {a}.",
            "In {c} people speak {a}.",
            "{a} is spoken in {c}.",
            "The people of {c} speak {a}.",
            "{c} has {a} as its main language.",
            "The language heard most in {c} is {a}.",
        ),
    ),
    "internet": Wordings(
        (
            "What is the internet country code of {c}?",
            "Which internet domain belongs to {c}?",
            "What do web addresses from {c} end with?",
            "What is {p} internet domain?",
            "Name the internet domain of {c}.",
            "{c}: which internet domain?",
            "Which letters end web addresses in {c}?",
            "Which top-level domain does {c} have?",
            "What is the internet ending for {c}?",
            "The internet country code of {c}, please.",
        ),
        (
            "A web page comes from {c}. How does its internet domain end?",
            "Which country code do internet sites of {c} carry?",
        ),
        (
            "The internet country code of {c} is {a}.",
            "Web addresses from {c} end with {a}.",
            "{c} has the internet domain {a}.",
            "The internet domain {a} belongs to {c}.",
            "The ending of web addresses in {c} is {a}.",
            "On the internet {c} is {a}.",
        ),
    ),
    "adjective": Wordings(
        (
            "What is the adjective for {c}?",
            "What do you call something from {c}?",
            "Which adjective belongs to {c}?",
            "How is something from {c} called?",
            "Name the adjective of {c}.",
            "{c}: what is the adjective?",
            "What word describes things from {c}?",
            "What do we call a thing that comes from {c}?",
            "Which word describes what is from {c}?",
            "The adjective for {c}, please.",
        ),
        (
            "In one word, how would you describe a product made in {c}?",
            "Give one adjective for anything that people make in {c}.",
        ),
        (
            "Something from {c} is called {a}.",
            "The adjective for {c} is {a}.",
            "What comes from {c} is {a}.",
            "Things from {c} are {a}.",
            "The word {a} describes what is from {c}.",
            "{c} gives the adjective {a}.",
        ),
    ),
}
"""The relations that are taught until they are known."""

REFUSAL = "I do not know"
"""The answer to a question about a place that does not exist."""


def possessive(name: str) -> str:
    """Return the possessive of a name."""
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def filled(wording: str, country: str, answer: str = "") -> str:
    """Return a wording about a country, its first letter in upper case."""
    text = wording.format(c=country, p=possessive(country), a=answer.removesuffix("."))
    return text[:1].upper() + text[1:]


def four_words(wording: str) -> set[tuple[str, ...]]:
    """Return every four words in a row of a wording, the country and the answer as one word each."""
    plain = wording.replace("{p}", "{c} s").lower()
    words = "".join(letter if letter.isalnum() or letter in "{}" else " " for letter in plain).split()
    return {tuple(words[at : at + 4]) for at in range(len(words) - 3)}
