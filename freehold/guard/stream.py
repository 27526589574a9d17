"""Answers as they may be shown: held, judged, redacted or withheld; the same however the text arrives.

A text is cut into passages by its own characters: at the first white space after PASSAGE_CHARS. Each passage is judged
together with the one before and the one after it, then shown. Where answers are held, all of a text is one passage.
So what is shown depends on the answer alone: not on tokens, on cuts, or on whether it is streamed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from freehold.guard.normal import Span
from freehold.guard.policy import Finding, Policy, redacted
from freehold.tokenizer.dialects import Kind, Piece

PASSAGE_CHARS = 400
"""What is found across passages is shorter than two of them."""
LONGEST_CHARS = 4 * PASSAGE_CHARS
"""Where a passage without white space ends."""


class TextGuard:
    """One text of an answer: its content, or its reasoning."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._all: list[str] = []
        self._rest = ""
        self._waiting: str | None = None
        """The passage that is not shown yet, since its neighbour has not come."""
        self._spans: list[Span] = []
        """What is redacted there"""
        self.findings: list[Finding] = []
        self.blocked = False

    def feed(self, text: str) -> str:
        """Take some text; return what may be shown now."""
        self._all.append(text)
        self._rest += text
        shown = ""
        while not (self.blocked or self._policy.holds_answers) and (end := _passage_end(self._rest)):
            passage, self._rest = self._rest[:end], self._rest[end:]
            shown += self._add(passage)
        return shown

    def finish(self) -> str:
        """Return the rest of what may be shown, and count what was found."""
        alone = self._waiting is None
        shown = self._add(self._rest) if self._rest and not self.blocked else ""
        if alone and self._waiting is not None:  # a text of one passage has no neighbour to be judged with
            self._judge("", self._waiting)
        if not self.blocked and self._waiting is not None:
            shown += redacted(self._waiting, self._spans)
        self._policy.note(self.findings, "".join(self._all), "answer")
        return shown

    def _add(self, passage: str) -> str:
        """Take the next passage; return the one before it, which was judged with all its neighbours now."""
        before, self._waiting = self._waiting, passage
        if before is None:
            return ""
        spans, self._spans = self._spans, []
        spans += self._judge(before, passage)
        # Nothing of a passage with a blocked finding is shown, and nothing after it.
        return "" if self.blocked and self._first_blocked < len(before) else redacted(before, spans)

    def _judge(self, before: str, passage: str) -> list[Span]:
        """Judge two passages that follow each other; return the spans to redact in the first."""
        findings = self._policy.look(before + passage, "answer").findings
        self.findings += findings
        at = len(before)
        blocked = [f.span[0] for f in findings if f.action == "block"]
        self._first_blocked = min(blocked, default=at)
        self.blocked = bool(blocked)
        spans = [f.span for f in findings if f.action == "redact"]
        self._spans += [(max(start - at, 0), end - at) for start, end in spans if end > at]
        return [(start, min(end, at)) for start, end in spans if start < at]


class AnswerGuard:
    """One answer: its texts and its tool calls, in the order in which they come."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._text: TextGuard | None = None
        self._kind: Kind = "content"
        self._call: list[Piece] = []
        self._held: list[Piece] = []
        self._shown = False
        self.blocked = False

    def feed(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Take pieces of the answer; return those that may be shown now."""
        return self._release([shown for piece in pieces for shown in self._take(piece)])

    def finish(self) -> list[Piece]:
        """Return the rest that may be shown; when the answer is withheld, the message that says so."""
        self._held += self._close()
        pieces, self._held = ([] if self._withheld else self._held), []
        if self.blocked and not self._shown:
            return [Piece("content", self._policy.config.message)]
        return pieces

    @property
    def _withheld(self) -> bool:
        return self.blocked and self._policy.holds_answers

    def _release(self, pieces: list[Piece]) -> list[Piece]:
        if self._policy.holds_answers:
            self._held += pieces
            return []
        self._shown |= bool(pieces)
        return pieces

    def _take(self, piece: Piece) -> list[Piece]:
        if self.blocked and not self._policy.holds_answers:
            return []
        if piece.kind in ("content", "reasoning"):
            closed = self._close() if piece.kind != self._kind or self._text is None else []
            if self._text is None:
                self._text, self._kind = TextGuard(self._policy), piece.kind
            return closed + self._as_piece(self._text.feed(piece.text))
        closed = self._close() if piece.kind == "call" else []
        self._call.append(piece)
        return closed + (self._end_call() if piece.kind == "call_end" else [])

    def _close(self) -> list[Piece]:
        """End the text, or a call that was cut."""
        pieces = self._as_piece(self._text.finish()) if self._text is not None else []
        self._text = None
        return pieces + (self._end_call() if self._call else [])

    def _as_piece(self, shown: str) -> list[Piece]:
        assert self._text is not None
        self.blocked |= self._text.blocked
        return [Piece(self._kind, shown)] if shown else []

    def _end_call(self) -> list[Piece]:
        """Judge a call: its name, and its arguments as they are written and as they are meant."""
        call, self._call = self._call, []
        arguments = "".join(piece.text for piece in call if piece.kind == "arguments")
        texts = [call[0].name, arguments, *_strings(arguments)]
        findings = [finding for text in texts for finding in self._policy.look(text, "answer").findings]
        self._policy.note(findings, call[0].name + arguments, "answer")
        if any(finding.action == "block" for finding in findings):
            self.blocked = True
            return []
        if any(finding.action == "redact" for finding in findings):
            arguments = self._redact_arguments(arguments)
        ends = [piece for piece in call if piece.kind == "call_end"]
        return [call[0], *([Piece("arguments", arguments)] if arguments else []), *ends]

    def _redact_arguments(self, arguments: str) -> str:
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return self._policy.look(arguments, "answer").text
        return json.dumps(_mapped(value, lambda text: self._policy.look(text, "answer").text), ensure_ascii=False)


def _strings(arguments: str) -> list[str]:
    found: list[str] = []
    try:
        _mapped(json.loads(arguments), lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    except (ValueError, RecursionError):
        return []
    return found


def _mapped(value: Any, change: Any) -> Any:
    """Return JSON with every string changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return value


def _passage_end(text: str) -> int:
    """Return where the first passage of a text ends; 0 when that is not known yet."""
    for at in range(PASSAGE_CHARS, min(len(text), LONGEST_CHARS) + 1):
        if text[at - 1].isspace():
            return at
    return LONGEST_CHARS if len(text) >= LONGEST_CHARS else 0
