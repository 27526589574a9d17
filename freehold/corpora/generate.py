"""Text, conversations and held-out tasks made from facts, definitions, reasoning-gym and grammars of our own.

Nothing held out is written anywhere for training: neither a fact chosen for `factbook_heldout` (in any phrasing)
nor a question of `reasoning`. The factbook's own prose does hold every fact; what is held out is being asked for it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from freehold.core.document import Conversation, Document, Rights, document_id
from freehold.corpora import dialogues, dictd, stories, tools, worked
from freehold.corpora.config import Settings
from freehold.corpora.factbook import Fact, facts, sentence
from freehold.corpora.reasoning import SEEDS_PER_RUN, Gym
from freehold.corpora.wordnet import Lexicon
from freehold.ledger.licence import strictest
from freehold.text.html import strip_html
from freehold.text.making import Made, Material
from freehold.text.reading import Reading

PAIRS_PER_PAGE = 12
WORKED_PER_PAGE = 6
# Shares of the conversations: facts, reasoning; the rest is talk.
FACT_SHARE, REASONING_SHARE = 0.42, 0.40
SYSTEM_SHARE = 0.15
# The word that decides, with country and field, which facts are held out.
HOLD_OUT = "hold-out"
# Held out of everything written: a fifth is enough facts for two tasks of 150 items from one factbook.
HELD_OUT_SHARE = 0.2
ASKED, ANSWERED = "Question: ", "Answer: "


def make(source: Settings, materials: Mapping[str, Material], name: str, seed: int) -> Made:
    """Return the documents, conversations and tasks of a generated source; a pure function of its arguments."""
    gym = Gym(source.reasoning, seed)
    book = _Factbook(source, materials.get("factbook"), seed)
    words = _WordNet(name, source, materials.get("wordnet"), seed)
    rights = {
        "facts": book.rights(name, source),
        "reasoning": _rights(name, source, strictest(source.licence, gym.licence), gym.version, gym.acquired),
        "talk": _rights(name, source, source.licence, "", gym.acquired),
    }
    reasoning_out = list(gym.held_out(source.reasoning_items))
    never = {item.question for item in reasoning_out} | {q for f in book.held_out for q in f.questions}

    documents = [*_documents(source, gym, book, rights, seed), *_our_documents(source, rights["talk"], never, seed)]
    conversations = list(_conversations(source, gym, book, rights, seed))
    conversations += _worked_conversations(source, rights["talk"], never, seed)
    conversations += _tool_conversations(source, book, rights["facts"] or rights["talk"], seed)
    documents += words.documents(never)
    conversations += words.conversations(never)
    asked = {m["content"] for c in conversations for m in c.messages if m["role"] == "user"}
    asked |= {line.removeprefix(ASKED) for d in documents for line in d.text.split("\n") if line.startswith(ASKED)}
    assert not asked & never, f"held-out questions would be trained on: {asked & never}"

    tasks = {}
    if reasoning_out:
        tasks["reasoning"] = [
            {
                "id": f"reasoning/{item.place}",
                "task": item.task,
                "kind": "generate",
                "prompt": [{"role": "user", "content": item.question}],
                "answer": item.answer,
                "seen": False,
                "source": rights["reasoning"]["synthetic_from"],
                "licence": rights["reasoning"]["licence"],
            }
            for item in reasoning_out
        ]
    for task, chosen in (("factbook_heldout", book.held_out), ("factbook_seen", book.train)):
        rows = list(book.choices(task, chosen, source.factbook_items, rights["facts"]))
        if rows:
            tasks[task] = rows
    return Made(documents, conversations, tasks, {"seeds": gym.seeds})


class _Factbook:
    """The facts, divided by the hash of (country, field) into those asked in training and those held out."""

    def __init__(self, source: Settings, material: Material | None, seed: int) -> None:
        self.material, self.seed = material, seed
        self.train: list[Fact] = []
        self.held_out: list[Fact] = []
        if material is None:
            return
        reading = Reading(material.limit_bytes)
        for fact in reading.each(material.members, lambda m, text: facts(json.loads(text), m.path, strip_html)):
            held = _unit(f"{HOLD_OUT}\0{fact.key}") < HELD_OUT_SHARE
            (self.held_out if held else self.train).append(fact)

    def rights(self, name: str, source: Settings) -> dict[str, Any]:
        return {} if self.material is None else _derived_rights(name, source, self.material)

    def choices(self, task: str, chosen: list[Fact], count: int, rights: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield multiple-choice items: the other answers are those of other countries to the same question."""
        everywhere: dict[str, set[str]] = {}
        for fact in self.train + self.held_out:
            everywhere.setdefault(fact.field.key, set()).add(fact.answer)
        able = sorted((f for f in chosen if f.field.choice), key=lambda f: _unit(f"{task}\0{f.key}"))
        for fact in able[:count]:
            random_ = random.Random(f"{self.seed}\0{task}\0{fact.key}")
            # An answer that holds the right one, or is held by it, could be right as well.
            wrong = [
                a
                for a in sorted(everywhere[fact.field.key])
                if a.lower() not in fact.answer.lower() and fact.answer.lower() not in a.lower()
            ]
            if len(wrong) < 3:
                continue
            options = [*random_.sample(wrong, 3), fact.answer]
            random_.shuffle(options)
            yield {
                "id": f"{task}/{document_id(task, fact.key)}",
                "task": fact.field.key,
                "kind": "choice",
                "prompt": [{"role": "user", "content": fact.questions[0]}],
                "choices": [sentence(o) for o in options],
                "answer": options.index(fact.answer),
                "seen": task == "factbook_seen",
                "source": f"{rights['synthetic_from']} {fact.path}",
                "licence": rights["licence"],
            }


class _WordNet:
    """Questions about a dictionary's words, one for a word as each part of speech: in conversations, then on pages.

    Nothing without a source, also where the policy left it out.
    """

    def __init__(self, name: str, source: Settings, material: Material | None, seed: int) -> None:
        self.source = source
        self.rights: dict[str, Any] = {}
        self.lexicon = Lexicon((), seed)
        if material is None:
            return
        reading = Reading(material.limit_bytes)
        entries = list(reading.each_bytes(material.members, lambda m, data: dictd.entries(m, data, reading)))
        self.rights = _derived_rights(name, source, material)
        self.lexicon = Lexicon(entries, seed)

    def conversations(self, never: set[str]) -> Iterator[Conversation]:
        for question, answer in self._pairs(never, slice(self.source.wordnet_conversations)):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": sentence(answer)}]
            yield _row(self.rights, "wordnet", messages)

    def documents(self, never: set[str]) -> Iterator[Document]:
        pairs = self._pairs(never, slice(self.source.wordnet_conversations, None))
        left = self.source.wordnet_bytes
        for number in itertools.count():
            page = [(question, sentence(answer)) for question, answer in itertools.islice(pairs, PAIRS_PER_PAGE)]
            text = _page("Words and their meanings", page)
            left -= len(text.encode())
            if left < 0 or not page:
                return
            yield _document(self.rights, f"wordnet/{number:05d}", text)

    def _pairs(self, never: set[str], which: slice) -> Iterator[tuple[str, str]]:
        return (pair for pair in self.lexicon.pairs(self.lexicon.askable[which]) if pair[0] not in never)


def _documents(
    source: Settings, gym: Gym, book: _Factbook, rights: dict[str, dict[str, Any]], seed: int
) -> Iterator[Document]:
    """Yield pages of questions and answers until `max_bytes`: first the facts, then reasoning."""
    left = source.max_bytes if source.max_bytes is not None else 2_400_000
    pages = itertools.chain(_fact_pages(book, seed), _reasoning_pages(gym))
    for kind, path, text in pages:
        size = len(text.encode())
        if size > left:
            return
        left -= size
        yield _document(rights[kind], path, text)


def _fact_pages(book: _Factbook, seed: int) -> Iterator[tuple[str, str, str]]:
    countries: dict[tuple[str, str], list[Fact]] = {}
    kinds: dict[str, list[Fact]] = {}
    for fact in book.train:
        countries.setdefault((fact.path, fact.country), []).append(fact)
        kinds.setdefault(fact.field.key, []).append(fact)
    for (path, country), known in countries.items():
        random_ = random.Random(f"{seed}\0{path}")
        said = [f.statement for f in known]
        random_.shuffle(said)
        yield "facts", f"facts/{path}#statements", f"{sentence(country)}\n\n" + " ".join(said) + "\n"
        pairs = [(random_.choice(f.questions), sentence(f.answer)) for f in known]
        random_.shuffle(pairs)
        yield "facts", f"facts/{path}#questions", _page(f"Questions about {country}", pairs)
    for kind, known in kinds.items():
        random_ = random.Random(f"{seed}\0{kind}")
        random_.shuffle(known)
        for number, start in enumerate(range(0, len(known), PAIRS_PER_PAGE)):
            batch = known[start : start + PAIRS_PER_PAGE]
            pairs = [(random_.choice(f.questions), sentence(f.answer)) for f in batch]
            yield "facts", f"facts/{kind}#{number}", _page("Countries of the world", pairs)


def _reasoning_pages(gym: Gym) -> Iterator[tuple[str, str, str]]:
    items = gym.train(0)
    for number in itertools.count():
        batch = list(itertools.islice(items, PAIRS_PER_PAGE))
        if not batch:
            return
        yield "reasoning", f"reasoning/{number:05d}", _page("Exercises", [(i.question, i.answer) for i in batch])


def _page(title: str, pairs: list[tuple[str, str]]) -> str:
    return f"{title}\n\n" + "\n\n".join(f"{ASKED}{q}\n{ANSWERED}{a}" for q, a in pairs) + "\n"


def _conversations(
    source: Settings, gym: Gym, book: _Factbook, rights: dict[str, dict[str, Any]], seed: int
) -> Iterator[Conversation]:
    """Yield at most `source.conversations`, each different: facts, reasoning, talk."""
    random_ = random.Random(f"{seed}\0conversations")
    asked = [(q, sentence(f.answer), f) for f in book.train for q in f.questions]
    random_.shuffle(asked)
    facts_wanted = min(int(source.conversations * FACT_SHARE), len(asked))
    for question, answer, fact in asked[:facts_wanted]:
        yield _conversation(rights["facts"], f"facts/{fact.path}#{fact.field.key}", [(question, answer)], random_)
    wanted = int(source.conversations * REASONING_SHARE) if source.reasoning else 0
    items = itertools.islice(gym.train(SEEDS_PER_RUN // 2), wanted)
    reasoning_made = 0
    for item in items:
        reasoning_made += 1
        yield _conversation(rights["reasoning"], item.place, [(item.question, item.answer)], random_)
    # Talk mixes in facts that are asked in training, so it falls under their terms.
    mixed = rights["facts"] or rights["talk"]
    known = [(q, a) for q, a, _ in asked[:500]]
    seen: set[tuple[tuple[str, str], ...]] = set()
    for number, turns in enumerate(dialogues.talk(random_, known)):
        if len(seen) >= source.conversations - facts_wanted - reasoning_made or number > 20 * source.conversations:
            return
        if tuple(turns) not in seen:
            seen.add(tuple(turns))
            yield _conversation(mixed, "talk", turns, random_)


def _our_documents(source: Settings, rights: dict[str, Any], never: set[str], seed: int) -> Iterator[Document]:
    """Yield pages of worked exercises until `worked_bytes`, of stories until `story_bytes`."""
    pages = (
        ("worked", source.worked_bytes, _worked_pages(never, seed)),
        ("stories", source.story_bytes, (_story_page(story) for story in stories.stories(f"{seed}\0stories"))),
    )
    for kind, left, texts in pages:
        for number, text in enumerate(texts):
            left -= len(text.encode())
            if left < 0:
                break
            yield _document(rights, f"{kind}/{number:05d}", text)


def _worked(never: set[str], seed: str) -> Iterator[worked.Exercise]:
    return (exercise for exercise in worked.exercises(seed) if exercise.question not in never)


def _worked_pages(never: set[str], seed: int) -> Iterator[str]:
    items = _worked(never, f"{seed}\0worked pages")
    while True:
        page = (
            "\n".join([ASKED + item.question, *item.steps, ANSWERED + item.answer])
            for item in itertools.islice(items, WORKED_PER_PAGE)
        )
        yield "Worked exercises\n\n" + "\n\n".join(page) + "\n"


def _story_page(story: stories.Story) -> str:
    pairs = "\n\n".join(f"{ASKED}{q}\n{ANSWERED}{a}" for q, a in story.questions)
    return f"{story.title}\n\n{story.text}\n\n{pairs}\n"


def _worked_conversations(
    source: Settings, rights: dict[str, Any], never: set[str], seed: int
) -> Iterator[Conversation]:
    for item in itertools.islice(_worked(never, f"{seed}\0worked talk"), source.worked_conversations):
        answer = {"role": "assistant", "content": item.answer, "reasoning_content": "\n".join(item.steps)}
        yield _row(rights, f"worked/{item.task}", [{"role": "user", "content": item.question}, answer])


def _tool_conversations(source: Settings, book: _Factbook, rights: dict[str, Any], seed: int) -> Iterator[Conversation]:
    known = [(f.country, f.field.key, f.questions[0], f.statement) for f in book.train]
    for messages in itertools.islice(_tool_talk(seed, known), source.tool_conversations):
        yield _row(rights, "tools", messages)


def _tool_talk(seed: int, known: list[tuple[str, str, str, str]]) -> Iterator[list[dict[str, Any]]]:
    """Yield tool dialogues, each different."""
    seen: set[str] = set()
    for messages in tools.dialogues(random.Random(f"{seed}\0tools"), known):
        text = json.dumps(messages, sort_keys=True)
        if text not in seen:
            seen.add(text)
            yield messages


def _conversation(
    rights: dict[str, Any], path: str, turns: list[tuple[str, str]], random_: random.Random
) -> Conversation:
    messages: list[dict[str, Any]] = []
    if random_.random() < SYSTEM_SHARE:
        messages.append({"role": "system", "content": random_.choice(dialogues.SYSTEM)})
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _row(rights, path, messages)


def _row(rights: dict[str, Any], path: str, messages: list[dict[str, Any]]) -> Conversation:
    text = json.dumps(messages, sort_keys=True)
    place = f"{path}#{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    filled = Rights(**rights | {"path": place, "sha256": digest, "kind": "conversation"})
    return Conversation(**vars(filled), id=document_id(filled.source, place), messages=messages)


def _document(rights: dict[str, Any], path: str, text: str) -> Document:
    filled = Rights(**rights | {"path": path, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    return Document(**vars(filled), id=document_id(filled.source, path), text=text)


def _rights(name: str, source: Settings, licence: str, made_from: str, acquired: str) -> dict[str, Any]:
    """Return the columns that rows made from one thing share; what they were made from is under its own terms too."""
    return {
        "source": name,
        "source_version": "freehold",
        "path": "",
        "sha256": "",
        "wrapper_licence": source.licence,
        "licence": licence,
        "licence_evidence": str(source.licence_evidence or ""),
        "acquired": acquired,
        "kind": "generated",
        "synthetic_from": made_from,
        "teacher": "",
        "split": "",
    }


def _derived_rights(name: str, source: Settings, of: Material) -> dict[str, Any]:
    """Return the columns of rows made from another source: its strictest terms, and what speaks against them too."""
    rights = _rights(name, source, strictest(source.licence, of.licence), of.version, of.acquired)
    if not of.doubt:
        return rights
    evidence = "; ".join(filter(None, [rights["licence_evidence"], of.doubt]))
    return rights | {"licence_evidence": evidence, "licence_confidence": "low"}


def _unit(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56
