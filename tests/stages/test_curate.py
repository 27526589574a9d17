"""Curation end to end: planted defects are found, clean text is let through, the same input gives the same bytes."""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from freehold.core.artifact import Workspace, hash_files
from freehold.core.config import fill, load_yaml, refill
from freehold.core.document import Conversation, Document, document_id, read_rows, write_rows
from freehold.core.errors import ConfigError, DataError
from freehold.core.log import Log
from freehold.stages.curate.config import CurateConfig, plan
from freehold.stages.curate.run import run

QUESTION = "If a train leaves the blue station at noon and travels {} miles in three hours, how fast did it go?"
FRENCH = (
    "Le petit village numéro {} se trouve au bord de la rivière, entouré de collines et de vieilles fermes. Chaque "
    "matin, les habitants se rendent au marché pour acheter du pain, des légumes et du fromage, puis ils rentrent "
    "chez eux en parlant du temps et des nouvelles du pays. Les enfants jouent dans la rue jusqu'au soir. "
)


def document(source: str, path: str, text: str, kind: str = "prose", **rights: str) -> Document:
    """Return a row with plausible rights."""
    fields = {
        "source_version": f"{source}==1.0",
        "sha256": "0" * 64,
        "wrapper_licence": "MIT",
        "licence": "PSF-2.0",
        "licence_evidence": "LICENSE: quoted",
        "acquired": "2026-01-01",
        "synthetic_from": "",
        "teacher": "",
        "split": "",
    }
    return Document(
        id=document_id(source, path), text=text, source=source, path=path, kind=kind, **{**fields, **rights}
    )


def conversation(path: str, question: str, answer: str) -> Conversation:
    row = document("talk", path, "", "conversation")
    rights = {name: getattr(row, name) for name in Conversation.__dataclass_fields__ if hasattr(row, name)}
    return Conversation(
        **rights, messages=[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    )


def clean_texts() -> list[str]:
    """Return real English text of a few thousand characters each: the reference pages inside Python."""
    whole = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    paragraphs = list(dict.fromkeys(p for p in whole.split("\n\n") if len(p) > 60))
    texts, text = [], ""
    for paragraph in paragraphs:
        text += paragraph + "\n\n"
        if len(text) > 3000:
            texts.append(text)
            text = ""
    return texts


def gather(folder: Path, documents: Iterable[Document], talks: Iterable[Conversation] = (), tasks: Any = ()) -> Path:
    by_source: dict[str, list[Document]] = {}
    for row in documents:
        by_source.setdefault(row.source, []).append(row)
    for source, rows in by_source.items():
        write_rows(folder / "documents" / f"{source}.parquet", rows, Document)
    if talks := list(talks):
        write_rows(folder / "conversations" / "talk.parquet", talks, Conversation)
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    (folder / "tasks" / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    return folder


def curate(gathered: Path, folder: Path, config: CurateConfig | None = None) -> dict[str, Any]:
    work = Workspace(folder, "curate", "test", 0, Log(None, quiet=True), {"gather": gathered})
    folder.mkdir(parents=True, exist_ok=True)
    return run(config or CurateConfig(), work)


def drops_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(folder / "drops.parquet").to_pylist()}


def kept_in(folder: Path) -> dict[str, Document]:
    paths = sorted((folder / "documents").glob("*.parquet"))
    return {row.id: row for path in paths for row in read_rows(path, Document)}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Curate clean pages with twenty of each defect among them; returns the output and the ids of each defect."""
    dice = random.Random(7)
    clean = clean_texts()
    rows = [document("clean", f"{i:03d}", text) for i, text in enumerate(clean)]
    planted: dict[str, list[str]] = {"clean": [row.id for row in rows]}

    def plant(name: str, texts: list[str]) -> None:
        planted[name] = [document_id("dirty", f"{name}/{i}") for i in range(len(texts))]
        rows.extend(document("dirty", f"{name}/{i}", text) for i, text in enumerate(texts))

    picked = dice.sample(clean, 60)
    plant("exact_duplicate", [re.sub(r"\s+", lambda _: dice.choice([" ", "\n", "\t "]), text) for text in picked[:20]])
    near = []
    for text in picked[20:40]:
        words = text.split(" ")
        for place in dice.sample(range(len(words)), len(words) // 100):
            words[place] = f"word{dice.randrange(10**6)}"
        near.append(" ".join(words))
    plant("near_duplicate", near)
    plant("language", ["".join(FRENCH.format(dice.randrange(10**6)) for _ in range(4)) for _ in range(20)])
    letters = "bcdfghjklmnpqrstvwxz"
    plant(
        "gibberish",
        [" ".join("".join(dice.choices(letters, k=dice.randint(2, 9))) for _ in range(300)) for _ in range(20)],
    )
    plant("boilerplate", [f"Click here to read our terms of service number {i}. " * 60 for i in range(20)])
    fresh = [f"Page {i}. " + sentence(dice) for i in range(60)]
    plant("contaminated", [text + QUESTION.format(300 + i) for i, text in enumerate(fresh[:20])])
    plant(
        "mojibake",
        [("The café ‘Zoë’ is naïve — " + t).encode().decode("cp1252") for t in fresh[20:40]],
    )
    found = (
        "Write to jane.doe{}@corporate-mail.org or (415) 867-53{:02d}, card 4111 1111 1111 1111, from 93.184.216.{}."
    )
    plant("pii", [text + found.format(i, i, 30 + i) for i, text in enumerate(fresh[40:])])
    base = tmp_path_factory.mktemp("planted")
    tasks = [
        {"id": f"sums-{i}", "task": "sums", "prompt": [{"role": "user", "content": QUESTION.format(300 + i)}]}
        for i in range(20)
    ]
    curate(gather(base / "gather", rows, tasks=tasks), base / "curate")
    return base / "curate", planted


def sentence(dice: random.Random) -> str:
    """Return English of our own making, never twice the same."""
    subjects = ["farmer", "teacher", "sailor", "doctor", "child", "painter", "baker", "judge", "pilot", "miner"]
    verbs = ["found", "carried", "painted", "followed", "counted", "watched", "repaired", "borrowed"]
    things = ["lantern", "bridge", "letter", "horse", "garden", "clock", "window", "barrel", "map", "ship"]
    places = ["river", "market", "school", "harbour", "forest", "station", "mill", "tower"]
    return " ".join(
        f"The {dice.choice(subjects)} {dice.choice(verbs)} a {dice.choice(things)} that was at the "
        f"{dice.choice(places)}, and then the {dice.choice(subjects)} went to {dice.choice(places)} {i} "
        f"with {dice.randrange(2, 90)} of the {dice.choice(things)}s."
        for i in range(20)
    )


@pytest.mark.parametrize("defect", ["exact_duplicate", "near_duplicate", "language", "gibberish", "boilerplate"])
def test_planted_defects_are_dropped(planted: tuple[Path, dict[str, list[str]]], defect: str) -> None:
    folder, ids = planted
    drops = drops_of(folder)
    reasons = {
        "exact_duplicate": {"exact_duplicate"},
        "near_duplicate": {"near_duplicate", "exact_duplicate"},
        "language": {"language"},
        "gibberish": {"language", "stop_words", "letters"},
        "boilerplate": {"repeated_ngrams", "duplicate_lines"},
    }[defect]
    found = [i for i in ids[defect] if i in drops and drops[i]["reason"] in reasons]
    assert len(found) >= 0.95 * len(ids[defect])


def test_contaminated_documents_are_dropped_and_named(planted: tuple[Path, dict[str, list[str]]]) -> None:
    folder, ids = planted
    drops = drops_of(folder)
    details = [drops[i]["detail"] for i in ids["contaminated"] if drops.get(i, {}).get("reason") == "decontamination"]
    assert details == [f"holds the question of sums-{i}" for i in range(20)]


def test_mojibake_and_personal_data_are_repaired(planted: tuple[Path, dict[str, list[str]]]) -> None:
    folder, ids = planted
    kept = kept_in(folder)
    assert all("The café ‘Zoë’ is naïve" in kept[i].text for i in ids["mojibake"])
    for identity in ids["pii"]:
        text = kept[identity].text
        assert not re.search(r"corporate-mail|867-53|4111|93\.184", text)
        assert "email@example.com" in text
        assert "192.0.2.1" in text


def test_clean_text_passes(planted: tuple[Path, dict[str, list[str]]]) -> None:
    folder, ids = planted
    drops = drops_of(folder)
    lost = [drops[i] for i in ids["clean"] if i in drops]
    assert len(lost) < 0.05 * len(ids["clean"]), lost
    assert set(ids["clean"]) - set(drops) <= set(kept_in(folder))


def test_report_adds_up(planted: tuple[Path, dict[str, list[str]]]) -> None:
    folder, ids = planted
    report = json.loads((folder / "report.json").read_text())
    for entry in report["sources"].values():
        before = entry["in"]
        for step in entry["steps"]:
            assert step["in"] == before
            dropped = sum(step["dropped"].values())
            assert step["in"]["documents"] - dropped == step["out"]["documents"]
            before = step["out"]
        assert entry["out"]["documents"] == before["documents"]
        assert entry["train"]["bytes"] + entry["validation"]["bytes"] == entry["out"]["bytes"]
    totals = report["totals"]
    assert totals["documents"]["in"] == sum(map(len, ids.values()))
    assert totals["documents"]["in"] - sum(totals["dropped"].values()) == totals["documents"]["out"]
    assert totals["redacted"] == {"card": 20, "email": 20, "ip": 20, "phone": 20}
    assert (folder / "tasks" / "sums.jsonl").exists()


def test_same_input_gives_same_bytes(tmp_path: Path) -> None:
    rows = [document("clean", str(i), text) for i, text in enumerate(clean_texts()[:12])]
    rows += [document("other", "twin", rows[0].text), document("other", "own", clean_texts()[12])]
    gathered = gather(tmp_path / "gather", rows)
    first, second = tmp_path / "one", tmp_path / "two"
    assert curate(gathered, first) == curate(gathered, second)
    assert hash_files(first) == hash_files(second)


def test_priority_decides_which_copy_stays(tmp_path: Path) -> None:
    text = clean_texts()[0]
    rows = [document("first", "a", text), document("second", "a", text), document("second", "b", clean_texts()[1])]
    rows.append(document("first", "c", clean_texts()[2]))
    gathered = gather(tmp_path / "gather", rows)
    curate(gathered, tmp_path / "by_name")
    assert [row["source"] for row in drops_of(tmp_path / "by_name").values()] == ["second"]
    curate(gathered, tmp_path / "by_priority", CurateConfig(priority=("second",)))
    assert [row["source"] for row in drops_of(tmp_path / "by_priority").values()] == ["first"]
    with pytest.raises(DataError, match="no such source"):
        curate(gathered, tmp_path / "wrong", CurateConfig(priority=("third",)))


def test_a_source_that_lost_much_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [document("clean", str(i), text) for i, text in enumerate(clean_texts()[:4])]
    rows += [document("codes", str(i), f"{i}{i}{i}-{i} " * 90) for i in range(5)]
    rows += [document("codes", "text", clean_texts()[4])]
    gathered = gather(tmp_path / "gather", rows)
    (tmp_path / "out").mkdir()
    run(CurateConfig(), Workspace(tmp_path / "out", "curate", "test", 0, Log(), {"gather": gathered}))
    said = capsys.readouterr().err
    assert "clean: 4 of 4 documents kept" in said
    assert re.search(r"codes: 1 of 6 documents kept, most dropped as \w+ \(5\): drops.parquet says why", said)


def test_a_source_that_lost_everything_is_an_error(tmp_path: Path) -> None:
    rows = [document("clean", str(i), text) for i, text in enumerate(clean_texts()[:2])]
    rows += [document("codes", str(i), f"{i}{i}{i}-{i} " * 90) for i in range(5)]
    gathered = gather(tmp_path / "gather", rows)
    with pytest.raises(DataError, match=r"drops every row of a source[\s\S]*codes: none of 5 kept, 5 dropped as \w+"):
        curate(gathered, tmp_path / "out")
    curate(gathered, tmp_path / "excluded", CurateConfig(exclude={"sources": ["codes"]}))
    assert {row.source for row in kept_in(tmp_path / "excluded").values()} == {"clean"}
    same = [conversation("a", "What is it?", "It is a sea."), conversation("b", "What is it?", "It is a sea.")]
    (tmp_path / "gather/conversations").mkdir()
    for name, talk in zip(("one", "two"), same, strict=True):
        write_rows(tmp_path / f"gather/conversations/{name}.parquet", [talk], Conversation)
    with pytest.raises(DataError, match="two: none of 1 kept, 1 dropped as exact_duplicate"):
        curate(gathered, tmp_path / "talks", CurateConfig(exclude={"sources": ["codes"]}))


def test_conversations(tmp_path: Path) -> None:
    talks = [conversation(str(i), f"What is the capital of country {i}?", f"It is city {i}.") for i in range(300)]
    talks.append(conversation("twin", "What is the capital of country 5?", "It is city 5."))
    talks.append(conversation("held", "  What is 3 + 4? ", "7"))
    talks.append(conversation("other", "What is 3 - 4?", "-1"))
    talks.append(conversation("mail", "Who are you?", "Write to bob.smith@gmail.com please."))
    tasks = [
        {"id": "s1", "task": "sums", "question": "What is 3 + 4?", "prompt": "What is 3 + 4?"},
        {"id": "s2", "task": "sums", "prompt": "What is 3 - 4?", "seen": True},
    ]
    gathered = gather(tmp_path / "gather", [document("clean", "a", clean_texts()[0])], talks, tasks)
    counts = curate(gathered, tmp_path / "curate")
    rows = {row.path: row for row in read_rows(tmp_path / "curate" / "conversations" / "talk.parquet", Conversation)}
    assert {row["path"]: row["reason"] for row in drops_of(tmp_path / "curate").values()} in (
        {"twin": "exact_duplicate", "held": "decontamination"},
    )
    assert "other" in rows
    assert rows["mail"].messages[1]["content"] == "Write to email@example.com please."
    assert 1 <= sum(row.split == "validation" for row in rows.values()) <= 15
    assert counts["conversations"]["in"] == 304
    assert counts["conversations"]["out"] == 302


def test_endless_line_is_dropped_quickly(tmp_path: Path) -> None:
    rows = [document("clean", "a", clean_texts()[0]), document("clean", "b", "x" * 100_000_000)]
    curate(gather(tmp_path / "gather", rows), tmp_path / "curate")
    assert [row["reason"] for row in drops_of(tmp_path / "curate").values()] == ["too_long"]


def test_bad_inputs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no documents to curate"):
        curate(tmp_path / "empty", tmp_path / "out1")
    gathered = gather(tmp_path / "odd", [document("odd", "a", "text", kind="poem")])
    with pytest.raises(DataError, match="of a kind curation has no rules for"):
        curate(gathered, tmp_path / "out2")
    gathered = gather(tmp_path / "short", [document("short", "a", "Too short.")])
    with pytest.raises(DataError, match="left no document"):
        curate(gathered, tmp_path / "out3")
    gathered = gather(tmp_path / "gone", [document("s", "a", clean_texts()[0])])
    with pytest.raises(DataError, match="(?s)left no document.*'excluded': 1"):
        curate(gathered, tmp_path / "out5", fill(CurateConfig, {"exclude": {"sources": ["s"]}}, "curate"))
    gathered = gather(tmp_path / "task", [document("s", "a", clean_texts()[0])], tasks=[{"task": "sums"}])
    with pytest.raises(DataError, match="not a task item"):
        curate(gathered, tmp_path / "out4")


def test_config_overrides_one_limit_of_one_kind() -> None:
    config = fill(CurateConfig, {"kinds": {"code": {"min_chars": 7}, "docstring": {"quality": False}}}, "curate")
    assert config.kinds.code.min_chars == 7
    assert not config.kinds.docstring.quality
    assert config.kinds.docstring.min_chars == CurateConfig().kinds.docstring.min_chars
    with pytest.raises(ConfigError, match="did you mean `threshold`"):
        fill(CurateConfig, {"near_duplicates": {"treshold": 0.5}}, "curate")
    with pytest.raises(ConfigError, match=r"(?s)removed.*rules.py: DOCSTRING = \{min_words: 10"):
        fill(CurateConfig, {"kinds": {"docstring": {"prose": {"min_words": 3}}}}, "curate")
    assert any("Jaccard >= 0.8" in line for line in plan(CurateConfig()))


OLD = Path(__file__).with_name("curate_before_rules.yaml")
"""The settings of curation as runs recorded them when every limit was one of them."""


def test_recorded_limits_are_read_as_todays_constants() -> None:
    recorded = load_yaml(OLD)
    assert refill(CurateConfig, recorded, "curate") == CurateConfig().model_dump(mode="json")
    for path in (("kinds", "prose", "prose", "min_words"), ("split", "large_bytes"), ("overlap", "ngram_words")):
        changed = load_yaml(OLD)
        part = changed
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] += 1
        assert refill(CurateConfig, changed, "curate") == changed
