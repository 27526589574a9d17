"""What we write ourselves is true: sums are evaluated, tools are run again, stories are read by another eye."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
from gather_fixtures import gather

from freehold.core.document import Conversation, Document, read_rows
from freehold.core.errors import RequestError
from freehold.corpora.stories import ITEMS, PLACES, stories
from freehold.corpora.tools import TOOLS, dialogues, run_tool
from freehold.corpora.worked import TASKS, exercises
from freehold.tokenizer.chat import render, render_ids

SUM = r"-?\d+(?: [-+*] -?\d+)*"
STATED = re.compile(rf"(?<![\w^/+*-] )(?<![\w^/.-])({SUM}) = ({SUM})(?![\w^/]| goes| [-+*/])")
FRACTIONS = re.compile(r"(\d+)/(\d+) = (\d+)/(\d+)")
FACTS = [("Norway", "capital", "What is the capital of Norway?", "The capital of Norway is Oslo.")]


def made(count: int = 900):
    return list(itertools.islice(exercises("seed"), count))


def test_every_line_of_a_worked_exercise_is_true():
    stated = 0
    for item in made():
        for line in item.steps:
            for left, right in STATED.findall(line):
                assert eval(left) == eval(right), (item.question, line)
                stated += 1
            for a, b, c, d in FRACTIONS.findall(line):
                assert int(a) * int(d) == int(b) * int(c), line
    assert stated > 1500
    assert eval("7 * 30") == 210
    assert STATED.findall("7 * 30 = 211") == [("7 * 30", "211")]


@pytest.mark.parametrize(
    ("task", "solve"),
    [
        ("addition", lambda n, _: str(n[0] + n[1])),
        ("subtraction", lambda n, _: str(n[1] - n[0])),
        ("multiplication", lambda n, _: str(n[0] * n[1])),
        ("division", lambda n, _: "{} remainder {}".format(*divmod(n[0], n[1]))),
        ("gcd", lambda n, _: str(max(d for d in range(1, n[0] + 1) if n[0] % d == n[1] % d == 0))),
        ("equation", lambda n, _: f"x = {(n[2] - n[1]) // n[0]}"),
        ("binary", lambda n, _: f"{n[0]:b}"),
        ("story_sum", lambda n, _: str(n[0] * n[1] - n[2])),
        ("sorting", lambda n, _: ", ".join(map(str, sorted(n)))),
        ("reverse", lambda _, q: q.split()[1][::-1]),
        ("expansion", lambda n, _: f"x^2 + {n[0] + n[1]}x + {n[0] * n[1]}"),
    ],
)
def test_answers_of_worked_exercises(task, solve):
    items = [item for item in made() if item.task == task]
    assert len(items) > 50
    for item in items:
        assert item.answer == solve([int(n) for n in re.findall(r"-?\d+", item.question)], item.question), item


def test_variables_logic_and_derivatives_by_running_them():
    for item in made():
        if item.task == "variables":
            lines, _, asked = item.question.removeprefix("Given ").partition(". What is ")
            scope: dict[str, int] = {}
            exec("\n".join(lines.split("; ")), {}, scope)
            assert item.answer == str(scope[asked.rstrip("?")]), item
        if item.task == "logic":
            scope = {name: value == "true" for name, value in re.findall(r"([ABC]) is (true|false)", item.question)}
            expression = re.search(r"Is (.*) true\?", item.question).group(1)
            assert item.answer == ("Yes" if eval(expression, {}, scope) else "No"), item
        if item.task == "derivative":
            said = re.search(r"of (.*) with", item.question).group(1)
            for x in (2, 5):
                at = [
                    eval(re.sub(r"(\d)x", r"\1*x", text).replace("^", "**"), {}, {"x": x + h})
                    for text, h in ((said, 1e-6), (said, -1e-6), (item.answer, 0))
                ]
                assert (at[0] - at[1]) / 2e-6 == pytest.approx(at[2], rel=1e-5), item


def test_exercises_are_a_function_of_the_seed_and_not_repeated():
    assert made() == made()
    assert made(30) != list(itertools.islice(exercises("other"), 30))
    questions = [item.question for item in made()]
    assert len(set(questions)) == len(questions)
    assert {item.task for item in made()} == set(TASKS)


def test_gather_writes_them_under_our_licence(tmp_path):
    more = {"worked_bytes": 9_000, "story_bytes": 5_000, "worked_conversations": 40, "tool_conversations": 30}
    source = {"kind": "generated", "reasoning": {}, "max_bytes": 1, "conversations": 0, "reasoning_items": 0, **more}
    gather(tmp_path, {"made": source})
    documents = list(read_rows(tmp_path / "documents/made.parquet", Document))
    sizes = {
        kind: sum(len(d.text.encode()) for d in documents if d.path.startswith(kind)) for kind in ("worked", "stories")
    }
    assert 7_000 < sizes["worked"] <= 9_000
    assert 4_000 < sizes["stories"] <= 5_000
    talks = list(read_rows(tmp_path / "conversations/made.parquet", Conversation))
    assert len({talk.id for talk in talks}) == len(talks) == 70
    assert sum(any("reasoning_content" in m for m in talk.messages) for talk in talks) == 40
    assert {row.licence for row in [*documents, *talks]} == {"LicenseRef-Freehold-Generated"}


def test_stories_hang_together():
    """Who moves is where the last sentence says; the reader here knows nothing of the writer's world."""
    for story in itertools.islice(stories("seed"), 300):
        hero, item = re.match(r"(\w+) and the (.*)", story.title).groups()
        assert item in ITEMS
        found = re.search(r"they went to the (\w+), and there", story.text).group(1)
        evening = re.search(rf"In the evening {hero} went to the (\w+) .* (\w+) stayed in the (\w+)\.", story.text)
        home, friend, stayed = evening.groups()
        other = re.search(r"playing with a (.*?)\.", story.text).group(1)
        expected = {
            f"Where was the {item} found?": found,
            f"Where is the {item} now?": home,
            f"Who helped {hero}?": friend,
            f"Where is {friend} now?": stayed,
            f"Who has the {other} now?": hero if "You may have my" in story.text else friend,
            f"Where was {hero} at the beginning?": re.search(rf"{hero} was in the (\w+)", story.text).group(1),
        }
        assert {found, home, stayed} <= set(PLACES)
        for question, answer in story.questions:
            assert answer.removeprefix("In the ").rstrip(".") == expected[question], story
        assert stayed == found != home


def test_tool_dialogues_are_true_and_render(tiny_tokenizer):
    kinds = set()
    for messages in itertools.islice(dialogues(random.Random(1), FACTS), 400):
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in messages[0]["tools"]}
        calls = [call for m in messages for call in m.get("tool_calls", ())]
        results = {m["tool_call_id"]: json.loads(m["content"]) for m in messages if m["role"] == "tool"}
        assert {call["id"] for call in calls} == results.keys()
        for call in calls:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            assert set(arguments) == set(offered[name]["required"])
            assert results[call["id"]] == run_tool(name, arguments, {("Norway", "capital"): FACTS[0][3]})
            kinds.add((name, len(calls), "error" in results[call["id"]]))
            value = results[call["id"]].get("result")
            if value is not None:
                assert str(value).rstrip(".") in messages[-1]["content"]
        text = render(messages, tools=messages[0]["tools"])
        assert text.count("<tool_call>") == len(calls)
        ids, mask = render_ids(tiny_tokenizer, messages, tools=messages[0]["tools"])
        learned = tiny_tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
        assert messages[-1]["content"] in learned
        assert not any(result in learned for result in ("<tool_response>", "<tools>"))
    assert {name for name, *_ in kinds} == set(TOOLS)
    assert {n for _, n, _ in kinds} == {1, 2}
    assert ("weekday", 1, True) in kinds
    with pytest.raises(RequestError):
        render(messages, tools=[{"name": "not a tool"}])
