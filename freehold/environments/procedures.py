"""Small procedures with one right answer: letters, spelling, sorting, arithmetic, two steps, JSON, code.

Each is an entry point of `freehold.environments`. The right answers show short steps, so that they can be learned from.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from freehold.environments.protocol import Conversations, Environment
from freehold.environments.sandbox import call_function
from freehold.environments.single import Item, Single
from freehold.environments.verifiers import same_number, same_text, valid_json

WORDS = (
    "apple", "banana", "basket", "bridge", "butter", "candle", "carpet", "cheese", "coffee", "cotton", "dinner",
    "engine", "family", "flower", "forest", "garden", "hammer", "island", "kettle", "kitten", "ladder", "letter",
    "lesson", "market", "mirror", "needle", "orange", "pepper", "pillow", "pocket", "ribbon", "rocket", "saddle",
    "school", "silver", "summer", "tunnel", "valley", "winter", "window",
)  # fmt: skip
NAMES = ("Ada", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kim", "Lea", "Max", "Nina", "Otto")
TOWNS = ("Ardale", "Belmor", "Corvin", "Dunfel", "Elstow", "Farnby", "Gorham", "Hexley", "Ilford", "Jarrow")
COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink")


def letters(settings: Mapping[str, Any], seed: int, conversations: Conversations) -> Environment:
    """Count a letter in a word."""
    return Single("letters", "1", _letters, same_number, seed)


def spelling(settings: Mapping[str, Any], seed: int, conversations: Conversations) -> Environment:
    """Spell a word with hyphens, or backwards."""
    return Single("spelling", "1", _spelling, same_text, seed)


def sorting(settings: Mapping[str, Any], seed: int, conversations: Conversations) -> Environment:
    """Sort three to five words."""
    return Single("sorting", "1", _sorting, same_text, seed)


def arithmetic(settings: Mapping[str, Any], seed: int, conversations: Conversations) -> Environment:
    """Add or subtract; `digits` (2) of each number."""
    digits = int(settings.get("digits", 2))
    return Single("arithmetic", f"1-{digits}", lambda r: _arithmetic(r, digits), same_number, seed)


def two_hop(settings: Mapping[str, Any], seed: int, conversations: Conversations) -> Environment:
    """Answer from two of several sentences."""
    return Single("two_hop", "1", _two_hop, same_text, seed)


def schema(settings: Mapping[str, Any], seed: int, conversations: Conversations) -> Environment:
    """Write a JSON object that satisfies a schema and says what was asked."""
    return Single("schema", "1", _schema, valid_json, seed)


def code(settings: Mapping[str, Any], seed: int, conversations: Conversations) -> Environment:
    """Write a Python function; it is run on cases in a process with limits."""
    return Single("code", "1", _code, runs_right, seed)


def runs_right(text: str, answer: Mapping[str, Any]) -> float:
    """Return 1 when the function in an answer returns what it must for every case."""
    body = text
    if "```" in text:
        # The last block counts: what stands before it is explanation.
        body = text.split("```")[-2].removeprefix("python").removeprefix("\n")
    if f"def {answer['function']}(" not in body:
        return 0.0
    results = call_function(body, answer["function"], [case[0] for case in answer["cases"]])
    wanted = [{"value": case[1]} for case in answer["cases"]]
    # Through JSON, because True == 1 in Python.
    return float(json.dumps(results) == json.dumps(wanted))


def _letters(r: random.Random) -> Item:
    word = r.choice(WORDS)
    # As often one that is there as any other, or 0 would be right almost always.
    letter = r.choice(word) if r.random() < 0.8 else r.choice("abcdefghijklmnoprstuvw")
    count = word.count(letter)
    steps = " ".join(f"{c}{word[: n + 1].count(letter)}" if c == letter else c for n, c in enumerate(word))
    wrong = (str(count + 1), f"{count} or {count + 1}", "0 1 2 3")
    return Item(f'How many times is the letter "{letter}" in "{word}"?', str(count), f"{steps}\n{count}", wrong)


def _spelling(r: random.Random) -> Item:
    word = (
        r.choice(WORDS) if r.random() < 0.5 else "".join(r.choice("abcdefghilmnoprstu") for _ in range(r.randint(3, 6)))
    )
    if r.random() < 0.5:
        answer, question = "-".join(word), f'Spell "{word}" with hyphens.'
    else:
        answer, question = word[::-1], f'Write "{word}" backwards.'
    return Item(question, answer, answer, (word + "s", "-".join(word[:-1])))


def _sorting(r: random.Random) -> Item:
    words = r.sample(WORDS, r.randint(3, 5))
    answer = " ".join(sorted(words))
    return Item(
        f"Sort these words: {' '.join(words)}",
        answer,
        answer,
        (" ".join(sorted(words, reverse=True)), " ".join(sorted(words)[:-1])),
    )


def _arithmetic(r: random.Random, digits: int) -> Item:
    a, b = r.randrange(10**digits), r.randrange(10**digits)
    if r.random() < 0.5:
        sign, value = "+", a + b
    else:
        a, b = max(a, b), min(a, b)
        sign, value = "-", a - b
    gold = f"{a} {sign} {b} = {value}"
    return Item(f"What is {a} {sign} {b}?", str(value), gold, (str(value + 1), f"{a} {sign} {b}", f"{value}/0"))


def _two_hop(r: random.Random) -> Item:
    people, towns = r.sample(NAMES, 3), r.sample(TOWNS, 3)
    colours = r.sample(COLOURS, 3)
    lines = [f"{p} lives in {t}." for p, t in zip(people, towns, strict=True)]
    lines += [f"The houses of {t} are {c}." for t, c in zip(towns, colours, strict=True)]
    r.shuffle(lines)
    at = r.randrange(3)
    question = f"{' '.join(lines)} What colour is the house of {people[at]}?"
    gold = f"{people[at]} lives in {towns[at]}.\n{colours[at]}"
    return Item(question, colours[at], gold, (colours[(at + 1) % 3], " ".join(colours), towns[at]))


def _schema(r: random.Random) -> Item:
    name, town, age = r.choice(NAMES), r.choice(TOWNS), r.randint(20, 80)
    made = {"name": name, "age": age, "town": town}
    properties = {
        key: {"type": "integer" if key == "age" else "string", "enum": [value]} for key, value in made.items()
    }
    wanted = {"type": "object", "properties": properties, "required": sorted(made), "additionalProperties": False}
    question = f'{name} is {age} and lives in {town}. Say so as JSON with "name", "age" and "town".'
    wrong = (
        json.dumps({**made, "age": str(age)}), json.dumps({"name": name}), json.dumps({**made, "more": 1}),
        json.dumps({**made, "age": age + 1}), f"```json\n{json.dumps(made)}", "{}", "null",
    )  # fmt: skip
    return Item(question, wanted, json.dumps(made), wrong)


_FUNCTIONS = (
    ("multiply", "x", "returns x times {n}", "return x * {n}", lambda x, n: x * n),
    ("power", "x", "returns x * x plus {n}", "return x * x + {n}", lambda x, n: x * x + n),
    ("is_multiple", "x", "says whether x is a multiple of {n}", "return x % {n} == 0", lambda x, n: x % n == 0),
    ("repeat", "x", "returns a list with x in it {n} times", "return [x] * {n}", lambda x, n: [x] * n),
    ("digits", "x", "returns the sum of the digits of x plus {n}", "return sum(map(int, str(x))) + {n}",
     lambda x, n: sum(map(int, str(x))) + n),
)  # fmt: skip


def _code(r: random.Random) -> Item:
    function, argument, does, body, value = r.choice(_FUNCTIONS)
    n = r.randint(2, 99)
    inputs = [0, 1, *r.sample(range(2, 1000), 3), n, 2 * n]
    answer = {"function": function, "cases": [[[x], value(x, n)] for x in inputs]}
    head = f"def {function}({argument}):\n    "
    question = f"Write a Python function `{function}({argument})` that {does.format(n=n)}."
    wrong = (
        head + "pass", head + "while True: pass", head + "raise SystemExit", head + f"return {n}",
        head + "# " + body.format(n=n) + "\n    return None", head + "return __import__('os').listdir('/')",
        head + "return open('/etc/passwd').read()", "import os; os._exit(0)\n" + head + body.format(n=n),
        head + "class A(int):\n        def __eq__(self, o): return True\n    return A()",
    )  # fmt: skip
    return Item(question, answer, f"```python\n{head}{body.format(n=n)}\n```", wrong)
