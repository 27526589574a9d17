"""Small procedures with one right answer and the steps to it: letters, spelling, sums, sorting, two facts in a text.

Each item is a pure function of a random generator. A held-out question is decided by its own hash, so no training
item asks it, however many are made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from freehold.corpora.worked import NAMES, Exercise

_WORDS = """able acorn anchor animal apple arrow autumn bacon basket beach bell berry bottle branch bread bridge bright
    brother bucket butter button cabin camel candle carpet castle cellar chair cherry circle clock cloud coffee
    copper corner cotton cradle cream crown daisy dinner doctor dragon drum eagle early earth elbow engine
    evening fabric farmer feather fence finger flag flower forest fountain garden ginger glass gold grape green
    guitar hammer harbor helmet honey horse house island ivory jacket jewel juice kettle kitchen kite ladder
    lake lamp lantern leaf lemon letter lily lion lizard magnet maple marble market meadow melon metal mirror
    money monkey moon mother mountain needle nest night north number ocean olive onion orange orchard otter oven
    owl paint palace paper pearl pencil pepper piano pillow planet plate pocket poem pony potato prince puzzle
    quarter queen rabbit rain ribbon river rocket roof root rose saddle salad salt sand school shadow sheep
    silver sister smoke snow spoon spring square star stone story street sugar summer sun table temple thunder
    ticket tiger timber tower train tree tulip tunnel turtle umbrella uncle valley velvet village violin wagon
    wall walnut water wheel whistle willow window winter wolf wood wool yard yellow zebra"""
WORDS = tuple(_WORDS.split())
REPEATING = tuple(word for word in WORDS if len(set(word)) < len(word))
COLOURS = ("red", "blue", "green", "white", "yellow", "grey", "brown", "black")
STREETS = ("Mill Street", "Park Lane", "Oak Road", "High Street", "Bridge Street", "Garden Lane", "Hill Road")
BOXES = ("box", "bag", "basket", "drawer", "chest", "case")
ROOMS = ("kitchen", "cellar", "garden", "hall", "attic", "library", "garage")
TRIES = 50
"""After this many repeated questions in a row a procedure passes its turn."""
Made = tuple[str, list[str], str]


def items(seed: str, keep: Callable[[str], bool]) -> Iterator[Exercise]:
    """Yield items without end, the procedures taking turns, no question twice, only questions that `keep` accepts."""
    random_ = random.Random(seed)
    seen: set[str] = set()
    while True:
        for task, make in PROCEDURES.items():
            for _ in range(TRIES):
                question, steps, answer = make(random_)
                if question not in seen and keep(question):
                    seen.add(question)
                    yield Exercise(task, question, tuple(steps), answer)
                    break


def _letters(r: random.Random) -> Made:
    # None, one and several equally often: a model that always says one would else be right in most cases.
    several = r.randrange(3)
    word = r.choice(REPEATING if several == 2 else WORDS)
    letters = {0: set("abcdefghilmnoprstu") - set(word), 1: set(word), 2: {x for x in word if word.count(x) > 1}}
    letter = r.choice(sorted(letters[several]))
    question = r.choice(
        (
            'How many times does the letter "{}" occur in the word "{}"?',
            'How often is "{}" in the word "{}"?',
            'Count the letter "{}" in "{}".',
        )
    ).format(letter, word)
    count, said = 0, []
    for one in word:
        count += one == letter
        said.append(f"{one} {count}" if one == letter else one)
    return question, [" ".join(said)], str(word.count(letter))


def _spelling(r: random.Random) -> Made:
    first, second = r.sample(WORDS, 2)
    if r.random() < 0.4:
        return f'Spell the words "{first}" and "{second}".', [], f"{' '.join(first)}, {' '.join(second)}"
    if r.random() < 0.5:
        three = r.sample(WORDS, 3)
        return f"What are the first letters of {', '.join(three)}?", [], " ".join(word[0] for word in three)
    backward = f"{' '.join(first[::-1])}, {' '.join(second[::-1])}"
    return (
        f'Spell "{first}" and "{second}" backward.',
        [f"{' '.join(first)}, {' '.join(second)}"],
        backward,
    )


def _arithmetic(r: random.Random) -> Made:
    a, b = r.randint(10, 99), r.randint(2, 99)
    if r.random() < 0.6:
        ones = a % 10 + b % 10
        carry = ones // 10
        tens = a // 10 + b // 10 + carry
        carried = f" + {carry}" if carry else ""
        steps = [f"{a % 10} + {b % 10} = {ones}", f"{a // 10} + {b // 10}{carried} = {tens}"]
        return (
            r.choice(("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?")).format(a, b),
            steps,
            str(a + b),
        )
    a, b = max(a, b), min(a, b)
    borrow = a % 10 < b % 10
    ones, tens = a % 10 + 10 * borrow, a // 10 - borrow
    steps = [f"{ones} - {b % 10} = {ones - b % 10}", f"{tens} - {b // 10} = {tens - b // 10}"]
    return r.choice(("What is {} - {}?", "How much is {} minus {}?")).format(a, b), steps, str(a - b)


def _sorting(r: random.Random) -> Made:
    words = r.sample(WORDS, r.randint(3, 5))
    ordered = sorted(words)
    asked = r.choice(
        ("Sort these words: {}.", "Put these words into alphabetical order: {}.", "Order by alphabet: {}.")
    )
    steps = [f"{' '.join(word[:2] for word in words)}", f"{' '.join(word[:2] for word in ordered)}"]
    return asked.format(", ".join(words)), steps, ", ".join(ordered)


def _two_hop(r: random.Random) -> Made:
    return _homes(r) if r.random() < 0.5 else _places(r)


def _homes(r: random.Random) -> Made:
    chain = (NAMES, COLOURS, STREETS)
    return _chain(
        r, chain, "{} lives in the {} house.", "The {} house is in {}.", "In which street does {} live?", "{}"
    )


def _places(r: random.Random) -> Made:
    chain = (WORDS, BOXES, ROOMS)
    return _chain(r, chain, "The {} is in the {}.", "The {} is in the {}.", "In which room is the {}?", "the {}")


def _chain(
    r: random.Random,
    chain: tuple[Sequence[str], Sequence[str], Sequence[str]],
    near: str,
    far: str,
    asked: str,
    said: str,
) -> Made:
    """Return a question that two shuffled facts answer: `near` leads from start to middle, `far` on to the end."""
    count = r.randint(2, 3)
    starts, middles, ends = (r.sample(words, count) for words in chain)
    first = [near.format(*pair) for pair in zip(starts, middles, strict=True)]
    second = [far.format(*pair) for pair in zip(middles, ends, strict=True)]
    at = r.randrange(count)
    lines = first + second
    r.shuffle(lines)
    return f"{' '.join(lines)} {asked.format(starts[at])}", [first[at], second[at]], said.format(ends[at])


PROCEDURES: dict[str, Callable[[random.Random], Made]] = {
    "letters": _letters,
    "spelling": _spelling,
    "arithmetic": _arithmetic,
    "sorting": _sorting,
    "two_hop": _two_hop,
}
