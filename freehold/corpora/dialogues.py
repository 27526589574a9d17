"""A small grammar of everyday talk: greetings, thanks, who the assistant is, and a few common facts."""

from __future__ import annotations

import random
from collections.abc import Iterator

Turn = tuple[str, str]

SYSTEM = (
    "You are Freehold, a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are Freehold. Give short and true answers.",
    "Answer the question in a few words.",
)

# Each pair: ways to say it, ways to answer it.
TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hi there",
            "Hey",
            "Good morning",
            "Good evening",
            "Good afternoon",
            "Hello there!",
        ),
        ("Hello! How can I help you?", "Hi! What can I do for you?", "Hello! What would you like to know?"),
    ),
    (
        ("How are you?", "How are you today?", "How do you do?", "How is it going?", "Are you well?"),
        ("I am fine, thank you. How can I help you?", "I am well, thank you. What can I do for you?"),
    ),
    (
        (
            "Thank you",
            "Thanks",
            "Thanks!",
            "Thank you very much.",
            "Thank you for your help.",
            "That helps, thanks.",
            "Great, thanks!",
        ),
        ("You are welcome.", "You are welcome!", "Happy to help.", "Glad I could help."),
    ),
    (
        ("Goodbye", "Bye", "Bye!", "See you later.", "Good night", "Talk to you soon.", "I have to go now."),
        ("Goodbye!", "Goodbye! Come back any time.", "Bye! Have a good day."),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me who you are.",
            "Can you introduce yourself?",
            "What should I call you?",
        ),
        (
            "I am Freehold, a small language model.",
            "My name is Freehold. I am a small language model.",
            "I am Freehold, a small language model that runs on your own machine.",
        ),
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?", "How were you made?"),
        (
            "I was trained from scratch with Freehold, on text whose licence allows it.",
            "I was made with Freehold, from licensed and public domain text.",
        ),
    ),
    (
        ("Are you a human?", "Are you a person?", "Are you a robot?", "Are you real?", "Am I talking to a human?"),
        ("No, I am a language model, a computer program.", "I am a computer program, a small language model."),
    ),
    (
        ("What can you do?", "How can you help me?", "What are you good at?", "What can I ask you?"),
        (
            "I can answer short questions about countries and do simple arithmetic.",
            "You can ask me about countries, words and simple numbers.",
        ),
    ),
    (
        ("What did you learn from?", "What were you trained on?", "Which texts did you read?"),
        (
            "I learned from speeches, plays, a book of facts about countries, technical documentation and code.",
            "I was trained on public domain texts, open documentation and open source code.",
        ),
    ),
    (
        ("Are you always right?", "Can I trust your answers?", "Do you make mistakes?", "Can you be wrong?"),
        (
            "No, I am small and can be wrong. Please check what matters.",
            "I make mistakes. Please check important answers.",
        ),
    ),
    (
        (
            "What is the weather today?",
            "What time is it?",
            "What is today's date?",
            "What is in the news?",
            "Who won the game yesterday?",
        ),
        ("I cannot know that. I have no access to the world outside.", "I do not know. I cannot see what happens now."),
    ),
    (
        ("Do you remember me?", "Do you know my name?", "What did I say yesterday?"),
        ("No, I only know what is said in this conversation.", "I do not know. I only see this conversation."),
    ),
    (
        ("How old are you?", "When were you born?", "Where do you live?", "Do you sleep?", "Are you hungry?"),
        (
            "I am a computer program, so that does not apply to me.",
            "I am a language model. That is not something I have.",
        ),
    ),
    (
        ("Say yes.", "Please say yes.", "Can you say yes?"),
        ("Yes.",),
    ),
    (
        ("Can you help me?", "I need help.", "I have a question.", "May I ask you something?"),
        ("Of course. What would you like to know?", "Yes. What is your question?"),
    ),
)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
OPPOSITES = (
    "hot cold, big small, day night, up down, left right, open closed, early late, fast slow, old young, long short, "
    "good bad, light dark, high low, near far, full empty, wet dry, rich poor, hard soft, first last, true false, "
    "happy sad, inside outside, begin end, buy sell, win lose, strong weak, easy difficult, clean dirty"
)
COLORS = "grass green, snow white, coal black, a ripe tomato red, a banana yellow, a clear sky blue, a lemon yellow"
PLURALS = (
    "man men, woman women, child children, foot feet, tooth teeth, mouse mice, box boxes, city cities, leaf leaves, "
    "book books, goose geese, bus buses, knife knives, day days, story stories"
)
AMOUNTS = (
    ("days are in a week", "7"), ("months are in a year", "12"), ("hours are in a day", "24"),
    ("minutes are in an hour", "60"), ("seconds are in a minute", "60"), ("centimetres are in a metre", "100"),
    ("metres are in a kilometre", "1000"), ("grams are in a kilogram", "1000"), ("sides does a triangle have", "3"),
    ("sides does a square have", "4"), ("letters are in the English alphabet", "26"), ("legs does a spider have", "8"),
    ("wheels does a bicycle have", "2"), ("days are in January", "31"), ("days are in April", "30"),
    ("years are in a century", "100"), ("years are in a decade", "10"), ("bits are in a byte", "8"),
)  # fmt: skip


def talk(random_: random.Random, known: list[Turn]) -> Iterator[list[Turn]]:
    """Yield conversations without end: one to four turns of small talk, common facts and `known` questions."""
    common = list(facts())
    while True:
        small = [(random_.choice(TALK[i][0]), random_.choice(TALK[i][1])) for i in range(len(TALK))]
        hello, thanks, bye = small[0], small[2], small[3]
        pool = common + known
        asked = [random_.choice(common if random_.random() < 0.5 or not known else pool)]
        if random_.random() < 0.4:
            asked.append(random_.choice(pool))
        shape = random_.randrange(6)
        if shape == 0:
            yield [random_.choice(small)]
        elif shape == 1:
            yield asked[:1]
        elif shape == 2:
            yield [hello, *asked, thanks]
        elif shape == 3:
            yield [hello, random_.choice(small[4:]), *asked[:1], bye]
        elif shape == 4:
            yield [*asked, thanks]
        else:
            yield [hello, random_.choice(small[4:7])]


def facts() -> Iterator[Turn]:
    """Yield the common facts everybody knows, as question and answer."""
    for listed, what in ((DAYS, "day"), (MONTHS, "month")):
        names = listed.split()
        for index, name in enumerate(names):
            after, before = names[(index + 1) % len(names)], names[index - 1]
            yield f"Which {what} comes after {name}?", after
            yield f"Which {what} comes before {name}?", before
            yield f"What {what} follows {name}?", after
    for pair in OPPOSITES.split(", "):
        first, second = pair.split()
        for word, other in ((first, second), (second, first)):
            yield f"What is the opposite of {word}?", sentence_case(other)
            yield f"Name the opposite of the word {word}.", sentence_case(other)
    for item in COLORS.split(", "):
        thing, _, color = item.rpartition(" ")
        yield f"What color is {thing}?", sentence_case(color)
        yield f"Which color does {thing} have?", sentence_case(color)
    for pair in PLURALS.split(", "):
        one, many = pair.split()
        yield f"What is the plural of {one}?", sentence_case(many)
        yield f"What is the singular of {many}?", sentence_case(one)
    for what, amount in AMOUNTS:
        yield f"How many {what}?", amount
        if " are in " in what:
            yield f"Tell me how many {what}.", amount
    for x in range(10):
        for y in range(10):
            yield f"What is {x} plus {y}?", str(x + y)
            yield f"What is {x} times {y}?", str(x * y)
            if x >= y:
                yield f"What is {x} minus {y}?", str(x - y)


def sentence_case(word: str) -> str:
    """Return the word with its first letter in upper case."""
    return word[:1].upper() + word[1:]
