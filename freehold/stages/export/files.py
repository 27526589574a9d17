"""From a Hugging Face folder to GGUF files: accounts for every tensor, plans the files, and streams them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from freehold.core.errors import ExportError
from freehold.model.config import ModelConfig
from freehold.stages.export import gguf_writer
from freehold.stages.export.card import make_card, sampled_errors, write_card
from freehold.stages.export.imatrix import Importance
from freehold.stages.export.mix import Choice, choose_types, visiting_order
from freehold.stages.export.shards import Shards
from freehold.stages.export.source import Weights
from freehold.stages.export.stream import Target, Tensor, Writer, place


def write_files(
    folder: Path, config: ModelConfig, files: Mapping[str, Path], *, name: str, imatrix: Path | None = None,
    workers: int = 0, say: Callable[[str], None] = lambda _: None, weights: Weights | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write GGUF files (file type: path, all in one folder) in one read of the weights; return figures.

    `folder` holds the tokenizer, and in Hugging Face form the weights when none are given. A card is
    written next to each file, with the errors of some layers read back.

    `workers` 0 means one a core. Memory is a slab a worker, whatever the size. ExportError when tensors do not add up,
    are not finite, when the importance matrix is another model's, or when the disk is full (repeat to resume).
    """
    shards = weights or Shards(folder)
    try:
        importance = Importance(imatrix) if imatrix else None
        tensors = _tensors(config)
        account(shards, config)
        _check_importance(importance, config, say)
        targets = [_target(folder, config, kind, path, name, tensors, importance) for kind, path in files.items()]
        for target in targets:
            _say_fallbacks(target, say)
        writer = Writer(shards, tensors, targets, importance, workers or len(os.sched_getaffinity(0)), say)
        figures = writer.run()
        for target in targets:
            write_card(target.path, _card(target, importance, sampled_errors(shards, tensors, target)))
    finally:
        shards.close()
    figures["bytes"] = {target.file_type: target.bytes for target in targets}
    figures["types"] = {t.file_type: dict(Counter(c.type for c in t.choices.values())) for t in targets}
    figures["fallbacks"] = {t.file_type: fallbacks(t.choices) for t in targets}
    return figures


def describe_calibration(importance: Importance | None) -> dict[str, Any]:
    """Return what a card says of the importance matrix."""
    if importance is None:
        return {"importance": "none"}
    return {
        "importance": "matrix",
        "file": importance.path.name,
        "sha256": importance.sha256(),
        "text": importance.dataset,
        "chunks": importance.chunks,
        "weights": len(importance.names),
        "matrices that saw no token": importance.idle() + len(importance.prior_only),
        "of these with a neutral prior": len(importance.prior_only),
    }


NOT_RUN = "not run: weights of the first, middle and last layer were read back, the model was not asked anything"


def _card(target: Target, importance: Importance | None, errors: dict[str, float]) -> dict[str, Any]:
    return make_card(
        target.path, target.file_type, target.choices, planned_bytes=target.bytes,
        calibration=describe_calibration(importance), errors=errors, proof={"model": NOT_RUN},
    )  # fmt: skip


def account(shards: Weights, config: ModelConfig) -> None:
    """Raise ExportError naming a tensor that is missing, left over, or of another shape than the config says."""
    wanted = {source: gguf_writer.source_shape(config, source) for t in _tensors(config) for source in t.sources}
    missing, unused = sorted(wanted.keys() - shards.tensors.keys()), sorted(shards.tensors.keys() - wanted.keys())
    if missing:
        raise ExportError(
            "the GGUF file needs a tensor the weights do not have", where=shards.folder,
            found=f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""),
            todo="the checkpoint and its config disagree: make or download the checkpoint again",
        )  # fmt: skip
    if unused:
        raise ExportError(
            "the weights have a tensor that no GGUF tensor is made of", where=shards.folder,
            found=unused[0] + (f", and {len(unused) - 1} more" if unused[1:] else ""),
            expected="every tensor used exactly once",
        )  # fmt: skip
    for source, shape in wanted.items():
        if shards.tensors[source].shape != shape:
            raise ExportError(
                "a tensor has another shape than the config says", where=f"{shards.folder}: {source}",
                found=list(shards.tensors[source].shape), expected=list(shape),
                todo="the checkpoint and its config disagree: make or download the checkpoint again",
            )  # fmt: skip


def fallbacks(choices: Mapping[str, Choice]) -> dict[str, int]:
    """Return how many tensors got another type because their rows are no whole blocks, as "Q4_K -> Q5_0": count."""
    return dict(Counter(f"{c.instead_of} -> {c.type}" for c in choices.values() if c.instead_of))


def _tensors(config: ModelConfig) -> list[Tensor]:
    shapes = gguf_writer.tensor_shapes(config)
    planned = sorted(gguf_writer.plan_tensors(config), key=lambda tensor: visiting_order(tensor.name))
    return [
        Tensor(t.name, t.sources, shapes[t.name][-2] if len(shapes[t.name]) > 1 else 1, shapes[t.name][-1])
        for t in planned
    ]


def _target(
    hf_folder: Path, config: ModelConfig, file_type: str, path: Path, name: str, tensors: list[Tensor],
    importance: Importance | None,
) -> Target:  # fmt: skip
    choices = choose_types(
        gguf_writer.tensor_shapes(config), file_type, layers=config.num_hidden_layers, experts=config.num_experts,
        importance=importance is not None,
    )  # fmt: skip
    extra: dict[str, str | int] = {}
    if importance:
        extra = {
            "quantize.imatrix.file": importance.path.name,
            "quantize.imatrix.dataset": importance.dataset,
            "quantize.imatrix.entries_count": len(importance.names),
            "quantize.imatrix.chunks_count": importance.chunks,
        }
    head = gguf_writer.header(hf_folder, config, choices, name=name, file_type=file_type, extra=extra)
    offsets, size = place(head, tensors, choices)
    return Target(file_type, path, head, choices, offsets, size)


def _check_importance(importance: Importance | None, config: ModelConfig, say: Callable[[str], None]) -> None:
    if importance is None:
        return
    without = importance.check(gguf_writer.tensor_shapes(config))
    say(
        f"importance matrix {importance.path.name}: {len(importance.names)} weights, {len(without)} without an entry, "
        f"{importance.idle()} matrices that saw no token count all inputs the same"
    )


def _say_fallbacks(target: Target, say: Callable[[str], None]) -> None:
    for change, count in fallbacks(target.choices).items():
        say(f"{target.path.name}: {count} tensors {change}, because their rows are no whole blocks")
