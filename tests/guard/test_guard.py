"""Guardrails: what is found whatever it is written in, and what is shown however an answer arrives."""

from __future__ import annotations

import base64
import codecs
import dataclasses
import json
import random
import urllib.parse

import pytest

from freehold.core.config import fill
from freehold.core.errors import ConfigError, DataError
from freehold.guard import takedown
from freehold.guard.config import GuardConfig
from freehold.guard.normal import forms
from freehold.guard.policy import Policy, redacted
from freehold.guard.stream import AnswerGuard
from freehold.tokenizer.dialects import Piece

SECRET = "the vault code is heliotrope"
MAIL = "jane.roe@contoso.com"


def policy(tmp_path=None, log=None, **changes) -> Policy:
    rules = {
        "words": {"kind": "pattern", "patterns": ["(?i)heliotrope"], "action": "block"},
        "people": {"kind": "personal", "find": ["email", "iban"], "action": "redact"},
        "topic": {"kind": "pattern", "patterns": ["(?i)weather"], "action": "flag"},
    }
    lines = [] if log is None else log
    return Policy(fill(GuardConfig, {"rules": rules} | changes, "guard"), "/v1/chat/completions", log=lines.append)


def blocked(text: str) -> bool:
    return policy().judge(text, "prompt").blocked


HIDDEN = {
    "plain": "heliotrope",
    "capitals": "HELIOTROPE",
    "cyrillic letters": "h\u0435li\u043etr\u043ep\u0435",
    "greek letters": "heli\u03bftrope",
    "full width": "".join(chr(ord(c) + 0xFEE0) for c in "heliotrope"),
    "zero width": "\u200b".join("heliotrope"),
    "soft hyphens": "helio\u00adtrope",
    "direction marks": "helio\u202etrope",
    "tag characters between": "helio\U000e0061trope",
    "base64": base64.b64encode(SECRET.encode()).decode(),
    "base64 for addresses": base64.urlsafe_b64encode(SECRET.encode()).decode().rstrip("="),
    "hex": SECRET.encode().hex(),
    "spaced hex": SECRET.encode().hex(" "),
    "percent": urllib.parse.quote(SECRET.replace(" ", "%20%20"), safe=""),
    "rot13": codecs.encode(SECRET, "rot13"),
    "rot13 of other letters": codecs.encode("heliotrope", "rot13").replace("o", "\u043e"),
}


@pytest.mark.parametrize("written", HIDDEN.values(), ids=HIDDEN)
def test_what_is_written_otherwise_is_found(written):
    assert blocked(f"please say: {written} now")
    assert not blocked("please say: heliotro pes now")


def test_findings_are_where_the_text_has_them():
    text = "caf\u00e9 \u200b write to j\u0430ne.roe@contoso.com\u200b, or \uff2a\uff2f\uff25@contoso.com!"
    assert policy().judge(text, "prompt").text == "caf\u00e9 \u200b write to [REDACTED]\u200b, or [REDACTED]!"
    hidden = base64.b64encode(f"write to {MAIL} today".encode()).decode()
    assert policy().judge(f"decode {hidden} please", "answer").text == "decode [REDACTED] please"
    assert redacted("abcdef", [(1, 3), (2, 4), (5, 6)]) == "a[REDACTED]e[REDACTED]"
    assert policy().judge("half \ud800 of jane.roe@contoso.com", "prompt").text == "half \ud800 of [REDACTED]"


def test_random_runs_are_not_opened():
    noise = random.Random(0).randbytes(60)
    assert len(list(forms(f"see {base64.b64encode(noise).decode()} and {noise.hex()}"))) == 2  # itself, and rot13


def test_rules_hold_by_place_and_route():
    config = {
        "rules": {
            "in": {"kind": "pattern", "patterns": ["x1"], "on": ["tools"]},
            "out": {"kind": "pattern", "patterns": ["x2"], "on": ["answer"], "action": "redact"},
        },
        "routes": {"/v1/completions": ["out"]},
    }
    guard = fill(GuardConfig, config, "guard")
    chat, text = Policy(guard, "/v1/chat/completions"), Policy(guard, "/v1/completions")
    assert chat.judge("x1", "tools").blocked
    assert not chat.judge("x1", "prompt").blocked
    assert not chat.judge("x1", "answer").blocked
    assert not text.acts("tools")
    assert text.judge("x2", "answer").text == "[REDACTED]"


def test_log_and_counts_hold_no_content():
    lines: list[str] = []
    guard = policy(log=lines)
    guard.judge(f"{SECRET} and weather, {MAIL}", "prompt")
    assert dict(guard.counts.found) == {
        ("people", "redact", "prompt"): 1, ("topic", "flag", "prompt"): 1, ("words", "block", "prompt"): 1,
    }  # fmt: skip
    assert len(lines) == 3
    assert not any("helio" in line or "jane" in line for line in lines)
    policy(log=lines, budget_ms=1e-6).judge("abc " * 50, "prompt")
    assert "the budget is" in lines[-1]


ANSWERS = [
    [Piece("content", f"Dear reader, {'this is a long sentence about nothing. ' * 40}{MAIL} was here.")],
    [Piece("content", f"{'word ' * 100}{SECRET}{' tail' * 100}")],
    [Piece("reasoning", "I know " + SECRET), Piece("content", "I can not say.")],
    [Piece("reasoning", "think " * 90), Piece("content", "line\n" * 100 + f"the mail is {MAIL}\n" + "line\n" * 90)],
    [Piece("content", "a" * 5000 + "; " + MAIL)],
    [Piece("content", "ok "), Piece("call", name="send"), Piece("arguments", json.dumps({"to": [MAIL], "n": 1})),
     Piece("call_end"), Piece("content", "sent " * 200)],
    [Piece("call", name="send"), Piece("arguments", '{"code": "heli\\u006ftrope"}'), Piece("call_end")],
    [Piece("call", name="send"), Piece("arguments", '{"text": "cut of')],
    [Piece("content", "weather " * 300)],
    [],
]  # fmt: skip


def shown(answer: list[Piece], cuts: random.Random | None, hold: str) -> tuple[bool, list[tuple[str, str, str]]]:
    """Return whether an answer is blocked, and what is shown: texts and calls, each in one piece."""
    guard, out = AnswerGuard(policy(hold=hold)), []
    for piece in answer:
        at = 0
        while piece.text and at < len(piece.text) and cuts is not None:
            size = cuts.choice([1, 2, 5, 40, 1000])
            if not guard.blocked:  # as who generates stops then
                out += guard.feed([dataclasses.replace(piece, text=piece.text[at : at + size])])
            at += size
        if cuts is None or not piece.text:
            out += [] if guard.blocked else guard.feed([piece])
    out += guard.finish()
    joined: list[tuple[str, str, str]] = []
    for piece in out:
        if joined and joined[-1][0] == piece.kind and piece.kind in ("content", "reasoning", "arguments"):
            joined[-1] = (piece.kind, joined[-1][1] + piece.text, "")
        else:
            joined.append((piece.kind, piece.text, piece.name))
    return guard.blocked, joined


@pytest.mark.parametrize("hold", ["answer", "window"])
@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_verdict_and_shown_text_do_not_depend_on_cuts(answer, hold):
    whole = shown(answer, None, hold)
    for seed in range(12):
        assert shown(answer, random.Random(seed), hold) == whole
    everything = "".join(text + name for _, text, name in whole[1])
    assert "helio" not in everything
    assert "jane" not in everything
    if hold == "answer" and whole[0]:
        assert whole[1] == [("content", "This answer was withheld by a policy.", "")]
    if not whole[0] and MAIL not in "".join(piece.text for piece in answer):
        texts = "".join(piece.text for piece in answer)
        assert everything.replace("send", "") == texts


def test_answers_are_shown_while_they_are_made():
    guard = AnswerGuard(policy(hold="window"))
    first = [len("".join(p.text for p in guard.feed([Piece("content", "some words ")]))) for _ in range(200)]
    assert sum(first) > 1000
    assert next(number for number, size in enumerate(first) if size) * 11 < 3 * 400


BOOK = "It was a bright cold day in the old harbour and the clocks of seven churches were striking nine all day long."


def test_takedown_filter_finds_what_was_removed(tmp_path):
    found = takedown.build([BOOK, "Four words of verse.", "too short"], ["the clocks of seven churches were striking"])
    takedown.save(tmp_path / "a.json", found)
    assert takedown.load(tmp_path / "a.json") == found
    assert takedown.build([BOOK], salt=found.salt).spans[10] == found.spans[10]
    assert takedown.build([BOOK], [BOOK.upper()]).spans == {}
    rule = {"kind": "takedown", "filter": str(tmp_path / "a.json"), "action": "redact"}
    guard = Policy(fill(GuardConfig, {"rules": {"gone": rule}}, "guard"), "/")
    text = f"He said: {BOOK.replace(' ', '  ')} And then? Four words  of VERSE!"
    assert guard.judge(text, "answer").text == "He said: [REDACTED]. And then? [REDACTED]!"
    assert guard.judge("It was a bright cold day in the new harbour and the clocks", "answer").text.startswith("It was")
    assert BOOK.split()[3] not in (tmp_path / "a.json").read_text()
    more = takedown.build(["another text that somebody asked us to remove from all the answers"], salt=found.salt)
    takedown.save(tmp_path / "a.json", takedown.merged(found, more))
    assert "[RED" in guard.judge("Another text that somebody asked us to remove from all", "answer").text  # no restart
    with pytest.raises(DataError, match="different salts"):
        takedown.merged(found, takedown.build([BOOK]))
    chinese = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec\u53bb\u516c\u56ed\u73a9"
    assert list(takedown.build([chinese]).find(f"\u4ed6\u8bf4{chinese}\u3002"))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"kind": "takedown_filter", "format_version": 9, "salt": "00", "spans": {}}',
             '{"kind": "takedown_filter", "format_version": 1, "salt": "zz", "spans": {}}',
             '{"kind": "takedown_filter", "format_version": 1, "salt": "00", "spans": {"0": []}}'],
)  # fmt: skip
def test_what_is_no_filter_is_refused(tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(DataError, match="not a take-down filter"):
        takedown.load(tmp_path / "f.json")


def test_missing_filter_stops_answers(tmp_path):
    takedown.save(tmp_path / "f.json", takedown.build([BOOK]))
    rules = {"gone": {"kind": "takedown", "filter": str(tmp_path / "f.json")}}
    guard = Policy(fill(GuardConfig, {"rules": rules}, "guard"), "/")
    (tmp_path / "f.json").unlink()
    with pytest.raises(DataError, match="filter is missing"):
        guard.judge(BOOK, "answer")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"kind": "pattern", "patterns": ["("]}, "no regular expression"),
        ({"kind": "pattern", "patterns": ["a*"]}, "empty text"),
        ({"kind": "pattern"}, "patterns"),
        ({"kind": "personal", "find": ["passport"]}, "no kind of personal data"),
        ({"kind": "opinion"}, "opinion"),
        ({"kind": "pattern", "patterns": ["a"], "on": ["dreams"]}, "dreams"),
    ],
)
def test_wrong_rule_is_refused_by_name(rule, said):
    with pytest.raises(ConfigError, match=said):
        fill(GuardConfig, {"rules": {"mine": rule}}, "guard")
    with pytest.raises(ConfigError, match="which is no rule"):
        fill(GuardConfig, {"routes": {"/v1/responses": ["mine"]}}, "guard")
