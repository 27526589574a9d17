"""Steps that look at the whole corpus, the planted corpus, resuming, engines: what one document cannot show."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_curate import clean_texts, conversation, curate, document, drops_of, gather, kept_in

from freehold.core.artifact import hash_files
from freehold.core.config import fill
from freehold.core.errors import ArtifactError, ConfigError, DataError
from freehold.stages.curate import bias
from freehold.stages.curate.classifier import train
from freehold.stages.curate.config import Classifier, CurateConfig, Overlap
from freehold.stages.curate.dedup import cut_lines, cut_words, find_overlaps, repeated, winnow
from freehold.stages.curate.rules import CONTAINED_SHARE
from freehold.stages.curate.toxicity import scorer
from freehold.text.held_out import Questions, read_questions
from freehold.text.words import read_batch, read_words, split_words

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

SHORT = {"shard_bytes": 20_000}


def config(**settings: Any) -> CurateConfig:
    return fill(CurateConfig, settings, "curate")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    import planted

    rows = planted.measure(planted.pages(1500), 20, tmp_path_factory.mktemp("planted"))
    return {row["step"]: row for row in rows}


def test_planted_defects_are_found_and_controls_are_not(table: dict[str, dict[str, Any]]) -> None:
    assert len(table) == 14
    for step, row in table.items():
        assert row["planted"] >= 12, step
        assert row["recall"] is None or row["recall"] >= 0.95, row
        assert row["precision"] >= 0.95, row


def test_bias_that_was_planted_is_brought_within_the_limit(table: dict[str, dict[str, Any]]) -> None:
    odds = table["bias"]["log_odds"]
    assert odds["before"] > 1.5
    assert odds["after"] is None or odds["after"] <= 1.5


def test_personal_data_dropped_by_another_step_is_planted() -> None:
    import planted

    plan = planted.build(planted.pages(1500), 20)
    gone, *cleaned = plan.planted["pii"]
    kept = {row.id: row.text for row in plan.rows if row.id != gone} | dict.fromkeys(cleaned, "")
    rows = planted.tabulate(plan, {gone: "toxic"}, kept, {"totals": {"redacted": {"email": 133}}})
    row = next(row for row in rows if row["step"] == "personal data")
    assert row == {
        "step": "personal data", "planted": 140, "found": 133, "taken": 133, "recall": 0.95, "precision": 1.0,
        "dropped": 7,
    }  # fmt: skip


def naive_repeats(texts: list[str], n: int) -> set[tuple[int, int]]:
    """Return (document, place) of each run of n words that an earlier document has, by brute force."""
    seen: set[tuple[str, ...]] = set()
    found = set()
    for number, text in enumerate(texts):
        words = split_words(text)
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        found |= {(number, i) for i, run in enumerate(runs) if run in seen}
        seen |= set(runs)
    return found


def overlaps(texts: list[str], memory_bytes: int | None = None, share: float = CONTAINED_SHARE, **settings: Any) -> Any:
    rules = Overlap.model_validate({"contained": "drop", "passages": "drop", **settings})
    words = read_batch(texts)
    hashes, places, counts = winnow(words)
    documents = np.repeat(np.arange(len(texts)), counts)
    order = np.arange(len(texts))
    return find_overlaps(
        order, counts, lambda: [(hashes, documents, places)], lambda i: words[i].hashes, rules, memory_bytes, share
    )


def test_every_long_passage_is_found_and_no_other() -> None:
    """Against brute force: exactly the words of runs of 50 that an earlier document has are cut."""
    pages = clean_texts()[:12]
    dice = np.random.default_rng(0)
    mixed = []
    for number in range(12):
        words = pages[number].split()
        other = pages[dice.integers(0, 12)].split()
        start, size = dice.integers(0, 200), int(dice.choice([20, 49, 50, 51, 120]))
        mixed.append(
            " ".join([*words[:150], f"break{number}", *other[start : start + size], f"end{number}", *words[150:]])
        )
    found = overlaps(mixed, contained="off")
    expected = {(d, i + k) for d, i in naive_repeats(mixed, 50) for k in range(50)}
    cut = {(d, i) for d, spans in found.passages.items() for start, end in spans for i in range(start, end)}
    assert expected
    assert cut == expected
    assert overlaps(mixed, 2_000, contained="off").passages == found.passages


def test_several_documents_together_hold_another() -> None:
    chapters = clean_texts()[:6]
    book = "\n".join(chapters)
    assert set(overlaps([book, *chapters]).contained) == {1, 2, 3, 4, 5, 6}
    found = overlaps([*chapters, book])
    assert set(found.contained) == {6}
    assert found.contained[6][1] >= 0.8
    # Half of a book is not the book.
    assert overlaps([*chapters[:3], book]).contained == {}
    assert overlaps([*chapters[:3], book], share=0.4).contained.keys() == {3}


def test_repeated_hashes_do_not_depend_on_memory() -> None:
    dice = np.random.default_rng(1)
    hashes = dice.integers(0, 2**63, 300).astype(np.uint64)[dice.integers(0, 300, 4000)]
    documents = np.sort(dice.integers(0, 100, 4000))
    places = np.arange(4000)

    def all_of(memory: int | None) -> set[tuple[int, int]]:
        parts = list(repeated(lambda: [(hashes, documents, places)], 2, memory))
        assert memory is None or len(parts) > 5
        return {(int(d), int(p)) for part in parts for d, p in zip(part[0], part[1], strict=True)}

    owners: dict[int, set[int]] = {}
    for key, number in zip(hashes.tolist(), documents.tolist(), strict=True):
        owners.setdefault(key, set()).add(number)
    expected = {
        (d, p)
        for key, d, p in zip(hashes.tolist(), documents.tolist(), range(4000), strict=True)
        if len(owners[key]) > 1
    }
    assert all_of(None) == all_of(10_000) == expected


def test_cuts() -> None:
    text = "One two three. Four five, six seven! “Eight” nine\nten"
    assert cut_words(text, [(3, 7)]) == "One two three.\n“Eight” nine\nten"
    assert cut_words(text, [(0, 3), (8, 10)]) == "Four five, six seven! “Eight”"
    from freehold.stages.curate.dedup import line_key

    assert cut_lines("a long line\nshort\n  a long line \nshor", {line_key("a long line")}, 5) == "short\nshor"


def test_measure_counts_and_drops_nothing(tmp_path: Path) -> None:
    pages = clean_texts()[:8]
    shared = "this line is the footer of every page of ours\n"
    rows = [document("clean", str(i), shared + page) for i, page in enumerate(pages)]
    rows.append(document("more", "whole", "\n".join(pages)))
    rules = {"overlap": {"contained": "measure"}, "lines": {"act": "measure", "min_documents": 4}}
    gathered = gather(tmp_path / "gather", rows)
    curate(gathered, tmp_path / "measured", config(**rules))
    report = json.loads((tmp_path / "measured" / "report.json").read_text())
    assert drops_of(tmp_path / "measured") == {}
    assert {row.text for row in kept_in(tmp_path / "measured").values()} == {row.text for row in rows}
    assert report["measured"]["contained_duplicates"]["contained_duplicate"]["documents"] == 1
    assert report["measured"]["lines"]["repeated_lines"] == {"documents": 7, "chars": 7 * len(shared)}
    rules["lines"]["act"] = "drop"
    curate(gathered, tmp_path / "dropped", config(**rules))
    assert sum(shared.strip() in row.text for row in kept_in(tmp_path / "dropped").values()) == 1
    sample = json.loads((tmp_path / "dropped" / "report.json").read_text())["samples"]["lines"][0]
    assert shared.strip() in sample["before"]
    assert shared.strip() not in sample["after"]


def test_what_a_cut_leaves_too_short_is_dropped(tmp_path: Path) -> None:
    page = clean_texts()[0]
    rows = [document("a", "page", page), document("b", "copy", page[:2500] + " and a few words of its own")]
    rows.append(document("b", "other", clean_texts()[1]))
    rules = {"near_duplicates": {"enabled": False}, "overlap": {"contained": "off", "passages": "drop"}}
    curate(gather(tmp_path / "gather", rows), tmp_path / "curate", config(**rules))
    assert [row["reason"] for row in drops_of(tmp_path / "curate").values()] == ["repeated_passages"]


def test_samples_hold_no_personal_data(tmp_path: Path) -> None:
    text = "Write to bob.smith@corporate-mail.org or call (415) 867-5309 today. "
    rows = [document("clean", "a", clean_texts()[0]), document("clean", "b", text + clean_texts()[1])]
    rows.append(document("clean", "c", text * 40))
    curate(gather(tmp_path / "gather", rows), tmp_path / "curate")
    report = (tmp_path / "curate" / "report.json").read_text()
    assert "xxx.xxxxx@xxxxxxxxx-xxxx.xxx" in report
    assert "email@example.com" in report
    assert "bob.smith" not in report
    assert "867-5309" not in report


def test_classifier_learns_and_names_bad_recipes(tmp_path: Path) -> None:
    good = [(f"g{i}", text) for i, text in enumerate(clean_texts()[:30])]
    bad = [(f"b{i}", f"buy cheap pills number {i} now best price online offer " * 30) for i in range(30)]
    model, facts = train(good, bad, Classifier())
    assert facts["auc"] == 1.0
    assert model.probability(read_words(clean_texts()[40]).hashes) > 0.9
    assert model.probability(read_words("cheap pills online, best offer, buy now " * 9).hashes) < 0.1
    again, _ = train(reversed(good), bad, Classifier())
    assert (again.weights == model.weights).all()
    with pytest.raises(ConfigError, match="needs sources under `good`"):
        config(classifier={"act": "drop"})
    with pytest.raises(ConfigError, match="both good and bad"):
        config(classifier={"act": "drop", "good": ["a"], "bad": ["a"]})
    gathered = gather(tmp_path / "gather", [document("a", "x", clean_texts()[0])])
    with pytest.raises(DataError, match="no such source"):
        curate(gathered, tmp_path / "one", config(classifier={"act": "drop", "good": ["a"], "bad": ["b"]}))
    gathered = gather(tmp_path / "empty", [document("a", "x", clean_texts()[0]), document("b", "y", "?!")])
    with pytest.raises(DataError, match="nothing to train"):
        curate(gathered, tmp_path / "two", config(classifier={"act": "drop", "good": ["a"], "bad": ["b"]}))


def test_toxicity_is_the_number_of_the_package() -> None:
    from profanity_check import predict_prob

    texts = [*clean_texts()[:5], "You are a stupid idiot, shut up.", "Ünïcödé — naïve!", "the", "x y z"]
    for text in texts:
        words = read_words(text).hashes
        assert scorer().passages(words, 10**6) == pytest.approx(predict_prob([text]), abs=1e-9)
    words = split_words(texts[0])
    pieces = [" ".join(words[i : i + 50]) for i in range(0, len(words) // 50 * 50 - 50, 50)]
    parts = scorer().passages(read_words(texts[0]).hashes, 50)
    assert parts[: len(pieces)] == pytest.approx(predict_prob(pieces), abs=1e-9)


def test_bias_counts_by_hand() -> None:
    texts = [
        "She was honest. He was at home with a gun; nothing else happened in the whole long day. She cooked.",
        "His war.",
    ]
    counts = bias.count(read_batch(texts), 3)
    women, men = bias.GROUPS.index(("gender", "women")), bias.GROUPS.index(("gender", "men"))
    virtue, family = (1 + list(bias.ATTRIBUTES).index(name) for name in ("virtue", "family"))
    violence = 1 + list(bias.ATTRIBUTES).index("violence")
    assert counts[:, women, 0].tolist() == [2, 0]
    assert counts[:, men, 0].tolist() == [1, 1]
    assert counts[0, women, virtue] == 1
    assert counts[0, men, virtue] == 1  # two words away
    assert counts[0, men, family] == 1
    assert counts[0, women, family] == 0
    assert counts[:, men, violence].tolist() == [0, 1]
    ratio, error = bias.log_odds(*(np.array(x) for x in (30, 100, 10, 100)))
    assert ratio == pytest.approx(np.log(30.5 / 70.5) - np.log(10.5 / 90.5))
    assert 2 < ratio / error < 5


KILLED = """
import sys
from pathlib import Path
from freehold.core.artifact import Workspace
from freehold.core.config import fill
from freehold.core.log import Log
from freehold.stages.curate import engine, run, shards
from freehold.stages.curate.config import CurateConfig
config = fill(CurateConfig, {"shard_bytes": 20000}, "curate")
done, job = 0, shards.Job.of(Path(sys.argv[1]), Path(sys.argv[2]), config)
for number in engine.make_all(job, shards.read_plan(job)):
    done += 1
    print(number, flush=True)
    if done == 4:
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gathered corpus of eight shards or more, with duplicates across them."""
    pages = clean_texts()[:60]
    rows = [document("one", f"{i:03d}", page) for i, page in enumerate(pages)]
    rows += [document("two", f"{i:03d}", page.upper() if i % 2 else page) for i, page in enumerate(pages[::3])]
    rows += [document("two", "short", "?"), document("two", "own", clean_texts()[60])]
    return gather(tmp_path_factory.mktemp("several") / "gather", rows)


@pytest.fixture(scope="module")
def straight(several: Path) -> Path:
    folder = several.parent / "straight"
    curate(several, folder, config(**SHORT))
    return folder


def test_killed_run_resumes_and_ends_with_the_same_bytes(several: Path, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(several), str(folder)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ, text=True)
    assert child.stdout is not None
    assert [int(child.stdout.readline()) for _ in range(4)] == [0, 1, 2, 3]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    done = sorted(path.name for path in (folder / "shards").glob("0*"))
    assert done == ["00000", "00001", "00002", "00003"]
    before = {name: (folder / "shards" / name / "words_of.npy").stat().st_mtime_ns for name in done}
    # What a kill in the middle of a shard leaves is not taken for one.
    (folder / "shards" / "00004.tmp").mkdir()
    made: list[str] = []
    counts = curate_watched(several, folder, made, before)
    assert counts["documents"]["in"] == 82
    assert made == ["kept"] * 4
    assert not (folder / "shards").exists()
    assert hash_files(folder) == hash_files(straight)


def curate_watched(gathered: Path, folder: Path, made: list[str], before: dict[str, int]) -> dict[str, Any]:
    """Curate, noting for each shard of `before` whether its files stayed as they were until they were read."""
    from freehold.stages.curate import shards

    original = shards.Corpus.__init__

    def look(self: Any, job: Any, plan: Any) -> None:
        for name, when in before.items():
            same = (job.shards / name / "words_of.npy").stat().st_mtime_ns == when
            made.append("kept" if same else "made again")
        original(self, job, plan)

    shards.Corpus.__init__ = look  # type: ignore[method-assign]
    try:
        return curate(gathered, folder, config(**SHORT))
    finally:
        shards.Corpus.__init__ = original  # type: ignore[method-assign]


def test_every_item_of_every_task_is_found() -> None:
    """Whatever its form: in a conversation always, in a document from six words on."""
    asked = [
        {
            "id": "a",
            "kind": "choice",
            "prompt": [{"role": "user", "content": "What is the capital?"}],
            "choices": ["x"],
        },
        {
            "id": "b",
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}],
        },
        {"id": "c", "prompt": "Name the longest river that flows through Egypt."},
        {"id": "d", "question": "Which of the four kings of the old song built the tower by the sea, and for whom?"},
        {"id": "e", "prompt": "Say this.", "seen": True},
    ]
    with tempfile.TemporaryDirectory() as folder:
        for row in asked:
            (Path(folder) / f"{row['id']}.jsonl").write_text(json.dumps(row))
        questions = read_questions(Path(folder))
    held = Questions(questions)
    talks = [conversation(name, f" {text.upper()} ", "It is so.") for name, text in questions]
    assert [why is not None for why in held.in_conversations(talks)] == [True] * 4
    texts = [f"They asked: {text} Nobody knew." for _, text in questions]
    found = held.in_documents(texts, read_batch(texts))
    assert [why is not None for why in found] == [False, False, True, True]
    part = "of the four kings of the old song built the tower by the sea"
    assert held.in_documents([part, part[3:-4]], read_batch([part, part[3:-4]])) == [
        ("decontamination", "holds 13 words of the question of d"),
        None,
    ]


def test_shards_of_another_recipe_are_not_taken(several: Path, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    command = [sys.executable, "-c", KILLED.replace("20000", "20001"), str(several), str(folder)]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True, capture_output=True)
    assert len(list((folder / "shards").glob("0*"))) >= 8
    curate(several, folder, config(**SHORT))
    assert hash_files(folder) == hash_files(straight)


def test_killed_worker_is_named_and_loses_nothing(several: Path, straight: Path, tmp_path: Path) -> None:
    def kill() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        workers[0].kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(ArtifactError, match="(?s)a worker was killed.*again to resume"):
        curate(several, tmp_path / "out", config(**SHORT, workers=2))
    curate(several, tmp_path / "out", config(**SHORT))
    assert hash_files(tmp_path / "out") == hash_files(straight)


def test_memory_and_workers_change_nothing(several: Path, straight: Path, tmp_path: Path) -> None:
    curate(several, tmp_path / "frugal", config(**SHORT, memory_bytes=1_000_000, workers=2))
    assert hash_files(tmp_path / "frugal") == hash_files(straight)
    # Larger shards are other row groups of the same rows.
    curate(several, tmp_path / "whole", config())
    assert kept_in(tmp_path / "whole") == kept_in(straight)
    assert drops_of(tmp_path / "whole") == drops_of(straight)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of two workers with one processor each, on this machine; the first is the head."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **small})
    second = cluster.add_node(**small)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    yield cluster, second
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_ray_gives_the_same_and_a_killed_worker_loses_nothing(
    several: Path, straight: Path, tmp_path: Path, cluster: Any
) -> None:
    import threading

    ray_cluster, second = cluster
    folder = tmp_path / "ray"
    seen: list[int] = []

    def kill_one() -> None:
        while not (done := list((folder / "shards").glob("0????"))):
            time.sleep(0.02)
        seen.append(len(done))
        ray_cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    counts = curate(several, folder, config(**SHORT, engine="ray"))
    killer.join()
    assert seen[0] < 8, "the worker was killed while there was work left"
    assert counts["documents"]["in"] == 82
    assert hash_files(folder) == hash_files(straight)


@pytest.mark.slow
def test_errors_of_ray_workers_are_the_same(tmp_path: Path, cluster: Any) -> None:
    gathered = gather(tmp_path / "odd", [document("odd", "a", "text", kind="poem")])
    with pytest.raises(DataError, match="of a kind curation has no rules for"):
        curate(gathered, tmp_path / "out", config(engine="ray"))


@pytest.mark.parametrize(
    ("package", "settings"),
    [("profanity_check", {"toxicity": {"act": "measure"}}), ("ray", {"engine": "ray"})],
)
def test_missing_extras_are_named(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, settings: dict[str, Any]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    scorer.cache_clear()
    with pytest.raises(ConfigError, match="not installed"):
        curate(several, tmp_path / "out", config(**SHORT, **settings))
