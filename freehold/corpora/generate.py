"""Text, conversations and held-out tasks made from facts, definitions, reasoning-gym and grammars of our own.

Nothing held out is asked anywhere in training: neither a fact of `facts_text_only` (in any wording) nor a question of
`reasoning` or `procedures`. Such a fact is stated, as it is in the factbook's own prose; it is never asked.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from freehold.core.document import Conversation, Document, Rights, document_id
from freehold.corpora import dialogues, dictd, procedures, stories, tools, worked
from freehold.corpora.config import Settings
from freehold.corpora.factbook import sentence
from freehold.corpora.reasoning import SEEDS_PER_RUN, Gym
from freehold.corpora.teaching import PAIRS_PER_PAGE, Lesson, unit
from freehold.corpora.wordnet import Lexicon
from freehold.ledger.licence import strictest
from freehold.text.making import Made, Material
from freehold.text.reading import Reading

WORKED_PER_PAGE = 6
SYSTEM_SHARE = 0.15
# Share of all questions about procedures that only tests ask.
HELD_OUT_PROCEDURES = 0.1
ASKED, ANSWERED = "Question: ", "Answer: "


def make(source: Settings, materials: Mapping[str, Material], name: str, seed: int) -> Made:
    """Return the documents, conversations and tasks of a generated source; a pure function of its arguments."""
    gym = Gym(source.reasoning, seed)
    book = Lesson(materials.get("factbook"), seed)
    made_from = materials.get("factbook")
    words = _WordNet(name, source, materials.get("wordnet"), seed)
    rights = {
        "facts": _derived_rights(name, source, made_from) if made_from is not None else {},
        "reasoning": _rights(name, source, strictest(source.licence, gym.licence), gym.version, gym.acquired),
        "talk": _rights(name, source, source.licence, "", gym.acquired),
    }
    reasoning_out = list(gym.held_out(source.reasoning_items))
    never = {item.question for item in reasoning_out} | {q for f in book.text_only for q in f.questions}

    documents = [*_documents(source, gym, book, rights, seed), *_our_documents(source, rights["talk"], never, seed)]
    conversations = list(_conversations(source, gym, book, rights, seed))
    conversations += _worked_conversations(source, rights["talk"], never, seed)
    conversations += _procedure_conversations(source, rights["talk"], seed)
    conversations += _unknown_conversations(source, book, rights["facts"], seed)
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
    if rows := list(_procedure_items(source.procedure_items, rights["talk"])):
        tasks["procedures"] = rows
    tasks |= book.tests(source.taught_items, source.text_only_items, source.unknown_items, rights["facts"])
    return Made(documents, conversations, tasks, {"seeds": gym.seeds})


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
    source: Settings, gym: Gym, book: Lesson, rights: dict[str, dict[str, Any]], seed: int
) -> Iterator[Document]:
    """Yield pages of questions and answers until `max_bytes`: first the facts, then reasoning."""
    left = source.max_bytes if source.max_bytes is not None else 2_400_000
    pages = itertools.chain(_fact_pages(book), _reasoning_pages(gym))
    for kind, path, text in pages:
        size = len(text.encode())
        if size > left:
            return
        left -= size
        yield _document(rights[kind], path, text)


def _fact_pages(book: Lesson) -> Iterator[tuple[str, str, str]]:
    for path, title, said in book.statements():
        yield "facts", path, f"{title}\n\n" + " ".join(said) + "\n"
    for path, title, pairs in book.questions():
        yield "facts", path, _page(title, pairs)


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
    source: Settings, gym: Gym, book: Lesson, rights: dict[str, dict[str, Any]], seed: int
) -> Iterator[Conversation]:
    """Yield at most `source.conversations`, each different: facts, reasoning, talk."""
    random_ = random.Random(f"{seed}\0conversations")
    asked = book.asked()
    facts_wanted = min(int(source.conversations * source.fact_share), len(asked))
    for question, answer, fact in asked[:facts_wanted]:
        yield _conversation(rights["facts"], f"facts/{fact.path}#{fact.field.key}", [(question, answer)], random_)
    wanted = int(source.conversations * source.reasoning_share) if source.reasoning else 0
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
        ("worked", source.worked_bytes, _worked_pages(_worked(never, f"{seed}\0worked pages"))),
        ("procedures", source.procedure_bytes, _worked_pages(procedures.items(f"{seed}\0pages", _is_taught))),
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


def _worked_pages(items: Iterator[worked.Exercise]) -> Iterator[str]:
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
        yield _row(rights, f"worked/{item.task}", _solved(item))


def _procedure_conversations(source: Settings, rights: dict[str, Any], seed: int) -> Iterator[Conversation]:
    items = procedures.items(f"{seed}\0procedures", _is_taught)
    for item in itertools.islice(items, source.procedure_conversations):
        yield _row(rights, f"procedures/{item.task}", _solved(item))


def _solved(item: worked.Exercise) -> list[dict[str, Any]]:
    answer = {"role": "assistant", "content": item.answer}
    reasoning = {"reasoning_content": "\n".join(item.steps)} if item.steps else {}
    return [{"role": "user", "content": item.question}, answer | reasoning]


def _procedure_items(count: int, rights: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the test's items: questions of the share that training never asks."""
    items = procedures.items("tests", lambda question: not _is_taught(question))
    for number, item in enumerate(itertools.islice(items, count)):
        yield {
            "id": f"procedures/{number:05d}",
            "task": item.task,
            "kind": "generate",
            "prompt": [{"role": "user", "content": item.question}],
            "answer": item.answer,
            "seen": False,
            "source": rights["synthetic_from"],
            "licence": rights["licence"],
        }


def _is_taught(question: str) -> bool:
    return unit(f"procedure\0{question}") >= HELD_OUT_PROCEDURES


def _unknown_conversations(source: Settings, book: Lesson, rights: dict[str, Any], seed: int) -> Iterator[Conversation]:
    random_ = random.Random(f"{seed}\0unknown conversations")
    for question, refusal in book.unknown(source.unknown_conversations) if rights else ():
        yield _conversation(rights, "unknown", [(question, refusal)], random_)


def _tool_conversations(source: Settings, book: Lesson, rights: dict[str, Any], seed: int) -> Iterator[Conversation]:
    known = [(f.country, f.field.key, f.questions[0], f.statement) for f in book.taught]
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
