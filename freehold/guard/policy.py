"""Judges texts by the rules of a route, and says what may be shown."""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from freehold.core.errors import DataError
from freehold.guard import personal, takedown
from freehold.guard.config import Action, GuardConfig, PatternRule, PersonalRule, Place, Rule, TakedownRule
from freehold.guard.normal import Form, Span, forms

REDACTED = "[REDACTED]"


@dataclass(frozen=True)
class Finding:
    """What a rule found in a text."""

    rule: str
    action: Action
    span: Span


@dataclass(frozen=True)
class Verdict:
    """What a text is judged to be; `text` is what may be shown if nothing blocks."""

    text: str
    findings: tuple[Finding, ...] = ()

    @property
    def blocked(self) -> bool:
        """Whether a rule forbids to show anything."""
        return any(finding.action == "block" for finding in self.findings)


@dataclass
class Counts:
    """What was found and how long it took; a log keeps names of rules and hashes of texts, never texts."""

    found: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By rule, action and place"""
    judged: int = 0
    over_budget: int = 0
    seconds: float = 0.0


Detector = Callable[[str], Iterable[Span]]
Log = Callable[[str], None]


class Policy:
    """The rules that hold on one route; `log` gets findings without their text."""

    def __init__(
        self, config: GuardConfig, route: str, counts: Counts | None = None, log: Log = lambda line: None
    ) -> None:
        names = config.routes.get(route, tuple(config.rules))
        self.config, self.counts, self._log = config, counts or Counts(), log
        self._rules = [(name, config.rules[name], _detector(config.rules[name])) for name in names]

    def acts(self, place: Place, *actions: Action) -> bool:
        """Return whether a rule looks there (and does one of these)."""
        return any(place in rule.on and (not actions or rule.action in actions) for _, rule, _ in self._rules)

    @property
    def holds_answers(self) -> bool:
        """Whether an answer is shown only when it was judged to its end."""
        return self.config.hold == "answer" or self.config.hold == "auto" and self.acts("answer", "block")

    def judge(self, text: str, place: Place) -> Verdict:
        """Judge one text that is complete."""
        verdict = self.look(text, place)
        self.note(verdict.findings, text, place)
        return verdict

    def look(self, text: str, place: Place) -> Verdict:
        """Judge a text without counting what is found."""
        rules = [(name, rule, detect) for name, rule, detect in self._rules if place in rule.on]
        if not rules or not text:
            return Verdict(text)
        began = time.perf_counter()
        # Half a surrogate pair, which JSON can hold: a detector reads a question mark in its place.
        read = text if text.isascii() else text.encode(errors="replace").decode()
        findings = [
            Finding(name, rule.action, span)
            for form in forms(read)
            for name, rule, detect in rules
            for span in _found(detect, form)
        ]
        findings = list(dict.fromkeys(sorted(findings, key=lambda f: (*f.span, f.rule))))
        took = time.perf_counter() - began
        self.counts.judged += 1
        self.counts.seconds += took
        if 1000 * took > self.config.budget_ms:
            self.counts.over_budget += 1
            limit = f"the budget is {self.config.budget_ms:g} ms"
            self._log(f"guard: judging {len(text)} characters took {1000 * took:.0f} ms, {limit}")
        return Verdict(redacted(text, (f.span for f in findings if f.action == "redact")), tuple(findings))

    def note(self, findings: Iterable[Finding], text: str, place: Place) -> None:
        """Count findings and log them: the rule, the action, and a hash of the text."""
        for rule, action in sorted({(finding.rule, finding.action) for finding in findings}):
            self.counts.found[rule, action, place] += 1
            digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
            self._log(f"guard: {rule} {action} in {place}, text {digest}")


def redacted(text: str, spans: Iterable[Span]) -> str:
    """Return a text with spans, which may overlap, replaced."""
    pieces, done = [], 0
    for start, end in _joined(spans):
        pieces += [text[done:start], REDACTED]
        done = end
    return "".join([*pieces, text[done:]])


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield spans in order, those that overlap as one."""
    current: Span | None = None
    for start, end in sorted(spans):
        if current is not None and start <= current[1]:
            current = current[0], max(current[1], end)
        else:
            if current is not None:
                yield current
            current = start, end
    if current is not None:
        yield current


def _found(detect: Detector, form: Form) -> Iterator[Span]:
    return (form.origin(span) for span in detect(form.text) if span[0] < span[1])


def _detector(rule: Rule) -> Detector:
    if isinstance(rule, PersonalRule):
        kinds = frozenset(rule.find)
        return lambda text: personal.find(text, kinds)
    if isinstance(rule, PatternRule):
        compiled = [re.compile(pattern) for pattern in rule.patterns]
        return lambda text: [match.span() for pattern in compiled for match in pattern.finditer(text)]
    return _Takedown(rule).find


class _Takedown:
    """A take-down filter that is read again when its file changes, so that a request holds without a restart."""

    def __init__(self, rule: TakedownRule) -> None:
        self._path: Path = rule.filter
        self._stamp: tuple[int, int] | None = None
        self._filter = self._read()  # at start, so that a wrong file is not found out by a request

    def find(self, text: str) -> Iterable[Span]:
        """Return where spans of the filter begin and end."""
        return self._read().find(text)

    def _read(self) -> takedown.Filter:
        try:
            status = self._path.stat()
        except OSError as error:
            # Without its filter a server would say what it must not.
            raise DataError("the take-down filter is missing", where=self._path, found=error.strerror) from error
        stamp = status.st_mtime_ns, status.st_size
        if stamp != self._stamp:
            self._filter, self._stamp = takedown.load(self._path), stamp
        return self._filter
