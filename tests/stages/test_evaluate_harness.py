"""lm-evaluation-harness, by its own classes: the same requests and numbers as ours, and tasks that are on disk."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from freehold import api
from freehold.checkpoint.hf import save_hf
from freehold.core.errors import ConfigError, DataError
from freehold.core.log import Log
from freehold.model.afmoe import Afmoe
from freehold.stages.evaluate.answers import answer
from freehold.stages.evaluate.config import EvaluateConfig, HarnessConfig
from freehold.stages.evaluate.harness import RESULTS, choice_ids, fingerprint, write_tasks
from freehold.stages.evaluate.items import Item, normalise
from freehold.stages.evaluate.lm_eval_tasks import run_tasks
from freehold.stages.evaluate.tasks import do_tasks
from freehold.tokenizer.bpe import train
from freehold.tokenizer.chat import render
from tests import tiny

QUIET = Log(quiet=True)
CAPITALS = ["Paris", "Rome is it", "London"]
WORDS = "Which city of 12? Paris Rome is it London. How much is 1+1? assistant user "


def choices(count: int = 8) -> list[Item]:
    def prompt(number: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Which {{city}} of {number}?"}]

    fields = {"task": "capitals", "kind": "choice", "choices": CAPITALS}
    return [Item(id=str(n), prompt=prompt(n), answer=n % 3, **fields) for n in range(count)]  # type: ignore[arg-type]


SUMS = [
    Item(id=f"s{n}", task="sums", kind="generate", prompt=[{"role": "user", "content": f"{n}+1?"}], answer=str(n + 1))
    for n in range(3)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny export in Hugging Face form, far from uniform."""
    folder = tmp_path_factory.mktemp("hf")
    config = tiny.config(vocab_size=310, max_position_embeddings=128)
    model = tiny.disturb(Afmoe(config))
    save_hf(folder, config, model.state_dict(), torch.float32)
    train([WORDS] * 9, 310, QUIET).save(folder)
    return folder


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to start the harness in, with no hub and a cache of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    monkeypatch.chdir(tasks)
    return tasks


def test_tasks_are_written_with_the_line_break_apart(tmp_path: Path, folder: Path) -> None:
    tokenizer = api.load(folder).tokenizer
    names = write_tasks(tmp_path, {"sums": SUMS, "capitals": choices()}, tokenizer, 5)
    assert names == ["freehold_sums", "freehold_capitals"]
    row = json.loads((tmp_path / "freehold_capitals.jsonl").read_text(encoding="utf-8").splitlines()[1])
    assert row == {
        "id": "1", "prompt": render(choices()[1].prompt, generation=True).removesuffix("\n"), "answer": 1,
        "choices": ["\nParis", "\nRome is it", "\nLondon", "\n"],
    }  # fmt: skip
    text = (tmp_path / "freehold_capitals.yaml").read_text(encoding="utf-8")
    assert text.endswith("process_results: !function freehold_results.choice\n")
    declared = yaml.safe_load(text.replace("!function ", ""))
    assert declared["dataset_kwargs"] == {"data_files": {"test": "freehold_capitals.jsonl"}}
    assert "--tasks freehold_sums,freehold_capitals" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 8 * 3
    assert write_tasks(tmp_path / "none", {}, tokenizer, 5) == []
    assert not (tmp_path / "none").exists()


def test_written_functions_level_answers_as_we_do(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(RESULTS)
    spec = importlib.util.spec_from_file_location("made", tmp_path / "made.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    for text in (" Paris.\n", "PARIS", "a  b .", "..."):
        assert made.level(text) == normalise(text)
    doc = {"choices": ["\nab", "\nabcd", "\n"], "answer": 1}
    assert made.choice(doc, [(-5.0, False), (-6.0, False), (-2.0, False)]) == {"acc": 0.0, "acc_bytes": 1.0}
    assert made.generated({"answer": 4}, [" 4."]) == {"exact": 1.0}


def test_a_choice_that_melts_into_the_prompt_is_refused(folder: Path) -> None:
    tokenizer = train(["assistant\n\nx assistant\n\ny "] * 9, 298, QUIET)
    item = choices()[0].model_copy(update={"choices": ["\nx", "y"]})
    with pytest.raises(DataError, match=r"(?s)spans the end of the prompt.*'\\nx'"):
        choice_ids(tokenizer, item)


def test_the_harness_own_hf_class_asks_and_counts_as_we_do(offline: Path, folder: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = api.load(folder)
    tasks = {"capitals": choices(), "sums": SUMS}
    names = write_tasks(offline, tasks, loaded.tokenizer, 5)
    asked: list[tuple[list[int], list[int]]] = []

    class Recorded(HFLM):  # type: ignore[misc]
        """The harness's class; notes which ids it is about to score."""

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            asked.extend((list(context), list(tail)) for _, context, tail in requests)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    theirs = Recorded(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)
    found = lm_eval.simple_evaluate(
        model=theirs, tasks=names, task_manager=TaskManager(include_path=".", include_defaults=False),
        bootstrap_iters=0, log_samples=False,
    )["results"]  # fmt: skip

    # Requests: 1 begin token each, and without the moved line break the same ids as ours.
    line_break = loaded.tokenizer.encode("\n")
    assert all(context.count(loaded.tokenizer.bos) == 1 for context, _ in asked)
    assert [line_break] * 8 == [tail for _, tail in asked if tail == line_break]
    seen = {fingerprint(context + line_break, tail[1:]) for context, tail in asked if tail != line_break}
    ours = [json.loads(line)["sha256"] for line in (offline / "requests.jsonl").read_text().splitlines()]
    assert seen == set(ours)

    config = EvaluateConfig(max_answer_tokens=5, dtype="float32")
    results, _ = do_tasks(loaded, tasks, config, QUIET, "tiny")
    assert found["freehold_capitals"]["acc_bytes,none"] == pytest.approx(results["tasks"]["capitals"]["accuracy"])
    assert found["freehold_sums"]["exact,none"] == pytest.approx(results["tasks"]["sums"]["accuracy"])

    # Through our engine the harness counts the same, task by task.
    config_ours = HarnessConfig(tasks=tuple(names), include_path=offline)
    through = run_tasks(loaded, config_ours, QUIET, "tiny")
    for name in names:
        for metric in ("acc", "acc_bytes", "exact"):
            if f"{metric},none" in found[name]:
                assert through[name][metric] == pytest.approx(found[name][f"{metric},none"])


CLOZE = """
task: cloze
dataset_path: json
dataset_kwargs: {data_files: {test: cloze.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{end}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc, aggregation: mean}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: long.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity}]
"""


def test_tasks_on_disk_have_the_harness_own_numbers(offline: Path, folder: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"text": "Which city of 12? Paris " * n, "end": " Rome"} for n in (1, 2, 5)]
    (offline / "cloze.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (offline / "long.jsonl").write_text(json.dumps({"text": "Which city of 12? " * 30, "end": " Rome"}) + "\n")
    (offline / "long.yaml").write_text(CLOZE.replace("cloze", "long"))
    (offline / "cloze.yaml").write_text(CLOZE)
    (offline / "rolling.yaml").write_text(ROLLING)
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    manager = TaskManager(include_path=".", include_defaults=False)
    # One begin token, and windows that hold it.
    once = HFLM(
        pretrained=str(folder), dtype="float32", device="cpu", batch_size=1, add_bos_token=False, max_length=127
    )
    found = {}
    for task, model in (("cloze", theirs), ("rolling", once)):
        found |= lm_eval.simple_evaluate(
            model=model, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=False
        )["results"]
    ours = run_tasks(api.load(folder), HarnessConfig(tasks=("cloze", "rolling"), include_path=offline), QUIET, "tiny")
    assert ours["cloze"]["perplexity"] == pytest.approx(found["cloze"]["perplexity,none"], rel=1e-4)
    assert ours["cloze"]["acc"] == found["cloze"]["acc,none"]
    assert ours["rolling"]["byte_perplexity"] == pytest.approx(found["rolling"]["byte_perplexity,none"], rel=1e-4)
    assert math.isfinite(ours["rolling"]["byte_perplexity"])
    with pytest.raises(DataError, match="(?s)a request of a task does not fit"):
        run_tasks(api.load(folder), HarnessConfig(tasks=("long",), include_path=offline), QUIET, "tiny")
    with pytest.raises(ConfigError, match=r"(?s)knows no such task.*absent.*cloze"):
        run_tasks(api.load(folder), HarnessConfig(tasks=("absent",), include_path=offline), QUIET, "tiny")


def test_answers_end_at_strings_and_prompts_must_fit(folder: Path) -> None:
    loaded = api.load(folder)
    whole = answer(loaded, [0, 40, 41], [], 6, "item")
    assert answer(loaded, [0, 40, 41], [whole[2]], 6, "item") == whole.split(whole[2])[0]
    with pytest.raises(DataError, match=r"(?s)does not fit.*sums, item 3.*129 tokens"):
        answer(loaded, [0] * 128, [], 6, "sums, item 3")


def test_a_missing_harness_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"(?s)is not installed.*pip install lm-eval"):
        run_tasks(api.load(folder), HarnessConfig(tasks=("x",)), QUIET, "tiny")
