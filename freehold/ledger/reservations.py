"""What a site reserves today for its texts, read from a snapshot: robots.txt, ai.txt, tdmrep.json and HTTP headers.

The snapshot is a folder of the user's: `HOST/robots.txt`, `HOST/ai.txt`, `HOST/tdmrep.json` (each perhaps below
`.well-known/`) and `HOST/headers.json`, an object from path patterns to HTTP headers. Nothing is fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import Field

from freehold.core.config import Config, user_path
from freehold.core.errors import DataError
from freehold.ledger.evidence import Finding

AGENTS = (
    "GPTBot", "ClaudeBot", "anthropic-ai", "CCBot", "Google-Extended", "Applebot-Extended", "Bytespider",
    "meta-externalagent", "FacebookBot", "Amazonbot", "cohere-ai", "cohere-training-data-crawler", "PerplexityBot",
    "Diffbot", "AI2Bot", "Omgilibot", "ImagesiftBot",
)  # fmt: skip
"""User agents by which sites address those who collect text for training (arXiv 2504.06219, and their own pages)."""
FILE_BYTES = 512_000
"""More of a robots.txt is not read (RFC 9309, 2.5)."""
PAGE_MARKS = ("tdm-reservation:", "robots:")
"""How findings begin that a page's `meta` elements gave."""


@dataclass(frozen=True)
class Rule:
    """One rule that reserves an address."""

    place: str
    """`HOST/robots.txt:line`."""
    words: str

    def __str__(self) -> str:
        return f"{self.place}: {self.words}"


@dataclass(frozen=True)
class Line:
    """`Allow` or `Disallow` of a group."""

    allow: bool
    pattern: str
    number: int


@dataclass
class Robots:
    """A file in the form of RFC 9309: rules by user agent, and what is said of training for all."""

    groups: dict[str, list[Line]] = field(default_factory=dict)
    signals: list[Line] = field(default_factory=list)
    """`Content-Signal: ai-train=no` and its like: where they hold."""


def parse_robots(text: str) -> Robots:
    """Return the groups of a robots.txt; rules of several groups of one agent are one group (RFC 9309, 2.2.1)."""
    found = Robots()
    agents: list[str] = []
    open_ = False
    for number, line in enumerate(text[:FILE_BYTES].splitlines(), 1):
        key, colon, value = line.partition("#")[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            continue
        if key == "user-agent":
            agents = [*agents, value.lower()] if open_ else [value.lower()]
            open_ = True
            found.groups.setdefault(value.lower(), [])
        elif key in {"allow", "disallow"}:
            open_ = False
            for agent in agents if value else ():
                found.groups[agent].append(Line(key == "allow", value, number))
        elif key in {"content-signal", "content-usage"}:
            open_ = False
            if re.search(r"\b(?:ai-train|train-ai|tdm)\s{0,9}=\s{0,9}n(?:o)?\b", value, re.I):
                found.signals.append(Line(False, _path_of(value), number))
        elif key == "disallowaitraining" and value:
            found.signals.append(Line(False, value, number))
    return found


def _path_of(value: str) -> str:
    """Return the path that a signal is about, when it begins with one; else everything."""
    first = value.split()[0]
    return first if first.startswith("/") else "/"


def forbidding(lines: list[Line], path: str) -> Line | None:
    """Return the rule that forbids a path: of those that match the longest decides, `Allow` where two are as long."""
    matching = [line for line in lines if matches(line.pattern, path)]
    best = max(matching, key=lambda line: (len(line.pattern), line.allow), default=None)
    return None if best is None or best.allow else best


def matches(pattern: str, path: str) -> bool:
    """Return whether a rule's pattern matches a path from its start; `*` is anything, `$` its end; in linear time."""
    pattern, path = _decoded(pattern), _decoded(path)
    ended = pattern.endswith("$")
    first, *others = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    place = len(first)
    for number, piece in enumerate(others):
        if ended and number == len(others) - 1:
            return len(path) - len(piece) >= place and path.endswith(piece)
        found = path.find(piece, place)
        if found < 0:
            return False
        place = found + len(piece)
    return not ended or place == len(path)


def _decoded(path: str) -> str:
    return unquote(path, errors="replace")


class Snapshot:
    """The reservations of sites at a date, and which of their rules forbids an address."""

    def __init__(self, folder: Path, date: str, agents: tuple[str, ...] = AGENTS) -> None:
        self.folder, self.date, self.agents = folder, date, tuple(agent.lower() for agent in agents)
        self.sites = lru_cache(maxsize=10_000)(self._site)

    def rule(self, address: str) -> Rule | None:
        """Return the rule that reserves a document at an address, or None; an unknown site reserves nothing."""
        host, path = host_and_path(address)
        return next(iter(self._rules(host, path)), None) if host else None

    def files(self) -> list[Path]:
        """Return every file of the snapshot, in the order of their paths."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink())

    def _rules(self, host: str, path: str) -> Iterator[Rule]:
        for name, text in self.sites(host).items():
            place = f"{host}/{name}"
            if name == "tdmrep.json":
                yield from _tdmrep(place, text, path)
            elif name == "headers.json":
                yield from _headers(place, text, path)
            else:
                yield from self._robots(place, text, path)

    def _robots(self, place: str, text: str, path: str) -> Iterator[Rule]:
        robots = parse_robots(text)
        # ai.txt has one group for all; in robots.txt an agent without a group of its own obeys the one of `*`.
        for agent in self.agents if place.endswith("robots.txt") else ("*",):
            own = agent if agent in robots.groups else "*"
            line = forbidding(robots.groups.get(own, []), path)
            if line is not None:
                yield Rule(f"{place}:{line.number}", f"User-agent: {own} Disallow: {line.pattern} (for {agent})")
        signal = forbidding(robots.signals, path)
        if signal is not None:
            yield Rule(f"{place}:{signal.number}", "training is reserved")

    def _site(self, host: str) -> dict[str, str]:
        """Return {name: text} of what the snapshot has of a site; `www.` may be missing or more."""
        for name in (host, host.removeprefix("www."), f"www.{host}"):
            folder = self.folder / name
            if "/" not in name and name not in {"", ".", ".."} and folder.is_dir():
                found = {}
                for file in ("robots.txt", "ai.txt", "tdmrep.json", "headers.json"):
                    path = next((p for p in (folder / file, folder / ".well-known" / file) if p.is_file()), None)
                    if path is not None:
                        with path.open("rb") as opened:
                            found[file] = opened.read(FILE_BYTES).decode("utf-8-sig", "replace")
                return found
        return {}


class Reservations(Config):
    """What sites reserve today, from a snapshot of theirs: documents with a web address are compared with it."""

    snapshot: str = Field(
        description="folder with HOST/robots.txt, HOST/ai.txt, HOST/tdmrep.json and HOST/headers.json (path patterns "
        "-> HTTP headers), as far as a site has them"
    )
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="ISO date on which the snapshot was taken")
    agents: tuple[str, ...] = Field(
        default=(), description="user agents whose exclusion counts; empty: those that collect text for training"
    )

    def open(self) -> Snapshot:
        """Return the snapshot; DataError when its folder has nothing in it."""
        snapshot = Snapshot(user_path(self.snapshot), self.date, self.agents or AGENTS)
        if not snapshot.files():
            raise DataError(
                "the snapshot of what sites reserve is empty",
                where=self.snapshot,
                expected="HOST/robots.txt, HOST/ai.txt, HOST/tdmrep.json or HOST/headers.json",
            )
        return snapshot


@dataclass
class Losses:
    """The documents that sites reserve: by host, with the rule and its date."""

    snapshot: Snapshot | None = None
    hosts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def reserves(
        self,
        address: str,
        text: str,
        fetched: str = "",
        headers: Mapping[str, str] | None = None,
        findings: Iterable[Finding] = (),
    ) -> str:
        """Return why a document at an address is not taken, and count it; empty when it may be.

        `headers` (names in lower case) and `findings` are what the site said with the document on the day `fetched`.
        """
        if not address:
            return ""
        rule = self.snapshot.rule(address) if self.snapshot else None
        date = self.snapshot.date if self.snapshot else ""
        if rule is None:
            rule, date = own_rule(address, headers or {}, findings), fetched
        if rule is None:
            return ""
        host, _ = host_and_path(address)
        lost = self.hosts.setdefault(host, {"documents": 0, "bytes": 0, "date": date, "rule": str(rule)})
        lost["documents"] += 1
        lost["bytes"] += len(text.encode(errors="replace"))
        return f"reserved by its site on {date}, {rule}"

    def record(self) -> dict[str, Any]:
        """Return what sources.json says; empty when nothing was lost."""
        hosts = dict(sorted(self.hosts.items(), key=lambda item: (-item[1]["bytes"], item[0])))
        totals = {key: sum(lost[key] for lost in hosts.values()) for key in ("documents", "bytes")}
        return {"reserved": {**totals, "hosts": hosts}} if hosts else {}


def web_address(value: Any) -> str:
    """Return a web address as rows hold it; empty for anything else."""
    text = value.strip() if isinstance(value, str) else ""
    try:
        text.encode()
    except UnicodeEncodeError:
        return ""
    return text if host_and_path(text)[0] else ""


def host_and_path(address: str) -> tuple[str, str]:
    """Return the host in lower case and the path with its query; empty strings for what is no web address."""
    try:
        parts = urlsplit(address.strip())
        host = (parts.hostname or "").rstrip(".").lower()
    except ValueError:
        return "", ""
    if parts.scheme.lower() not in {"http", "https"} or not host:
        return "", ""
    return host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _tdmrep(place: str, text: str, path: str) -> Iterator[Rule]:
    """Yield the reservation of tdmrep.json: the first location that matches decides (TDMRep, 2024, 6.1)."""
    rules = _json(text)
    for number, rule in enumerate(rules if isinstance(rules, list) else [], 1):
        if isinstance(rule, dict) and matches(str(rule.get("location", "/")), path):
            if str(rule.get("tdm-reservation")) == "1":
                yield Rule(f"{place}#{number}", f"tdm-reservation: 1 for {rule.get('location', '/')}")
            return


def _headers(place: str, text: str, path: str) -> Iterator[Rule]:
    """Yield what HTTP headers of matching paths reserve."""
    rules = _json(text)
    for pattern, headers in rules.items() if isinstance(rules, dict) else ():
        if isinstance(headers, dict) and matches(str(pattern), path):
            words = header_reservation({str(key).lower(): str(value) for key, value in headers.items()})
            if words:
                yield Rule(f"{place}, {pattern}", words)


def own_rule(address: str, headers: Mapping[str, str], findings: Iterable[Finding]) -> Rule | None:
    """Return what the site said with a document that reserves it: an HTTP header, or a mark of the page."""
    if words := header_reservation(headers):
        return Rule(f"{address}, HTTP header", words)
    marks = (one.quote for one in findings if one.kind == "restriction" and one.quote.startswith(PAGE_MARKS))
    return next((Rule(f"{address}, HTML", mark) for mark in marks), None)


def header_reservation(headers: Mapping[str, str]) -> str:
    """Return the header (names in lower case) that reserves a text, or an empty string."""
    if headers.get("tdm-reservation", "").strip() == "1":
        return "tdm-reservation: 1"
    robots = headers.get("x-robots-tag", "")
    if {"noai", "noimageai"} & set(re.split(r"[\s,:]", robots.lower())):
        return f"x-robots-tag: {robots[:60]}"
    usage = " ".join(headers.get(name, "") for name in ("content-usage", "content-signal"))
    return "training is reserved" if re.search(r"\b(?:ai-train|train-ai)\s{0,9}=\s{0,9}n(?:o)?\b", usage, re.I) else ""
