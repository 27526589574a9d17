"""The gate: which licences may be used for what, and the refusal that names the rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import AfterValidator, Field

from freehold.core.config import Config
from freehold.core.errors import LicenceError
from freehold.ledger.known import look_up
from freehold.ledger.licence import parse

Use = Literal["train", "distill", "redistribute", "commercial"]
Decision = Literal["allow", "review", "refuse"]

PUBLIC_DOMAIN = (
    "CC0-1.0", "Unlicense", "blessing", "CC-PDDC", "LicenseRef-PD-USGov", "LicenseRef-PD-expired",
    "LicenseRef-PD-dedicated",
)  # fmt: skip
PERMISSIVE = (
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "NCSA",
    "PostgreSQL", "PSF-2.0", "Python-2.0", "Python-2.0.1", "Unicode-3.0", "Zlib", "CNRI-Python",
    "LicenseRef-Freehold-Generated",
)  # fmt: skip
ATTRIBUTION = ("CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0")
COPYLEFT = re.compile(r"(A|L)?GPL-|GFDL-|MPL-|EPL-|CDDL-|EUPL-|OSL-|MS-RL|CC-BY-SA-|Artistic-|man-pages-copyleft|OPL-1")
# What the terms of some families forbid outright, whatever the recipe allows.
FORBIDS: tuple[tuple[re.Pattern[str], Use, str], ...] = (
    (re.compile(r"CC-BY-NC|PolyForm-Noncommercial|.*[Nn]on-?[Cc]ommercial"), "commercial", "forbids commercial use"),
    (re.compile(r"CC-BY-(NC-)?ND"), "train", "forbids derived works"),
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


class Policy(Config):
    """Which licences may enter, and what the model made of them must be free to do."""

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


@dataclass(frozen=True)
class Verdict:
    """What the policy says about one expression."""

    decision: Decision
    reason: str
    """Why, naming the id that decided."""
    taken: str
    """The expression with each OR replaced by the branch the policy lets us take; empty unless allowed."""


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


@dataclass(frozen=True)
class Claim:
    """The rights a source claims for its text, judged before any text is read."""

    source: str
    source_version: str
    path: str
    wrapper_licence: str
    licence: str
    licence_evidence: str


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
    return judge(row.licence, policy)


def gate(rows: Iterable[R], policy: Policy) -> Iterator[R]:
    """Yield the rows the policy lets through; after the last one raise LicenceError if any was not.

    Read it to the end before anything is written: the error comes last so that it can name every row.
    """
    stopped: list[tuple[R, Verdict]] = []
    seen: dict[tuple[str, ...], Verdict] = {}
    for row in rows:
        key = (row.source, row.source_version, row.wrapper_licence, row.licence, row.licence_evidence)
        verdict = seen.get(key) or judge_row(row, policy)
        seen[key] = verdict
        if verdict.decision == "allow":
            yield row
        else:
            stopped.append((row, verdict))
    if stopped:
        raise _refusal(stopped)


def _refusal(stopped: list[tuple[Any, Verdict]]) -> LicenceError:
    lines = [
        f"{v.decision}: {r.source}, {r.path or '(all of it)'}: wrapper {r.wrapper_licence or 'unknown'}, "
        f"content {r.licence or 'unknown'}: {v.reason}"
        for r, v in stopped[:10]
    ]
    if len(stopped) > 10:
        lines.append(f"and {len(stopped) - 10:,} more")
    review_only = all(v.decision == "review" for _, v in stopped)
    return LicenceError(
        f"the policy stops {len(stopped):,} of the rows; nothing was written",
        where=", ".join(sorted({r.source for r, _ in stopped})),
        found="\n            ".join(lines),
        todo="decide on them: move the id to `policy.allow` or `policy.refuse`"
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
    if deciding.decision != "allow":
        return deciding
    if operator == "OR":
        return deciding
    taken = [f"({p.taken})" if " OR " in p.taken else p.taken for p in parts]
    return Verdict("allow", "; ".join(dict.fromkeys(p.reason for p in parts)), " AND ".join(dict.fromkeys(taken)))


def _judge_symbol(symbol: Any, policy: Policy) -> Verdict:
    # An exception (WITH) only gives more permission, so the licence before it decides.
    key = str(getattr(symbol, "license_symbol", symbol).key)
    for pattern, use, why in FORBIDS:
        if use in policy.uses and pattern.match(key.removeprefix("LicenseRef-")):
            return Verdict("refuse", f"{key} {why}, and the policy wants `{use}`", "")
    if key in policy.refuse:
        return Verdict("refuse", f"{key} is on the refuse list", "")
    if key in policy.allow:
        return Verdict("allow", f"{key} is allowed", str(symbol.render()))
    if key in policy.review:
        return Verdict("review", f"{key} is on the review list", "")
    if COPYLEFT.match(key):
        if policy.allow_copyleft:
            return Verdict("allow", f"{key} is allowed as copyleft", str(symbol.render()))
        return Verdict("refuse", f"{key} is copyleft and `allow_copyleft` is false", "")
    return Verdict("refuse", f"{key} is on no list of the policy", "")
