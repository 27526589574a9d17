"""Questions from a dictionary: read right, answered right, clean, under the dictionary's terms too."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import pytest
from gather_fixtures import deb, gather, report

from freehold.core.artifact import Workspace
from freehold.core.config import fill
from freehold.core.document import Conversation, Document, read_rows
from freehold.core.errors import ConfigError
from freehold.core.log import Log
from freehold.corpora.wordnet import Lexicon, senses
from freehold.stages.gather.config import GatherConfig
from freehold.stages.gather.run import run

ENTRY = """lamp
    n 1: a thing on a table that gives light in the evening; "the
         lamp is lit"; "buy a lamp" [syn: {lamp}, {table light}, {Lux}]
    2: (slang) a blow
    v 1: put something upon a tall pole
    adj 1: not dark at all: "a lamp evening" [ant: {dim},
           {dusky}] [also: {lamper}]"""
COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2026 Somebody
License: MIT
"""
PARTS = {"n": "noun", "v": "verb", "adj": "adjective"}


def dictionary(count: int = 60) -> str:
    """Return entries of words that we made up."""
    letters = "bdfgklmnprstvz"
    names = [f"{a}a{b}o" + "ren"[n % 3] for n, (a, b) in enumerate((a, b) for a in letters for b in letters)][:count]
    lines = ["00-database-short", "     words of our own"]
    for n, name in enumerate(names):
        part = list(PARTS)[n % 3]
        twin = f" [syn: {{{name}}}, {{twin of {n}}}]" if n % 4 == 0 else ""
        against = f" [ant: {{un{name}}}]" if n % 5 == 0 else ""
        lines += [name, f'    {part} 1: kept {" ".join(names[n - 1])} on shelf {n}; "a {name}"{twin}{against}']
    lines += ["slurry", "    n 1: an offensive word for somebody", "Paris", "    n 1: a city in France", ""]
    return "\n".join(lines)


def test_an_entry_is_read_as_its_senses() -> None:
    found = list(senses(ENTRY))
    assert [(s.word, s.part, s.first) for s in found] == [
        ("lamp", "noun", True), ("lamp", "noun", False), ("lamp", "verb", True), ("lamp", "adjective", True)
    ]  # fmt: skip
    assert [s.definition for s in found] == [
        "a thing on a table that gives light in the evening",
        "(slang) a blow",
        "put something upon a tall pole",
        "not dark at all",
    ]
    assert found[0].synonyms == ("table light", "Lux")
    assert found[3].antonyms == ("dim", "dusky")
    assert not list(senses("word\nwith no sense in it"))


def test_no_wrong_choice_could_be_right() -> None:
    """Of the ten words two mean the same, and a third has a word in common with them."""
    definitions = ["a bit of copper rod", "a bit of copper rod", "red as the copper is"]
    definitions += [f"a bit of {letter * 7} rod" for letter in "defghij"]
    lexicon = Lexicon([f"xy{c}\n    n 1: {text}" for c, text in zip("abcdefghij", definitions, strict=True)], 3)
    assert len(lexicon.askable) == 10
    choices = {}
    for sense in lexicon.askable:
        for question, answer in lexicon.questions(sense):
            if question.startswith("Which of these words"):
                assert answer == sense.word
                choices[answer] = set(re.search(r"”: (\w+), (\w+), (\w+) or (\w+)\?$", question).groups())
            # Without choices it is asked only where one word is right.
            assert not question.startswith("Which noun") or sense.word not in {"xya", "xyb"}
    assert {len(found) for found in choices.values()} == {4}
    assert len(choices) == 10
    assert all(len(choices[word] & {"xya", "xyb", "xyc"}) == 1 for word in ("xya", "xyb", "xyc"))
    assert any(choices[word] & {"xya", "xyb", "xyc"} for word in choices if word > "xyc")


def test_insults_are_neither_asked_nor_offered_in_any_sense() -> None:
    """Words with a clean first sense: an offensive second one, also in another word's entry alone, or no label."""
    entries = [
        "blick\n    adj 1: wholly neat and in good order [syn: {blick}, {tidy}]\n"
        "    n 1: (slur) offensive term for a farmer",
        "blunk\n    n 1: a tree with small green leaves",
        "farmer\n    n 1: (slur) a disparaging name [syn: {farmer}, {Blunk}]",
        "whore\n    n 1: a woman who takes money for her time",
        "tidy\n    adj 1: in good order at all times [syn: {blick}, {tidy}, {trim}] [ant: {blick}, {messy}]",
        "nice\n    adj 1: as somebody would say of an idiot at last",
        *(f"xy{c}\n    adj 1: like number {n} of the pieces of {c * 6}" for n, c in enumerate("abcdefgh")),
    ]
    lexicon = Lexicon(entries, 3)
    assert {sense.word for sense in lexicon.askable} == {"tidy", *(f"xy{c}" for c in "abcdefgh")}
    asked = [pair for sense in lexicon.askable for pair in lexicon.questions(sense)]
    assert ("What is the opposite of the adjective “tidy”?", "messy") in asked
    assert any(answer == "trim" for _, answer in asked)
    assert not re.search("blick|blunk|whore|idiot", str(asked))


def test_a_word_is_no_insult_for_its_letters() -> None:
    kept = [
        "class",
        "whorled",
        "swank",
        "snigger",
        "raccoon",
        "grape",
        "scraper",
        "title",
        "hagfish",
        "trampoline",
        "rapid",
    ]
    lexicon = Lexicon([f"{word}\n    n 1: a thing of number {n} on this list" for n, word in enumerate(kept)], 1)
    assert sorted(sense.word for sense in lexicon.askable) == sorted(kept)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    packed = gzip.compress(dictionary().encode(), mtime=0)
    files = {"usr/share/dictd/our.dict.dz": packed}
    words = deb(folder / "dict-our.deb", files, COPYRIGHT, name="dict-our")
    words |= {"members": ["*.dict.dz"], "reader": "dictd", "content": "reference", "acquired": "2026-01-01"}
    generated: dict[str, Any] = {
        "kind": "generated", "reasoning": {}, "conversations": 0, "max_bytes": 1000, "reasoning_items": 0,
        "wordnet": "words", "wordnet_bytes": 100_000, "wordnet_conversations": 20,
    }  # fmt: skip
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        gather(folder / name, {"words": words, "made": generated}, seed=seed, corpus_dir=str(folder))
    return folder


def pairs_of(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the questions of conversations and those of pages, each with its answer."""
    talk = read_rows(folder / "conversations/made.parquet", Conversation)
    pages = read_rows(folder / "documents/made.parquet", Document)
    return [(c.messages[0]["content"], c.messages[1]["content"]) for c in talk], [
        pair for page in pages for pair in re.findall(r"^Question: (.*)\nAnswer: (.*)$", page.text, re.M)
    ]


def test_every_answer_stands_in_the_dictionary(made: Path) -> None:
    talk, pages = pairs_of(made / "one")
    assert (len(talk), len(pages)) == (20, 40)
    text = dictionary()
    known = dict(re.findall(r"^(\w+)\n    (.*)$", text, re.M))
    forms = set()
    asked = []
    for question, answer in [*talk, *pages]:
        answer = answer[0].lower() + answer[1:]
        quoted = re.search("“(.*?)”", question)[1]
        if found := re.search(r"the (noun|verb|adjective) “(\w+)”", question):
            word, line = found[2], known[found[2]]
            assert PARTS[line.split()[0]] == found[1]
            assert answer in re.split(r"[;{}]| 1: ", line)
        else:
            word = answer
            assert f" 1: {quoted};" in known[word]
        asked.append(word)
        forms.add(question.split("“")[0].split(" the ")[0])
    assert len(asked) == len(set(asked)) == 60  # each word once
    assert not {"slurry", "paris"} & set(asked)
    assert len(forms) >= 5


def test_rows_name_what_they_are_made_of_and_have_its_terms(made: Path) -> None:
    rows = [
        *read_rows(made / "one/conversations/made.parquet", Conversation),
        *read_rows(made / "one/documents/made.parquet", Document),
    ]
    assert {(r.licence, r.synthetic_from, r.acquired, r.source) for r in rows} == {
        ("LicenseRef-Freehold-Generated AND MIT", "dict-our==1.0-1", "2026-01-01", "made")
    }
    assert all(r.path.startswith("wordnet") for r in rows)
    assert report(made / "one", "made")["made_from"] == ["dict-our==1.0-1"]


def test_the_seed_decides(made: Path) -> None:
    assert pairs_of(made / "one") == pairs_of(made / "again")
    assert pairs_of(made / "one") != pairs_of(made / "two")


def test_a_source_that_is_no_dictionary_is_refused(tmp_path: Path) -> None:
    sources = {"files": {"kind": "folder", "path": str(tmp_path)}, "made": {"kind": "generated", "wordnet": "files"}}
    with pytest.raises(ConfigError, match=r"(?s)`made\.wordnet` names `files`.*no source read by dictd"):
        gather(tmp_path / "out", sources)


@pytest.mark.parametrize("key", ["wordnet_bytes", "wordnet_conversations"])
def test_questions_about_no_dictionary_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)gather\.sources\.made.*`{key}` needs `wordnet`"):
        gather(tmp_path / "out", {"made": {"kind": "generated", key: 10}})


def test_skipped_dictionary_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {
        "kind": "debian", "package": "dict-our", "version": "1", "file": "absent.deb", "sha256": "0" * 64,
        "members": ["*.dict.dz"], "reader": "dictd", "licence": "GPL-3.0-only", "refused": "drop",
        "licence_evidence": {"rule": "known"}, "acquired": "2026-01-01",
    }  # fmt: skip
    made = {"kind": "generated", "reasoning": {}, "conversations": 5, "reasoning_items": 0}
    made |= {"wordnet": "words", "wordnet_bytes": 1000, "story_bytes": 2000}
    config = fill(GatherConfig, {"sources": {"words": words, "made": made}}, "gather")
    run(config, Workspace(tmp_path, "gather", "test", 1, Log()))
    said = "".join(capsys.readouterr())
    assert "made: nothing made of `words` (wordnet), which is skipped" in said
    assert "(factbook)" not in said
