"""The report of a model's experts by domain, and the proof that a grown model computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from freehold.core.errors import ConfigError
from freehold.model.config import ModelConfig
from freehold.stages.reshape.model import Opened, build
from freehold.stages.reshape.scores import Scores, bits_per_token, fewer_experts, score_experts

MASSES = (0.95, 0.9, 0.8, 0.6)
"""Shares of the routing weight that adaptive numbers of experts are measured at."""
LARGEST_JUMP = 1e-4
"""Of a logit: rounding of fp32 sums in another order, not another function."""
PROBE_TOKENS = 256


def experts_report(
    parent: Opened, domains: Mapping[str, Sequence[Sequence[int]]], reference: Sequence[Sequence[int]] | None
) -> dict[str, Any]:
    """Return scores by domain and layer, with lift over the reference, and what fewer experts a token cost."""
    config, model = parent.config, parent.model()
    if config.num_dense_layers == config.num_hidden_layers:
        raise ConfigError("the model has no experts", where=parent.folder, found="dense layers only")
    common = score_experts(model, reference) if reference else None
    found: dict[str, Any] = {
        "model": parent.sha256, "experts": config.num_experts, "top_k": config.num_experts_per_tok, "domains": {}
    }  # fmt: skip
    for name, chunks in domains.items():
        scores = score_experts(model, chunks)
        found["domains"][name] = {
            "tokens": scores.text_tokens,
            "quarter": round(_quarter(scores, config.num_experts), 4),
            "layers": scores.table(common),
            "fewer": _fewer(model, config, chunks),
        }
    return found


def _quarter(scores: Scores, experts: int) -> float:
    """Return the share of the gate mass that the busiest quarter of the experts has, in the mean over layers."""
    count = max(1, experts // 4)
    return sum(float(layer.share("mass").topk(count).values.sum()) for layer in scores.layers.values()) / len(
        scores.layers
    )


def _fewer(model: Any, config: ModelConfig, chunks: Sequence[Sequence[int]]) -> dict[str, dict[str, float]]:
    """Return bits per token and experts per token, for each number of experts and each share of the weight."""
    top = config.num_experts_per_tok
    counts = sorted({1, max(1, top // 2), top, min(2 * top, config.num_experts)})
    ways: dict[str, dict[str, Any]] = {f"k {k}": {"k": k} for k in counts}
    ways |= {f"weight {mass:g}": {"mass": mass} for mass in MASSES}
    found = {}
    for name, way in ways.items():
        with fewer_experts(model, **way) as used:
            bits = bits_per_token(model, chunks)
        found[name] = {"bits": round(bits, 5), "experts": round(used[0] / max(used[1], 1), 4)}
    return found


@torch.inference_mode()
def largest_difference(parent: Opened, config: ModelConfig, state: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a logit on random ids; ConfigError when the new model is another function."""
    ids = torch.randint(0, config.vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    jump = float((parent.model()(ids) - build(config, state)(ids)).abs().max())
    if not jump <= LARGEST_JUMP:
        raise ConfigError(
            "the grown model does not compute the same", where=parent.folder, found=f"a logit differs by {jump:.2g}",
            expected=f"at most {LARGEST_JUMP:g}", todo="a lower bias",
        )  # fmt: skip
    return jump
