"""Our choice tasks as files of lm-evaluation-harness, so that its numbers can be compared with ours."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from freehold.core.artifact import write_atomic
from freehold.stages.evaluate.items import Item
from freehold.tokenizer.chat import render


def write_tasks(folder: Path, tasks: dict[str, list[Item]]) -> list[str]:
    """Write `freehold_<task>.yaml` and its `.jsonl` for every choice task; return the names lm-eval knows them by.

    The prompt is the rendered chat, special tokens included: the harness's tokenizer turns it into the ids
    that our own evaluation scores. Data files are found from inside `folder` (see its README.md).
    """
    names = []
    for task, items in tasks.items():
        if items[0].kind != "choice":
            continue
        name = f"freehold_{task}"
        rows = [
            {"id": i.id, "prompt": render(i.prompt, generation=True), "choices": i.choices, "answer": i.answer}
            for i in items
        ]
        lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows]
        write_atomic(folder / f"{name}.jsonl", "".join(lines))
        write_atomic(folder / f"{name}.yaml", yaml.safe_dump(_declaration(name), sort_keys=False))
        names.append(name)
    if names:
        write_atomic(folder / "README.md", README.format(names=",".join(names)))
    return names


def _declaration(name: str) -> dict[str, object]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        # acc_bytes is the same rule as ours: the highest log-probability per byte.
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_bytes")],
        "metadata": {"version": 1.0},
    }


README = """# These tasks in lm-evaluation-harness

The data files are named relative to this folder, so start the harness here. With the exported model:

    lm_eval --include_path . --tasks {names} --model hf --model_args pretrained=../../export/hf

Against a running `freehold serve` (the tokenizer is needed to count tokens):

    lm_eval --include_path . --tasks {names} --model local-completions \\
      --model_args base_url=http://127.0.0.1:8000/v1/completions,model=freehold,tokenizer=../../export/hf

`acc_bytes` follows the rule of `results.json`: of the choices, the one with the highest log-probability per byte.
"""
