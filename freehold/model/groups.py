"""The groups of a model's parameters that an adapter may train, by our own names; needs no torch.

A name means the same matrices in every AFMoE model. Hugging Face's `gate_proj` alone means four different things there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from freehold.core.errors import ConfigError

LINEAR: dict[str, str] = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.gate": "self_attn.gate_proj",
    "dense.gate": "mlp.gate_proj",
    "dense.up": "mlp.up_proj",
    "dense.down": "mlp.down_proj",
    "shared.gate": "mlp.shared_experts.gate_proj",
    "shared.up": "mlp.shared_experts.up_proj",
    "shared.down": "mlp.shared_experts.down_proj",
    "router": "mlp.router.gate",
}
"""Groups of plain matrices -> the module of a layer."""
STACKS: dict[str, str] = {"experts.gate_up": "gate_up_proj", "experts.down": "down_proj"}
"""Groups of routed experts -> the stack of a layer's experts."""
ADAPTABLE = (*LINEAR, *STACKS)
"""Groups that may have factors, in the order of reports."""
FULL_ONLY = ("embedding", "head", "norms", "bias")
"""Groups that only full tuning trains."""


def group_of(name: str) -> str:
    """Return the group of a parameter or buffer, with or without factors (`...q_proj.factors.a`)."""
    stem, _, rest = name.partition(".mlp.experts.")
    for group, stack in STACKS.items():
        if stack in rest:
            return group
    name = stem.partition(".factors")[0].removesuffix(".weight")
    for group, module in LINEAR.items():
        if name.endswith(f".{module}"):
            return group
    if name.endswith("embed_tokens"):
        return "embedding"
    if name.endswith("lm_head"):
        return "head"
    return "bias" if name.endswith("expert_bias") else "norms"


def select(wanted: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the groups that names mean: `attention` is all of attention, `attention.q` one matrix.

    ConfigError for a name that matches nothing, or that only full tuning reaches.
    """
    found: list[str] = []
    for name in wanted:
        if name in FULL_ONLY:
            raise ConfigError(
                "an adapter of low rank cannot hold this group",
                where=where,
                found=name,
                expected=", ".join(families()),
                todo="preset: own trains every parameter in full",
            )
        here = [group for group in ADAPTABLE if group == name or group.startswith(f"{name}.")]
        if not here:
            near = difflib.get_close_matches(name, [*families(), *ADAPTABLE], 1)
            raise ConfigError(
                "a group name matches no matrix of the model",
                where=where,
                found=name,
                expected=", ".join(families()) + (f" (did you mean {near[0]}?)" if near else ""),
                todo="groups have our own names; those of Hugging Face mean other matrices in this architecture",
            )
        found += [group for group in here if group not in found]
    return tuple(group for group in ADAPTABLE if group in found)


def families() -> tuple[str, ...]:
    """Return the first words of the groups."""
    return tuple(dict.fromkeys(group.partition(".")[0] for group in ADAPTABLE))
