"""Filters that look at one document: unicode, length, language, prose, code. Each returns why it drops, or None."""

from __future__ import annotations

import ast
import re
import string
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from freehold.stages.curate.rules import (
    LANGUAGE_SAMPLE_CHARS,
    MAX_LINE_CHARS,
    MAX_LOST,
    MIN_LANGUAGE_SCORE,
    SURE_LANGUAGE_SCORE,
    CodeLimits,
    ProseLimits,
)
from freehold.text import Why
from freehold.text.language import language_detector
from freehold.text.words import Words, beyond_ascii, distinct, repeats_at_most, stop_share

NEWLINES = re.compile("\r\n?|[\u0085\u2028\u2029]")
# C0 except tab and newline, DEL, C1, the byte order mark and the non-characters that end plane 0.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")
# None of these changes or joins with another in NFC.
_COMPOSED = re.compile("[\u0080-\u02ff\u2010-\u205e]*")
# UTF-8 read as Latin-1 or Windows-1252: a lead byte's letter followed by what a continuation byte becomes.
_CONTINUED = (
    "\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014\u2018-\u201e\u2020-\u2022"
    "\u2026\u2030\u2039\u203a\u20ac\u2122"
)
MOJIBAKE = re.compile(f"[\u00c2-\u00df][{_CONTINUED}]|\u00e2\u20ac|\u00f0\u0178")
BULLETS = ("- ", "* ", "\u2022", "\u25cf", "\u25aa", "+ ")
GENERATED = re.compile(
    r"auto-?\s?generated|automatically generated|generated (?:automatically|from ['\"])|do not (?:edit|modify)"
    r"|this (?:file|module) (?:is|was|has been) generated",
    re.I,
)
ALPHANUMERIC = (string.ascii_letters + string.digits).encode()
RULERS = "=-~^*#_+.|"
RULED = re.compile(r"([=~^*#_+.|\-])\1{3,}")


def clean_unicode(text: str) -> tuple[str, str]:
    """Return the text in NFC with `\\n` newlines, no control characters and mojibake repaired, and what was done.

    What is beyond ASCII is looked at alone first: each expression would read the whole text for a few characters.
    """
    done = []
    clean, few = text, beyond_ascii(text)
    if "\r" in text or NEWLINES.search(few):
        clean = NEWLINES.sub("\n", text)
        done.append("newlines")
    if MOJIBAKE.search(few) and MOJIBAKE.search(clean):
        repaired = repair_mojibake(clean)
        if repaired != clean:
            clean, few = repaired, beyond_ascii(repaired)
            done.append("mojibake")
    if has_controls(clean, few):
        clean = CONTROLS.sub("", clean)
        done.append("controls")
    if not _COMPOSED.fullmatch(few):
        normal = unicodedata.normalize("NFC", clean)
        if normal != clean:
            clean = normal
            done.append("nfc")
    return clean, " ".join(done)


def has_controls(text: str, few: str) -> bool:
    """Return whether CONTROLS matches in a text; `few` are its characters beyond ASCII."""
    raw = np.frombuffer(text.encode(), np.uint8)
    low = np.count_nonzero(raw < 32)
    if low and low != np.count_nonzero(raw == 10) + np.count_nonzero(raw == 9):
        return True
    return bool((raw == 127).any()) or CONTROLS.search(few) is not None


def repair_mojibake(text: str) -> str:
    """Undo wrong decodings, line by line and only where their marks are: ftfy is slow, and careful per line."""
    import ftfy

    lines = text.split("\n")
    return "\n".join(ftfy.fix_encoding(line) if MOJIBAKE.search(line) else line for line in lines)


def check_length(text: str, min_chars: int, max_chars: int, max_line_chars: int = MAX_LINE_CHARS) -> Why | None:
    """Drop what is empty, too short, too long, undecodable, or one endless line."""
    if not text.strip():
        return "empty", "no text"
    if len(text) < min_chars:
        return "too_short", f"{len(text)} characters, at least {min_chars}"
    if len(text) > max_chars:
        return "too_long", f"{len(text)} characters, at most {max_chars}"
    if len(text) > max_line_chars:
        longest = max(map(len, text.splitlines()))
        if longest > max_line_chars:
            return "long_line", f"a line of {longest} characters, at most {max_line_chars}"
    lost = text.count("\ufffd")
    if lost > MAX_LOST * len(text):
        return "undecodable", f"{lost} replacement characters in {len(text)}"
    return None


def check_language(text: str, languages: Sequence[str] | None) -> Why | None:
    """Drop a document when most of its samples (start, middle, end) are in another language."""
    if languages is None:
        return None
    size = LANGUAGE_SAMPLE_CHARS
    starts = (0,) if len(text) <= size else (0, (len(text) - size) // 2, len(text) - size)
    found: list[tuple[str, float]] = []
    foreign = 0
    for left, start in zip(range(len(starts) - 1, -1, -1), starts, strict=True):
        found.append(language_detector()(text[start : start + size]))
        # English between table borders scores low, but still as English: only another language counts against.
        foreign += found[-1][0] not in languages and found[-1][1] >= MIN_LANGUAGE_SCORE
        if 2 * (foreign + left) <= len(starts):
            return None
    return "language", ", ".join(f"{language} {score:.2f}" for language, score in found)


def check_prose(text: str, words: Words, limits: ProseLimits) -> Why | None:
    """Drop text that is not running text: lists of codes, symbols, boilerplate repeated over and over."""
    count = len(words.hashes)
    if count < limits.min_words:
        return "few_words", f"{count} words, at least {limits.min_words}"
    low, high = limits.mean_word_chars
    mean = words.chars / count
    # Where most words are single letters, their length says nothing.
    if 2 * words.alone < count and not low <= mean <= high:
        return "word_length", f"mean {mean:.2f} characters, {low} to {high}"
    letters = _letters(text, words)
    # Underlines and table borders are layout: a run of one mark counts as nothing, which never makes the share smaller.
    if letters < limits.min_letters and any(4 * mark in text for mark in RULERS):
        letters = _letters(RULED.sub("", text), words)
    if letters < limits.min_letters:
        return "letters", f"{letters:.2f} of the characters, at least {limits.min_letters}"
    ellipses = text.count("...") + text.count("\u2026")
    symbols = (text.count("#") + ellipses) / count
    if symbols > limits.max_symbols:
        return "symbols", f"{symbols:.2f} per word, at most {limits.max_symbols}"
    if words.stop_fraction < limits.min_stop_words:
        share = _stop_share(text, words)
        if share is not None and share < limits.min_stop_words:
            return "stop_words", f"{share:.3f} of the words, at least {limits.min_stop_words}"
    return check_lines(text, ellipses, limits) or _check_repetition(words, limits)


def _stop_share(text: str, words: Words) -> float | None:
    """Return the share of the commonest words of the text's own language; None when that language's are not known."""
    language, score = language_detector()(text[:LANGUAGE_SAMPLE_CHARS])
    if language == "en" or score < SURE_LANGUAGE_SCORE:
        return words.stop_fraction
    return stop_share(words, language)


def _letters(text: str, words: Words) -> float:
    """Return the letters of all words as a share of the characters that are not space."""
    raw = np.frombuffer(text.encode(), np.uint8)
    spaces = sum(np.count_nonzero(raw == ord(space)) for space in " \t\n")
    figures = np.count_nonzero(raw - np.uint8(ord("0")) < 10) + np.count_nonzero(raw == ord("_"))
    return float((words.chars - figures) / max(1, len(text) - spaces))


def check_lines(text: str, ellipses: int, limits: ProseLimits) -> Why | None:
    """Drop text whose lines are bullets, end in ellipses, or repeat earlier ones; `ellipses` is their number."""
    lines = stripped(text.split("\n"))
    # No more lines begin with a bullet, or end with an ellipsis, than there are such marks: counting those is faster.
    most = limits.max_bullet_lines
    if most < 1 and sum(text.count(bullet[0]) for bullet in BULLETS) / len(lines) > most:
        share = sum([line.startswith(BULLETS) for line in lines]) / len(lines)
        if share > most:
            return "bullet_lines", f"{share:.2f} of the lines, at most {most}"
    most = limits.max_ellipsis_lines
    if ellipses / len(lines) > most:
        share = sum([line.endswith(("...", "\u2026")) for line in lines]) / len(lines)
        if share > most:
            return "ellipsis_lines", f"{share:.2f} of the lines, at most {most}"
    repeated = repeated_fraction(lines)
    if repeated > limits.max_duplicate_lines:
        return "duplicate_lines", f"{repeated:.2f} of the characters, at most {limits.max_duplicate_lines}"
    # A paragraph that is there twice is made of lines that are.
    repeated = repeated_fraction(stripped(text.split("\n\n"))) if repeated else 0.0
    if repeated > limits.max_duplicate_paragraphs:
        return "duplicate_paragraphs", f"{repeated:.2f} of the characters, at most {limits.max_duplicate_paragraphs}"
    return None


def stripped(parts: list[str]) -> list[str]:
    """Return the parts without the space around them, and without those that are nothing else."""
    return list(filter(None, map(str.strip, parts)))


def _check_repetition(words: Words, limits: ProseLimits) -> Why | None:
    # Five letters of a script without spaces come again in any text; ten say about what five words say.
    runs = words.ngrams(10 if 2 * words.alone > len(words.hashes) else 5)
    if repeats_at_most(runs, limits.max_repeated_ngrams):
        return None
    repeated = 1 - len(distinct(runs)) / len(runs)
    if repeated > limits.max_repeated_ngrams:
        return "repeated_ngrams", f"{repeated:.2f} of the five-word runs, at most {limits.max_repeated_ngrams}"
    return None


def repeated_fraction(parts: list[str]) -> float:
    """Return the share of characters in parts equal to an earlier part."""
    different = set(parts)
    if len(different) == len(parts):
        return 0.0
    total = sum(map(len, parts))
    return 1 - sum(map(len, different)) / total if total else 0.0


def check_code(text: str, path: str, limits: CodeLimits) -> Why | None:
    """Drop source that does not parse, that a program wrote, or that is a table rather than code."""
    raw_lines = text.split("\n")
    lines, longest = stripped(raw_lines), max(map(len, raw_lines))
    if longest > limits.max_line_chars:
        return "code_line_length", f"a line of {longest} characters, at most {limits.max_line_chars}"
    mean = len(text) / max(1, len(lines))
    if mean > limits.max_mean_line_chars:
        return "code_line_length", f"mean line of {mean:.0f} characters, at most {limits.max_mean_line_chars}"
    raw = text.encode("ascii", "replace")
    digits = len(raw) - len(raw.translate(None, b"0123456789"))
    alphanumeric = len(raw) - len(raw.translate(None, ALPHANUMERIC))
    if alphanumeric < limits.min_alphanumeric * len(raw):
        return "alphanumeric", f"{alphanumeric / len(raw):.2f} of the characters, at least {limits.min_alphanumeric}"
    if digits > limits.max_digits * alphanumeric:
        return "digits", f"{digits / alphanumeric:.2f} of letters and digits, at most {limits.max_digits}"
    if mark := GENERATED.search("\n".join(lines[:8])[:1000]):
        return "generated_code", f"says {mark.group(0)!r}"
    comments = sum(line.startswith("#") for line in lines) / max(1, len(lines))
    if comments > limits.max_comment_lines:
        return "comments", f"{comments:.2f} of the lines, at most {limits.max_comment_lines}"
    if PurePosixPath(path.partition("#")[0]).suffix in ("", ".py", ".pyi"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return "not_python", f"{type(error).__name__}: {error}"
    return None
