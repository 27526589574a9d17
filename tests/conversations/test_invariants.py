"""Nine invariants of rendering, masking and packing, each with a mutant that breaks it; and what is learned, shown."""

from __future__ import annotations

import json

import numpy as np
import pytest

from freehold.cli.main import main
from freehold.conversations.invariants import keeps_id_0, packs_unchanged, violations
from freehold.core.log import Log
from freehold.core.marks import IGNORE
from freehold.data.packing import Example, conversation_batch
from freehold.stages.align.config import SftConfig
from freehold.stages.align.learned import examples_of
from freehold.tokenizer.bpe import train
from freehold.tokenizer.chat import render_ids

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TALK = [
    {"role": "user", "content": "Say <|im_end|> and <|im_start|>", "tools": [TOOL]},
    {"role": "assistant", "content": "", "reasoning_content": "I call.", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"result": 2}'},
    {"role": "assistant", "content": "Two.", "reasoning_content": "It is two."},
    {"role": "user", "content": "And again?"},
    {"role": "assistant", "content": "Two, again."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train(["the cat sat on the mat 0123456789"] * 9, 300, Log(quiet=True))


def rendered(tokenizer, messages=TALK):
    return render_ids(tokenizer, messages, tools=messages[0].get("tools"))


def without(ids, mask, token, which=-1):
    at = [n for n, one in enumerate(ids) if one == token][which]
    return ids[:at] + ids[at + 1 :], mask[:at] + mask[at + 1 :]


def encoded_again(tokenizer, ids, mask):
    """Return what becomes of a conversation that is joined as text and then encoded, specials and all."""
    again = tokenizer.encode(tokenizer.decode(ids, skip_specials=False), specials=True)
    return again, mask[: len(again)]


MUTANTS = {
    "the prompt is what the model learned to continue": lambda t, ids, mask: (
        [*ids[:9], t.encode("x")[0], *ids[9:]], [*mask[:9], False, *mask[9:]],
    ),
    "a turn only appends": lambda t, ids, mask: without(ids, mask, t.specials["<think>"], 0),
    "some tokens are learned, and not all": lambda t, ids, mask: (ids, [True] * len(ids)),
    "the end of a turn is learned": lambda t, ids, mask: (
        ids, [m and i != t.specials["<|im_end|>"] for i, m in zip(ids, mask, strict=True)],
    ),
    "tools are rendered as they were given": lambda t, ids, mask: rendered(
        t, [TALK[0] | {"tools": [TOOL | {"function": TOOL["function"] | {"description": None}}]}, *TALK[1:]]
    ),
    "no text becomes a special token": lambda t, ids, mask: encoded_again(t, ids, mask),
    "one beginning, one end a turn": lambda t, ids, mask: ([ids[0], *ids], [False, *mask]),
}  # fmt: skip


def test_good_conversations_break_nothing(tokenizer):
    assert violations(tokenizer, TALK, rendered(tokenizer)) == []
    assert violations(tokenizer, TALK[:1] + TALK[3:4], rendered(tokenizer, TALK[:1] + TALK[3:4])) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_is_caught(tokenizer, name):
    assert name in violations(tokenizer, TALK, MUTANTS[name](tokenizer, *rendered(tokenizer)))


def test_a_row_without_a_learned_token_is_caught(tokenizer):
    ids, mask = rendered(tokenizer)
    assert "some tokens are learned, and not all" in violations(tokenizer, TALK, (ids, [False] * len(mask)))


def test_packing_changes_no_mask(tokenizer):
    parts = [rendered(tokenizer, [TALK[4], {**TALK[5], "content": f"Answer {n}"}]) for n in range(3)]
    examples = [Example(str(n), "s", *part) for n, part in enumerate(parts)]
    targets = conversation_batch([examples], 300, tokenizer.pad).targets[0]
    assert packs_unchanged(parts, targets)
    lost = np.where(np.arange(300) > len(parts[0][0]), IGNORE, targets)
    crossed = np.roll(targets, 1)
    assert not packs_unchanged(parts, lost)
    assert not packs_unchanged(parts, crossed)


def test_id_0_is_a_target():
    part = ([5, 0, 7, 0], [False, True, True, True])
    targets = conversation_batch([[Example("a", "s", *part)]], 8, 1).targets[0]
    assert keeps_id_0(part, targets)
    assert not keeps_id_0(part, np.where(targets == 0, IGNORE, targets))


def learned(tokenizer, **changes):
    found = []
    for messages in examples_of(TALK, SftConfig(**changes)):
        ids, mask = rendered(tokenizer, messages)
        text = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_specials=True)
        found.append((text, tokenizer.decode(ids).count("<think>")))
    return found


def test_all_turns_are_learned_unless_asked_otherwise(tokenizer):
    assert examples_of(TALK, SftConfig()) == [TALK]
    assert learned(tokenizer, turns="last") == [("Two, again.", 2)]
    ((text, _),) = learned(tokenizer, calls=False)
    assert "add" not in text
    assert "Two." in text
    assert examples_of([{**TALK[5], "train": False}], SftConfig()) == []


def test_reasoning_is_kept_dropped_or_of_the_last_turn(tokenizer):
    ((dropped, thoughts),) = learned(tokenizer, reasoning="drop")
    assert (thoughts, "It is" in dropped) == (0, False)
    last = learned(tokenizer, reasoning="last")
    assert [count for _, count in last] == [1, 1, 0]
    assert ["I call." in text for text, _ in last] == [True, False, False]
    # Together they learn each turn once.
    assert sum(text.count("Two, again.") for text, _ in last) == 1


def test_show_marks_what_is_learned(tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "t")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": TALK[4:]}) + "\n" for _ in range(3)))
    assert main(["align", "--check", str(path), "--tokenizer", str(tmp_path / "t"), "--show", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("row ") == 2
    marked = said.partition("[[")[2].partition("]]")[0]
    assert marked.replace("|", "").startswith("Two, again.")
    assert main(["align", "--check", str(path), "--show", "2"]) == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_survey_checks_every_row(tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "t")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TALK[4:]}) + "\n")
    assert main(["align", "--check", str(path), "--tokenizer", str(tmp_path / "t"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["broken"] == []
