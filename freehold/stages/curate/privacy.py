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
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from freehold.stages.curate.rules import MAX_FINDINGS_PER_1000_CHARS, MIN_FINDINGS_TO_DROP
from freehold.text import Why
from freehold.text.words import beyond_ascii

# Endings seen in addresses; `x@y.T` in numpy code or `a@b.conj` is no address.
ENDINGS = (
    "com|org|net|edu|gov|mil|int|info|biz|name|io|dev|app|ai|co|eu|uk|us|ca|au|nz|de|fr|it|es|pt|nl|be|ch|at|se|no"
    "|dk|fi|pl|cz|hu|ro|gr|ie|ru|ua|tr|il|in|cn|jp|kr|tw|hk|sg|br|mx|ar|cl|za|ng|ke|eg"
)
EMAIL = re.compile(
    rf"(?<![\w.+%/:-])[A-Za-z0-9][A-Za-z0-9._%+-]{{0,63}}@(?:[A-Za-z0-9-]{{2,63}}\.)+(?:{ENDINGS})\b(?!\.?\w)", re.I
)
PHONE = re.compile(
    r"(?<![\w.,/+=-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]\d{2,4}){1,4}"  # +44 20 7946 0123
    r"|\[\d{1,3}\][ -]?(?:\(\d{1,4}\)|\d{1,4})(?:[ -]\d{2,4}){1,4}"  # [1] (202) 265-1234, as factbooks print it
    r"|(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}([.-]))[2-9]\d{2}[ .-]\d{4}"  # (212) 736-5000
    r")(?![\w/=-]|[.,]\d)"
)
OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IP = re.compile(rf"(?<![\w.-])(?:{OCTET}\.){{3}}{OCTET}(?![\w-]|\.\d)")
CARD = re.compile(r"(?<![\w.,-])[3-6]\d{3}(?:[ -]?\d){9,15}(?![\w-]|[.,]\d)")
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
# As long as its country's are: what follows (`BIC ...`, `EUR 500`) looks like more of it.
_ACCOUNTS = "|".join(
    rf"{country}\d\d(?: ?[A-Z\d]{{4}}){{{chars // 4 - 1}}}" + (rf" ?[A-Z\d]{{{chars % 4}}}" if chars % 4 else "")
    for country, chars in IBAN_CHARS.items()
)
# Two letters and two digits first: three times as fast as to try every country everywhere.
IBAN = re.compile(rf"(?=[A-Z]{{2}}\d\d)(?<![\w.,/+-])(?:{_ACCOUNTS})(?![\w-])")
SSN = re.compile(r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-]|\.\d)")

# An at sign, seven digits hardly apart, or three dots between numbers.
TRIGGER = re.compile(r"[@\d](?:(?<=@)|(?:[ .()\[\]-]{0,3}\d){6}|\d{0,2}(?:\.\d{1,3}){3})")
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
    plain = account.replace(" ", "")
    digits = "".join(str(int(c, 36)) for c in plain[4:] + plain[:4])
    return IBAN_CHARS.get(plain[:2]) == len(plain) and int(digits) % 97 == 1


def _is_account(match: re.Match[str]) -> bool:
    return mod_97(match.group(0))


def _is_person(match: re.Match[str]) -> bool:
    address = match.group(0).lower()
    return not address.startswith(HARMLESS_NAMES) and not HARMLESS_DOMAINS.search(address)


def _is_phone(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match.group(0))
    fictional = re.fullmatch(r"\d*55501\d\d", digits) is not None
    return 8 <= len(digits) <= 15 and not fictional


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
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


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


# {how a secret begins: the whole of it}; `secret` is what is replaced, where that is a part. It is looked for by its
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
    """Return whether a text that has a secret's form could be one: random, and nobody's placeholder."""
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
    pieces, done = [], 0
    # One quick scan finds the lines worth six slow ones.
    for trigger in triggers(text):
        if trigger.start() >= done:
            start = max(done, text.rfind("\n", done, trigger.start()) + 1)
            end = text.find("\n", trigger.end())
            end = len(text) if end < 0 else end
            pieces += [text[done:start], _redact_line(text[start:end], kinds, found)]
            done = end
    return ("".join([*pieces, text[done:]]), dict(found)) if found else (text, {})


def triggers(text: str) -> Iterator[re.Match[str]]:
    """Yield what `TRIGGER.finditer` does; in a long text it is tried only where the digits stand close enough."""
    if len(text) < _LONG_CHARS or _DIGIT.search(beyond_ascii(text)):
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


def _following(flags: np.ndarray, n: int) -> np.ndarray:
    """Return int64 [flags]: how many of each one and the `n - 1` after it are set."""
    sums = np.concatenate([[0], np.cumsum(flags)])
    return np.asarray(sums[np.minimum(np.arange(len(flags)) + n, len(flags))] - sums[:-1])


def _redact_line(line: str, kinds: Collection[str], found: Counter[str]) -> str:
    for kind, (pattern, plausible, instead) in KINDS.items():
        if kind in kinds:

            def swap(
                match: re.Match[str],
                kind: str = kind,
                plausible: Callable[[re.Match[str]], bool] = plausible,
                instead: str = instead,
            ) -> str:
                if not plausible(match):
                    return match.group(0)
                found[kind] += 1
                return instead

            line = pattern.sub(swap, line)
    return line


def check_density(chars: int, found: Mapping[str, int]) -> Why | None:
    """Drop a document that is mostly personal data: an address list, a log of mails."""
    total = sum(found.values())
    if total >= MIN_FINDINGS_TO_DROP and 1000 * total > MAX_FINDINGS_PER_1000_CHARS * chars:
        return "pii", f"{total} findings in {chars} characters: " + ", ".join(f"{k} {n}" for k, n in found.items())
    return None
