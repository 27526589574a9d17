"""The same numbers as transformers' AfmoeForCausalLM: names, logits, and the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers

from freehold.model import blockwise
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig, to_hf_dict


def reference(model: Afmoe) -> transformers.AfmoeForCausalLM:
    config = transformers.AfmoeConfig(**to_hf_dict(model.config, "float32"), attn_implementation="eager")
    result = transformers.AfmoeForCausalLM(config).to(next(model.parameters()).dtype)
    result.load_state_dict(model.state_dict(), strict=True)
    return result


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    "variant", ["hard", "no muP", "every 2nd global", "window beyond T", "all dense", "all MoE", "blocks"]
)
def test_logits_and_every_gradient(
    hard: ModelConfig, make: Callable[[ModelConfig], Afmoe], monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    change: dict[str, dict[str, object]] = {
        "hard": {},
        "blocks": {},
        "no muP": {"mup_enabled": False},
        "every 2nd global": {"layer_types": None, "global_attn_every_n_layers": 2},
        "window beyond T": {"sliding_window": 64},
        "all dense": {"num_dense_layers": 5},
        "all MoE": {"num_dense_layers": 0, "num_experts_per_tok": 8},
    }
    if variant == "blocks":  # what longer sequences use on CPUs
        monkeypatch.setattr(blockwise, "BLOCK_TOKENS", 8)
    model = make(ModelConfig(**hard.model_dump() | change[variant]))
    theirs = reference(model)
    generator = torch.Generator().manual_seed(5)
    # 13 and up: transformers gives the row of the padding id (12) no gradient.
    ids, targets = torch.randint(13, 96, (2, 2, 23), generator=generator)
    ours_logits, their_logits = model(ids), theirs(ids).logits
    assert relative_error(ours_logits, their_logits) < 1e-5
    for logits in (ours_logits, their_logits):
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert expected[name].abs().max() > 0, name
        assert relative_error(parameter.grad, expected[name]) < 5e-5, name


def test_the_names_are_those_of_transformers(model: Afmoe) -> None:
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in reference(model).state_dict().items()
    }


@pytest.mark.parametrize("part", ["expert_bias", "gate_proj", "q_norm", "post_mlp_layernorm", "shared_experts"])
def test_this_test_would_see_an_error_in(model: Afmoe, part: str) -> None:
    theirs = reference(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if part in name:
                tensor.mul_(0.9)
    ids = torch.arange(13, 59)[None]
    assert relative_error(model(ids), theirs(ids).logits) > 1e-3


def test_left_padded_batches_agree(model: Afmoe) -> None:
    ids = torch.arange(13, 33)[None]
    padded = torch.cat([torch.full((1, 4), 12), ids], 1)
    real = padded != 12
    positions = real.cumsum(1).sub(1).clamp(min=0)
    ours = model(padded, positions=positions, document_ids=real.long() - 1)[:, 4:]
    torch.testing.assert_close(ours, model(ids), rtol=1e-5, atol=1e-5)
    theirs = reference(model)(padded, attention_mask=real.long(), position_ids=positions).logits[:, 4:]
    assert relative_error(ours, theirs) < 1e-5
