"""Fewer experts: slices of the stacked experts, router rows and biases, with the controls that show what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from freehold.core.errors import ConfigError
from freehold.core.table import Table
from freehold.model.config import ModelConfig
from freehold.stages.reshape.config import PruneConfig
from freehold.stages.reshape.model import Opened, build
from freehold.stages.reshape.scores import Scores, bits_per_token, fewer_experts, score_experts

Chunks = Mapping[str, Sequence[Sequence[int]]]
"""Text by name, cut into chunks of ids; the first is the domain."""


def moe_numbers(config: ModelConfig) -> range:
    """Return the numbers of the layers that have experts."""
    return range(config.num_dense_layers, config.num_hidden_layers)


def sliced(
    config: ModelConfig, state: Mapping[str, Tensor], kept: Mapping[int, Sequence[int]]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the shape and tensors of a model that keeps these experts, in ascending order, in each layer.

    Router rows and biases go with their experts; the scale of the routing weights stays. ConfigError when layers
    keep different numbers, or fewer than a token uses.
    """
    counts = {len(set(experts)) for experts in kept.values()}
    if len(counts) != 1 or set(kept) != set(moe_numbers(config)):
        raise ConfigError(
            "every layer must keep the same number of experts", where="keep", found=sorted(counts), expected="one"
        )
    (count,) = counts
    if not config.num_experts_per_tok <= count <= config.num_experts:
        raise ConfigError(
            "a layer cannot keep this many experts",
            where="keep",
            found=count,
            expected=f"{config.num_experts_per_tok} (used by a token) to {config.num_experts} (there are)",
        )
    new = dict(state)
    for number, experts in kept.items():
        index, stem = torch.tensor(sorted(experts)), f"model.layers.{number}.mlp"
        for name in ("experts.gate_up_proj", "experts.down_proj", "router.gate.weight", "expert_bias"):
            new[f"{stem}.{name}"] = state[f"{stem}.{name}"][index].contiguous()
    # Not derived again: the weights were trained with this scale, which belongs to k more than to the experts left.
    return config.model_copy(update={"num_experts": count}), new


def choose(scores: Scores, kind: str, keep: int) -> dict[int, list[int]]:
    """Return the best experts of each layer by a score."""
    return {number: sorted(layer.share(kind).topk(keep).indices.tolist()) for number, layer in scores.layers.items()}


def at_random(config: ModelConfig, keep: int, seed: int) -> dict[int, list[int]]:
    """Return as many experts of each layer, drawn."""
    generator = torch.Generator().manual_seed(seed)
    return {
        number: sorted(torch.randperm(config.num_experts, generator=generator)[:keep].tolist())
        for number in moe_numbers(config)
    }


def prune(
    parent: Opened, chunks: Chunks, settings: PruneConfig
) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """Return the pruned model and its report: bits per token of every text, next to three controls.

    The controls: all experts, as many at random, and all experts with fewer of them a token.
    """
    config, state = parent.config, parent.state
    if not 0 < settings.keep <= config.num_experts or settings.keep < config.num_experts_per_tok:
        # Refused before an hour of reading.
        sliced(config, state, {n: range(settings.keep) for n in moe_numbers(config)})
    model = parent.model()
    scores = score_experts(model, next(iter(chunks.values())))
    kept = choose(scores, settings.score, settings.keep)
    new_config, new_state = sliced(config, state, kept)
    bits = {"all experts": _bits(model, chunks)}
    bits[f"{settings.keep} by {settings.score}"] = _bits(build(new_config, new_state), chunks)
    random_config, random_state = sliced(config, state, at_random(config, settings.keep, settings.seed))
    bits[f"{settings.keep} at random"] = _bits(build(random_config, random_state), chunks)
    if (fewer := max(1, config.num_experts_per_tok // 2)) < config.num_experts_per_tok:
        with fewer_experts(model, k=fewer):
            bits[f"all, {fewer} a token"] = _bits(model, chunks)
    share = {str(n): round(float(layer.share("mass")[kept[n]].sum()), 4) for n, layer in scores.layers.items()}
    report = {
        "how": "pruned",
        "experts": [config.num_experts, settings.keep],
        "score": settings.score,
        "kept": {str(number): experts for number, experts in kept.items()},
        "kept_mass": share,
        "bits_per_token": bits,
        "settings": settings.model_dump(mode="json"),
    }
    return new_config, new_state, report


def _bits(model: Any, chunks: Chunks) -> dict[str, float]:
    return {name: round(bits_per_token(model, text), 5) for name, text in chunks.items()}


def report_table(report: dict[str, Any]) -> Table:
    """Return bits per token of each text, by what was kept; the difference to all experts in brackets."""
    bits = report["bits_per_token"]
    texts = list(next(iter(bits.values())))
    base = bits["all experts"]
    rows = [[kept, *(f"{found[t]:.4f} ({found[t] - base[t]:+.4f})" for t in texts)] for kept, found in bits.items()]
    note = "Bits per token, in brackets the difference. The first text is the domain that experts were chosen by."
    return Table("Pruned experts and controls", ["kept", *texts], rows, note)
