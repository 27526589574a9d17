"""Tool calls in both dialects give the same events however their text is cut."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from answers import TEXTS, TOOLS, cuts, joined, parse, parse_tokens

from freehold.core.errors import CheckpointError
from freehold.tokenizer.dialects import Piece
from freehold.tokenizer.output import AnswerFormat, read_format

CUTS = 60


@pytest.mark.parametrize("calls_in_reasoning", [True, False])
@pytest.mark.parametrize(("dialect", "text"), [(d, t) for d, texts in TEXTS.items() for t in texts])
def test_any_cut_gives_the_same_events(dialect, text, calls_in_reasoning):
    options = {"dialect": dialect, "tools": TOOLS, "calls_in_reasoning": calls_in_reasoning}
    expected = joined(parse([text], **options))
    assert joined(parse(list(text), **options)) == expected
    for tokens in itertools.islice(cuts(text, random.Random(text)), CUTS):
        assert joined(parse_tokens(tokens, **options)) == expected, tokens


def calls(text, dialect, **options):
    """Return (name, arguments) of each call, arguments read, and each prefix of them is no wrong JSON."""
    found, arguments = [], ""
    for piece in parse(list(text), dialect=dialect, tools=TOOLS, **options):
        if piece.kind == "call":
            found.append((piece.name, None))
            arguments = ""
        elif piece.kind == "arguments":
            arguments += piece.text
            found[-1] = (found[-1][0], arguments)
    return [(name, json.loads(written)) for name, written in found]


def test_hermes_arguments_are_the_models_own():
    assert calls(TEXTS["hermes"][0], "hermes") == [
        ("now", {}),
        ("plan", {"city": 'Zürich " } {', "deep": {"a": [1, {"b": "]"}]}, "days": 3}),
    ]
    assert calls(TEXTS["hermes"][1], "hermes") == [("now", {"a": 1})]
    assert calls(TEXTS["hermes"][5], "hermes") == [("né", {"x": "\\"})]


def test_xml_values_have_the_types_of_the_schema():
    assert calls(TEXTS["xml"][0], "xml") == [
        ("now", {}),
        (
            "plan",
            {
                "city": 'Zürich\n\n "quoted" \\ <b> </p',
                "days": 3,
                "deep": {"a": [1, {"b": "é\n"}]},
                "share": None,
                "sure": "maybe",
                "unknown": "4",
            },
        ),
    ]
    assert calls(TEXTS["xml"][1], "xml") == [("plan", {"list": [], "either": 12, "kind": "a"})]
    assert calls(TEXTS["xml"][5], "xml") == [("plan", {"city": "no end", "days": 2})]
    assert calls(TEXTS["xml"][6], "xml") == [("plan", {"city": "", "share": "NaN"})]


@pytest.mark.parametrize("dialect", ["hermes", "xml"])
def test_arguments_come_before_their_call_ends(dialect):
    text = TEXTS[dialect][0]
    kinds = [piece.kind for piece in parse(list(text), dialect=dialect, tools=TOOLS)]
    assert kinds.count("arguments") > 20
    assert kinds.count("call") == kinds.count("call_end") == 2


@pytest.mark.parametrize(("dialect", "place"), [("hermes", 3), ("xml", 3), ("xml", 4)])
def test_cut_call_is_left_incomplete(dialect, place):
    pieces = joined(parse([TEXTS[dialect][place]], dialect=dialect, tools=TOOLS))
    assert [piece.kind for piece in pieces] == ["call", "arguments", "call_end"]
    with pytest.raises(json.JSONDecodeError):
        json.loads(pieces[1].text)


@pytest.mark.parametrize("dialect", ["hermes", "xml"])
def test_calls_in_reasoning_follow_the_policy(dialect):
    text = TEXTS[dialect][2]
    counted = joined(parse([text], dialect=dialect, tools=TOOLS))
    assert [piece.kind for piece in counted][:5] == ["reasoning", "call", "arguments", "call_end", "reasoning"]
    kept = joined(parse([text], dialect=dialect, tools=TOOLS, calls_in_reasoning=False))
    assert kept[0] == Piece("reasoning", text[len("<think>") : text.index("</think>")])
    assert kept[1].kind == "content"


def test_format_is_recorded_with_the_template(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    assert read_format(tmp_path) == AnswerFormat()
    path = tmp_path / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    recorded = {"dialect": "xml", "thinking": True, "calls_in_reasoning": False}
    path.write_text(json.dumps(facts | {"answer_format": recorded}))
    assert read_format(tmp_path) == AnswerFormat(**recorded)
    assert read_format(tmp_path / "nowhere") == AnswerFormat()
    for wrong in ({"dialect": "klingon"}, {"language": 1}, 3, {"thinking": "yes"}):
        path.write_text(json.dumps(facts | {"answer_format": wrong}))
        with pytest.raises(CheckpointError, match="answer_format is not a format"):
            read_format(tmp_path)


def test_format_is_seen_in_a_foreign_template(tmp_path):
    template = "{% for c in calls %}<tool_call><function={{ c.name }}>{% endfor %}"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template + prompt}))
    assert read_format(tmp_path) == AnswerFormat("xml", thinking=True)
    (tmp_path / "chat_template.jinja").write_text("<think> {% if add_generation_prompt %}assistant{% endif %}")
    assert read_format(tmp_path) == AnswerFormat()
