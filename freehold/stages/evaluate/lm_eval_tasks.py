"""Tasks of lm-evaluation-harness that are on disk, asked through our engine and counted by the harness itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freehold.core.errors import ConfigError
from freehold.core.log import Log
from freehold.stages.evaluate.config import HarnessConfig

if TYPE_CHECKING:
    from freehold.api import Loaded


def run_tasks(loaded: Loaded, config: HarnessConfig, log: Log, name: str) -> dict[str, dict[str, float]]:
    """Return the harness's own figures of each task, by metric.

    Raises ConfigError when the harness is not installed or knows no such task, DataError for a request that does not
    fit the model.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "lm-evaluation-harness is not installed", where="evaluate.harness", found=error, todo="pip install lm-eval"
        ) from error
    from freehold.stages.evaluate.lm_eval_model import model_of

    log.say(f"  {name}: {', '.join(config.tasks)} by lm-evaluation-harness")
    with _offline(), contextlib.chdir(config.include_path or Path()):
        manager = TaskManager(include_path="." if config.include_path else None, include_defaults=config.shipped)
        unknown = [task for task in config.tasks if task not in manager.all_tasks]
        if unknown:
            raise ConfigError(
                "the harness knows no such task",
                where="evaluate.harness.tasks",
                found=", ".join(unknown),
                expected=", ".join(manager.all_tasks[:20]) or "a folder with YAML files of tasks",
            )
        found = simple_evaluate(
            model=model_of(loaded),
            tasks=list(config.tasks),
            num_fewshot=config.num_fewshot,
            limit=config.max_items,
            apply_chat_template=config.chat_template,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
            verbosity="ERROR",
        )
    return {task: _figures(row) for task, row in sorted(found["results"].items())}


def _figures(row: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of one task under the names that people know."""
    return {
        key.removesuffix(",none"): round(float(value), 6)
        for key, value in sorted(row.items())
        if isinstance(value, int | float) and "stderr" not in key
    }


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the harness from asking a hub: what is not on disk is an error."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
