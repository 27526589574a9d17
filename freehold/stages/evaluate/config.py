"""Settings of the evaluate stage."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from freehold.core.config import Config

Checkpoint = Literal["truebase", "base", "preview", "thinking"]
THINKING: Checkpoint = "thinking"
"""The checkpoint that reasons before it answers, so it is given room to."""
# Which stage writes which named checkpoint.
MADE_BY: dict[str, str] = {"truebase": "pretrain", "base": "pretrain", "preview": "align", "thinking": "align"}


class HarnessConfig(Config):
    """Tasks of lm-evaluation-harness that are on disk: asked through our engine, counted by the harness."""

    tasks: tuple[str, ...] = Field((), description="names of tasks; none: the harness is not used")
    include_path: Path | None = Field(
        None, description="folder with YAML files of tasks; their data files are found from inside it"
    )
    shipped: bool = Field(False, description="also know the tasks that come with the harness (most need a network)")
    max_items: int | None = Field(None, gt=0, description="items of each task, in file order; null takes all")
    num_fewshot: int | None = Field(None, ge=0, description="examples in each prompt; null: as the task says")
    chat_template: bool = Field(False, description="put each prompt into a user turn")


class NeedlesConfig(Config):
    """Facts hidden in long held-out text, and asked for: RULER's task with our own words, generated offline."""

    lengths: tuple[int, ...] = Field((), description="tokens of prompt and answer; none: not done")
    keys: tuple[int, ...] = Field((1, 4), min_length=1, description="facts in a text, of which one is asked for")
    items: int = Field(20, gt=0, description="questions for each length and number of keys, at five depths in turn")
    wordings: int = Field(4, ge=1, le=4, description="forms of a fact: 1 a pair alone, up to 4 with whole sentences")
    seed: int = Field(0, ge=0, description="decides words, places and text")
    position_rows: int = Field(8, gt=0, description="most stretches of text for bits per byte by position")


class EvaluateConfig(Config):
    """Declaration of the evaluate stage."""

    checkpoints: tuple[Checkpoint, ...] = Field(
        ("truebase", "base", "preview"), min_length=1, description="checkpoints whose bits per byte are measured"
    )
    task_checkpoints: tuple[Checkpoint, ...] = Field(
        ("base", "preview"), description="checkpoints that do the tasks; the gain is last minus first"
    )
    context_tokens: int = Field(
        512, gt=0, description="width of the windows that held-out text is cut into; a token sees its window only"
    )
    batch_items: int = Field(32, gt=0, description="windows or prompts computed together; bounds memory")
    max_bytes_per_source: int | None = Field(
        80_000, gt=0, description="UTF-8 bytes of held-out text used of each source, in file order; null takes all"
    )
    max_items_per_task: int | None = Field(None, gt=0, description="task items used, in file order; null takes all")
    max_answer_tokens: int = Field(24, gt=0, description="longest answer to a generate task")
    max_reasoning_tokens: int = Field(
        128, ge=0, description="tokens that `thinking` may spend before its answer, on top of max_answer_tokens"
    )
    files: dict[str, Path] = Field(
        default_factory=dict,
        description="further task files by task name: JSONL of items, as in docs/formats.md; unlike tasks that gather "
        "reads, training text is not searched for their questions",
    )
    harness: HarnessConfig = Field(default_factory=HarnessConfig, description="tasks of lm-evaluation-harness")
    needles: NeedlesConfig = Field(default_factory=NeedlesConfig, description="what is found in a long text")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="type of the matrices while evaluating; sums and log-softmax are float32"
    )

    @model_validator(mode="after")
    def _known_for_tasks(self) -> EvaluateConfig:
        missing = [name for name in self.task_checkpoints if name not in self.checkpoints]
        if missing:
            raise ValueError(f"task_checkpoints must be among checkpoints, {', '.join(missing)} is not")
        return self


def plan(config: EvaluateConfig) -> list[str]:
    """Return the lines a dry run prints about this stage."""
    limit = config.max_bytes_per_source
    text = "all held-out text" if limit is None else f"up to {limit:,} bytes of held-out text a source"
    lines = [
        f"bits per byte of {', '.join(config.checkpoints)} on {text}, "
        f"{config.context_tokens}-token windows, {config.dtype}, compared with xz -9 and zstd -19"
    ]
    if config.task_checkpoints:
        limit = config.max_items_per_task
        items = "every held-out item" if limit is None else f"up to {limit:,} held-out items of each task"
        lines.append(
            f"{items} by {', '.join(config.task_checkpoints)}, answers up to {config.max_answer_tokens} tokens"
        )
    if config.needles.lengths:
        lines.append(f"{config.needles.items} needles a cell at {', '.join(map(str, config.needles.lengths))} tokens")
    if config.harness.tasks:
        lines.append(
            f"lm-evaluation-harness: {', '.join(config.harness.tasks)} by {', '.join(config.task_checkpoints)}"
        )
    return lines
