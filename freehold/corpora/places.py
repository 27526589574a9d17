"""Names of places that do not exist but could: a model must say that it does not know them.

Names of training and of tests are made from beginnings that do not occur in the other list, and none is within one
letter of a real name.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator

TRAINING = (
    "Bal", "Kor", "Mel", "Dor", "Fen", "Gal", "Hel", "Jor", "Mor", "Nar", "Pel", "Ros", "Sar", "Tel", "Ver", "Wes",
    "Zan", "Bru", "Cas", "Dra", "Est", "Fal", "Gri", "Hol", "Ist", "Kal", "Lor", "Mir", "Nov", "Ost", "Pra", "Qua",
    "Rav", "Sol", "Tri", "Ur", "Vel", "Yar", "Zem", "Ald", "Ber", "Cor", "Esk", "Ill", "Kes", "Lan", "Mun", "Nor",
    "Ph", "Rem", "Sten", "Tav", "Ubr", "Wol", "Yel", "Zor", "Ar", "Bel", "Cal", "Den", "El", "Fro", "Gor", "Har",
)  # fmt: skip
TESTS = (
    "Tor", "Val", "Xan", "Lum", "Ord", "Ulm", "Vin", "Thal", "Sev", "Mag", "Bor", "Kand", "Pol", "Ren", "Gund", "Arv",
)  # fmt: skip
MIDDLES = ("", "a", "e", "i", "o", "da", "la", "ma", "ra", "ta", "va", "no", "ri", "lo", "ka", "be", "si", "du", "go")
ENDS = (
    "nia", "land", "stan", "via", "ria", "dor", "mar", "sia", "tania", "gua", "lia", "zia", "bia", "don", "ga", "mos",
    "que", "tar", "wick", "ce", "ly", "an", "us",
)  # fmt: skip
FORMS = ("{}", "{}", "{}", "{}", "{}", "New {}", "Saint {}", "the {} Islands", "{} Island", "South {}")
"""Most are one word; the others are formed as real names are."""


def unknown(seed: str, beginnings: Collection[str], real: Collection[str]) -> Iterator[str]:
    """Yield different names without end made from some beginnings; none is or nearly is one of `real`."""
    random_ = random.Random(seed)
    words = {word.lower() for name in real for word in name.split()}
    seen: set[str] = set()
    while True:
        core = random_.choice(list(beginnings)) + random_.choice(MIDDLES) + random_.choice(ENDS)
        name = random_.choice(FORMS).format(core)
        if name in seen or len(core) < 5 or any(within_one_letter(core.lower(), word) for word in words):
            continue
        seen.add(name)
        yield name


def within_one_letter(one: str, other: str) -> bool:
    """Return whether two words are equal or differ by one letter put in, left away or changed."""
    if abs(len(one) - len(other)) > 1:
        return False
    at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    rest, rest_other = one[at:], other[at:]
    return rest[1:] == rest_other[1:] or rest[1:] == rest_other or rest == rest_other[1:]
