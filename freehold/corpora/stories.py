"""Small stories from a grammar over a small world, so that each story is consistent, and questions about them.

After TinyStories (Eldan and Li 2023, arXiv:2305.07759) and bAbI (Weston et al. 2015, arXiv:1502.05698): the world knows
who is where and who has what; each sentence changes it or follows from it, and answers are read off it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

PEOPLE = {
    **dict.fromkeys(("Anna", "Bella", "Dina", "Gina", "Hanna", "Julia", "Lotta", "Nina", "Paula"), "she"),
    **dict.fromkeys(("Carlo", "Emil", "Fritz", "Ivo", "Karim", "Milo", "Otto"), "he"),
}
PLACES = (
    "garden",
    "kitchen",
    "forest",
    "library",
    "market",
    "harbour",
    "barn",
    "meadow",
    "mill",
    "school",
    "attic",
    "bakery",
)
ITEMS = (
    "red ball",
    "old key",
    "blue kite",
    "small lamp",
    "wooden horse",
    "silver bell",
    "green hat",
    "little drum",
    "brown bag",
)
WEATHER = (
    "It was a sunny morning",
    "It was a cold day",
    "It rained a little",
    "It was late in the afternoon",
    "The wind was strong",
)
WORRIES = ("{p} could not find {pos} {item} anywhere", "{pos_} {item} was gone", "{p} had lost {pos} {item}")
FEELINGS = ("sad", "worried", "a little angry", "close to tears")
LESSONS = (
    "It is good to ask a friend for help.",
    "Two pairs of eyes see more than one.",
    "Whoever looks with patience finds.",
    "A friend who helps is worth more than a thing.",
)
POSSESSIVE = {"she": "her", "he": "his"}


@dataclass
class World:
    """Who is where, and where each thing is: a place, or a person who carries it."""

    where: dict[str, str] = field(default_factory=dict)
    things: dict[str, str] = field(default_factory=dict)

    def place_of(self, thing: str) -> str:
        """Return the place a thing is at, carried or not."""
        return self.where.get(self.things[thing], self.things[thing])


@dataclass(frozen=True)
class Story:
    """A story with its title, and the questions that it answers."""

    title: str
    text: str
    questions: tuple[tuple[str, str], ...]


def stories(seed: str) -> Iterator[Story]:
    """Yield stories without end."""
    random_ = random.Random(seed)
    while True:
        yield story(random_)


def story(r: random.Random) -> Story:
    """Write one story: somebody misses a thing, a friend helps to look for it, and it is found."""
    hero, friend = r.sample(list(PEOPLE), 2)
    he, friend_he = PEOPLE[hero], PEOPLE[friend]
    item, other = r.sample(ITEMS, 2)
    start, hiding, *wrong = r.sample(PLACES, 4)
    world = World({hero: start, friend: r.choice(wrong)}, {item: hiding, other: friend})
    sentences = [f"{r.choice(WEATHER)}, and {hero} was in the {start}."]
    words = {"p": he.capitalize(), "pos": POSSESSIVE[he], "pos_": POSSESSIVE[he].capitalize(), "item": item}
    sentences.append(r.choice(WORRIES).format(**words) + f", and {he} was {r.choice(FEELINGS)}.")
    _go(world, hero, world.where[friend])
    sentences.append(f"So {hero} went to the {world.where[hero]}, where {friend} was playing with a {other}.")
    sentences.append(f'"{r.choice(("Hello", "Good day"))}, {friend}," said {hero}. "Have you seen my {item}?"')
    sentences.append(f'"No," said {friend}, "but I will help you to look for it."')
    looked = []
    for place in r.sample([p for p in wrong if p != world.where[hero]], r.randint(0, 1)):
        _go(world, hero, place)
        _go(world, friend, place)
        looked.append(place)
        sentences.append(f"First they went to the {place}. They looked {_corners(r)}, but the {item} was not there.")
    _go(world, hero, hiding)
    _go(world, friend, hiding)
    sentences.append(
        f"{'Then' if looked else 'Together'} they went to the {hiding}, and there, {_corners(r)}, lay the {item}!"
    )
    if r.random() < 0.5:
        world.things[item] = friend
        sentences.append(f"{friend} picked up the {item} and gave it to {hero}.")
    else:
        sentences.append(f"{hero} picked up the {item} and laughed.")
    world.things[item] = hero
    if r.random() < 0.5:
        world.things[other] = hero
        sentences.append(f'"You may have my {other} too," said {friend}, and {hero} thanked {_him(friend_he)}.')
    else:
        sentences.append(f'"Thank you, {friend}," said {hero}.')
    home = r.choice([start, *(p for p in PLACES if p != hiding)])
    _go(world, hero, home)
    sentences.append(f"In the evening {hero} went to the {home} with the {item}. {friend} stayed in the {hiding}.")
    sentences.append(r.choice(LESSONS))
    asked = [
        (f"Where was the {item} found?", f"In the {hiding}."),
        (f"Where is the {item} now?", f"In the {world.place_of(item)}."),
        (f"Who helped {hero}?", f"{friend}."),
        (f"Where is {friend} now?", f"In the {world.where[friend]}."),
        (f"Who has the {other} now?", f"{world.things[other]}."),
        (f"Where was {hero} at the beginning?", f"In the {start}."),
    ]
    paragraphs = [" ".join(sentences[:2]), " ".join(sentences[2:5]), " ".join(sentences[5:])]
    return Story(f"{hero} and the {item}", "\n\n".join(paragraphs), tuple(r.sample(asked, 3)))


def _go(world: World, person: str, place: str) -> None:
    world.where[person] = place


def _corners(r: random.Random) -> str:
    return r.choice(("behind a box", "under a blanket", "near the door", "in a dark corner", "between two stones"))


def _him(word: str) -> str:
    return "him" if word == "he" else "her"
