"""What disagrees with a claimed licence: texts, tags, names and metadata of other licences, with their lines."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from freehold.core.errors import LicenceError
from freehold.ledger.evidence import licence_places, of_cc_url, same_licence
from freehold.ledger.licence import from_free_text, normalise, parse
from freehold.ledger.policy import PERMISSIVE, PUBLIC_DOMAIN

FREE = frozenset((*PERMISSIVE, *PUBLIC_DOMAIN))
# Licences by the names people write, where the recogniser wants more words. The first that matches at a place counts.
NAMES: tuple[tuple[str, str], ...] = (
    (r"gnu affero general public licen[cs]e|agpl", "AGPL"),
    (r"gnu (?:lesser|library) general public licen[cs]e|lgpl", "LGPL"),
    (r"gnu general public licen[cs]e|gpl", "GPL"),
    (r"gnu free documentation licen[cs]e|gfdl", "GFDL"),
    (r"(?:creative commons attribution|cc.by).{0,3}non.?commercial.{0,3}(?:share.?alike|no.?deriv\w*)?"
     r"|cc.by.nc(?:.sa|.nd)?", "CC-BY-NC"),
    (r"creative commons attribution.{0,3}share.?alike|cc.by.sa", "CC-BY-SA"),
    (r"creative commons attribution.{0,3}no.?deriv\w*|cc.by.nd", "CC-BY-ND"),
    (r"creative commons attribution|cc.by\b", "CC-BY"),
    (r"mozilla public licen[cs]e|mpl", "MPL"),
    (r"eclipse public licen[cs]e|epl", "EPL"),
    (r"apache (?:software )?licen[cs]e|apache.2", "Apache"),
    (r"(?:the )?mit licen[cs]e", "MIT"),
    (r"(?:[234].clause |new |modified |simplified )?bsd licen[cs]e|bsd.[234].clause", "BSD"),
    (r"isc licen[cs]e", "ISC"),
    (r"business source licen[cs]e", "BUSL"),
    (r"server side public licen[cs]e|sspl", "SSPL"),
    (r"(?:python software foundation|psf) licen[cs]e", "PSF"),
)  # fmt: skip
FAMILIES = {name for _, name in NAMES}
FREE_FAMILIES = {"Apache", "MIT", "BSD", "ISC", "PSF"}
_NAMED = re.compile("|".join(rf"\b({pattern})" for pattern, _ in NAMES), re.I)
KEYS = {"license", "licence", "licenses", "licences", "spdx", "license-expression", "license_expression",
        "spdx-license-identifier", "license_name", "license_type"}  # fmt: skip
"""Keys under which metadata state a licence."""
KEY_LINE = re.compile(r"[\s\"'#*-]{0,20}([A-Za-z][A-Za-z_-]{2,30})[\"']?[ \t]{0,20}[:=](.{1,300})")
DEPTH = 4
"""How deep a JSON file is searched for such keys."""


@dataclass(frozen=True)
class Statement:
    """One place in a source that states a licence."""

    place: str
    """`file:line`."""
    says: str
    """An SPDX id or expression; where only a family is named, its name (`GPL`)."""
    how: str
    """text | metadata | name"""

    def __str__(self) -> str:
        said = {"text": "is the text of", "metadata": "declares", "name": "names"}[self.how]
        return f"{self.place} {said} {self.says}"


def leaves(expression: str) -> list[frozenset[str]]:
    """Return the branches of an expression, each the licences that hold together; none when it is no expression."""
    try:
        return [frozenset(branch) for branch in _branches(parse(expression))]
    except LicenceError:
        return []


def _branches(tree: Any) -> list[set[str]]:
    operator = getattr(tree, "operator", "").strip().upper()
    if operator == "OR":
        return [branch for part in tree.args for branch in _branches(part)]
    if operator == "AND":
        joined: list[set[str]] = [set()]
        for part in tree.args:
            joined = [one | other for one in joined for other in _branches(part)]
        return joined
    return [{str(getattr(tree, "license_symbol", tree).key)}]


def covered(said: str, claim: str) -> bool:
    """Return whether a claim grants no more than a statement does: each of its branches keeps to the statement."""
    if is_public_domain(claim) and is_public_domain(said):
        return True
    ways = _ways(said)
    branches = leaves(claim)
    return bool(branches) and all(
        any(all(any(_same(mine, other) for mine in branch) for other in way) for way in ways) for branch in branches
    )


def mentions(said: str, claim: str) -> bool:
    """Return whether a licence of a statement is among those of a claim."""
    ways = _ways(said)
    return any(_same(mine, other) for branch in leaves(claim) for mine in branch for way in ways for other in way)


def _ways(said: str) -> list[frozenset[str]]:
    """Return the branches of a statement; a family or an unknown name is one by itself."""
    return [frozenset({said})] if said in FAMILIES else leaves(said) or [frozenset({said})]


def is_free(said: str) -> bool:
    """Return whether a statement asks for no more than a notice: one of its branches has permissive licences only."""
    return said in FREE_FAMILIES or any(all(one in FREE for one in way) for way in _ways(said))


def is_public_domain(claim: str) -> bool:
    """Return whether a claim says that no one has rights in the text."""
    branches = leaves(claim)
    return bool(branches) and all(one in PUBLIC_DOMAIN for branch in branches for one in branch)


def _same(claimed: str, found: str) -> bool:
    if found in FAMILIES:  # a family without its version
        return claimed == found or claimed.startswith((f"{found}-", f"{found}.")) and not _narrower(claimed, found)
    return same_licence(claimed, found)


def _narrower(claimed: str, family: str) -> bool:
    """Return whether a family's name begins that of a stricter one: CC-BY and CC-BY-NC."""
    return family == "CC-BY" and claimed.startswith(("CC-BY-NC", "CC-BY-SA", "CC-BY-ND"))


def in_text(text: str, place: str) -> list[Statement]:
    """Return the licences whose words a text holds, each once, at its first line."""
    return [Statement(f"{place}:{line}", key, "text") for key, line in licence_places(text)]


def by_name(text: str, place: str, first_line: int = 1) -> list[Statement]:
    """Return the licences that a text names, each once."""
    found: dict[str, Statement] = {}
    for match in _NAMED.finditer(text):
        name = next(name for number, (_, name) in enumerate(NAMES) if match[number + 1])
        line = first_line + text.count("\n", 0, match.start())
        found.setdefault(name, Statement(f"{place}:{line}", name, "name"))
    return list(found.values())


def in_metadata(text: str, place: str) -> list[Statement]:
    """Return what a metadata file states: JSON, TOML, YAML or `key: value` lines, a model card's front matter."""
    found = []
    if text.lstrip()[:1] in {"{", "["}:
        with contextlib.suppress(ValueError, RecursionError):
            for value in _values(json.loads(text), DEPTH):
                line = 1 + text.count("\n", 0, max(text.find(json.dumps(value)[1:-1]), 0))
                found += stated(value, f"{place}:{line}")
            return found
    for number, line_text in enumerate(text.split("\n"), 1):
        match = KEY_LINE.match(line_text)
        if match and match[1].lower() in KEYS:
            found += stated(match[2].strip(" \t\"',;[]{}"), f"{place}:{number}")
        elif line_text.strip().startswith(("Classifier: License ::", '"License ::', "'License ::", "License ::")):
            found += stated(line_text.rpartition("::")[2].strip(" \"',"), f"{place}:{number}")
    return found


def _values(value: Any, depth: int) -> Iterator[str]:
    if depth and isinstance(value, dict):
        for key, inner in value.items():
            if key.lower() in KEYS:
                yield from _texts(inner)
            else:
                yield from _values(inner, depth - 1)
    elif depth and isinstance(value, list):
        for inner in value:
            yield from _values(inner, depth - 1)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, dict):
        yield from (str(value[key]) for key in ("type", "name", "id", "text", "url", "path") if key in value)


def stated(value: str, place: str) -> list[Statement]:
    """Return what a value of metadata states: an expression, a Creative Commons address, or a name; else nothing."""
    value = value.strip()
    if re.match(r"public[ _-]domain\b", value, re.I):
        return [Statement(place, "CC-PDDC", "metadata")]
    says = of_cc_url(value) or from_free_text(value) or _dashed(value)
    if says:
        return [Statement(place, says, "metadata")]
    return [Statement(place, one.says, "metadata") for one in by_name(value[:500], place)]


def _dashed(value: str) -> str | None:
    """Return the SPDX id of a name as dataset cards write it: `cc-by-nc-4.0`, `gpl 3.0`."""
    candidate = "-".join(value.split()).replace("_", "-")
    for form in (candidate, f"{candidate}-only"):
        try:
            return normalise(form) if re.fullmatch(r"[A-Za-z0-9.+-]{2,60}", form) else None
        except LicenceError:
            continue
    return None


def of_row(fields: Mapping[str, Any], place: str, own_key: str) -> list[Statement]:
    """Return what the other keys of a row state; a value that is no licence's name is stated as it is."""
    found = []
    for key, value in fields.items():
        if str(key).lower() in KEYS and key != own_key:
            for text in filter(None, _texts(value)):
                found += stated(text, place) or [Statement(place, " ".join(text.split())[:60], "metadata")]
    return found


def conflicts(claim: str, statements: Iterable[Statement], *, around: bool) -> list[Statement]:
    """Return the statements that disagree with a claim.

    `around`: they are those of a package around the text. The package's permission says nothing against a text in which
    no one has rights, and a file that has the claimed licence may add notices of bundled parts; terms that ask for more
    than a notice (copyleft, attribution by Creative Commons, non-commercial, unknown ones) always speak against it.
    """
    statements = list(statements)
    files = {_file(one.place) for one in statements if mentions(one.says, claim)}
    whole = any(covered(one.says, claim) for one in statements if one.how == "metadata")
    shown = {one.says for one in statements}
    found = []
    for one in statements:
        if covered(one.says, claim):
            continue
        if mentions(one.says, claim):
            # One of several licences to choose from: the others must be shown as well.
            if whole or all(any(_same(mine, says) for mine in way for says in shown) for way in leaves(claim)):
                continue
        elif is_free(one.says) and (_file(one.place) in files or (around and is_public_domain(claim))):
            continue
        found.append(one)
    return found


def _file(place: str) -> str:
    return re.sub(r":\d+\Z", "", place)


def quoted(quote: str, claim: str) -> tuple[Literal["agrees", "contradicts", "silent"], list[str]]:
    """Return whether words quoted as evidence are evidence for a licence, and the licences they are of.

    Silent: nothing in them is recognised; a person has to read them.
    """
    found = [one.says for one in (*in_text(quote, ""), *by_name(quote, ""))]
    if not found:
        return "silent", []
    return "agrees" if any(mentions(says, claim) for says in found) else "contradicts", list(dict.fromkeys(found))
