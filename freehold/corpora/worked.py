"""Exercises with every step written out: arithmetic as it is done on paper, and small symbolic tasks.

Each is a pure function of a random generator; what a line says (`a + b = c`) is true, and a test evaluates it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

WORDS = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "market", "needle", "orange", "pocket", "quarry", "ribbon", "saddle", "temple", "velvet", "window",
    "yellow", "zebra",
)  # fmt: skip
NAMES = (
    "Ada",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Hugo",
    "Ida",
    "Jonas",
    "Lena",
    "Max",
    "Nora",
    "Oskar",
)
THINGS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "stones", "tickets", "walnuts")

TRIES = 20
"""After this many repeated questions in a row a task passes its turn."""


@dataclass(frozen=True)
class Exercise:
    """A question, how it is solved line by line, and the answer."""

    task: str
    question: str
    steps: tuple[str, ...]
    answer: str


def exercises(seed: str) -> Iterator[Exercise]:
    """Yield exercises without end, the tasks taking turns while they have something new, no question twice."""
    random_ = random.Random(seed)
    seen: set[str] = set()
    while True:
        for task, make in TASKS.items():
            for _ in range(TRIES):
                question, steps, answer = make(random_)
                if question not in seen:
                    seen.add(question)
                    yield Exercise(task, question, tuple(steps), answer)
                    break


Made = tuple[str, list[str], str]


def _addition(r: random.Random) -> Made:
    a, b = r.randint(11, 9999), r.randint(11, 9999)
    steps, carry = [], 0
    for place, name in enumerate(("ones", "tens", "hundreds", "thousands")):
        x, y = a // 10**place % 10, b // 10**place % 10
        if 10**place > max(a, b):
            break
        total = x + y + carry
        said = f"{x} + {y} + {carry} = {total}" if carry else f"{x} + {y} = {total}"
        carry = total // 10
        steps.append(f"{name.capitalize()}: {said}, write {total % 10}" + (f", carry {carry}." if carry else "."))
    if carry:
        steps.append(f"The carry {carry} stands in front.")
    return f"Add {a} and {b} digit by digit.", [*steps, f"{a} + {b} = {a + b}"], str(a + b)


def _subtraction(r: random.Random) -> Made:
    b, d = r.randint(11, 999), r.randint(11, 999)
    a = b + d
    ten = -(-b // 10) * 10
    steps = [f"From {b} to {ten}: {ten} - {b} = {ten - b}", f"From {ten} to {a}: {a} - {ten} = {a - ten}"]
    steps = steps if ten < a else [f"Count up from {b}: {b} + {d} = {a}"]
    total = [f"Together: {ten - b} + {a - ten} = {d}"] if ten < a else []
    return f"Subtract {b} from {a} by counting up.", [*steps, *total, f"{a} - {b} = {d}"], str(d)


def _multiplication(r: random.Random) -> Made:
    a, b = r.randint(12, 999), r.randint(3, 99)
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(a))) if digit != "0"][::-1]
    products = [part * b for part in parts]
    steps = [f"{a} = {' + '.join(map(str, parts))}"]
    steps += [f"{part} * {b} = {product}" for part, product in zip(parts, products, strict=True)]
    if len(products) > 1:
        steps.append(f"{' + '.join(map(str, products))} = {a * b}")
    return f"Multiply {a} by {b} in parts.", steps, str(a * b)


def _division(r: random.Random) -> Made:
    d, a = r.randint(2, 12), r.randint(100, 9999)
    steps, rest, quotient = [], 0, ""
    for digit in str(a):
        now = rest * 10 + int(digit)
        times = now // d
        if times or quotient:
            quotient += str(times)
            steps.append(
                f"{now} / {d} goes {times} times: {times} * {d} = {times * d}, {now} - {times * d} = {now % d}"
            )
        rest = now % d
    check = f"Check: {a // d} * {d} + {a % d} = {a}"
    return f"Divide {a} by {d} with remainder.", [*steps, check], f"{a // d} remainder {a % d}"


def _gcd(r: random.Random) -> Made:
    common = r.randint(1, 20)
    a, b = sorted((common * r.randint(2, 40), common * r.randint(2, 40)), reverse=True)
    x, y, steps = a, b, list[str]()
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    steps.append(f"The remainder is 0, so {x} divides both.")
    return f"What is the greatest common divisor of {a} and {b}?", steps, str(math.gcd(a, b))


def _equation(r: random.Random) -> Made:
    a, x, b = r.randint(2, 12), r.randint(-12, 20), r.randint(1, 40)
    c = a * x + b
    steps = [f"{a} * x + {b} = {c}", f"Take {b} from both sides: {c} - {b} = {c - b}", f"So {a} * x = {c - b}"]
    steps += [f"Divide by {a}: {c - b} / {a} = {x}", f"Check: {a} * {x} + {b} = {c}"]
    return f"Solve {a} * x + {b} = {c} for x.", steps, f"x = {x}"


def _binary(r: random.Random) -> Made:
    n = r.randint(5, 255)
    steps, rest, digits = [], n, ""
    while rest:
        steps.append(f"{rest} = 2 * {rest // 2} + {rest % 2}")
        digits, rest = str(rest % 2) + digits, rest // 2
    return f"Write {n} in binary.", [*steps, f"The remainders from last to first: {digits}"], digits


def _fraction(r: random.Random) -> Made:
    b, d = r.randint(2, 9), r.randint(2, 9)
    a, c = r.randint(1, b), r.randint(1, d)
    m = math.lcm(b, d)
    x, y = a * m // b, c * m // d
    steps = [f"The common denominator of {b} and {d} is {m}."]
    steps += [f"{a}/{b} = {x}/{m} and {c}/{d} = {y}/{m}", f"{x} + {y} = {x + y}, so the sum is {x + y}/{m}"]
    common = math.gcd(x + y, m)
    if common > 1:
        steps.append(f"Divide both by {common}: {(x + y) // common}/{m // common}")
    top, bottom = (x + y) // common, m // common
    return f"Add the fractions {a}/{b} and {c}/{d}.", steps, f"{top}/{bottom}" if bottom > 1 else str(top)


def _story_sum(r: random.Random) -> Made:
    (one, two), thing = r.sample(NAMES, 2), r.choice(THINGS)
    bags, each, gone = r.randint(2, 9), r.randint(3, 20), r.randint(1, 5)
    total = bags * each
    question = (
        f"{one} has {bags} bags with {each} {thing} in each. {one} gives {gone} {thing} to {two}. "
        f"How many {thing} does {one} have now?"
    )
    steps = [
        f"In the bags are {bags} * {each} = {total} {thing}.",
        f"After the gift: {total} - {gone} = {total - gone}",
    ]
    return question, steps, str(total - gone)


def _variables(r: random.Random) -> Made:
    names = r.sample("abcdfghkmnpqrst", r.randint(3, 5))
    values, lines, steps = dict[str, int](), list[str](), list[str]()
    for name in names:
        if not values or r.random() < 0.25:
            values[name] = r.randint(1, 20)
            lines.append(f"{name} = {values[name]}")
            steps.append(f"{name} is {values[name]}.")
            continue
        other, n, add = r.choice(list(values)), r.randint(1, 9), r.random() < 0.5
        before = values[other]
        values[name] = before + n if add else before - n
        sign = "+" if add else "-"
        lines.append(f"{name} = {other} {sign} {n}")
        steps.append(f"{name} is {before} {sign} {n} = {values[name]}")
    asked = names[-1]
    return f"Given {'; '.join(lines)}. What is {asked}?", steps, str(values[asked])


def _sorting(r: random.Random) -> Made:
    numbers = r.sample(range(1, 100), r.randint(4, 6))
    done, steps = list[int](), list[str]()
    for n in numbers:
        done = sorted([*done, n])
        steps.append(f"Put in {n}: {', '.join(map(str, done))}")
    return f"Sort the numbers {', '.join(map(str, numbers))}.", steps, ", ".join(map(str, done))


def _reverse(r: random.Random) -> Made:
    word = "".join(r.choice(WORDS).upper()[: r.randint(3, 6)])
    steps = [f"The letters are {', '.join(word)}.", f"From last to first: {', '.join(reversed(word))}."]
    return f"Spell {word} backward.", steps, word[::-1]


def _logic(r: random.Random) -> Made:
    a, b, c = (r.random() < 0.5 for _ in range(3))
    inner, first, second = r.choice(("and", "or")), *r.choice((("not ", ""), ("", "not "), ("", "")))
    outer = "or" if inner == "and" else "and"
    x, y = (not a if first else a), (not b if second else b)
    both = (x and y) if inner == "and" else (x or y)
    result = (both and c) if outer == "and" else (both or c)
    question = f"A is {_truth(a)}, B is {_truth(b)}, C is {_truth(c)}. Is ({first}A {inner} {second}B) {outer} C true?"
    steps = [
        f"{first}A is {_truth(x)}, {second}B is {_truth(y)}.",
        f"{_truth(x)} {inner} {_truth(y)} is {_truth(both)}.",
    ]
    return question, [*steps, f"{_truth(both)} {outer} {_truth(c)} is {_truth(result)}."], "Yes" if result else "No"


def _expansion(r: random.Random) -> Made:
    a, b = r.randint(1, 12), r.randint(1, 12)
    steps = ["x * x = x^2", f"x * {b} + {a} * x = {a + b}x", f"{a} * {b} = {a * b}"]
    return f"Expand (x + {a})(x + {b}).", steps, f"x^2 + {a + b}x + {a * b}"


def _derivative(r: random.Random) -> Made:
    powers = sorted(r.sample(range(1, 6), r.randint(2, 3)), reverse=True)
    terms = [(r.randint(2, 9), power) for power in powers]
    steps = [f"{_term(c, p)} becomes {_term(c * p, p - 1)}, as {c} * {p} = {c * p}." for c, p in terms]
    said, made = (" + ".join(_term(c, p) for c, p in list_) for list_ in (terms, [(c * p, p - 1) for c, p in terms]))
    return f"What is the derivative of {said} with respect to x?", steps, made


def _term(factor: int, power: int) -> str:
    return f"{factor}" if power == 0 else f"{factor}x" if power == 1 else f"{factor}x^{power}"


def _truth(value: bool) -> str:
    return "true" if value else "false"


TASKS: dict[str, Callable[[random.Random], Made]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "division": _division,
    "gcd": _gcd,
    "equation": _equation,
    "binary": _binary,
    "fraction": _fraction,
    "story_sum": _story_sum,
    "variables": _variables,
    "sorting": _sorting,
    "reverse": _reverse,
    "logic": _logic,
    "expansion": _expansion,
    "derivative": _derivative,
}
