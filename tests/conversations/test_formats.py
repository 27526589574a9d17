"""Every format that users bring becomes the one form that the template renders, or is refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from freehold.conversations.formats import convert, detect
from freehold.conversations.messages import Refused
from freehold.core.document import rewritten, said
from freehold.core.log import Log
from freehold.tokenizer.bpe import train
from freehold.tokenizer.chat import render, render_ids

ASK = {"role": "user", "content": "2+2?"}
SAY = {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def made(row: dict[str, Any]) -> list[dict[str, Any]]:
    return convert(row, detect(row)).messages


def answer(**fields: Any) -> dict[str, Any]:
    """Return what one message of the assistant becomes."""
    return made({"messages": [ASK, {"role": "assistant", **fields}]})[1]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("messages", {"messages": [ASK, SAY]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}),
        ("alpaca", {"instruction": "2+2?", "input": "", "output": "4"}),
        ("prompt_completion", {"prompt": "2+2?", "completion": "4"}),
        ("prompt_completion", {"prompt": [ASK], "completion": [SAY]}),
    ],
)
def test_formats_become_the_same_conversation(kind, row):
    assert detect(row) == kind
    assert made(row) == [ASK, SAY]


def test_alpaca_with_input_system_and_history():
    row = {"instruction": "Add.", "input": "2 2", "output": "4", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    roles = [(m["role"], m["content"]) for m in made(row)]
    assert roles == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n\n2 2"), ("assistant", "4")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [ASK], "chosen": [SAY], "rejected": [{"role": "assistant", "content": "5"}]},
        {"chosen": [ASK, SAY], "rejected": [ASK, {"role": "assistant", "content": "5"}]},
        {"prompt": "2+2?", "chosen": [ASK, SAY], "rejected": [ASK, {"role": "assistant", "content": "5"}]},
    ],
)
def test_pairs_keep_the_worse_answer_next_to_the_better(row):
    assert detect(row) == "preference"
    assert made(row) == [ASK, {**SAY, "rejected": [{"role": "assistant", "content": "5"}]}]


def test_margins_labels_and_tasks_are_kept():
    pair = made({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 1.5})
    assert pair[1]["margin"] == 1.5
    assert made({"prompt": "q", "completion": "a", "label": False})[1]["label"] is False
    task = {"prompt": "2+2?", "answer": 4}
    assert convert(task, detect(task)).item == {"kind": "generate", "prompt": [ASK], "answer": "4"}
    choice = {"prompt": "2+2?", "choices": ["3", "4"], "answer": "4"}
    assert convert(choice, detect(choice)).item == {
        "kind": "choice", "prompt": [ASK], "choices": ["3", "4"], "answer": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "<think>\neasy\n</think>\n\n4"},
        {"content": "4", "reasoning_content": "easy"},
        {"content": "4", "reasoning": "easy"},
        {"content": "4", "thinking": "easy\n"},
        {"content": "<think>easy</think>4", "reasoning": "easy"},
    ],
)
def test_four_places_of_reasoning_become_one(fields):
    assert answer(**fields) == {"role": "assistant", "content": "4", "reasoning_content": "easy"}


def test_empty_reasoning_is_none_and_text_before_it_is_content():
    assert answer(content="<think>\n\n</think>\n\n4") == SAY
    assert answer(content="Well. <think>x</think>4")["content"] == "Well. 4"


def test_calls_keep_spelling_and_order_wherever_they_stood():
    written = '{"b": 1.0e5, "a": "ü"}'
    inside = answer(content=f'<tool_call>\n{{"name": "add", "arguments": {written}}}\n</tool_call>')
    assert inside["content"] == ""
    assert json.loads(inside["tool_calls"][0]["function"]["arguments"]) == {"b": 100000.0, "a": "ü"}
    given = answer(content=None, tool_calls=[{"id": "1", "function": {"name": "add", "arguments": written}}])
    assert given["tool_calls"][0] == {
        "type": "function", "id": "1", "function": {"name": "add", "arguments": written}
    }  # fmt: skip
    sharegpt = made(
        {
            "conversations": [
                {"from": "system", "value": "Use tools.\n<tools>\n" + json.dumps(TOOL) + "\n</tools>"},
                {"from": "human", "value": "2+2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "<tool_response>\n4\n</tool_response>"},
                {"from": "gpt", "value": "4"},
            ]
        }
    )
    assert [m["role"] for m in sharegpt] == ["system", "user", "assistant", "tool", "assistant"]
    assert (sharegpt[0]["content"], sharegpt[0]["tools"], sharegpt[3]["content"]) == ("Use tools.", [TOOL], "4")
    assert '{"name": "add", "arguments": {"a": 2}}' in render(sharegpt, tools=sharegpt[0]["tools"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "plain"}, "has the keys of no format: text"),
        ({"messages": [ASK, SAY], "instruction": "a", "output": "b"}, "could be messages or alpaca"),
        ({"input_ids": [1], "messages": []}, "token ids"),
        ({"messages": []}, "at least one message"),
        ({"messages": [ASK, {"role": "narrator", "content": "x"}]}, "message 1 has the unknown role 'narrator'"),
        ({"messages": [ASK]}, "nothing to learn"),
        ({"messages": [ASK, {**SAY, "weight": 0}]}, "nothing to learn"),
        ({"messages": [ASK, {"role": "assistant", "content": " "}]}, "says nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAY]}, "a part of type image_url"),
        ({"messages": [ASK, {"role": "assistant", "content": 4}]}, "content of type int"),
        ({"messages": [ASK, {"role": "assistant", "content": "<think>on and on"}]}, "not closed"),
        ({"messages": [ASK, {"role": "assistant", "content": "</think>4"}]}, "not closed"),
        ({"messages": [ASK, {**SAY, "reasoning": "a", "thinking": "b"}]}, "different reasoning in reasoning and think"),
        ({"messages": [ASK, {**SAY, "tool_calls": [{"function": {"arguments": "{}"}}]}]}, "a call without a name"),
        (
            {"messages": [ASK, {**SAY, "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]}]},
            "the arguments of f are not JSON",
        ),
        ({"messages": [ASK, {**SAY, "function_call": {"name": "f", "arguments": "[1]"}}]}, "not a JSON object"),
        ({"messages": [ASK, {"role": "assistant", "content": "<tool_call>{</tool_call>"}]}, "a call are not JSON"),
        ({"messages": [ASK, SAY], "tools": [1]}, r"tools\[0\]: not a tool"),
        ({"messages": [ASK, SAY], "tools": "{"}, "its tools are not JSON"),
        ({"instruction": "a", "input": 3, "output": "b"}, "is not text"),
        ({"instruction": "a", "output": "b", "history": ["x", "yz"]}, "not a list of"),
        ({"prompt": "q", "completion": [ASK, SAY]}, "does not begin with the assistant"),
        ({"prompt": "q", "completion": 4}, "not text or lists"),
        ({"prompt": "q", "completion": "a", "label": 1}, "`label` is not true or false"),
        ({"prompt": "q", "chosen": "a"}, "`rejected` is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": -1}, "the rejected answer is the better one"),
        ({"prompt": "q", "answer": True}, "the answer of a task"),
        ({"prompt": "q", "choices": ["a"], "answer": 0}, "two or more texts"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": "c"}, "neither one of the choices"),
    ],
)
def test_rows_are_refused_with_the_reason(row, reason):
    with pytest.raises(Refused, match=reason):
        convert(row, detect(row))


def test_only_turns_with_weight_are_learned():
    tokenizer = train(["what is 2+2? 4 and 5"] * 9, 292, Log(quiet=True))
    messages = made({"messages": [ASK, {**SAY, "content": "5", "train": False}, ASK, SAY]})
    ids, mask = render_ids(tokenizer, messages)
    assert [i for i, learned in zip(ids, mask, strict=True) if learned] == [*tokenizer.encode("4"), tokenizer.eos]
    prompt = [ASK, {"role": "assistant", "content": "5"}, ASK]
    ids, mask = render_ids(tokenizer, made({"prompt": prompt, "completion": "4"}))
    assert sum(mask) == len(tokenizer.encode("4")) + 1


def test_every_text_is_seen_and_can_be_changed():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"to": "ann", "n": 5}'}}
    messages = [ASK, {**SAY, "reasoning_content": "ann", "tool_calls": [call], "rejected": [{**SAY, "content": "ann"}]}]
    assert ("assistant", "ann") in list(said(messages))
    assert len(list(said(messages))) == 5
    changed = rewritten(messages, lambda text: text.replace("ann", "[name]").replace("5", "[n]"))
    assert changed[1]["rejected"][0]["content"] == changed[1]["reasoning_content"] == "[name]"
    assert json.loads(changed[1]["tool_calls"][0]["function"]["arguments"]) == {"to": "[name]", "n": "[n]"}
    assert messages[1]["reasoning_content"] == "ann"
