"""The files for lm-evaluation-harness: it opens them offline, asks what we ask, and counts what we count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from freehold.core.log import Log
from freehold.infer.engine import Engine
from freehold.model.afmoe import Afmoe
from freehold.stages.evaluate.harness import write_tasks
from freehold.stages.evaluate.items import Item
from freehold.tokenizer.bpe import train
from freehold.tokenizer.chat import render, render_ids

CAPITALS = ["Paris", "Rome is it", "London"]


def items(task: str, count: int = 6) -> list[Item]:
    def prompt(number: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Which {{city}} of {number}?"}]

    fields = {"task": task, "kind": "choice", "choices": CAPITALS}
    return [Item(id=str(n), prompt=prompt(n), answer=n % 3, **fields) for n in range(count)]  # type: ignore[arg-type]


def test_only_choice_tasks_are_written(tmp_path: Path) -> None:
    question = Item(id="1", task="sums", kind="generate", prompt=[{"role": "user", "content": "1+1?"}], answer="2")
    assert write_tasks(tmp_path / "a", {"sums": [question], "capitals": items("capitals")}) == ["freehold_capitals"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "freehold_capitals.jsonl",
        "freehold_capitals.yaml",
    ]
    assert write_tasks(tmp_path / "b", {"sums": [question]}) == []
    assert not (tmp_path / "b").exists()


def test_rows_hold_the_rendered_prompt(tmp_path: Path) -> None:
    write_tasks(tmp_path, {"capitals": items("capitals")})
    row = json.loads((tmp_path / "freehold_capitals.jsonl").read_text(encoding="utf-8").splitlines()[1])
    assert row == {
        "id": "1",
        "prompt": render(items("capitals")[1].prompt, generation=True),
        "choices": CAPITALS,
        "answer": 1,
    }
    declared = yaml.safe_load((tmp_path / "freehold_capitals.yaml").read_text(encoding="utf-8"))
    assert declared["dataset_kwargs"] == {"data_files": {"test": "freehold_capitals.jsonl"}}
    assert "--tasks freehold_capitals" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_harness_asks_and_counts_as_we_do(
    tmp_path: Path, tiny_model: Afmoe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = train(["Which city? Paris Rome London"] * 9, 300, Log(quiet=True))
    engine = Engine(tiny_model)
    ours = items("capitals")
    asked: list[tuple[str, str]] = []

    class Ours(LM):
        """Answers the harness with our tokenizer and engine, from the strings it sends."""

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:  # type: ignore[type-arg]
            asked.extend(request.args for request in requests)
            pairs = [[tokenizer.encode(text, specials=True) for text in request.args] for request in requests]
            values = engine.score([prompt + choice for prompt, choice in pairs])
            return [(sum(v[-len(choice) :]), False) for v, (_, choice) in zip(values, pairs, strict=True)]

        def loglikelihood_rolling(self, requests: list) -> list[float]:  # type: ignore[type-arg]
            raise AssertionError("choice tasks do not ask for this")

        def generate_until(self, requests: list) -> list[str]:  # type: ignore[type-arg]
            raise AssertionError("choice tasks do not ask for this")

    write_tasks(tmp_path / "tasks", {"capitals": ours})
    monkeypatch.chdir(tmp_path / "tasks")
    manager = TaskManager(include_path=".", include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=Ours(), tasks=["freehold_capitals"], task_manager=manager, bootstrap_iters=0, log_samples=False
    )["results"]["freehold_capitals"]

    assert sorted(asked) == sorted((render(i.prompt, generation=True), c) for i in ours for c in CAPITALS)
    prompt, _ = render_ids(tokenizer, ours[0].prompt, generation=True)
    assert tokenizer.encode(render(ours[0].prompt, generation=True), specials=True) == prompt
    right = 0
    for item in ours:
        prompt, _ = render_ids(tokenizer, item.prompt, generation=True)
        tails = [tokenizer.encode(choice) for choice in CAPITALS]
        values = engine.score([prompt + tail for tail in tails])
        per_byte = torch.tensor([sum(v[-len(t) :]) / len(c) for v, t, c in zip(values, tails, CAPITALS, strict=True)])
        right += int(per_byte.argmax()) == item.answer
    assert found["acc_bytes,none"] == pytest.approx(right / len(ours))
