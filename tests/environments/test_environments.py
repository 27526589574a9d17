"""Environments: right answers score 1, what only looks like one scores 0, faults are no rewards."""

from __future__ import annotations

import json
import time

import pytest

from freehold.core.document import Conversation
from freehold.core.errors import ConfigError, DataError
from freehold.environments.audit import check, guarded, open_environment, play
from freehold.environments.protocol import EnvironmentFault, said, total
from freehold.environments.sandbox import call_function
from freehold.environments.verifiers import final_answer, matches, same_number, same_text, satisfies, valid_json

OWN = ["arithmetic", "calculator", "calendar", "files", "letters", "schema", "sorting", "spelling", "store", "two_hop"]


def opened(name, settings=None, rows=()):
    return open_environment(name, settings or {}, 0, lambda source: rows, "test")


@pytest.mark.parametrize("name", OWN)
def test_right_scores_1_and_wrong_scores_0(name):
    environment = opened(name)
    check(environment, tasks=20)
    check(environment, "held_out", tasks=5)


@pytest.mark.slow
def test_code_is_judged_by_its_results():
    check(opened("code"), tasks=3)


def test_code_that_returns_other_values_scores_0():
    environment = opened("code")
    task = environment.task("train", 0)
    assert [play(environment, task, turns) for turns in (environment.gold(task)[0], environment.wrong(task)[-1])] == [
        1,
        0,
    ]


@pytest.mark.slow
def test_gym_items_are_judged_by_their_own_scorer():
    check(opened("gym", {"task": "letter_counting"}))
    with pytest.raises(ConfigError, match="no such task"):
        opened("gym", {"task": "nonsense"})


@pytest.mark.parametrize("name", ["letters", "store"])
def test_no_task_is_in_both_splits(name):
    environment = opened(name)
    found = {split: {str(environment.task(split, n).messages) for n in range(200)} for split in ("train", "held_out")}
    assert not found["train"] & found["held_out"]
    assert environment.task("train", 7) == opened(name).task("train", 7)


RIGHTS = dict.fromkeys(
    ("source_version", "path", "sha256", "wrapper_licence", "licence_evidence", "acquired", "kind", "synthetic_from"),
    "x",
) | {"teacher": "", "split": "train"}


def rows(count, source="talk"):
    return [
        Conversation(
            id=f"c{n}", source=source, licence="CC-BY-4.0",
            messages=[{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"Step\n{n}."}],
            **RIGHTS,
        )
        for n in range(count)
    ]  # fmt: skip


def test_questions_from_conversations_inherit_their_rights():
    environment = opened("answers", {"source": "talk"}, rows(40))
    check(environment)
    task = environment.task("train", 3)
    assert (task.source, task.licence) == ("talk", "CC-BY-4.0")
    assert task.document in {f"c{n}" for n in range(40)}
    with pytest.raises(DataError, match="too few conversations"):
        opened("answers", {"source": "talk"}, rows(0))


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("3 + 4 = 7", "7", 1), ("so\nAnswer: 7.", "7", 1), ("\\boxed{1/2}", "0.5", 1), ("1,000", "1000", 1),
        ("7 or 8", "7", 0), ("7\n8", "7", 0), ("# 7", "7", 0), ("", "7", 0), ("1/0", "7", 0), ("9" * 500, "9", 0),
        ("the answer is 7", "7", 1), ("-7", "7", 0), ("7 apples", "7", 0),
    ],
)  # fmt: skip
def test_numbers_are_compared_exactly(text, answer, right):
    assert same_number(text, answer) == right


def test_text_is_the_last_line():
    assert final_answer("I think\n\nThe answer is: Paris.\n") == "Paris"
    assert same_text("PARIS", "Paris") == 1
    assert same_text("", "") == 0
    assert matches("<a>x</a>", r"<a>.*</a>") == 1 > matches("<a>x</a> y", r"<a>.*</a>")


@pytest.mark.parametrize(
    ("value", "schema", "good"),
    [
        (True, {"type": "integer"}, False), (1.0, {"type": "integer"}, False),
        ([1, "a"], {"items": {"type": "string"}}, False),
        ([1], {"type": "array", "minItems": 2}, False), ("ab", {"maxLength": 1}, False), (3, {"maximum": 2}, False),
        (None, {"type": ["null", "string"]}, True), ({"a": 1}, {"required": ["b"]}, False),
        (1, {"enum": [True]}, False),
    ],
)  # fmt: skip
def test_schema_decides_by_type_and_bounds(value, schema, good):
    assert satisfies(value, schema) is good


def test_json_is_all_of_the_answer():
    assert valid_json('{"a": 1}', {"type": "object"}) == 1
    assert valid_json('{"a": NaN}', {"type": "object"}) == 0 == valid_json('x {"a": 1}', {"type": "object"})
    assert valid_json("[" * 100_000, {}) == 0


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("return x + 1", [{"value": 2}]),
        ("return 1 / 0", [{"error": "ZeroDivisionError"}]),
        ("return [0] * 10**10", [{"error": "MemoryError"}]),
        ("import socket; socket.socket(); return 2", [{"error": "PermissionError"}]),
        ("import subprocess; subprocess.run(['true']); return 2", [{"error": "PermissionError"}]),
        ("import time; time.sleep(999); return 2", [{"value": 2}]),
        ("print('{}' * 10**6); return 2", [{"value": 2}]),
        ("return object()", []),
        ("return 'x' * 2 * 10**6", []),
    ],
)
def test_code_has_limits(body, found):
    assert call_function(f"def f(x):\n    {body}", "f", [[1]]) == found


def test_faults_are_errors_not_rewards():
    with pytest.raises(EnvironmentFault, match=r"(?s)raised an error.*KeyError"):
        guarded("x", lambda: {}["a"])
    with pytest.raises(EnvironmentFault, match="does not return"):
        guarded("x", lambda: time.sleep(5), patience_s=0.05)
    for parts in ({"correct": float("nan")}, {"form": 1.0}, {"correct": True}, {"correct": None}):
        with pytest.raises(EnvironmentFault, match="no number"):
            total(parts, "x")


def test_a_verifier_that_is_wrong_is_named():
    environment = opened("spelling")
    environment.verify = lambda text, answer: 1.0
    with pytest.raises(EnvironmentFault, match="does not know right from wrong"):
        check(environment)


def test_calls_that_cannot_be_done_change_nothing():
    environment = opened("store")
    task = environment.task("train", 0)
    start = environment.start(task)
    call = {"function": {"name": "set", "arguments": "{"}}
    reply = environment.step(task, start, {"role": "assistant", "content": "", "tool_calls": [call]})
    assert reply.state["world"] == start["world"]
    assert (reply.state["calls"], reply.state["invalid"], start["calls"]) == (1, 1, 0)
    assert "error" in json.loads(reply.messages[0]["content"])


def test_episodes_share_no_state():
    environment = opened("files")
    first, second = (environment.task("train", n) for n in (0, 1))
    gold = environment.gold(first)[0]
    before = environment.start(second)
    assert play(environment, first, gold) == 1
    assert environment.start(second) == before
    assert play(environment, first, said("Done.")) == 0
