"""Personal data and secrets by regular expression: found, checked for plausibility, replaced by a harmless stand-in.

The stand-ins (RFC 2606 and 5737 names and addresses, fictional telephone numbers, an account in the country XX, which
ISO 3166 leaves to its users) keep code parsing and are themselves never found, so cleaning twice changes nothing.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache

import numpy as np

from freehold.guard.telephone import is_international, is_number

# Endings seen in addresses; `x@y.T` in numpy code or `a@b.conj` is no address.
ENDINGS = (
    "com|org|net|edu|gov|mil|int|info|biz|name|io|dev|app|ai|co|eu|uk|us|ca|au|nz|de|fr|it|es|pt|nl|be|ch|at|se|no"
    "|dk|fi|pl|cz|hu|ro|gr|ie|ru|ua|tr|il|in|cn|jp|kr|tw|hk|sg|br|mx|ar|cl|za|ng|ke|eg"
)
EMAIL = re.compile(
    rf"(?<![\w.+%/:-])[A-Za-z0-9][A-Za-z0-9._%+-]{{0,63}}@(?:[A-Za-z0-9-]{{2,63}}\.)+(?:{ENDINGS})\b(?!\.?\w)", re.I
)
# `jane [at] mail [dot] com`, `jane at mail dot com`, `jane @ mail . com`: a dot or the at sign is spelled.
_AT, _DOT = r"(?: ?[\[({] ?at ?[\])}] ?| at )", r"(?: ?[\[({] ?dot ?[\])}] ?| dot )"
SPELLED = re.compile(
    rf"(?<![\w.+%/:-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]|{_DOT}(?=\w{{1,30}}(?: at | ?[\[({{] ?at))){{0,63}}(?:"
    rf"{_AT}(?:[A-Za-z0-9-]{{2,63}}{_DOT}){{1,4}}(?:{ENDINGS})"
    rf"| ?[\[({{] ?at ?[\])}}] ?(?:[A-Za-z0-9-]{{2,63}}\.){{1,4}}(?:{ENDINGS})"
    rf"|(?: @ |@)(?:[A-Za-z0-9-]{{2,63}}(?: \. |{_DOT})){{1,4}}(?:{ENDINGS})"
    r")\b(?!\.?\w)",
    re.I,
)
# What one of these texts holds; looked for before the expression, for most texts hold none.
_SPELLED_MARKS = (
    *(" dot ", "[dot]", "(dot)", "{dot}", "[at]", "(at)", "{at}", "[ at ]", "( at )", " . "),
    *(" DOT ", "[DOT]", "(DOT)", "[AT]", "(AT)"),
)
LABEL = (
    r"(?:tele(?:phone|fax|fon)|phone|tel|fax|mobile|telefono|teléfono|téléphone|tél|handy|whatsapp|телефон|тел"
    r"|电话|電話)"
)
PHONE = re.compile(
    r"(?<![\w.,/+=-])(?:"
    r"(?P<world>(?:\+ ?|(?<!\d )00 ?)\d{1,3}[ ./-]?(?:\(\d{1,4}\)[ ./-]?)?\d{1,4}"
    r"(?:[ ./-]?\d{2,4}){1,5})"  # +44 20 7946 0123
    # [1] (202) 265-1234, as factbooks print it
    r"|\[(?P<code>\d{1,3})\][ -]?(?P<rest>(?:\(\d{1,4}\)|\d{1,4})(?:[ -]\d{2,4}){1,4})"
    r"|(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}([.-]))[2-9]\d{2}[ .-]\d{4}"  # (212) 736-5000
    r")(?![\w/=-]|[.,]\d)"
    rf"|(?i:(?<![^\W_]){LABEL}(?![^\W\d_]))[^\w\n+(]{{0,8}}(?P<labelled>[+(]?\d[\d ()/.-]{{5,20}}\d)(?![\w/=-]|[.,]\d)"
)
OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IP = re.compile(rf"(?<![\w.-])(?:{OCTET}\.){{3}}{OCTET}(?![\w-]|\.\d)")
CARD = re.compile(r"(?<![\w.,-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-]|[.,]\d)")
# Digits of a card by how its number begins (ISO/IEC 7812 as the networks publish them).
_NETWORKS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11,16}|35(?:2[89]|[3-8]\d)\d{12,15}|6(?:011|4[4-9]\d|5\d\d)\d{12,15}"
)
# Characters of an account number by country, from the IBAN registry of SWIFT (ISO 13616).
IBAN_CHARS = {
    country: chars
    for chars, countries in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
        21: "CH CR HR LI LV", 22: "BG BH DE GB GE IE ME RS", 23: "AE GI IL IQ OM SO TL",
        24: "AD CZ DZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC",
        33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
# As long as its country's are: what follows (`BIC ...`, `EUR 500`) looks like its continuation.
_ACCOUNTS = "|".join(
    rf"{country}\d\d(?:[ -]?[A-Z\d]{{4}}){{{chars // 4 - 1}}}" + (rf"[ -]?[A-Z\d]{{{chars % 4}}}" if chars % 4 else "")
    for country, chars in IBAN_CHARS.items()
)
# Two letters and two digits first: three times as fast as to try every country everywhere.
IBAN = re.compile(rf"(?=[A-Z]{{2}}\d\d)(?<![\w.,/+-])(?:{_ACCOUNTS})(?![\w-])", re.I)
SSN = re.compile(r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-]|\.\d)")

# An at sign, seven digits hardly apart, or three dots between numbers.
TRIGGER = re.compile(r"[@\d](?:(?<=@)|(?:[ .()\[\]/-]{0,3}\d){6}|\d{0,2}(?:\.\d{1,3}){3})")
_LONG_CHARS = 2_000
_DIGIT = re.compile(r"\d")
HARMLESS_DOMAINS = re.compile(
    r"@(?:[\w-]+\.)*(?:example|test|invalid|localhost|domain|anycompany|company|server|host)\.\w+$", re.I
)
HARMLESS_NAMES = ("git@", "hg@", "noreply@", "no-reply@", "donotreply@", "user@", "username@", "you@", "name@", "foo@")
PUBLIC_PLACEHOLDERS = ("123.45.67.89", "123.123.123.123", "111.111.111.111")
VERSION_BEFORE = re.compile(r"(?:\bv|version|release|[=<>~]=|[-_])\s*$", re.I)


def luhn(number: str) -> bool:
    """Return whether the digits of a card number have a right check digit."""
    digits = [int(c) for c in number if c.isdigit()]
    doubled = [2 * d - 9 * (d > 4) for d in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def mod_97(account: str) -> bool:
    """Return whether an international bank account number has its country's length and right check digits."""
    plain = account.replace(" ", "").replace("-", "").upper()
    digits = "".join(str(int(c, 36)) for c in plain[4:] + plain[:4])
    return IBAN_CHARS.get(plain[:2]) == len(plain) and int(digits) % 97 == 1


def _is_account(match: re.Match[str]) -> bool:
    return mod_97(match.group(0))


def _is_person(match: re.Match[str]) -> bool:
    address = match.group(0).lower()
    return not address.startswith(HARMLESS_NAMES) and not HARMLESS_DOMAINS.search(address)


def _is_phone(match: re.Match[str]) -> bool:
    text = match["labelled"] or match[0]
    digits = re.sub(r"\D", "", text)
    if match["code"]:
        right = is_number(match["code"], re.sub(r"\D", "", match["rest"]))
    elif match["world"]:
        right = is_international(re.sub(r"\(0\)|\D", "", text).removeprefix("00"))
    elif match["labelled"]:
        years = all(re.fullmatch(r"1[5-9]\d\d|20\d\d", part) for part in re.findall(r"\d+", text))
        right = 7 <= len(digits) <= 15 and not years
    else:
        right = len(digits) in (10, 11)
    fictional = digits[-7:-2] == "55501"
    return right and not fictional


def _is_public_ip(match: re.Match[str]) -> bool:
    address = ipaddress.ip_address(match.group(0))
    before = match.string[max(0, match.start() - 12) : match.start()]
    # Few digits are a section or a version far more often than a machine.
    long_enough = sum(c.isdigit() for c in match.group(0)) >= 7
    return (
        long_enough
        and address.is_global
        and not address.is_multicast
        and match.group(0) not in PUBLIC_PLACEHOLDERS
        and not VERSION_BEFORE.search(before)
    )


def _is_card(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match.group(0))
    return _NETWORKS.fullmatch(digits) is not None and len(set(digits)) > 1 and luhn(digits)


KINDS: dict[str, tuple[re.Pattern[str], Callable[[re.Match[str]], bool], str]] = {
    # name: (pattern, plausible?, stand-in); an order in which no pattern takes a part of another's.
    "email": (EMAIL, _is_person, "email@example.com"),
    "ip": (IP, _is_public_ip, "192.0.2.1"),
    "iban": (IBAN, _is_account, "XX00 0000 0000 0000 0000"),
    "card": (CARD, _is_card, "0000-0000-0000-0000"),
    "phone": (PHONE, _is_phone, "(212) 555-0100"),
    "ssn": (SSN, lambda match: True, "000-00-0000"),
}


EVERYTHING = ("secret", *KINDS)
"""Every kind of personal data that is looked for."""


# {how a secret begins: all its characters}; `secret` is what is replaced, where that is a part. It is looked for by its
# beginning alone, which costs far less than an expression. Who issues tokens says how they look, for such scanners.
KEY = "-----BEGIN "
# Base64 as it is or in strings, after header lines (RFC 1421); never `-----`, so what names the markers ends it.
_KEY_BODY = (
    r"(?:[\s\\nr\"',]{0,99}[A-Z][A-Za-z-]{1,30}:(?:(?!-----)[^\n\\]){0,200}+(?=[\n\\])){0,9}+"
    r"[A-Za-z0-9+/=\s\\\"',]{0,20000}+"
)
_KEY_LINE = re.compile(r"[A-Za-z0-9+/]{40}")
_AWS = r"[\"']?\s{0,9}[:=>]{1,2}\s{0,9}[\"']?(?P<secret>[\w/+]{40})(?![\w/+=])"
_END = r"(?![A-Za-z0-9_-])"
SECRETS: dict[str, re.Pattern[str]] = {
    begin: re.compile(pattern, re.S)
    for begin, pattern in {
        KEY: KEY + rf"((?:[A-Z0-9]+ ){{0,3}}PRIVATE KEY(?: BLOCK)?)-----(?P<secret>{_KEY_BODY})-----END \1-",
        "AKIA": rf"(?<![A-Za-z0-9])AKIA[A-Z2-7]{{16}}{_END}",
        "ASIA": rf"(?<![A-Za-z0-9])ASIA[A-Z2-7]{{16}}{_END}",
        **{name: name + _AWS for name in ("secret_access_key", "SECRET_ACCESS_KEY", "ecretAccessKey")},
        **{f"gh{kind}_": rf"(?<![A-Za-z0-9])gh{kind}_[A-Za-z0-9]{{36,251}}{_END}" for kind in "pousr"},
        "github_pat_": rf"github_pat_[A-Za-z0-9]{{22}}_[A-Za-z0-9]{{59}}{_END}",
        "glpat-": rf"glpat-[A-Za-z0-9_-]{{20,64}}{_END}",
        "xox": rf"(?<![A-Za-z0-9])xox[abeprs]-[0-9][A-Za-z0-9-]{{20,200}}{_END}",
        "slack.com/services/": rf"slack\.com/services/(?P<secret>T\w{{8,12}}/B\w{{8,12}}/\w{{20,30}}){_END}",
        "_live_": rf"(?<=\b[rs]k)_live_(?P<secret>[A-Za-z0-9]{{24,100}}){_END}",
        "AIza": rf"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{{35}}{_END}",
        "pypi-AgEIcHlwaS5vcmc": rf"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{{50,300}}{_END}",
        "eyJ": r"(?<![\w.-])eyJ[\w-]{8,500}\.eyJ[\w-]{8,5000}\.[\w-]{20,1000}(?![\w-])",
    }.items()
}  # fmt: skip
REMOVED = "REMOVED_SECRET"
RANDOM = 0.7  # of the bits that characters of 64 kinds could have: random ones exceed it, words do not
PLACEHOLDER = re.compile(r"example|sample|your|dummy|fake|test|placeholder|(.)\1{4}|12345|abcde|sdfg", re.I)


def _is_secret(begin: str, text: str) -> bool:
    """Return whether a text that has a secret's form could be one: random, and no placeholder."""
    if begin == "eyJ":  # a token whose parts can be read: its head says how it was signed
        head = text.partition(".")[0]
        try:
            return "alg" in json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
        except (ValueError, TypeError):
            return False
    plain = re.sub(r"[\s\\\"']", "", text)
    # Words between the two markers are prose about keys.
    right = _KEY_LINE.search(text) is not None if begin == KEY else not PLACEHOLDER.search(plain)
    return right and entropy(plain) >= RANDOM * math.log2(min(len(plain), 64))


def entropy(text: str) -> float:
    """Return the bits a character of a text, from how often each character is in it."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _secrets(text: str) -> Iterator[tuple[int, int]]:
    """Yield where secrets begin and end."""
    underscore = "_" in text  # of all looks the cheapest: most prose is spared half of them
    for begin, pattern in SECRETS.items():
        at = text.find(begin) if underscore or "_" not in begin else -1
        while at >= 0:
            match = pattern.match(text, at)
            if match:
                start, end = match.span("secret" if "secret" in pattern.groupindex else 0)
                if _is_secret(begin, text[start:end]):
                    yield start, end
            at = text.find(begin, match.end() if match else at + len(begin))


def _redact_secrets(text: str, found: Counter[str]) -> str:
    pieces, done = [], 0
    for start, end in sorted(_secrets(text)):
        if start >= done:
            pieces += [text[done:start], REMOVED]
            done = end
            found["secret"] += 1
    return "".join([*pieces, text[done:]]) if pieces else text


def redact(text: str, kinds: Collection[str]) -> tuple[str, dict[str, int]]:
    """Return the text with personal data and secrets replaced, and how many of each kind were found."""
    if not kinds:
        return text, {}
    found: Counter[str] = Counter()
    if "secret" in kinds:
        text = _redact_secrets(text, found)
    if "email" in kinds and any(mark in text for mark in _SPELLED_MARKS):
        text, count = SPELLED.subn(KINDS["email"][2], text)
        found.update({"email": count} if count else {})
    folded = text if text.isascii() else text.translate(_folding())
    pieces, done = [], 0
    # One quick scan finds the lines worth six slow ones.
    for trigger in triggers(folded):
        if trigger.start() >= done:
            start = max(done, text.rfind("\n", done, trigger.start()) + 1)
            end = text.find("\n", trigger.end())
            end = len(text) if end < 0 else end
            pieces += [text[done:start], _redact_line(text[start:end], folded[start:end], kinds, found)]
            done = end
    return ("".join([*pieces, text[done:]]), dict(found)) if found else (text, {})


def find(text: str, kinds: Collection[str]) -> Iterator[tuple[int, int]]:
    """Yield where personal data and secrets begin and end, each kind by itself."""
    if "secret" in kinds:
        yield from _secrets(text)
    if "email" in kinds and any(mark in text for mark in _SPELLED_MARKS):
        yield from (match.span() for match in SPELLED.finditer(text))
    folded = text if text.isascii() else text.translate(_folding())
    if next(triggers(folded), None) is None:
        return
    for kind, (pattern, plausible, _) in KINDS.items():
        for match in pattern.finditer(folded) if kind in kinds else ():
            if plausible(match):
                yield match.span("labelled") if kind == "phone" and match["labelled"] else match.span()


def triggers(text: str) -> Iterator[re.Match[str]]:
    """Yield what `TRIGGER.finditer` does; in a long text it is tried only where the digits stand close enough."""
    if len(text) < _LONG_CHARS or _DIGIT.search(_beyond_ascii(text)):
        yield from TRIGGER.finditer(text)
        return
    raw = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    digits = np.flatnonzero(raw - np.uint8(ord("0")) < 10)
    gaps = np.diff(digits)
    dots = (gaps == 2) & (raw[digits[:-1] + 1] == ord("."))
    starts = digits[: len(gaps)][(_following(gaps <= 4, 6) == 6) | (_following(dots, 9) >= 3)]
    done = 0
    for start in np.sort(np.concatenate([starts, np.flatnonzero(raw == ord("@"))])).tolist():
        if start >= done and (match := TRIGGER.match(text, start)):
            done = match.end()
            yield match


def _beyond_ascii(text: str) -> str:
    """Return the characters of a text that are not ASCII, in order."""
    return "" if text.isascii() else text.encode().translate(None, bytes(range(128))).decode()


def _following(flags: np.ndarray, n: int) -> np.ndarray:
    """Return int64 [flags]: how many of each one and the `n - 1` after it are set."""
    sums = np.concatenate([[0], np.cumsum(flags)])
    return np.asarray(sums[np.minimum(np.arange(len(flags)) + n, len(flags))] - sums[:-1])


@lru_cache(maxsize=1)
def _folding() -> dict[int, str]:
    """Return what each digit, wide letter, space and hyphen beyond ASCII stands for: one character for each."""
    table = {point: chr(point - 0xFEE0) for point in range(0xFF01, 0xFF5F)}
    table |= dict.fromkeys((0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000), " ")
    table |= dict.fromkeys((*range(0x2010, 0x2016), 0x2212, 0xFE58, 0xFE63), "-")
    for point in range(0x660, min(sys.maxunicode, 0x1FBFA)):
        if (value := unicodedata.decimal(chr(point), None)) is not None:
            table[point] = str(value)
    return table


def _redact_line(line: str, folded: str, kinds: Collection[str], found: Counter[str]) -> str:
    """Return a line without personal data; it is found in `folded`, which has the same length."""
    for kind, (pattern, plausible, instead) in KINDS.items():
        if kind not in kinds:
            continue
        pieces, same, done = [], [], 0
        for match in pattern.finditer(folded):
            if plausible(match):
                start, end = match.span("labelled") if kind == "phone" and match["labelled"] else match.span()
                pieces += [line[done:start], instead]
                same += [folded[done:start], instead]
                done = end
                found[kind] += 1
        if pieces:
            line, folded = "".join([*pieces, line[done:]]), "".join([*same, folded[done:]])
    return line
