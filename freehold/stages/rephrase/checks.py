"""Whether a rewrite may be learned from: every rule has a name, and what it found is said.

Facts are what can be counted without another model: numbers, and words with a capital inside a sentence. A rewrite
that invents some is dropped, and one that keeps too few.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from freehold.stages.rephrase.prompts import Limits
from freehold.stages.rephrase.teacher import Answer
from freehold.text import Why
from freehold.text.language import language_detector
from freehold.text.words import split_words

COPY_WORDS, REPEAT_WORDS = 8, 5
LANGUAGE_SCORE = 0.5
"""A language found with less is not believed: short rewrites are guessed wrongly below it."""
LEAST_QUESTION_WORDS = 4
"""Shorter than in curate: a rewrite is short, and asks a question only when its teacher made one."""
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_MARK = re.compile(r"^\s*(?:[-*•]|\(?\d{1,3}[.):])\s+", re.M)
_NAME = re.compile(r"\b[A-Z][A-Za-z'’-]*[A-Za-z]\b")
_STARTS = re.compile(r"(?:^|[.!?:;\n\"“”'‘(\[*#-])\s*$")
_REFUSAL = re.compile(
    r"\b(as an ai\b|as a language model|i(?: am|['’]m) (?:sorry|unable)|i (?:can(?:not|['’]t)|could not) "
    r"(?:help|assist|rewrite|fulfil|provide|access|do that))",
    re.I,
)
_GARBLED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
_PAIR = re.compile(r"^Question: \S.*\n+Answer: \S.*$", re.M)


def numbers(text: str) -> set[str]:
    """Return the numbers of a text, without marks of lists and without separators of thousands."""
    return {re.sub(r",(?=\d{3}\b)", "", n) for n in _NUMBER.findall(_MARK.sub("", text))}


def names(text: str) -> set[str]:
    """Return the words with a capital that stand inside a sentence, in lower case."""
    plain = _MARK.sub("", text)
    found = (m for m in _NAME.finditer(plain) if not _STARTS.search(plain[max(0, m.start() - 4) : m.start()]))
    return {m.group().lower() for m in found}


def measure(passage: str, rewrite: str) -> dict[str, float]:
    """Return what the limits are about: length, copied, kept, new_numbers, new_names, repeated, each a share."""
    there, here = split_words(passage), split_words(rewrite)
    # A name of one text may begin a sentence in the other, so all words of that are compared.
    said, known = {*here, *numbers(rewrite)}, {*there, *numbers(passage)}
    facts = [{number} for number in numbers(passage)] + [_name_words(name) for name in names(passage)]
    taken, mine, again = set(_runs(there, COPY_WORDS)), _runs(here, COPY_WORDS), _runs(here, REPEAT_WORDS)
    return {
        "length": len(here) / max(len(there), 1),
        "copied": _share(sum(run in taken for run in mine), len(mine)),
        "kept": _share(sum(fact <= said for fact in facts), len(facts)) if facts else 1.0,
        "new_numbers": _share(len(numbers(rewrite) - known), len(numbers(rewrite))),
        "new_names": _share(len(unknown_names(passage, rewrite)), len(names(rewrite))),
        "repeated": _share(len(again) - len(set(again)), len(again)),
    }


def unknown_names(passage: str, rewrite: str) -> set[str]:
    """Return the names of a rewrite of which a word is not in its passage."""
    known = set(split_words(passage))
    return {name for name in names(rewrite) if not _name_words(name) <= known}


def _name_words(name: str) -> set[str]:
    """Return the words of a name; `Peru's` is the name `Peru`."""
    return set(split_words(name)) - {"s"}


def judge(
    answer: Answer, rewrite: str, passage: str, asked: str, limits: Limits, form: str, found: Mapping[str, float]
) -> Why | None:
    """Return why a rewrite must not be learned from, or None.

    `asked` are the prompt's own words, `form` that of the strategy, `found` what `measure` says.
    """
    count = len(split_words(rewrite))
    least, most = limits.length
    if answer.refused:
        return "refused", answer.refused
    if not rewrite:
        return ("only_thoughts" if answer.text.strip() else "empty"), answer.finish_reason
    if broken := _GARBLED.search(rewrite):
        return "garbled", repr(broken.group())
    if answer.finish_reason == "length":
        return "unfinished", f"{count} words, then max_tokens"
    if refusal := _REFUSAL.search(rewrite):
        return "refusal", refusal.group()
    if echo := _echo(rewrite, asked, passage):
        return "echo", " ".join(echo)
    if count < limits.min_words or found["length"] < least:
        return "too_short", f"{count} words, {found['length']:.2f} of the passage"
    if found["length"] > most:
        return "too_long", f"{found['length']:.2f} of the passage"
    if found["repeated"] > limits.max_repeated:
        return "repetition", f"{found['repeated']:.2f}"
    if wrong := _wrong_form(rewrite, form):
        return "form", wrong
    if wrong := _other_language(passage, rewrite):
        return "language", wrong
    if found["copied"] > limits.max_copied:
        return "copied", f"{found['copied']:.2f}"
    if found["new_numbers"] > limits.max_new_numbers:
        return "invented_numbers", ", ".join(sorted(numbers(rewrite) - numbers(passage))[:5])
    if found["new_names"] > limits.max_new_names:
        return "invented_names", ", ".join(sorted(unknown_names(passage, rewrite))[:5])
    if found["kept"] < limits.min_kept:
        return "lost_facts", f"{found['kept']:.2f} kept"
    return None


def _other_language(passage: str, rewrite: str) -> str:
    """Return the language of a rewrite that is not surely in that of its passage; empty when it is."""
    expected, sure = language_detector()(passage)
    language, score = language_detector()(rewrite)
    found = language if score >= LANGUAGE_SCORE else "unknown"
    return "" if sure < LANGUAGE_SCORE or found == expected else found


def _wrong_form(rewrite: str, form: str) -> str:
    lines = [line for line in rewrite.splitlines() if line.strip()]
    if form == "pairs" and (not lines or 2 * len(_PAIR.findall(rewrite)) != len(lines)):
        return "not lines of `Question:` and `Answer:` in turn"
    if form == "list" and sum(line.startswith("- ") for line in lines) < 3:
        return "fewer than three lines that begin with `- `"
    return ""


def _echo(rewrite: str, asked: str, passage: str) -> tuple[str, ...] | None:
    """Return a run of words that is the prompt's and not the passage's."""
    own = {*_runs(split_words(asked), COPY_WORDS)} - {*_runs(split_words(passage), COPY_WORDS)}
    return next((run for run in _runs(split_words(rewrite), COPY_WORDS) if run in own), None)


def _runs(text_words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text_words[at : at + n]) for at in range(len(text_words) - n + 1)]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
