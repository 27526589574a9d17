"""Measure named checkpoints on the same held-out text and items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from freehold.api import load
from freehold.core.artifact import Workspace, sha256_file, write_atomic, write_json
from freehold.core.errors import ConfigError
from freehold.core.log import Log
from freehold.stages.evaluate import harness
from freehold.stages.evaluate.config import MADE_BY, EvaluateConfig
from freehold.stages.evaluate.items import Item, read_files, read_items
from freehold.stages.evaluate.lm_eval_tasks import run_tasks
from freehold.stages.evaluate.needles import find_needles
from freehold.stages.evaluate.table import parts, tables
from freehold.stages.evaluate.tasks import do_tasks
from freehold.stages.evaluate.text import HeldOut, bits_per_byte, compressors, held_out
from freehold.tokenizer.bpe import Tokenizer

SETTINGS = ("context_tokens", "max_bytes_per_source", "max_items_per_task", "max_answer_tokens", "dtype")


def run(config: EvaluateConfig, work: Workspace) -> dict[str, Any]:
    """Write results.json, results.md, `answers/<checkpoint>.jsonl` and lm_eval/; return the headline figures."""
    texts = held_out(work.input("curate"), config.max_bytes_per_source)
    tasks = read_items(work.input("curate") / "tasks", config.max_items_per_task)
    tasks |= read_files(config.files, config.max_items_per_task, taken=tasks)
    results: dict[str, Any] = {
        "settings": config.model_dump(mode="json", include=set(SETTINGS)) | _files(config),
        "text": compressors(texts),
        "checkpoints": {},
    }
    for name in config.checkpoints:
        doing = tasks if name in config.task_checkpoints else {}
        path = work.input(MADE_BY[name]) / name
        result, rows = evaluate_model(path, texts, doing, config, work.log, name)
        results["checkpoints"][name] = result
        if rows:
            lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows]
            write_atomic(work.folder / "answers" / f"{name}.jsonl", "".join(lines))
    results["gain"] = gain(results["checkpoints"], config.task_checkpoints)
    write_json(work.folder / "results.json", results)
    shown = tables(results) + ([parts(results)] if any("tasks" in r for r in results["checkpoints"].values()) else [])
    markdown = "\n".join(table.markdown() for table in shown)
    write_atomic(work.folder / "results.md", f"# Evaluation\n\n{markdown}")
    last = config.checkpoints[-1]
    tokenizer = Tokenizer.load(work.input(MADE_BY[last]) / last)
    harness.write_tasks(work.folder / "lm_eval", tasks, tokenizer, config.max_answer_tokens)
    return headline(results)


def _files(config: EvaluateConfig) -> dict[str, Any]:
    """Return the hashes of the task files that the recipe names: their content is not part of the stage's key."""
    return {"files": {name: sha256_file(path) for name, path in config.files.items()}} if config.files else {}


def evaluate_model(
    path: Path, texts: HeldOut, tasks: dict[str, list[Item]], config: EvaluateConfig, log: Log, name: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return one model's results, and its answer to every item of `tasks` (which may be empty).

    `path` is a checkpoint or an HF folder; the model reads the text through its own tokenizer, so models
    with different vocabularies compare fairly by bits per byte.
    """
    loaded = load(path, dtype=config.dtype, device=config.device)
    limit = loaded.config.max_position_embeddings
    if config.context_tokens >= limit:
        raise ConfigError(
            "the window is wider than the model's context",
            where="evaluate.context_tokens",
            found=config.context_tokens,
            expected=f"less than the {limit} of {name}",
        )
    result: dict[str, Any] = {"bits_per_byte": bits_per_byte(loaded, texts, config, log, name)}
    log.say(f"  {name}: {result['bits_per_byte']['overall']['bits_per_byte']:.3f} bits per byte")
    if config.needles.lengths:
        result["long"] = find_needles(loaded, texts, config.needles, log, name)
    rows: list[dict[str, Any]] = []
    if tasks:
        result["tasks"], rows = do_tasks(loaded, tasks, config, log, name)
        overall = result["tasks"]["overall"]
        log.say(f"  {name}: {overall['correct']} of {overall['items']} items right")
    if config.harness.tasks and name in config.task_checkpoints:
        result["harness"] = run_tasks(loaded, config.harness, log, name)
    return result, rows


def gain(checkpoints: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return what the last task checkpoint gets right more often than the first, in accuracy (0.1 = ten points)."""
    if len(names) < 2 or any("tasks" not in checkpoints[name] for name in names):
        return {}
    before, after = (checkpoints[name]["tasks"] for name in (names[0], names[-1]))

    def rise(old: dict[str, Any], new: dict[str, Any]) -> float:
        return round(new["accuracy"] - old["accuracy"], 6)

    return {
        "from": names[0],
        "to": names[-1],
        "tasks": {task: rise(old, after["tasks"][task]) for task, old in before["tasks"].items()},
        "overall": rise(before["overall"], after["overall"]),
    }


def headline(results: dict[str, Any]) -> dict[str, Any]:
    """Return the few figures that the manifest keeps."""
    checkpoints = results["checkpoints"]
    return {
        "bytes": results["text"]["overall"]["bytes"],
        "xz_bits_per_byte": results["text"]["overall"]["xz"],
        "zstd_bits_per_byte": results["text"]["overall"]["zstd"],
        "bits_per_byte": {n: r["bits_per_byte"]["overall"]["bits_per_byte"] for n, r in checkpoints.items()},
        "accuracy": {n: r["tasks"]["overall"]["accuracy"] for n, r in checkpoints.items() if "tasks" in r},
        "gain": results["gain"].get("overall"),
    }
