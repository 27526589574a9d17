from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gather_fixtures import FREE, country, gather, install, install_factbook

from freehold.core.document import Conversation, Document, read_rows
from freehold.core.errors import ConfigError, DataError
from freehold.corpora import dialogues, factbook
from freehold.corpora.config import Settings
from freehold.corpora.reasoning import HELD_OUT_SEEDS, Gym, load
from freehold.corpora.wordings import REFUSAL
from freehold.text.html import strip_html

SMALL = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 9},
    "spell_backward": {"min_word_len": 3, "max_word_len": 4},
}
GENERATED = {"kind": "generated", "factbook": "book", "reasoning": SMALL, "max_bytes": 180_000, "conversations": 400,
             "reasoning_items": 31, "taught_items": 20, "text_only_items": 10, "unknown_items": 12,
             "unknown_conversations": 30, "procedure_conversations": 40, "procedure_items": 15}  # fmt: skip


class Output:
    def __init__(self, folder: Path, countries: dict[str, dict[str, Any]]) -> None:
        self.folder, self.countries = folder, countries
        self.documents = list(read_rows(folder / "documents/made.parquet", Document))
        self.conversations = list(read_rows(folder / "conversations/made.parquet", Conversation))
        self.tasks = {
            p.stem: [json.loads(line) for line in p.read_text().splitlines()]
            for p in (folder / "tasks").glob("*.jsonl")
        }
        self.facts = {
            question: fact
            for path, data in countries.items()
            for fact in factbook.facts(data, path, strip_html)
            for question in fact.questions
        }
        self.tested = {question: fact for fact in self.facts.values() for question in fact.tests}
        self.pairs = [
            (c.messages[i]["content"], c.messages[i + 1]["content"])
            for c in self.conversations
            for i in range(len(c.messages) - 1)
            if c.messages[i]["role"] == "user"
        ]
        for document in self.documents:
            self.pairs += re.findall(r"^Question: (.*)\nAnswer: (.*)$", document.text, re.M)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Output:
    folder = tmp_path_factory.mktemp("made")
    site = folder / "site"
    site.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        gather(folder / "out", {"book": install_factbook(site), "made": GENERATED})
    countries = {p.relative_to(site).as_posix(): json.loads(p.read_text()) for p in site.rglob("data/*.json")}
    return Output(folder / "out", countries)


def score(question: str, answer: str) -> float | None:
    """Return reasoning-gym's own verdict, from a scorer given only question and answer; None for other questions."""
    if found := re.search(r"problem: (.*) =$", question):
        return float(eval(found[1]) == int(answer))  # digits and signs: we made it
    if found := re.search(r"numbers: (.*)\. Give", question):
        return float(all(int(n) % int(answer) == 0 for n in found[1].split(", ")))
    if found := re.search(r"nus\): (\S+)$", question):
        return float(found[1][::-1] == answer)
    return None


def test_counts_and_forms(made: Output) -> None:
    assert {name: len(rows) for name, rows in made.tasks.items()} == {
        "reasoning": 31,
        "procedures": 15,
        "facts_taught": 20,
        "facts_text_only": 10,
        "facts_text_only_open": 10,
        "unknown_places": 12,
    }
    assert len(made.conversations) <= 470
    assert len({c.id for c in made.conversations}) == len(made.conversations) > 420
    assert 160_000 < sum(len(d.text.encode()) for d in made.documents) <= 180_000
    for row in made.tasks["reasoning"]:
        assert set(row) == {"id", "task", "kind", "prompt", "answer", "seen", "source", "licence"}
        assert row["kind"] == "generate"
        assert row["task"] in SMALL
    for row in made.tasks["facts_text_only"]:
        assert row["kind"] == "choice"
        assert len(set(row["choices"])) == 4
    for name, rows in made.tasks.items():
        assert all(row["seen"] is (name == "facts_taught") for row in rows)


def test_rights_are_the_strictest_of_ours_and_the_source_s(made: Output) -> None:
    by_source = {d.synthetic_from: d.licence for d in made.documents}
    assert by_source == {
        "book==1.0": "LicenseRef-Freehold-Generated AND LicenseRef-PD-USGov",
        "reasoning-gym==0.1.25": "Apache-2.0 AND LicenseRef-Freehold-Generated",
    }
    assert {d.kind for d in made.documents} == {"generated"}
    assert {c.kind for c in made.conversations} == {"conversation"}
    ours = {"LicenseRef-Freehold-Generated", *by_source.values()}
    assert all(row["licence"] in ours for rows in made.tasks.values() for row in rows)


def test_doubt_about_a_source_holds_for_what_was_made_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = install_factbook(tmp_path / "site", 20)
    monkeypatch.syspath_prepend(tmp_path / "site")
    files = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in tmp_path.rglob("data/*.json")}
    grant = (Path(__file__).parents[2] / "LICENSE").read_text()
    install(tmp_path / "site", "book", {**files, "book-1.0.dist-info/LICENSE-CONTENT": grant})
    sources = {"book": book | {"refused": "drop"}, "made": {**GENERATED, "refused": "drop"}}
    counts = gather(tmp_path / "out", sources)["sources"]
    assert counts["book"]["documents"] == 0
    rows = [*read_rows(tmp_path / "out/documents/made.parquet", Document)]
    assert {row.synthetic_from for row in rows} == {"reasoning-gym==0.1.25"}
    gather(tmp_path / "settled", {name: one | {"settled": "asked"} for name, one in sources.items()})
    rows = [*read_rows(tmp_path / "settled/documents/made.parquet", Document)]
    assert {row.synthetic_from for row in rows} == {"book==1.0", "reasoning-gym==0.1.25"}


def test_reasoning_answers_are_true_by_their_own_scorer(made: Output) -> None:
    for row in made.tasks["reasoning"]:
        task, seed = re.match(r"reasoning/reasoning_gym/(\w+)#(\d+)$", row["id"]).groups()
        assert int(seed) >= HELD_OUT_SEEDS
        dataset = load().create_dataset(task, seed=int(seed), size=1, **SMALL[task])
        entry = dataset[0]
        assert " ".join(entry["question"].split()) == row["prompt"][0]["content"]
        assert dataset.score_answer(row["answer"], entry) == 1.0
        assert dataset.score_answer(row["answer"] + "1", entry) < 1.0
    scores = [score(q, a) for q, a in made.pairs]
    assert scores.count(1.0) > 200
    assert 0.0 not in scores


def test_factbook_answers_are_true(made: Output) -> None:
    checked = 0
    for question, answer in made.pairs:
        if question in made.facts:
            fact = made.facts[question]
            raw = strip_html(factbook.at(made.countries[fact.path], fact.field.path))
            assert answer.lower() in raw.lower()
            checked += 1
    assert checked > 200
    for row in made.tasks["facts_text_only"]:
        fact = made.tested[row["prompt"][0]["content"]]
        assert row["choices"][row["answer"]].lower() == fact.answer.lower()
        wrong = [c for i, c in enumerate(row["choices"]) if i != row["answer"]]
        assert not any(w.lower() in fact.answer.lower() or fact.answer.lower() in w.lower() for w in wrong)
    for row in made.tasks["facts_taught"] + made.tasks["facts_text_only_open"]:
        assert row["answer"].lower() == made.tested[row["prompt"][0]["content"]].answer.lower()


def test_nothing_held_out_is_asked_in_training(made: Output) -> None:
    asked = {question for question, _ in made.pairs}
    everything = "\n".join(d.text for d in made.documents) + "\n"
    for name in made.tasks:
        for row in made.tasks[name]:
            question = row["prompt"][0]["content"]
            assert question not in asked
            assert question + "\n" not in everything
            assert not [(q, question) for q in asked if q.startswith(question.rstrip(" =.") + " ")]
    for row in made.tasks["facts_text_only"]:
        fact = made.tested[row["prompt"][0]["content"]]
        assert not asked & {*fact.questions, *fact.tests}
        assert any(said in everything for said in fact.statements)
    lists = {
        name: {made.tested[row["prompt"][0]["content"]].key for row in made.tasks[name]}
        for name in ("facts_taught", "facts_text_only")
    }
    trained = {made.facts[q].key for q in asked if q in made.facts}
    assert lists["facts_taught"] <= trained
    assert not lists["facts_text_only"] & trained
    share = 1 - len(trained) / len({f.key for f in made.facts.values()})
    assert 0.15 < share < 0.35


def test_unknown_places_are_refused_and_known_ones_are_not(made: Output) -> None:
    real = {fact.country for fact in made.facts.values()}
    refused = [q for q, a in made.pairs if a == REFUSAL]
    assert len(refused) == 30
    assert not [q for q in refused if q in made.facts]
    for row in made.tasks["unknown_places"]:
        assert row["answer"] == REFUSAL
        assert not [name for name in real if name in row["prompt"][0]["content"]]


def test_conversations_are_well_formed(made: Output) -> None:
    first = [c.messages[0]["role"] for c in made.conversations]
    assert 0.05 < first.count("system") / len(first) < 0.3
    for conversation in made.conversations:
        roles = [m["role"] for m in conversation.messages if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m["content"].strip() for m in conversation.messages)
    answers = {a for q, a in made.pairs if q in dialogues.TALK[4][0]}
    assert answers
    assert all("Freehold" in a for a in answers)


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    source = {**GENERATED, "factbook": None, "conversations": 60, "max_bytes": 5000, "procedure_items": 0}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        gather(tmp_path / name, {"made": source}, seed=seed)
    texts = {}
    for name in "abc":
        texts[name] = [
            p.read_bytes() for p in sorted((tmp_path / name).rglob("*")) if p.suffix in {".parquet", ".jsonl"}
        ]
    assert texts["a"] == texts["b"]
    assert texts["a"] != texts["c"]
    assert len(texts["a"]) == 3  # no factbook, so no tasks from it


def test_exercises_are_those_of_the_pinned_version() -> None:
    """The digest was taken with every requirement of reasoning-gym installed, pycosat too."""
    gym = Gym(Settings().reasoning, 17)
    items = [*gym.held_out(60), *itertools.islice(gym.train(0), 240)]
    text = "\n".join(f"{item.place}\t{item.question}\t{item.answer}" for item in items)
    digest = "b3816914c04ef5b5bcaaad1baa5f21a7231f5fc56b93ca8103e3e3d2b8d72b6d"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_without_pycosat_only_the_task_that_calls_it_fails() -> None:
    code = """
import sys
sys.modules["pycosat"] = None  # as if it were not installed
from freehold.core.errors import ConfigError
from freehold.corpora.reasoning import Gym
print(next(Gym({"gcd": {}}, 1).train(0)).question)
assert "pycosat" not in sys.modules  # sympy would take whatever has that name
try:
    next(Gym({"zebra_puzzles": {}}, 1).train(0))
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    question, *error = done.stdout.splitlines()
    assert question == next(Gym({"gcd": {}}, 1).train(0)).question
    assert error[0] == "this reasoning-gym task needs pycosat, which is not installed"
    assert "where:    reasoning.zebra_puzzles" in error[1]
    assert "pip install pycosat==0.6.6" in error[2]


def test_missing_generator_names_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "pip install --no-deps --require-hashes -r recipes/corpus.txt"
    code = "import sys; sys.modules['zss'] = None; from freehold.corpora import reasoning; reasoning.load()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DataError: reasoning-gym cannot be imported" in done.stderr
    assert line in done.stderr
    (tmp_path / "site").mkdir()
    install(tmp_path / "site", "reasoning-gym", {})
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(DataError, match=r"made: found reasoning-gym==1\.0, .* for reasoning-gym==0\.1\.25") as caught:
        gather(tmp_path / "out", {"made": {**GENERATED, "factbook": None}})
    assert caught.value.todo == line


def test_a_file_of_the_factbook_that_is_no_country_has_no_facts(tmp_path: Path) -> None:
    book = tmp_path / "book"
    book.mkdir()
    (book / "alia.json").write_text(country("Alia", 1))
    (book / "broken.json").write_text("{")
    folder = {"kind": "folder", "path": str(book), "members": ["*.json"], "reader": "factbook", **FREE}
    gather(tmp_path / "out", {"book": folder, "made": {**GENERATED, "conversations": 20, "reasoning_items": 0}})
    made = read_rows(tmp_path / "out/documents/made.parquet", Document)
    assert any("Alia City" in document.text for document in made)


@pytest.mark.parametrize(
    ("reasoning", "message"),
    [
        ({"chain_sums": {}}, "did you mean `chain_sum`"),
        ({"chain_sum": {"min_terms": 9, "max_terms": 2}}, "does not take these settings"),
        ({"chain_sum": {"terms": 9}}, "does not take these settings"),
    ],
)
def test_wrong_reasoning_settings_are_named(reasoning: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        gather(tmp_path / "out", {"made": {**GENERATED, "factbook": None, "reasoning": reasoning}})


@pytest.mark.parametrize(
    ("key", "text", "answer"),
    [
        ("capital", "Tashkent (Toshkent)", "Tashkent"),
        ("capital", "none", ""),
        ("capital", "Nairobi", "Nairobi"),
        ("capital", "Porto-Novo (official), Cotonou (seat of government)", ""),
        ("highest", "Mont Blanc 4,810", "Mont Blanc"),
        ("highest", "Gora Ayribaba 3,139 m", "Gora Ayribaba"),
        ("highest", "unnamed location 3 m", ""),
        ("currency", "Swiss francs (CHF) per US dollar -", "Swiss francs"),
        ("internet", ".fr", ".fr"),
        ("internet", ".gb and .uk; note - more", ""),
        ("independence", "1 July 1960 (from a merger)", "1 July 1960"),
        ("independence", "none (territory of Australia)", ""),
        ("population", "37,015,151 (2025 est.)", "37,015,151"),
        ("population", "no permanent inhabitants", ""),
        ("exports", "natural gas, refined petroleum (2023)", "natural gas, refined petroleum"),
        ("climate", "tropical\nnote: more", ""),
        (
            "size",
            "about four times the size of Virginia; larger than California",
            "about four times the size of Virginia",
        ),
    ],
)
def test_only_clean_facts_are_taken(key: str, text: str, answer: str) -> None:
    field = next(f for f in factbook.FIELDS if f.key == key)
    assert factbook.clean(field, text) == answer


@pytest.mark.parametrize(
    ("short", "name"),
    [("France", "France"), ("The Bahamas", "the Bahamas"), ("United States", "the United States"), ("none", ""),
     ("Cook Islands", "the Cook Islands"), ("Svalbard (sometimes referred to as Spitsbergen)", "Svalbard")],
)  # fmt: skip
def test_names_of_countries(short: str, name: str) -> None:
    data = {"Government": {"Country name": {"conventional short form": {"text": short}}}}
    assert factbook.name_of(data, strip_html) == name


def test_common_facts_do_not_contradict_each_other() -> None:
    answers: dict[str, str] = {}
    for question, answer in dialogues.facts():
        assert answers.setdefault(question, answer) == answer, question
    assert answers["Which day comes after Sunday?"] == "Monday"
    assert answers["What month follows December?"] == "January"
    assert answers["What is 7 times 8?"] == "56"
