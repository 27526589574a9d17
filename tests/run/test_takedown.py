"""Take-down: exact against the batches themselves, over forks and children, and a recipe that does without it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from run_fixture import LETTER, MODULE, SPEECH, TALK, TWIN, build_run

from freehold.cli import main
from freehold.core.artifact import Workspace, read_json, write_json, write_manifest
from freehold.core.document import Document, document_id, read_rows, replace, write_rows
from freehold.core.errors import ArtifactError, DataError
from freehold.core.log import Log
from freehold.data.exposure import trace_rows, write_trace
from freehold.data.loader import PhaseRows, Source, TextOrder, consumed_by
from freehold.data.packing import IGNORE
from freehold.guard import takedown as spans
from freehold.optim.config import PhaseConfig
from freehold.optim.schedule import Schedule
from freehold.run.recipe import resolve
from freehold.run.steps import step_seconds
from freehold.run.takedown import takedown
from freehold.run.takedown_answer import Excluded, Origin, RunAnswer, Takedown
from freehold.run.takedown_filter import write_filter
from freehold.run.takedown_recipe import write_recipe
from freehold.run.trace_text import render_takedown
from freehold.stages.curate.config import CurateConfig, Exclusion, NearDuplicates
from freehold.stages.curate.run import run as curate

ROOT = Path(__file__).parents[2]
END = 9_999
"""No document's token here: the last token of each is its own too, so that its reader can be named."""
PHASES = {
    "stable": {"steps": 14, "warmup_steps": 2, "shape": "constant", "start": 1.0, "end": 1.0, "checkpoint": "truebase"},
    "anneal": {"steps": 10, "warmup_steps": 0, "shape": "linear", "start": 1.0, "end": 0.0, "checkpoint": "base"},
}


def documents() -> tuple[dict[str, Source], dict[int, str]]:
    """Return sources whose documents each have a token of their own, and whose token it is."""
    dice = np.random.default_rng(3)
    sources, owner, token = {}, {}, 1
    for name, count in (("big", 90), ("small", 25)):
        parts, ids = [], []
        for number in range(count):
            ids.append(document_id(name, f"{number}.txt"))
            owner[token] = ids[-1]
            parts.append(np.full(int(dice.integers(2, 13)), token, np.uint16))
            token += 1
        lengths = np.array([len(part) for part in parts])
        sources[name] = Source(name, np.concatenate(parts), np.cumsum(lengths) - lengths, lengths, ids)
    return sources, owner


def order_of(sources: dict[str, Source]) -> TextOrder:
    phases = [PhaseRows(name, phase["steps"], {}) for name, phase in PHASES.items()]
    return TextOrder(sources, phases, context_tokens=7, sequences=3, seed=5, separator=END)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, set[int]]]:
    """Write a run whose trace is that of a real order; returns it and the steps that learned from each document,
    read off the tokens of every batch."""
    folder = tmp_path_factory.mktemp("runs") / "real"
    sources, owner = documents()
    order = order_of(sources)
    learned: dict[str, set[int]] = {identity: set() for identity in owner.values()}
    for step in range(24):
        batch = order.batch(step)
        for token in np.unique(np.concatenate([batch.input_ids, batch.targets[batch.targets != IGNORE]], axis=None)):
            learned[owner[int(token)]].add(step)
    for name, source in sources.items():
        rights = {
            "source": name, "source_version": f"{name}==1", "sha256": "0" * 64, "wrapper_licence": "MIT",
            "licence": "MIT" if name == "big" else "Apache-2.0", "licence_evidence": "LICENSE", "kind": "prose",
            "acquired": "2026-01-02", "synthetic_from": "", "teacher": "", "split": "train", "text": "words",
        }  # fmt: skip
        rows = [Document(id=identity, path=f"{n}.txt", **rights) for n, identity in enumerate(source.ids)]
        for stage in ("gather", "curate"):
            write_rows(folder / stage / f"documents/{name}.parquet", rows, Document)
        table = {"id": source.ids, "start": source.starts, "tokens": source.lengths, "bytes": source.lengths}
        (folder / "tokenize/tokens").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), folder / f"tokenize/tokens/{name}.train.parquet")
    names = {step: "stable" if step < 14 else "anneal" for step in range(24)}
    write_trace(folder / "pretrain/trace.parquet", trace_rows(order, range(24), names))
    for step in range(1, 25):
        facts = {
            "stage": "pretrain", "stage_type": "step", "step": step, "phase": names[step - 1], "phases": PHASES,
            "seed": 5, "consumed": {str(end): order.consumed_at(end) for end in (14, 24)},
        }  # fmt: skip
        place = folder / f"pretrain/checkpoints/step_{step:08d}"
        place.mkdir(parents=True)
        write_json(place / "trainer.json", facts)
        write_manifest(place, kind="checkpoint")
    sections = {
        "gather": yaml.safe_load((ROOT / "recipes/tiny.yaml").read_text())["gather"],
        "curate": {"priority": []},
        "tokenize": {"vocab_size": 300},
        "pretrain": {"phases": PHASES, "parent": ""},
    }
    for stage, section in sections.items():
        (folder / stage / "resolved.yaml").write_text(yaml.safe_dump(section, sort_keys=False))
        write_manifest(folder / stage, kind=stage, seed=5)
    metrics = [{"step": s, "tokens": 21 * s, "perf/tokens_per_s": 10.5} for s in (4, 8, 12)]
    (folder / "pretrain/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder, learned


def test_exact_by_brute_force(real: tuple[Path, dict[str, set[int]]]) -> None:
    run, learned = real
    rows = pq.read_table(run / "pretrain/trace.parquet").to_pylist()
    edges = [row["document_id"] for row in rows if 0 in row["step_tokens"]]  # only the target at the end of a row
    never = [identity for identity, steps in learned.items() if not steps]
    assert edges
    assert never
    for identity in {*list(learned)[::9], *edges[:4], never[0]}:
        steps = learned[identity]
        entry = takedown(run, identity).runs[0]
        steps_named = [step for row in entry.seen for a, b in row.ranges for step in range(a, b + 1)]
        assert steps_named == sorted(steps)
        assert [c.step for c in entry.checkpoints] == [s for s in range(1, 25) if steps and min(steps) < s]
        assert (entry.restart is None) == (not steps)
        if steps and min(steps) > 0:
            assert entry.last_clean == f"pretrain/checkpoints/step_{min(steps):08d}"


def test_sources_and_licences_by_brute_force(real: tuple[Path, dict[str, set[int]]]) -> None:
    run, learned = real
    sources, _ = documents()
    assert {row["document_id"] for row in pq.read_table(run / "pretrain/trace.parquet").to_pylist()} == {
        identity for identity, steps in learned.items() if steps
    }
    for query in ("small", "Apache-2.0"):
        answer = takedown(run, query)
        assert answer.rows == 25
        assert answer.excluded == Excluded(["small"], [], [])
        for checkpoint in answer.runs[0].checkpoints:
            reached = sum(1 for i in sources["small"].ids if any(s < checkpoint.step for s in learned[i]))
            assert checkpoint.documents == reached
    assert sum(row.tokens for row in answer.runs[0].shards) == sources["small"].total_tokens


def test_rows_read_before_a_checkpoint_inside_a_phase(real: tuple[Path, dict[str, set[int]]]) -> None:
    order = order_of(documents()[0])
    for step in range(1, 25):
        counted = dict.fromkeys(order.names, 0)
        for name, _ in [row for s in range(step) for row in order.rows(s)]:
            counted[name] += 1
        assert consumed_by(read_json(real[0] / f"pretrain/checkpoints/step_{step:08d}/trainer.json")) == counted
    with pytest.raises(DataError, match="how far its data was read"):
        consumed_by({"step": 3, "phases": PHASES, "phase": "stable", "seed": 5})


def test_cost_is_the_runs_own(real: tuple[Path, dict[str, set[int]]]) -> None:
    run, learned = real
    assert step_seconds(run, "pretrain") == 2.0  # 84 tokens in 4 steps at 10.5 tokens a second
    first, identity = max((min(steps), identity) for identity, steps in learned.items() if steps)
    restart = takedown(run, identity).runs[0].restart
    assert restart.origin.endswith(f"step_{first:08d}")
    assert restart.steps == {"pretrain": 24 - first, "align": 0}
    assert restart.hours == pytest.approx((24 - first) * 2.0 / 3600)


def test_recipe_continues_where_it_is_clean(real: tuple[Path, dict[str, set[int]]], tmp_path: Path) -> None:
    run, learned = real
    first, identity = max((min(steps), identity) for identity, steps in learned.items() if steps)
    assert first > 14  # inside the linear phase
    answer = takedown(run, identity)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    applied = write_recipe(run, answer, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert applied.command == f"freehold run {applied.recipe} --fork real-without-{identity}"
    recipe = resolve(Path(applied.recipe), fork=f"real-without-{identity}")
    assert recipe.stages["curate"].config.exclude.documents == (identity,)
    assert recipe.stages["tokenize"].config.tokenizer == run / "tokenize/tokenizer"
    pretrain = recipe.stages["pretrain"].config
    assert pretrain.parent.endswith(f"step_{first:08d}")
    assert {name: phase.steps for name, phase in pretrain.phases.items()} == {"anneal": 24 - first}
    assert recipe.head.until == "pretrain"
    full = Schedule({name: PhaseConfig.model_validate(phase) for name, phase in PHASES.items()})
    rest = Schedule(pretrain.phases, first_step=first)
    for step in range(first, 24):
        assert rest.at(step).factor == pytest.approx(full.at(step).factor)


def test_recipe_without_a_whole_source(real: tuple[Path, dict[str, set[int]]], tmp_path: Path) -> None:
    applied = write_recipe(real[0], takedown(real[0], "big"), tmp_path)
    recipe = resolve(Path(applied.recipe))
    assert recipe.stages["curate"].config.exclude.sources == ("big",)
    assert recipe.stages["pretrain"].config.parent == ""  # its first step read it already
    assert recipe.stages["tokenize"].config.tokenizer is None


def test_many_ids_go_into_a_file(
    real: tuple[Path, dict[str, set[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freehold.run.takedown_recipe.MOST_IDS_IN_RECIPE", 1)
    answer = takedown(real[0], "1.txt")  # a part of the path: 1.txt, 11.txt, ...
    recipe = resolve(Path(write_recipe(real[0], answer, tmp_path).recipe))
    exclude = recipe.stages["curate"].config.exclude
    assert exclude.documents == ()
    assert exclude.file is not None
    assert set(exclude.file.read_text().split()) == set(answer.excluded.documents)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "runs" / "tiny")


def states(entry: RunAnswer) -> list[str]:
    return [c.stage_type for c in entry.checkpoints]


def test_alignment_alone_is_repeated(run: Path) -> None:
    entry = takedown(run, TALK).runs[0]
    assert states(entry) == ["Preview"]
    assert entry.exports == ["export/gguf/Tiny-F32.gguf", "export/hf/model.safetensors"]
    assert entry.last_clean == "pretrain/base"
    assert entry.restart.origin.endswith("tiny/pretrain/base")
    assert entry.restart.steps == {"pretrain": 0, "align": 2}
    assert entry.restart.hours is None  # nothing was measured


def test_nothing_learned_nothing_to_restart(run: Path) -> None:
    for identity in (LETTER, TWIN):
        entry = takedown(run, identity).runs[0]
        assert (entry.checkpoints, entry.exports, entry.restart) == ([], [], None)
    assert takedown(run, LETTER).runs[0].shards[0].shard == "speeches.validation.bin"


def test_a_copy_that_stays_is_named_and_taken_in_by_widen(run: Path) -> None:
    answer = takedown(run, TWIN)
    assert [row.id for row in answer.twins] == [SPEECH]
    wide = takedown(run, TWIN, widen=True)
    assert wide.rows == 2
    assert states(wide.runs[0]) == ["step", "TrueBase", "Base", "Preview"]
    assert set(wide.excluded.documents) == {SPEECH, TWIN}


def test_what_was_made_from_a_source_goes_with_it(run: Path) -> None:
    for stage in ("gather", "curate"):
        path = run / stage / "conversations/made.parquet"
        table = pq.read_table(path)
        place = table.schema.get_field_index("synthetic_from")
        pq.write_table(table.set_column(place, "synthetic_from", pa.array(["speeches==1.2"])), path)
    answer = takedown(run, "speeches")
    assert (answer.rows, answer.derived) == (4, 1)
    assert answer.excluded.sources == ["made", "speeches"]
    part = takedown(run, SPEECH)
    assert (part.rows, part.derived) == (1, 0)
    assert part.perhaps_derived == [Origin("speeches==1.2", 1, certain=False)]
    assert takedown(run, SPEECH, widen=True).rows == 2


def test_forks_and_children_are_answered(run: Path) -> None:
    shutil.copytree(run, run.parent / "fork")
    child = run.parent / "child"
    shutil.copytree(run, child)
    for stage in ("pretrain", "align", "export"):
        shutil.rmtree(child / stage)
    truebase = read_json(run / "pretrain/truebase/manifest.json")["content_sha256"]
    facts = {"stage": "pretrain", "stage_type": "Base", "step": 4, "phase": "other", "parent": truebase}
    (child / "pretrain/base").mkdir(parents=True)
    write_json(child / "pretrain/base/trainer.json", facts)
    write_manifest(child / "pretrain/base", kind="checkpoint")
    write_trace(child / "pretrain/trace.parquet", [])
    write_manifest(child / "pretrain", kind="pretrain", counts={"steps": 4})
    entries = {Path(entry.run).name: entry for entry in takedown(run, SPEECH).runs}
    assert list(entries) == ["tiny", "child", "fork"]
    assert states(entries["child"]) == ["Base"]  # by its parent alone: its own steps never read the speech
    assert "not clean" in entries["child"].restart.blocked
    assert states(entries["fork"]) == states(entries["tiny"])
    # The module was first read in step 2, after TrueBase: the child's own steps decide, and they read nothing.
    entries = {Path(entry.run).name: entry for entry in takedown(run, MODULE).runs}
    assert entries["child"].checkpoints == []
    assert entries["child"].last_clean == "pretrain/base"


def test_a_parent_that_is_nowhere_is_not_taken_for_clean(run: Path) -> None:
    trainer = run / "pretrain/base/trainer.json"
    write_json(trainer, read_json(trainer) | {"parent": "0" * 64})
    write_manifest(run / "pretrain/base", kind="checkpoint")
    for path in ("pretrain/truebase", "pretrain/checkpoints"):
        shutil.rmtree(run / path)
    shutil.rmtree(run / "align")
    entry = takedown(run, MODULE).runs[0]
    assert states(entry) == ["Base"]
    assert "is not known" in entry.restart.blocked
    with pytest.raises(ArtifactError, match="how it was made"):
        write_recipe(run, takedown(run, MODULE))
    for stage in ("gather", "curate"):
        (run / stage / "resolved.yaml").write_text("priority: []\n")
    with pytest.raises(DataError, match="no clean place to continue from"):
        write_recipe(run, takedown(run, MODULE))
    assert takedown(run, LETTER).runs[0].unknown == ["pretrain/base"]
    assert "no restart from here: whether its parent is clean is not known" in render_takedown(
        takedown(run, LETTER), 200
    )


def test_unrecorded_steps_are_unknown_never_clean(run: Path) -> None:
    (run / "pretrain/trace.parquet").unlink()
    entry = takedown(run, SPEECH).runs[0]
    assert entry.last_clean is None
    assert "pretrain/base" in entry.unknown
    assert (entry.restart.origin, entry.restart.certain) == ("", False)


def test_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean speeches\?"):
        takedown(run, "speches")
    with pytest.raises(ArtifactError, match="does not say how it was made"):
        write_recipe(run, takedown(run, SPEECH), tmp_path)


def test_command(real: tuple[Path, dict[str, set[int]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["takedown", "big", str(real[0]), "--apply", "--out", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert Path(answer["applied"]["recipe"]).exists()
    assert main(["takedown", "big", str(real[0]), "--apply", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for part in (
        "big: 90 rows by source",
        "big.train.bin: 90 documents",
        "cheapest restart: from nothing",
        "--fork",
    ):
        assert part in text


def test_excluded_rows_leave_the_corpus_and_nothing_else(tmp_path: Path) -> None:
    rows = list(read_rows(build_run(tmp_path / "x", "gather") / "gather/documents/speeches.parquet", Document))
    text = "The members of the house were asked what they had seen there, and each of them said that they had not. "
    rows = [replace(row, text=f"{text}{' '.join(f'{w}{n}' for w in text.split())}. ") for n, row in enumerate(rows)]
    write_rows(tmp_path / "in/documents/speeches.parquet", rows, Document)

    def made(name: str, exclude: Exclusion) -> dict[str, Document]:
        config = CurateConfig(exclude=exclude, near_duplicates=NearDuplicates(enabled=False))
        folder = tmp_path / name
        curate(config, Workspace(folder, "curate", "t", 0, Log(quiet=True), {"gather": tmp_path / "in"}))
        return {row.id: row for p in (folder / "documents").glob("*.parquet") for row in read_rows(p, Document)}

    full = made("full", Exclusion())
    assert len(full) == 3
    listed = tmp_path / "ids.txt"
    listed.write_text(SPEECH + "\n")
    by_id = made("by_id", Exclusion(documents=(SPEECH,)))
    assert by_id == {identity: row for identity, row in full.items() if identity != SPEECH}
    drop = pq.read_table(tmp_path / "by_id/drops.parquet").to_pylist()[0]
    assert (drop["id"], drop["reason"], drop["detail"]) == (SPEECH, "excluded", "by id")
    with pytest.raises(DataError, match="missing or another one"):
        made("bad", Exclusion(file=listed, file_sha256="00"))
    with pytest.raises(DataError, match="was not gathered"):
        made("bad", Exclusion(sources=("speech",)))
    with pytest.raises(DataError, match="was not gathered"):
        made("bad", Exclusion(documents=("0" * 16,)))


def test_filter_holds_what_rows_say_and_others_do_not(run, tmp_path):
    phrase = "these ten words stand in a letter and in code too"
    for file in run.glob("*/documents/*.parquet"):
        rows = [
            replace(row, text=f"{phrase} but the {row.source} of {row.path} alone say what follows here now")
            for row in read_rows(file, Document)
        ]
        write_rows(file, rows, Document)
    made = tmp_path / "filter.json"
    assert main(["takedown", "speeches", str(run), "--filter", str(made), "--json"]) == 0
    found = spans.load(made)
    assert found.find("but the speeches of letter txt alone say what follows here").__next__()
    assert not list(found.find(phrase))
    assert not list(found.find("but the code of pkg module py alone say what follows"))
    before = sum(map(len, found.spans.values()))
    assert main(["takedown", "code", str(run), "--filter", str(made)]) == 0
    assert sum(map(len, spans.load(made).spans.values())) > before
    assert spans.load(made).salt == found.salt
    for folder in ("gather", "curate"):
        shutil.rmtree(run / folder / "documents")
        (run / folder / "documents").mkdir()
    answer = Takedown(
        **{f.name: None for f in dataclasses.fields(Takedown)} | {"excluded": Excluded(["speeches"], [], [])}
    )
    with pytest.raises(DataError, match="no text of these rows"):
        write_filter(run, answer, made)
