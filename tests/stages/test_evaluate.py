"""Evaluation: exact code lengths, answers that count, and numbers another harness can repeat."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from freehold.api import Loaded, load
from freehold.checkpoint.hf import save_hf
from freehold.core.artifact import Workspace
from freehold.core.config import fill
from freehold.core.document import Document, write_rows
from freehold.core.errors import ConfigError, DataError
from freehold.core.log import Log
from freehold.data.loader import Source
from freehold.data.packing import cut
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.stages.evaluate.config import EvaluateConfig, HarnessConfig, plan
from freehold.stages.evaluate.items import Item, macro, normalise, read_files, read_items, wilson
from freehold.stages.evaluate.likelihood import batches, score
from freehold.stages.evaluate.run import evaluate_model, gain, run
from freehold.stages.evaluate.table import tables
from freehold.stages.evaluate.tasks import do_tasks, refuses, said
from freehold.stages.evaluate.text import bits_per_byte, compressors, held_out
from freehold.tokenizer.bpe import train
from freehold.tokenizer.chat import render_ids
from freehold.trainer import validate

QUIET = Log(quiet=True)
WORDS = "the cat sat on a mat and the dog saw the cat; Paris is the capital of France. Zürich, 1914 – 1918."
CONFIG = EvaluateConfig(context_tokens=16, batch_items=3, max_answer_tokens=5, dtype="float32")
SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_dense_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": 6, "global_attn_every_n_layers": 2, "max_position_embeddings": 128,
}  # fmt: skip

Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return a function that gives the HF folder of a small random model, another one for each name."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train([WORDS] * 20, 320, QUIET)

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            config = ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE)
            model = Afmoe(config)
            model.init_weights(torch.Generator().manual_seed(len(name)))
            with torch.no_grad():
                model.lm_head.weight.mul_(0 if name == "uniform" else 8)  # 8: far from uniform
            save_hf(path, config, model.state_dict(), torch.float32)
            tokenizer.save(path)
        return path

    return folder


@pytest.fixture(scope="session")
def loaded(checkpoints: Folders) -> Loaded:
    return load(checkpoints("base"))


def document(number: int, text: str, split: str, source: str = "tales") -> Document:
    empty = {f.name: "" for f in dataclasses.fields(Document)}
    return Document(**empty | {"id": str(number), "text": text, "source": source, "split": split})


def curated(root: Path, **sources: list[tuple[str, str]]) -> Path:
    """Write documents/<source>.parquet of (split, text) rows below `root` and return `root`."""
    for source, rows in sources.items():
        documents = [document(i, text, split, source) for i, (split, text) in enumerate(rows)]
        write_rows(root / "documents" / f"{source}.parquet", documents, Document)
    return root


def question(number: int, answer: str = "paris", task: str = "capitals") -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"What is the capital of country {number}?"}]
    return {"id": f"{task}-{number}", "task": task, "kind": "generate", "prompt": prompt, "answer": answer}


def choice(number: int, choices: list[str], answer: int, task: str = "choices") -> dict[str, Any]:
    return question(number, task=task) | {"kind": "choice", "choices": choices, "answer": answer}


CHOICES = [choice(n, ["the cat", "a dog", "Zürich is a city"], n % 3) for n in range(4)]


def write_items(folder: Path, name: str, rows: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def brute_force_nats(model: Afmoe, sequence: list[int], context_tokens: int, first: int = 1) -> float:
    """Predict every token from place `first` on from its window alone, one forward pass a token."""
    total = 0.0
    with torch.inference_mode():
        for place in range(first, len(sequence)):
            start = (place - 1) // context_tokens * context_tokens
            logits = model(torch.tensor([sequence[start:place]]))[0, -1].double()
            total -= float(logits.log_softmax(-1)[sequence[place]])
    return total


# Held-out text


def test_bits_per_byte_equals_one_forward_pass_a_token(loaded: Loaded, tmp_path: Path) -> None:
    texts = [WORDS, "Zürich.", WORDS[::-1], "a"]
    found = bits_per_byte(
        loaded, held_out(curated(tmp_path, tales=[("validation", t) for t in texts]), None), CONFIG, QUIET, "base"
    )
    end = loaded.tokenizer.end_of_text
    sequences = [[loaded.tokenizer.bos, *loaded.tokenizer.encode(text), end] for text in texts]
    nats = sum(brute_force_nats(loaded.model, s, CONFIG.context_tokens) for s in sequences)
    size = sum(len(text.encode()) for text in texts)
    assert found["overall"]["bits"] == pytest.approx(nats / math.log(2), rel=1e-5)
    assert found["overall"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)
    assert found["overall"]["tokens"] == sum(len(s) - 1 for s in sequences)
    assert found["overall"]["bytes"] == size
    assert max(len(s) for s in sequences) > 2 * CONFIG.context_tokens  # several windows were needed


def test_training_and_evaluation_count_the_same_bits(loaded: Loaded, tmp_path: Path) -> None:
    """Validation while training lays windows side by side; evaluation scores them one by one, through the cache."""
    texts = [WORDS, "Zürich.", WORDS[::-1], "a", WORDS[:33]]
    root = curated(tmp_path, tales=[("validation", t) for t in texts])
    evaluated = bits_per_byte(loaded, held_out(root, None), CONFIG, QUIET, "base")["overall"]
    documents = [[*loaded.tokenizer.encode(text), loaded.tokenizer.end_of_text] for text in texts]
    lengths = np.array([len(ids) for ids in documents])
    source = Source("tales", np.concatenate(documents), np.cumsum(lengths) - lengths, lengths, list("abcde"))
    sizes = np.array([len(text.encode()) for text in texts])
    held = validate.held_out(source, sizes, CONFIG.context_tokens, 0, loaded.tokenizer.bos)
    assert held.batch.target_tokens == evaluated["tokens"]
    assert len(held.batch.input_ids) < sum(-(-n // CONFIG.context_tokens) for n in lengths)  # windows share rows
    trained = validate.bits_per_byte(loaded.model, {"tales": held})["val/bpb"]
    assert trained == pytest.approx(evaluated["bits_per_byte"], abs=2e-6)  # recorded with six digits


def test_uniform_model_needs_log2_of_the_vocabulary_a_token(checkpoints: Folders, tmp_path: Path) -> None:
    loaded = load(checkpoints("uniform"))
    texts = held_out(curated(tmp_path, one=[("validation", WORDS)], two=[("validation", "a mat")]), None)
    found = bits_per_byte(loaded, texts, CONFIG, QUIET, "uniform")
    for record in [found["overall"], *found["sources"].values()]:
        assert record["bits"] == pytest.approx(record["tokens"] * math.log2(loaded.tokenizer.vocab_size), abs=6e-4)
    assert found["overall"]["tokens"] == sum(r["tokens"] for r in found["sources"].values())


def test_batches_do_not_change_the_number(loaded: Loaded, tmp_path: Path) -> None:
    texts = held_out(curated(tmp_path, tales=[("validation", WORDS[i:]) for i in range(0, 60, 10)]), None)
    one, many = (
        bits_per_byte(loaded, texts, CONFIG.model_copy(update={"batch_items": n}), QUIET, "base")["overall"]["bits"]
        for n in (1, 32)
    )
    assert one == pytest.approx(many, rel=1e-6)


def test_held_out_text_is_cut_between_characters(tmp_path: Path) -> None:
    rows = [("train", "no"), ("validation", "abc"), ("validation", "dé"), ("validation", "fgh"), ("", "no")]
    root = curated(tmp_path, tales=rows, other=[("train", "only training")])
    assert held_out(root, None) == {"tales": [("abc", True), ("dé", True), ("fgh", True)]}
    assert held_out(root, 5) == {"tales": [("abc", True), ("d", False)]}  # the fifth byte is half of é
    assert held_out(root, 3) == {"tales": [("abc", True)]}
    assert held_out(root, 2) == {"tales": [("ab", False)]}


def test_a_cut_document_does_not_pay_for_its_end(loaded: Loaded, tmp_path: Path) -> None:
    root = curated(tmp_path, tales=[("validation", WORDS)])
    whole = bits_per_byte(loaded, held_out(root, len(WORDS.encode())), CONFIG, QUIET, "base")["overall"]
    part = bits_per_byte(loaded, held_out(root, 40), CONFIG, QUIET, "base")["overall"]
    assert whole["tokens"] == len(loaded.tokenizer.encode(WORDS)) + 1
    assert part["tokens"] == len(loaded.tokenizer.encode(WORDS[:40]))


def test_no_held_out_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no held-out text"):
        held_out(curated(tmp_path, tales=[("train", "text")]), None)


def test_compressors_see_the_same_bytes(tmp_path: Path) -> None:
    texts = held_out(
        curated(tmp_path, b=[("validation", WORDS), ("validation", "a")], a=[("validation", "b" * 99)]), None
    )
    found = compressors(texts)
    first, second = b"b" * 99, (WORDS + "a").encode()
    assert list(found["sources"]) == ["a", "b"]
    assert found["sources"]["a"]["xz"] == round(8 * len(lzma.compress(first, preset=9)) / 99, 6)
    zstd = pa.Codec("zstd", compression_level=19).compress(first + second, asbytes=True)
    assert found["overall"]["zstd"] == round(8 * len(zstd) / len(first + second), 6)
    assert (found["overall"]["bytes"], found["overall"]["documents"]) == (len(first + second), 3)


def test_windows_predict_every_token_once() -> None:
    ids = list(range(1, 12))
    windows = cut(ids, 4)
    assert [w[1:] for w in windows] == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]
    assert [w[0] for w in windows] == [1, 5, 9]
    assert cut([1], 4) == []
    assert cut([1, 2, 3, 4, 5], 4) == [[1, 2, 3, 4, 5]]


def test_batches_hold_similar_lengths_and_every_index_once() -> None:
    assert batches([5, 1, 9, 1, 5], 2) == [[1, 3], [0, 4], [2]]
    assert batches([512] * 5, 32) == [[0, 1, 2, 3], [4]]  # no more tokens than the engine reads in one pass
    assert batches([9999], 32) == [[0]]
    assert batches([], 32) == []


def test_scores_come_back_in_the_order_asked(loaded: Loaded) -> None:
    sequences = [[1, 40, 41, 42], [1, 50], [1, 60, 61]]
    together = score(loaded.engine, sequences, batch_items=2, log=QUIET, what="")
    for sequence, values in zip(sequences, together, strict=True):
        assert -sum(values) == pytest.approx(brute_force_nats(loaded.model, sequence, 99), rel=1e-5)


# Items


def test_items_are_read_by_file_in_file_order(tmp_path: Path) -> None:
    write_items(tmp_path, "b", [question(1, task="two"), question(2, task="one"), question(3, task="two")])
    write_items(tmp_path, "a", [choice(1, ["x", "y"], 0) | {"note": "the writer's own"}])
    (tmp_path / "empty.jsonl").write_text("")
    tasks = read_items(tmp_path)
    assert {task: [item.id for item in items] for task, items in tasks.items()} == {
        "a": ["choices-1"],
        "b": ["two-1", "one-2", "two-3"],
    }
    assert [item.id for item in read_items(tmp_path, limit=2)["b"]] == ["two-1", "one-2"]
    assert tasks["a"][0].chance == 0.5
    assert tasks["b"][0].chance == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ({"id": "1"}, "not a task item"),
        (question(1) | {"answer": 4}, "has a text `answer`"),
        (question(1) | {"choices": ["a", "b"]}, "no `choices`"),
        (choice(1, ["a", "b"], 2), "not an index"),
        (choice(1, ["a", "b"], -1), "not an index"),
        (choice(1, ["a"], 0), "two or more"),
        (choice(1, ["a", ""], 0), "non-empty"),
        (question(1) | {"prompt": []}, "prompt"),
        (question(1) | {"kind": "essay"}, "kind"),
        (choice(1, ["a", "b"], 0), "items of one kind"),
    ],
)
def test_what_is_no_item_is_named_with_its_line(tmp_path: Path, row: Any, message: str) -> None:
    write_items(tmp_path, "t", [question(0), row])
    with pytest.raises(DataError, match=message) as error:
        read_items(tmp_path)
    assert str(error.value.where).endswith("t.jsonl:2")


@pytest.mark.parametrize(
    ("text", "form"),
    [(" Paris. ", "paris"), ("New\n York", "new york"), ("3.5", "3.5"), ("STRASSE", "strasse"), ("..", "")],
)
def test_answers_are_compared_in_one_form(text: str, form: str) -> None:
    assert normalise(text) == form


def test_wilson_interval() -> None:
    # Newcombe (1998), table I: 81 of 263, method 3.
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0) == (0, 1)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_greedy_answers_are_those_of_the_plain_loop(loaded: Loaded) -> None:
    items = [Item(**question(n)) for n in range(5)]
    scores, rows = do_tasks(loaded, {"capitals": items}, CONFIG, QUIET, "base")
    stops = {loaded.tokenizer.im_end, loaded.tokenizer.end_of_text}
    for item, row in zip(items, rows, strict=True):
        ids, _ = render_ids(loaded.tokenizer, item.prompt, generation=True)
        answer: list[int] = []
        with torch.inference_mode():
            while len(answer) < CONFIG.max_answer_tokens and not stops & set(answer):
                answer.append(int(loaded.model(torch.tensor([ids + answer]))[0, -1].argmax()))
        assert row["answer"] == loaded.tokenizer.decode(answer, skip_specials=True)
        assert (row["id"], row["expected"], row["correct"]) == (item.id, "paris", False)
    right = [
        item.model_copy(update={"answer": f"  {row['answer'].upper()}."}) for item, row in zip(items, rows, strict=True)
    ]
    better, _ = do_tasks(loaded, {"capitals": [*right[:3], *items[3:]]}, CONFIG, QUIET, "base")
    assert scores["overall"]["correct"] == 0
    record = better["tasks"]["capitals"]
    assert record["parts"]["capitals"] == better["overall"] | {"majority": 0.4}
    assert {key: record[key] for key in better["overall"]} == better["overall"]
    assert (record["kind"], record["macro"], record["refused"]) == ("generate", 0.6, 0)
    assert record["answer_tokens"] == sum(row["tokens"] for row in rows) / 5
    assert (better["overall"]["correct"], better["overall"]["accuracy"]) == (3, 0.6)


def test_relations_count_the_same_in_the_macro_average() -> None:
    few, many = ({"accuracy": 0.5, "items": 2}, {"accuracy": 1.0, "items": 100})
    found = macro({"few": few, "many": many})
    assert found["macro"] == 0.75
    # Half the standard error of a half of two, 1.96 times.
    assert found["macro_low"] == pytest.approx(0.75 - 1.96 * 0.5 * (0.25 / 2) ** 0.5, abs=1e-4)
    assert found["macro_high"] == 1.0


def test_thoughts_are_no_part_of_an_answer(loaded: Loaded) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
    ]
    asked, _ = render_ids(loaded.tokenizer, messages[:1], generation=True)
    ids, _ = render_ids(loaded.tokenizer, messages)
    assert said(loaded, ids[len(asked) :]).strip() == "b"
    assert refuses(" I do not  know.")
    assert not refuses("I know")


def test_the_likeliest_choice_a_byte_is_taken(loaded: Loaded) -> None:
    items = [Item(**row) for row in CHOICES]
    scores, rows = do_tasks(loaded, {"choices": items}, CONFIG, QUIET, "base")
    picked = []
    for item in items:
        ids, _ = render_ids(loaded.tokenizer, item.prompt, generation=True)
        per_byte = []
        for text in item.choices or []:
            tail = loaded.tokenizer.encode(text)
            per_byte.append(brute_force_nats(loaded.model, ids + tail, 999, len(ids)) / len(text.encode()))
        picked.append(per_byte.index(min(per_byte)))
    assert [row["answer"] for row in rows] == [CHOICES[0]["choices"][i] for i in picked]
    assert [row["correct"] for row in rows] == [p == item.answer for p, item in zip(picked, items, strict=True)]
    assert scores["overall"]["chance"] == pytest.approx(1 / 3, abs=1e-6)


@pytest.mark.parametrize("row", [question(1), choice(1, ["a", "b"], 0)])
def test_an_item_longer_than_the_context_is_named(loaded: Loaded, row: dict[str, Any]) -> None:
    item = Item(**row | {"prompt": [{"role": "user", "content": "cat " * 200}]})
    with pytest.raises(DataError, match="does not fit") as error:
        do_tasks(loaded, {item.task: [item]}, CONFIG, QUIET, "base")
    assert item.id in str(error.value.where)


def test_parts_of_a_task_are_counted_apart(loaded: Loaded) -> None:
    items = [Item(**question(n, task=("sums", "words")[n % 2])) for n in range(5)]
    scores, rows = do_tasks(loaded, {"mixed": items}, CONFIG, QUIET, "base")
    assert {part: record["items"] for part, record in scores["tasks"]["mixed"]["parts"].items()} == {
        "sums": 3,
        "words": 2,
    }
    assert [(row["task"], row["part"]) for row in rows[:2]] == [("mixed", "sums"), ("mixed", "words")]


# The stage


@pytest.fixture
def work(tmp_path: Path, checkpoints: Folders) -> Workspace:
    root = curated(
        tmp_path / "curate", tales=[("validation", WORDS), ("train", "x")], notes=[("validation", "the cat")]
    )
    write_items(root / "tasks", "choices", CHOICES)
    write_items(root / "tasks", "capitals", [question(n) for n in range(3)])
    for stage, name in (("pretrain", "truebase"), ("pretrain", "base"), ("align", "preview")):
        (tmp_path / stage).mkdir(exist_ok=True)
        (tmp_path / stage / name).symlink_to(checkpoints(name))
    inputs = {name: tmp_path / name for name in ("pretrain", "align", "curate")}
    return Workspace(tmp_path / "evaluate", "evaluate", "small", 0, QUIET, inputs)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_stage_writes_the_same_files_twice(work: Workspace) -> None:
    counts = run(CONFIG, work)
    first = contents(work.folder)
    assert run(CONFIG, work) == counts
    assert contents(work.folder) == first
    assert sorted(first) == [
        "answers/base.jsonl",
        "answers/preview.jsonl",
        "lm_eval/README.md",
        "lm_eval/freehold_capitals.jsonl",
        "lm_eval/freehold_capitals.yaml",
        "lm_eval/freehold_choices.jsonl",
        "lm_eval/freehold_choices.yaml",
        "lm_eval/freehold_results.py",
        "lm_eval/requests.jsonl",
        "results.json",
        "results.md",
    ]
    results = json.loads(first["results.json"])
    assert list(results["checkpoints"]) == ["base", "preview", "truebase"]
    assert "tasks" not in results["checkpoints"]["truebase"]
    assert len(first["answers/base.jsonl"].splitlines()) == 7
    assert (
        counts["bits_per_byte"]["base"] == results["checkpoints"]["base"]["bits_per_byte"]["overall"]["bits_per_byte"]
    )
    assert counts["gain"] == pytest.approx(counts["accuracy"]["preview"] - counts["accuracy"]["base"], abs=2e-6)
    table = first["results.md"].decode()
    assert "| source | bytes | xz -9 | zstd -19 | truebase | base | preview |" in table
    assert "| capitals: capitals | 3 |" in table
    assert "| task | items | chance | base | preview | preview − base |" in table


def test_task_files_of_the_recipe_are_asked(work: Workspace, tmp_path: Path) -> None:
    folder = write_items(tmp_path / "own", "mine", [question(n, task="mine") for n in range(2)])
    changes = {"checkpoints": ("base",), "task_checkpoints": ("base",), "files": {"mine": folder / "mine.jsonl"}}
    run(CONFIG.model_copy(update=changes), work)
    results = json.loads((work.folder / "results.json").read_text())
    assert results["checkpoints"]["base"]["tasks"]["tasks"]["mine"]["items"] == 2
    assert list(results["settings"]["files"]) == ["mine"]


@pytest.mark.parametrize(
    ("name", "says"), [("absent", "no such task file"), ("taken", "is there already"), ("empty", "is empty")]
)
def test_task_files_that_cannot_be_asked_are_named(tmp_path: Path, name: str, says: str) -> None:
    for file in ("taken", "empty"):
        (tmp_path / f"{file}.jsonl").write_text("")
    with pytest.raises(DataError, match=says):
        read_files({name: tmp_path / f"{name}.jsonl"}, None, taken={"taken"})


def test_harness_figures_have_a_table() -> None:
    rate = {"bits_per_byte": 1.0}
    plain = {"bytes": 1, "xz": 1.0, "zstd": 1.0}
    base = {"bits_per_byte": {"overall": rate, "sources": {}}, "harness": {"cloze": {"acc": 0.5}}}
    results = {
        "settings": {"context_tokens": 8, "dtype": "float32"}, "text": {"sources": {}, "overall": plain},
        "checkpoints": {"base": base}, "gain": {},
    }  # fmt: skip
    assert "| cloze | acc | 0.5000 |" in tables(results)[-1].markdown()


def test_stage_without_tasks(work: Workspace) -> None:
    config = CONFIG.model_copy(update={"checkpoints": ("base",), "task_checkpoints": ()})
    counts = run(config, work)
    assert (counts["accuracy"], counts["gain"]) == ({}, None)
    assert "## Tasks" not in (work.folder / "results.md").read_text()
    assert not (work.folder / "answers").exists()


def test_gain_is_last_minus_first() -> None:
    def result(accuracy: float) -> dict[str, Any]:
        return {"tasks": {"tasks": {"t": {"accuracy": accuracy}}, "overall": {"accuracy": accuracy / 2}}}

    found = gain({"base": result(0.2), "preview": result(0.5)}, ("base", "preview"))
    assert found == {"from": "base", "to": "preview", "tasks": {"t": 0.3}, "overall": 0.15}
    assert gain({"base": result(0.2)}, ("base",)) == {}


def test_window_must_fit_the_model(checkpoints: Folders, tmp_path: Path) -> None:
    texts = held_out(curated(tmp_path, tales=[("validation", WORDS)]), None)
    config = CONFIG.model_copy(update={"context_tokens": SHAPE["max_position_embeddings"]})
    with pytest.raises(ConfigError, match="wider than the model's context") as error:
        evaluate_model(checkpoints("base"), texts, {}, config, QUIET, "base")
    assert error.value.where == "evaluate.context_tokens"


def test_tasks_need_a_checkpoint_that_is_loaded() -> None:
    with pytest.raises(ConfigError, match="not a valid value") as error:
        fill(EvaluateConfig, {"checkpoints": ["base"]}, "evaluate")
    assert "preview is not" in str(error.value)


def test_plan_says_what_will_be_measured() -> None:
    assert plan(EvaluateConfig()) == [
        "bits per byte of truebase, base, preview on up to 80,000 bytes of held-out text a source, "
        "512-token windows, bfloat16, compared with xz -9 and zstd -19",
        "every held-out item by base, preview, answers up to 24 tokens",
    ]
    config = EvaluateConfig(max_bytes_per_source=None, max_items_per_task=9)
    assert "all held-out text" in plan(config)[0]
    assert "up to 9 held-out items of each task" in plan(config)[1]
    assert len(plan(EvaluateConfig(task_checkpoints=()))) == 1
    assert plan(EvaluateConfig(harness=HarnessConfig(tasks=("cloze",))))[-1].startswith("lm-evaluation-harness: cloze")
