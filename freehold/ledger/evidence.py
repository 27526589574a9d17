"""What shows a licence: metadata, licence files, tags and notices in a text, Creative Commons links, restrictions.

The wrapper's statements (what a package declares, the licence files next to it) and the content's (what the text itself
says) are kept apart. `weigh` makes one licence with a confidence of them; the strictest term wins, and what contradicts
another is named. Licence texts are recognised by `licenseclassifier`, the patterns of google/licensecheck in Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from freehold.core.errors import LicenceError
from freehold.ledger.licence import normalise, parse, strictest

Confidence = Literal["high", "medium", "low"]
RANK: dict[str, int] = {"": 0, "low": 0, "medium": 1, "high": 2}
# A text's own statement about its rights stands in its first lines or its last.
HEAD_CHARS, TAIL_CHARS = 4_000, 1_500
# A shorter match is a link or a name, not a licence's words.
NOTICE_CHARS = 60
QUOTE_CHARS = 120

TAG = "SPDX-License-Identifier:"
TAG_CHARS = 120
ABOUT_RIGHTS = re.compile(r"licen[cs]e|redistribut|permission is hereby|public domain", re.I)
CREATIVE_COMMONS = re.compile(
    r"creativecommons\.org/(?:licen[cs]es/(by(?:-nc)?(?:-sa|-nd)?|nc(?:-sa)?|nd|sa)/(\d\.\d)(?:/([a-z]{2,3})\b)?"
    r"|publicdomain/(zero|mark)/1\.0)",
    re.I,
)
_USE = r"(?:use|uses|purposes?|research|study|applications?)"
# Words by which a text or its package withholds a use; each was met in real packages. Licences of software say "may not
# be used to endorse", and must not match. Without one of the words in front, the pattern is not tried.
RESTRICTIONS: tuple[tuple[str, tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (name, words, re.compile(pattern, re.I))
    for name, words, pattern in (
        ("non-commercial", ("commercial",),
         rf"\bnon-?\s?commercial\s+(?:\w+,?\s+){{0,4}}{_USE}\b|\bnon-?\s?commercial(?:ly)? only\b"
         r"|\bnot\s+(?:be\s+used\s+)?for\s+(?:any\s+)?commercial\s+(?:use|purposes?)\b"),
        ("some uses only", ("use only", "uses only", "purposes only", "purpose only", "research only", "study only"),
         rf"\bfor\s+(?:(?:your|personal|private|research|educational|academic|evaluation|"
         rf"and|or|,)\s*){{1,6}}{_USE}\s+only\b|\bfor\s+research\s+only\b"),
        ("no copies", ("no part of", "may not be"),
         r"\bno\s+part\s+of\s+(?:this|the)\s+\w+[^.]{0,60}\bmay\s+be\s+(?:reproduced|copied|stored|trans)"
         r"|\bmay\s+not\s+be\s+(?:reproduced|re-?distributed|republished|copied)\b(?!\s+and\s+used\s+to)"),
        ("no republishing", ("republish", "redistribute"),
         r"\b(?:do\s+not|don't|please\s+don't)\s+(?:commercially\s+)?(?:republish|redistribute)\b"),
        ("no training", ("train", "machine learning", "mining"),
         r"\bmay\s+not\s+be\s+used\s+(?:to|for)\s+(?:\w+\s+){0,4}(?:train|training|machine\s+learning)\b"
         r"|\btext\s+and\s+data\s+mining\b[^.]{0,80}\breserved\b"),
        ("permission asked", ("copyright holder",), r"\bwith\s+the\s+permission\s+of\s+the\s+copyright\s+holder"),
    )
)  # fmt: skip
# What a package says of texts that are not its own. Only for texts that are said to be under the wrapper's licence.
FOREIGN: tuple[tuple[str, tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (name, (), re.compile(pattern, re.I))
    for name, pattern in (
        ("lyrics or transcripts", r"\blyrics\b"
                                  r"|\b(?:tv|show|film|movie|sitcom|television)[- ]?(?:show )?transcripts?\b"),
        ("scraped", r"\bscrap(?:e[ds]?|ing)\b[^.]{0,60}\b(?:from|definitions?|web|sites?|pages?)\b"
                    r"|\bfound\b[^.]{0,40}\bon\s+the\s+(?:internet|web)\b|\bfair[- ]use\b"),
        ("the Brown Corpus", r"\bbrown\s+corpus\b|\bcorpus\s+import\s+brown\b"),
        ("the GCIDE dictionary", r"\bGCIDE\b"),
    )
)  # fmt: skip
# The same, shown by the text or its path.
MARKS: tuple[tuple[str, tuple[str, ...], re.Pattern[str]], ...] = (
    ("the Brown Corpus", ("/at ",), re.compile(r"(?:[\w'-]+/(?:at|nns?|np|vb[dgnz]?|in|jj|cc|pp\$?|rb|to|md)\s+){5}")),
    ("the GCIDE dictionary", ("[1913",), re.compile(r"\[1913 Webster\]")),
    ("a script of others", ("[scene",), re.compile(r"^\s*\[Scene\b", re.M)),
    ("essays of a living author", ("graham",), re.compile(r"paul[\s_-]*graham[\s_-]*essays", re.I)),
)
TEMPLATE = re.compile(r"\[year\]|\[fullname\]|<year>|<copyright holders?>|\[copyright holders?\]", re.I)


@dataclass(frozen=True)
class Finding:
    """One statement about rights and where it stands."""

    kind: str
    """metadata | licence file | debian | tag | notice | link | card | restriction | template"""
    place: str
    says: str
    """The SPDX expression it states; empty for what speaks against any licence."""
    quote: str = ""
    sure: bool = True
    """Whether it certainly speaks of this text: a link may mean another work, a glob another file."""

    def __str__(self) -> str:
        quote = f': "{self.quote}"' if self.quote else ""
        return f"{self.kind} {self.says}".rstrip() + (f" in {self.place}" if self.place else "") + quote


@dataclass(frozen=True)
class Text:
    """What a licence file was recognised as."""

    ids: tuple[str, ...]
    """The licences whose text, notice or link it holds, in its order."""
    explained: float
    """Share of its characters that belong to one of them."""
    opens_unread: bool
    """Whether it begins with more than a heading that none of them explains."""


@dataclass(frozen=True)
class Weighed:
    """One licence for a text, how sure it is, and all that was found."""

    licence: str
    confidence: Confidence
    evidence: str
    conflicts: tuple[str, ...] = field(default=())


@lru_cache(maxsize=1024)
def licence_text(text: str) -> Text:
    """Return the licences whose words a text holds, current SPDX ids, each once."""
    from licenseclassifier import identify_license

    found = identify_license(text, 0.0)
    explained = sum(match.end - match.start for match in found) / max(len(text.strip()), 1)
    ids = tuple(dict.fromkeys(_current(match.id) for match in found))
    return Text(ids, min(explained, 1.0), bool(found) and found[0].start > 1_000)


@lru_cache(maxsize=1024)
def licence_places(text: str) -> tuple[tuple[str, int], ...]:
    """Return (id, line) of the licences whose words a text holds, each once, where it begins."""
    from licenseclassifier import identify_license

    found: dict[str, int] = {}
    for match in identify_license(text, 0.0):
        words = text[match.start : match.end]
        start = match.start + len(words) - len(words.lstrip())
        found.setdefault(_current(match.id), 1 + text.count("\n", 0, start))
    return tuple(found.items())


def agreement(expression: str, text: Text) -> Literal["agrees", "partly", "silent", "contradicts"]:
    """Say whether a licence text confirms an expression: completely, in part, or as the text of other licences only.

    A text that begins with much that was not recognised may hold the licence there: it is silent, not another one.
    """
    if not text.ids:
        return "silent"
    try:
        share = _share(parse(expression), set(text.ids))
    except LicenceError:
        return "silent"
    if share:
        return "agrees" if share == 1 else "partly"
    return "silent" if text.opens_unread else "contradicts"


def of_head(text: str, place: str = "") -> list[Finding]:
    """Return what a text says of its own rights in its first lines: SPDX tags, or else a licence notice."""
    head = text[:HEAD_CHARS]
    found = []
    for said in _tags(head):
        try:
            found.append(Finding("tag", place, normalise(said), said))
        except LicenceError:
            found.append(Finding("restriction", place, "", f"a tag that is no SPDX expression: {said}"))
    if found or not ABOUT_RIGHTS.search(head):
        return found
    ids = _notices(head)
    if ids:
        found.append(Finding("notice", place, normalise(" AND ".join(ids))))
    return found


def _tags(head: str) -> Iterator[str]:
    """Yield what SPDX tags say: alone on a line but for the marks of a comment around them."""
    for line in head.splitlines() if TAG in head else ():
        before, _, said = line.partition(TAG)
        if said and len(before.strip()) <= 12 and not before.strip(" \t#/*;%.<!\"'-"):
            said = said.strip().removesuffix("*/").removesuffix("-->").strip()
            if 2 <= len(said) <= TAG_CHARS and not set(said) & set("<>\"'"):
                yield said


def restrictions(text: str, place: str = "", *, foreign: bool = False) -> list[Finding]:
    """Return the words at a text's beginning and end that withhold a use, and what marks it as the work of others.

    With `foreign` the text describes a package, and what it says of texts that are not its own counts too.
    """
    ends = text if len(text) <= HEAD_CHARS + TAIL_CHARS else text[:HEAD_CHARS] + "\n" + text[-TAIL_CHARS:]
    found = []
    # Line breaks are no matter to the words; looking for them first spares most texts the patterns.
    plain = " ".join(ends.lower().split())
    looked_for = [pattern for pattern in MARKS + RESTRICTIONS if any(word in plain for word in pattern[1])]
    for name, _, pattern in [*looked_for, *(FOREIGN if foreign else ())]:
        match = pattern.search(ends)
        if match:
            start = max(match.start() - 30, 0)
            quote = " ".join(ends[start : match.end() + 30].split())[:QUOTE_CHARS]
            found.append(Finding("restriction", place, "", f"{name}: {quote}"))
    return found


def unfilled(text: str, place: str = "") -> list[Finding]:
    """Return a finding when a licence file is an empty form, by which no one grants anything."""
    # Some texts end with a form on purpose: how to apply these terms.
    match = TEMPLATE.search(text[:400])
    return [Finding("template", place, "", match[0])] if match else []


def of_cc_url(url: str) -> str | None:
    """Return the SPDX id that a Creative Commons address stands for, or None when it is no licence's."""
    match = CREATIVE_COMMONS.search(url)
    if match is None:
        return None
    if match[4]:
        return "CC0-1.0" if match[4].lower() == "zero" else "LicenseRef-PD-mark"
    kind, version, place = match[1].upper(), match[2], match[3]
    for candidate in ([f"CC-{kind}-{version}-{place.upper()}"] if place else []) + [f"CC-{kind}-{version}"]:
        try:
            return normalise(candidate)
        except LicenceError:
            continue
    return f"LicenseRef-CC-{kind}-{version}"


def weigh(claim: Weighed, own: Iterable[Finding], *, detected: bool = False) -> Weighed:
    """Return the licence of one document: what its source claims, and what the document says itself.

    A document's own statement adds to the claim, so that the strictest term wins; where no one claimed anything but the
    claim was `detected` around it, its own statement takes the place. Restrictions make the confidence low.
    """
    own = list(own)
    said = [finding for finding in own if finding.says]
    against = [str(finding) for finding in own if not finding.says]
    licence, confidence = claim.licence, claim.confidence
    if said:
        mine = said[0].says
        for finding in said[1:]:
            mine = strictest(mine, finding.says)
        if detected or not licence:
            licence, confidence = mine, "high" if all(finding.sure for finding in said) else "medium"
        elif agreement(licence, Text(tuple(_leaves(mine)), 1.0, False)) != "agrees" or _leaves(mine) - set(
            _leaves(licence)
        ):
            try:
                licence = strictest(licence, mine)
            except LicenceError:
                licence = mine
            confidence = min(confidence, "medium", key=RANK.__getitem__)
    shown = dict.fromkeys([claim.evidence, *map(str, said), *(f"against it: {finding}" for finding in against)])
    conflicts = (*claim.conflicts, *against)
    return Weighed(licence, "low" if conflicts else confidence, "; ".join(filter(None, shown)), conflicts)


def _notices(head: str) -> list[str]:
    from licenseclassifier import identify_license

    return list(dict.fromkeys(_current(m.id) for m in identify_license(head, 0.0) if m.end - m.start >= NOTICE_CHARS))


def _current(key: str) -> str:
    try:
        return normalise(key)
    except LicenceError:
        return f"LicenseRef-{key}"


def _leaves(expression: str) -> frozenset[str]:
    try:
        tree = parse(expression)
    except LicenceError:
        return frozenset()
    return frozenset(str(getattr(symbol, "license_symbol", symbol).key) for symbol in tree.symbols)


def _share(tree: Any, ids: set[str]) -> float:
    """Return the share of an expression's licences that are among ids; of alternatives the best one counts."""
    operator = getattr(tree, "operator", "").strip().upper()
    if operator in {"AND", "OR"}:
        parts = [_share(part, ids) for part in tree.args]
        return max(parts) if operator == "OR" else sum(parts) / len(parts)
    key = str(getattr(tree, "license_symbol", tree).key)
    return float(any(same_licence(key, other) for other in ids))


def same_licence(claimed: str, found: str) -> bool:
    """Say whether a text found is that of the licence claimed: a text does not say `only` or `or later`."""
    first, second = _family(claimed), _family(found)
    if first[0] != second[0]:
        return False
    if not first[1] or not second[1] or first[1] == second[1]:
        return True
    return claimed.endswith(("-or-later", "+")) and second[1] > first[1]


@lru_cache(maxsize=4096)
def _family(key: str) -> tuple[str, tuple[int, ...]]:
    if key in {"PSF-2.0", "Python-2.0", "Python-2.0.1", "CNRI-Python"}:
        return "Python", ()
    for family in ("HPND", "MIT-CMU", "BSD-4-Clause", "BSD-3-Clause", "BSD-2-Clause"):
        if key == family or key.startswith(f"{family}-"):
            return "HPND" if family == "MIT-CMU" else family, ()
    if key in {"X11", "MIT-Modern-Variant", "MIT-open-group", "MIT"}:
        return "MIT", ()
    match = re.fullmatch(r"((?:A|L)?GPL|GFDL)-(\d+)\.(\d+).*", key)
    return (match[1], (int(match[2]), int(match[3]))) if match else (key, ())
