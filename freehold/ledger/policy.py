"""The gate: which licences may be used for what and where, and the refusal that names the rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import AfterValidator, Field, model_validator

from freehold.core.config import Config, load_yaml, merge, user_path
from freehold.core.errors import LicenceError
from freehold.ledger.evidence import RANK, Confidence
from freehold.ledger.known import look_up
from freehold.ledger.licence import parse

Use = Literal["train", "distill", "redistribute", "commercial"]
Decision = Literal["allow", "review", "refuse"]

PUBLIC_DOMAIN = (
    "CC0-1.0", "Unlicense", "blessing", "CC-PDDC", "LicenseRef-PD-USGov", "LicenseRef-PD-expired",
    "LicenseRef-PD-dedicated", "LicenseRef-PD-mark",
)  # fmt: skip
PERMISSIVE = (
    "0BSD", "Apache-2.0", "BSD-1-Clause", "BSD-2-Clause", "BSD-2-Clause-Views", "BSD-3-Clause", "BSD-3-Clause-Clear",
    "BSL-1.0", "CNRI-Python", "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "MIT-Modern-Variant", "NCSA", "PostgreSQL",
    "PSF-2.0", "Python-2.0", "Python-2.0.1", "TCL", "Unicode-3.0", "Unicode-DFS-2016", "X11", "Zlib",
    "LicenseRef-WordNet", "LicenseRef-Freehold-Generated",
)  # fmt: skip
ATTRIBUTION = ("CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0")
COPYLEFT = re.compile(
    r"(A|L)?GPL-|GFDL-|MPL-|EPL-|CDDL-|EUPL-|OSL-|MS-RL|CC-BY-SA-|Artistic-|Linux-man-pages-copyleft|OPUBL-|Vim$"
)
# What the terms of some families forbid outright, whatever the recipe allows.
FORBIDS: tuple[tuple[re.Pattern[str], Use, str], ...] = (
    (re.compile(r"CC-BY-NC|PolyForm-Noncommercial|.*[Nn]on-?[Cc]ommercial"), "commercial", "forbids commercial use"),
    (re.compile(r"CC-BY-(NC-)?ND"), "train", "forbids derived works"),
    (re.compile(r".*[Nn]o-?[Tt]rain"), "train", "forbids training"),
    (
        re.compile(r".*[Nn]o-?[Dd]istill|(scancode-)?[Ll]lama-(2|3)-"),
        "distill",
        "forbids training others on its output",
    ),
    (re.compile(r".*[Rr]esearch-?[Oo]nly"), "commercial", "is for research only"),
    (re.compile(r".*([Rr]esearch-?[Oo]nly|[Nn]o-?[Rr]edistribution)"), "redistribute", "forbids passing it on"),
)


def _licence_id(text: str) -> str:
    """Return the id as SPDX spells it; ValueError for what no licence's id could ever equal."""
    if text in PERMISSIVE + PUBLIC_DOMAIN + ATTRIBUTION:  # no need to load the list of SPDX for the defaults
        return text
    try:
        key = getattr(parse(text), "key", None)
    except LicenceError as error:
        raise ValueError(f"an SPDX id or LicenseRef-<name>; {error.found or error.what}") from None
    if key is None:
        raise ValueError("one id an entry: an expression is taken apart and each id in it looked up by itself")
    return str(key)


LicenceId = Annotated[str, AfterValidator(_licence_id)]
Place = Annotated[str, Field(pattern=r"^[A-Z]{2}$")]


class UseRule(Config):
    """Lists for one use, merged over those of the policy; refuse wins over review, review over allow."""

    allow: tuple[LicenceId, ...] = Field(default=(), description="ids free for this use")
    review: tuple[LicenceId, ...] = Field(default=(), description="ids a person decides on before this use")
    refuse: tuple[LicenceId, ...] = Field(default=(), description="ids not free for this use")


class Note(Config):
    """What is particular about some licences in one jurisdiction; shown with every verdict on them."""

    where: str = Field(pattern=r"^[A-Z]{2}$", description="EU, or a country as ISO 3166 has it")
    licences: tuple[str, ...] = Field(description="globs over SPDX ids")
    note: str = Field(min_length=1, description="what a person should know")
    decision: Literal["review", "refuse"] | None = Field(
        default=None,
        description="what follows when this is one of the policy's `jurisdictions`; null: only shown",
    )


class Origin(Config):
    """Who made a model, a teacher or a package, and where; empty is unknown."""

    vendor: str = Field(default="", description="who made it")
    country: str = Field(default="", description="country of the vendor, as ISO 3166 has it")
    compute: str = Field(default="", description="country in which it was computed, as ISO 3166 has it")

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.model_dump().items() if value) or "unknown"


class OriginRule(Config):
    """What follows for models, teachers and packages whose origin matches every pattern given."""

    vendor: str = Field(default="*", description="glob over vendors")
    country: str = Field(default="*", description="glob over countries")
    compute: str = Field(default="*", description="glob over places of compute")
    decision: Literal["review", "refuse"] = Field(default="refuse", description="what follows")

    @model_validator(mode="after")
    def _says_something(self) -> OriginRule:
        if self.vendor == self.country == self.compute == "*":
            raise ValueError("a rule of origin needs a vendor, a country or a place of compute")
        return self

    def matches(self, origin: Origin) -> bool:
        """Return whether it is about an origin; what is unknown matches only `*`."""
        return all(
            pattern == "*" or (value and fnmatchcase(value.casefold(), pattern.casefold()))
            for pattern, value in (
                (self.vendor, origin.vendor),
                (self.country, origin.country),
                (self.compute, origin.compute),
            )
        )


NOTES = (
    Note(where="US", licences=("LicenseRef-PD-expired",), note="the term is 95 years from publication"),
    Note(where="EU", licences=("LicenseRef-PD-expired",), note="the term is the author's life and 70 years"),
    Note(
        where="EU",
        licences=("LicenseRef-PD-USGov",),
        note="17 U.S.C. 105 frees works of the United States at home; abroad they may claim copyright",
    ),
    Note(
        where="DE",
        licences=("Unlicense", "CC-PDDC", "LicenseRef-PD-dedicated"),
        note="authors cannot give up their rights; such a text is read as leave for every use",
    ),
    Note(
        where="EU",
        licences=("CC-BY-*",),
        note="attribution is due where the text is passed on; mining under Article 4 of Directive 2019/790 needs no "
        "licence unless rights are reserved",
    ),
)


MEMBER_STATES = frozenset(
    [
        "AT",
        "BE",
        "BG",
        "CY",
        "CZ",
        "DE",
        "DK",
        "EE",
        "ES",
        "FI",
        "FR",
        "GR",
        "HR",
        "HU",
        "IE",
        "IT",
        "LT",
        "LU",
        "LV",
        "MT",
        "NL",
        "PL",
        "PT",
        "RO",
        "SE",
        "SI",
        "SK",
    ]
)
"""Members of the European Union, as ISO 3166 has them."""


class Policy(Config):
    """Which licences may enter, and what the model made of them must be free to do.

    `file: PATH` takes the keys of a YAML file; the other keys are merged over them.
    """

    allow: tuple[LicenceId, ...] = Field(
        default=PERMISSIVE + PUBLIC_DOMAIN, description="SPDX ids and LicenseRefs that may be used"
    )
    review: tuple[LicenceId, ...] = Field(
        default=ATTRIBUTION, description="ids a person decides on: they stop the run until moved to allow or refuse"
    )
    refuse: tuple[LicenceId, ...] = Field(default=(), description="ids that never enter, even when allowed above")
    allow_copyleft: bool = Field(default=False, description="also allow the GPL, LGPL, MPL, CC-BY-SA, ... families")
    uses: tuple[Use, ...] = Field(
        default=("train", "distill", "redistribute", "commercial"),
        description="what the text and the model must be usable for; a licence that forbids one of them is refused",
    )
    by_use: dict[Use, UseRule] = Field(default={}, description="lists for one use alone, merged over those above")
    jurisdictions: tuple[Place, ...] = Field(
        default=(),
        description="where the model will be used, EU or a country as ISO 3166 has it: notes with a decision for one "
        "of these count",
    )
    notes: tuple[Note, ...] = Field(default=NOTES, description="what is particular in a jurisdiction")
    min_confidence: Confidence = Field(
        default="medium",
        description="rows whose evidence is weaker stop for review; low is contradicted, withheld or unread",
    )

    origins: tuple[OriginRule, ...] = Field(
        default=(), description="models, teachers and packages that stop because of who made them, or where"
    )
    unknown_origin: Decision = Field(
        default="allow", description="what follows for a model or teacher whose vendor and country are not stated"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, data: Any) -> Any:
        if isinstance(data, dict) and "file" in data:
            return merge(load_yaml(user_path(str(data["file"]))), {k: v for k, v in data.items() if k != "file"})
        return data


@dataclass(frozen=True)
class Verdict:
    """What the policy says about one expression."""

    decision: Decision
    reason: str
    """Why, naming the id that decided."""
    taken: str
    """The expression with each OR replaced by the branch the policy lets us take; empty unless allowed."""
    uses: tuple[tuple[Use, Decision], ...] = ()
    """What was decided for each use the policy wants; the worst of them is the decision."""
    notes: tuple[str, ...] = ()
    """What is particular about the deciding licences, `EU: ...`."""


class Row(Protocol):
    """What the gate looks at: any Document, Conversation or Claim."""

    @property
    def source(self) -> str:
        """Name of the source in the recipe."""

    @property
    def source_version(self) -> str:
        """Distribution and version."""

    @property
    def path(self) -> str:
        """Where in the source."""

    @property
    def wrapper_licence(self) -> str:
        """What the package declares."""

    @property
    def licence(self) -> str:
        """What the content is under."""

    @property
    def licence_evidence(self) -> str:
        """What shows it."""

    @property
    def licence_confidence(self) -> str:
        """How well: high, medium, low, or empty where it was not weighed."""


@dataclass(frozen=True)
class Claim:
    """The rights a source claims for its text, judged before any text is read."""

    source: str
    source_version: str
    path: str
    wrapper_licence: str
    licence: str
    licence_evidence: str
    licence_confidence: str = ""


R = TypeVar("R", bound=Row)
SEVERITY: dict[Decision, int] = {"allow": 0, "review": 1, "refuse": 2}


def judge(expression: str, policy: Policy) -> Verdict:
    """Judge an SPDX expression: AND needs every part allowed, OR needs one, an exception only adds permission."""
    try:
        tree = parse(expression)
    except LicenceError as error:
        return Verdict("refuse", f"unknown licence: {error.found or error.what}", "")
    return _judge_tree(tree, policy)


def judge_row(row: Row, policy: Policy) -> Verdict:
    """Judge one row by its content's licence; the wrapper's licence is no evidence of that."""
    names = [row.source, row.source_version.split("==")[0]]
    known = next((found for name in names if (found := look_up(name))), None)
    if known is not None:
        return Verdict("refuse", f"{known.name} declares {known.declared} but holds {known.reason} ({known.real})", "")
    if not row.licence.strip():
        wrapper = row.wrapper_licence or "nothing"
        return Verdict("refuse", f"the content's licence is unknown (the wrapper's, {wrapper}, does not decide)", "")
    if not row.licence_evidence.strip():
        return Verdict("refuse", "no evidence for the content's licence", "")
    verdict = judge(row.licence, policy)
    # Rows that were not weighed pass as medium: who asks for high asks that somebody weighed them.
    weak = RANK[row.licence_confidence or "medium"] < RANK[policy.min_confidence]
    if weak and verdict.decision == "allow":
        confidence = f"of {row.licence_confidence} confidence" if row.licence_confidence else "not weighed"
        return Verdict("review", f"the evidence is {confidence}: {row.licence_evidence}", "")
    return verdict


def judge_origin(what: str, origin: Origin, policy: Policy) -> Verdict:
    """Judge a model, teacher or package by who made it and where."""
    found = [rule.decision for rule in policy.origins if rule.matches(origin)]
    if found:
        return Verdict(max(found, key=SEVERITY.__getitem__), f"the policy stops {what} by its origin: {origin}", "")
    if not (origin.vendor or origin.country) and what.partition(" ")[0] in ("model", "teacher"):
        return Verdict(policy.unknown_origin, f"the origin of {what} is not stated", "")
    return Verdict("allow", f"origin: {origin}", "")


def judge_unknown(reason: str, settled: str) -> Verdict:
    """Judge a parent of which something is not known: a person decides, and says why."""
    return Verdict("allow", f"settled: {settled}", "") if settled else Verdict("review", reason, "")


def gate(rows: Iterable[R], policy: Policy) -> Iterator[R]:
    """Yield the rows the policy lets through; after the last one raise LicenceError if any was not.

    Read it to the end before anything is written: the error comes last so that it can name every row.
    """
    stopped: list[tuple[R, Verdict]] = []
    seen: dict[tuple[str, ...], Verdict] = {}
    for row in rows:
        verdict = judged(row, policy, seen)
        if verdict.decision == "allow":
            yield row
        else:
            stopped.append((row, verdict))
    if stopped:
        raise refusal(stopped, f"the policy stops {len(stopped):,} of the rows; nothing was written")


def judged(row: Row, policy: Policy, seen: dict[tuple[str, ...], Verdict]) -> Verdict:
    """Return `judge_row`, remembering in `seen` what was said of rows with the same rights."""
    rights = (row.source, row.source_version, row.wrapper_licence, row.licence, row.licence_evidence)
    key = (*rights, row.licence_confidence)
    if key not in seen:
        seen[key] = judge_row(row, policy)
    return seen[key]


def refusal(stopped: list[tuple[Any, Verdict]], what: str) -> LicenceError:
    """Return the error that names rows (or claims) the policy stopped, and why."""
    lines = [
        f"{v.decision}: {r.source}, {r.path or '(all rows)'}: wrapper {r.wrapper_licence or 'unknown'}, "
        f"content {r.licence or 'unknown'}: {v.reason}"
        for r, v in stopped[:10]
    ]
    if len(stopped) > 10:
        lines.append(f"and {len(stopped) - 10:,} more")
    review_only = all(v.decision == "review" for _, v in stopped)
    return LicenceError(
        what,
        where=", ".join(sorted({r.source for r, _ in stopped})),
        found="\n            ".join(lines),
        todo="decide on them: move the id to `policy.allow` or `policy.refuse`, or say in the source's `settled` why "
        "what speaks against it does not hold"
        if review_only
        else "take the source out of the recipe, give its content's licence with evidence, or change `policy`",
    )


def _judge_tree(tree: Any, policy: Policy) -> Verdict:
    operator = getattr(tree, "operator", "").strip().upper()
    if operator not in {"AND", "OR"}:
        return _judge_symbol(tree, policy)
    parts = [_judge_tree(part, policy) for part in tree.args]
    pick = max if operator == "AND" else min
    deciding = pick(parts, key=lambda v: SEVERITY[v.decision])
    if deciding.decision != "allow" or operator == "OR":
        return deciding
    taken = [f"({p.taken})" if " OR " in p.taken else p.taken for p in parts]
    return Verdict(
        "allow",
        "; ".join(dict.fromkeys(p.reason for p in parts)),
        " AND ".join(dict.fromkeys(taken)),
        deciding.uses,
        tuple(dict.fromkeys(note for p in parts for note in p.notes)),
    )


def _judge_symbol(symbol: Any, policy: Policy) -> Verdict:
    # An exception (WITH) only gives more permission, so the licence before it decides.
    key = str(getattr(symbol, "license_symbol", symbol).key)
    found = {use: _judge_use(key, use, policy) for use in policy.uses}
    # Of reasons as strong, what the licence itself forbids is named before what a list says.
    decision, reason, _ = max(
        found.values(), key=lambda d: (SEVERITY[d[0]], d[2]), default=(*_judge_lists(key, policy), False)
    )
    notes = tuple(
        f"{note.where}: {note.note}" for note in policy.notes if any(fnmatchcase(key, glob) for glob in note.licences)
    )
    taken = str(symbol.render()) if decision == "allow" else ""
    return Verdict(decision, reason, taken, tuple((use, d[0]) for use, d in found.items()), notes)


def _judge_use(key: str, use: Use, policy: Policy) -> tuple[Decision, str, bool]:
    """Return the decision on one licence for one use, why, and whether the licence's own terms decided."""
    for pattern, forbidden, why in FORBIDS:
        if use == forbidden and pattern.match(key.removeprefix("LicenseRef-")):
            return "refuse", f"{key} {why}, and the policy wants `{use}`", True
    if key in policy.refuse:
        return "refuse", f"{key} is on the refuse list", False
    rule = policy.by_use.get(use, UseRule())
    if key in rule.refuse:
        return "refuse", f"{key} is on the refuse list for `{use}`", False
    for note in policy.notes:
        if (
            note.decision
            and _holds(note.where, policy.jurisdictions)
            and any(fnmatchcase(key, g) for g in note.licences)
        ):
            return note.decision, f"{key} in {note.where}: {note.note}", False
    if key in rule.review:
        return "review", f"{key} is on the review list for `{use}`", False
    if key in rule.allow:
        return "allow", f"{key} is allowed for `{use}`", False
    return *_judge_lists(key, policy), False


def _holds(where: str, jurisdictions: tuple[str, ...]) -> bool:
    """Return whether a note holds in one of the places: those of the EU hold in its member states."""
    return where in jurisdictions or (where == "EU" and not MEMBER_STATES.isdisjoint(jurisdictions))


def _judge_lists(key: str, policy: Policy) -> tuple[Decision, str]:
    if key in policy.refuse:
        return "refuse", f"{key} is on the refuse list"
    if key in policy.allow:
        return "allow", f"{key} is allowed"
    if key in policy.review:
        return "review", f"{key} is on the review list"
    if COPYLEFT.match(key):
        if policy.allow_copyleft:
            return "allow", f"{key} is allowed as copyleft"
        return "refuse", f"{key} is copyleft and `allow_copyleft` is false"
    return "refuse", f"{key} is on no list of the policy"
