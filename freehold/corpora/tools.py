"""Dialogues in which the assistant calls tools: every result is computed, every answer follows from a result.

Tools are in OpenAI's form, in the key `tools` of the system message. Of ten dialogues about six need one call, one
needs two together, one lacks an argument that the assistant asks for, one needs no tool, one meets an error.
"""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

Message = dict[str, Any]
UNITS = {("kilometres", "metres"): 1000, ("hours", "minutes"): 60, ("kilograms", "grams"): 1000, ("days", "hours"): 24,
         ("metres", "centimetres"): 100, ("minutes", "seconds"): 60, ("weeks", "days"): 7}  # fmt: skip
WORDS = ("mountain", "river", "elephant", "library", "window", "question", "telephone", "butterfly", "orchestra")
OPERATIONS = {"add": ("plus", "+"), "subtract": ("minus", "-"), "multiply": ("times", "*")}
SMALL_TALK = (
    ("Thank you for your help.", "You are welcome."),
    ("Hello!", "Hello! How can I help you?"),
    ("What is the opposite of hot?", "Cold."),
    ("Which day comes after Monday?", "Tuesday."),
)


def _tool(name: str, description: str, **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_NUMBER, _TEXT = {"type": "number"}, {"type": "string"}
TOOLS = {
    "calculate": _tool(
        "calculate", "Do arithmetic.", operation={"type": "string", "enum": list(OPERATIONS)}, a=_NUMBER, b=_NUMBER
    ),
    "convert": _tool("convert", "Convert an amount to another unit.", amount=_NUMBER, unit=_TEXT, to=_TEXT),
    "weekday": _tool("weekday", "Return the day of the week of a date.", date={"type": "string", "format": "date"}),
    "count_letters": _tool("count_letters", "Count the letters of a word.", word=_TEXT),
    "country_fact": _tool("country_fact", "Look up a fact about a country.", country=_TEXT, fact=_TEXT),
}


def run_tool(name: str, arguments: dict[str, Any], facts: dict[tuple[str, str], str]) -> dict[str, Any]:
    """Return what a tool gives, or `{"error": ...}`; `facts` holds answers by (country, fact)."""
    if name == "calculate":
        a, b = arguments["a"], arguments["b"]
        return {"result": {"add": a + b, "subtract": a - b, "multiply": a * b}[arguments["operation"]]}
    if name == "convert":
        factor = UNITS.get((arguments["unit"], arguments["to"]))
        return {"result": arguments["amount"] * factor} if factor else {"error": "unknown units"}
    if name == "weekday":
        try:
            return {"result": datetime.date.fromisoformat(arguments["date"]).strftime("%A")}
        except ValueError:
            return {"error": "no such date"}
    if name == "count_letters":
        return {"result": len(arguments["word"])}
    found = facts.get((arguments["country"], arguments["fact"]))
    return {"result": found} if found else {"error": "not known"}


def dialogues(random_: random.Random, facts: Sequence[tuple[str, str, str, str]]) -> Iterator[list[Message]]:
    """Yield dialogues without end; `facts` are (country, fact, question, answer) that may be asked in training."""
    known = {(country, fact): answer for country, fact, _, answer in facts}
    while True:
        kind = random_.choice(("one",) * 6 + ("two", "ask", "none", "error"))
        if kind == "none":
            question, answer = random_.choice(SMALL_TALK)
            yield [_system(random_, []), _say("user", question), _say("assistant", answer)]
            continue
        if kind == "ask":
            date = _date(random_)
            messages = [_system(random_, ["weekday"]), _say("user", "What day of the week was it?")]
            messages += [_say("assistant", "Which date do you mean?"), _say("user", f"{date.isoformat()}.")]
            yield messages + _called(known, [("weekday", {"date": date.isoformat()}, f"It was a {date:%A}.")])
            continue
        if kind == "error":
            date_text = f"{random_.randint(1950, 2030)}-02-30"
            answer = f"There is no such date as {date_text}."
            question = f"What day of the week was {date_text}?"
            messages = [_system(random_, ["weekday"]), _say("user", question)]
            yield messages + _called(known, [("weekday", {"date": date_text}, answer)])
            continue
        wanted = [_one(random_, facts) for _ in range(2 if kind == "two" else 1)]
        if len({question for question, *_ in wanted}) < len(wanted):
            continue
        question = " And: ".join(asked for asked, *_ in wanted)
        messages = [_system(random_, [name for _, name, *_ in wanted]), _say("user", question)]
        yield messages + _called(known, [(name, arguments, answer) for _, name, arguments, answer in wanted])


def _one(r: random.Random, facts: Sequence[tuple[str, str, str, str]]) -> tuple[str, str, dict[str, Any], str]:
    """Return a question, the tool it needs, the arguments, and the answer in words."""
    name = r.choice([name for name in TOOLS if facts or name != "country_fact"])
    if name == "calculate":
        operation = r.choice(list(OPERATIONS))
        a, b = r.randint(10, 9999), r.randint(2, 999)
        value = run_tool(name, {"operation": operation, "a": a, "b": b}, {})["result"]
        word, _ = OPERATIONS[operation]
        return f"What is {a} {word} {b}?", name, {"operation": operation, "a": a, "b": b}, f"{a} {word} {b} is {value}."
    if name == "convert":
        (unit, to), factor = r.choice(list(UNITS.items()))
        n = r.randint(2, 500)
        return (
            f"How many {to} are {n} {unit}?",
            name,
            {"amount": n, "unit": unit, "to": to},
            f"{n} {unit} are {n * factor} {to}.",
        )
    if name == "weekday":
        date = _date(r)
        return f"What day of the week was {date}?", name, {"date": date.isoformat()}, f"{date} was a {date:%A}."
    if name == "count_letters":
        word = r.choice(WORDS)
        return (
            f"How many letters has the word {word}?",
            name,
            {"word": word},
            f"The word {word} has {len(word)} letters.",
        )
    country, fact, question, answer = r.choice(facts)
    return question, name, {"country": country, "fact": fact}, f"{answer.removesuffix('.')}."


def _called(known: dict[tuple[str, str], str], calls: Sequence[tuple[str, dict[str, Any], str]]) -> list[Message]:
    """Return the assistant's calls, what came back, and the answer in words."""
    made = [
        {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for n, (name, arguments, _) in enumerate(calls)
    ]
    back = [
        {"role": "tool", "tool_call_id": f"call_{n}", "content": json.dumps(run_tool(name, arguments, known))}
        for n, (name, arguments, _) in enumerate(calls)
    ]
    answer = _say("assistant", " ".join(words[:1].upper() + words[1:] for *_, words in calls))
    return [{"role": "assistant", "content": "", "tool_calls": made}, *back, answer]


def _system(r: random.Random, needed: Sequence[str]) -> Message:
    """Return a system message with the tools needed and some others, in any order."""
    others = [name for name in TOOLS if name not in needed]
    names = [*dict.fromkeys(needed), *r.sample(others, r.randint(1, 2))]
    r.shuffle(names)
    return {
        "role": "system",
        "content": "You are Freehold, a helpful assistant.",
        "tools": [TOOLS[name] for name in names],
    }


def _say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _date(r: random.Random) -> datetime.date:
    return datetime.date(1950, 1, 1) + datetime.timedelta(days=r.randrange(29_000))
