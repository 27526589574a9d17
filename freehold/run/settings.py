"""The settings of a recipe for people: what a newcomer sets first, then everything else."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from freehold.run.layout import (
    ALIGN,
    CHAT,
    CURATE,
    DECLARED,
    EVALUATE,
    EXPORT,
    GATHER,
    IMPORT,
    PRETRAIN,
    REPHRASE,
    SERVE,
    TOKENIZE,
)

FIRST: dict[str, tuple[str, ...]] = {
    GATHER: ("sources", "policy", "corpus_dir"),
    CURATE: ("kinds", "near_duplicates", "decontamination", "split", "exclude", "workers"),
    REPHRASE: ("teacher", "strategies"),
    TOKENIZE: ("vocab_size", "tokenizer"),
    PRETRAIN: (
        "model",
        "batch.context_tokens",
        "batch.sequences",
        "batch.micro_sequences",
        "phases",
        "optim.lr",
        "optim.muon_lr",
        "parent",
        "parallel.device",
        "trainer.checkpoint_every_steps",
    ),
    ALIGN: ("checkpoint", "batch.context_tokens", "batch.sequences", "phases", "optim.lr"),
    EVALUATE: ("checkpoints", "task_checkpoints", "max_bytes_per_source", "max_items_per_task"),
    EXPORT: ("checkpoint", "name", "types", "uses"),
    SERVE: ("path", "host", "port", "max_model_len"),
    IMPORT: ("path", "name", "licence", "licence_evidence"),
    CHAT: ("path", "system", "max_tokens"),
}
"""What is set in the first recipe of one's own, in the order in which the questions come up."""


def first_settings(stage: str) -> list[tuple[str, str, str]]:
    """Return (key, default, description) of the settings of a stage that a newcomer sets first."""
    cls = DECLARED[stage].config_class()
    fields = ((key, find(cls, key)) for key in FIRST[stage])
    return [(f"{stage}.{key}", _default(field), field.description or "") for key, field in fields if field is not None]


def find(cls: type[BaseModel], key: str) -> FieldInfo | None:
    """Return the field that a dotted key names; None when there is no such field."""
    name, _, rest = key.partition(".")
    field = cls.model_fields.get(name)
    if field is None or not rest:
        return field
    inner = field.annotation
    return find(inner, rest) if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def json_schema(stage: str) -> dict[str, Any]:
    """Return the JSON Schema of a stage's section: the keys that come first are first, and named in `x-first`."""
    schema: dict[str, Any] = DECLARED[stage].config_class().model_json_schema()
    order = list(dict.fromkeys(key.partition(".")[0] for key in FIRST[stage]))
    properties = schema.get("properties", {})
    rest = [name for name in properties if name not in order]
    return {**schema, "x-first": list(FIRST[stage]), "properties": {name: properties[name] for name in [*order, *rest]}}


def text() -> str:
    """Return the first settings of every stage, for a terminal."""
    lines = []
    for stage in FIRST:
        lines.append(f"{stage}: {DECLARED[stage].summary}")
        for key, default, description in first_settings(stage):
            lines.append(f"  {key:<40}{default:<14}{description}")
        lines.append("")
    return "\n".join([*lines, "every setting of a stage: freehold schema STAGE"])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(needed)"
    value = field.get_default(call_default_factory=True, validated_data={})
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return shown if isinstance(value, int | float | str) and 0 < len(shown) <= 12 else ""
