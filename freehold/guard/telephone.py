"""Whether digits can be a telephone number: calling codes and the lengths that numbers have under them.

Codes are those of ITU-T E.164; lengths are of national significant numbers, without the trunk prefix 0.
"""

from __future__ import annotations

import re

# {digits after the code: calling codes}; a country with several lengths has their range.
_LENGTHS = {
    (10, 10): "1 7 30 52 57 58 90 91 98",
    (9, 9): "27 31 33 34 40 41 48 56 61 93 94 212 233 254 255 256 351 375 380 420 421 992 994 995 996 998",
    (8, 8): "45 47 53 65 216 356 357 370 371 373 374 382 386 387 389 852 853 965 968 973 974 976 993",
    (7, 7): "354 423 960",
    (8, 9): "32 36 51 66 213 218 355 377 381 385 855 886 962 963 966 970 971 972",
    (9, 10): "20 44 81 84 92",
    (10, 11): "54 55 86",
    (8, 10): "46 60 63 64 82 234 856 880 964 977",
    (7, 9): "353 359 967",
    (7, 10): "95 358",
    (8, 11): "39 49",
    (8, 12): "62",
    (8, 13): "43",
    (7, 8): "372 961 975",
    (6, 9): "352 376",
}
LENGTHS = {int(code): lengths for lengths, codes in _LENGTHS.items() for code in codes.split()}
_OTHERS = re.compile(r"2[1-69]\d|5[09]\d|6[789]\d|80\d|87\d|88\d")
"""Three-digit codes of small countries and of no country, whose numbers have six to nine digits."""


def is_international(code_and_number: str) -> bool:
    """Return whether digits are a calling code and a number as long as numbers under it are."""
    for size in (1, 2, 3):
        code, number = code_and_number[:size], code_and_number[size:]
        if is_number(code, number):
            return True
    return False


def is_number(code: str, number: str) -> bool:
    """Return whether a number, perhaps with its trunk prefix 0, can belong to a calling code."""
    number = number.removeprefix("0")
    if code == "1":  # neither an area code nor an exchange begins with 0 or 1
        return len(number) == 10 and number[0] > "1" and number[3] > "1"
    least, most = LENGTHS.get(int(code or 0), (6, 9) if _OTHERS.fullmatch(code) else (99, 0))
    return least <= len(number) <= most and number[:1] not in ("", "0")
