"""Which optimizer steps which parameter, and their state by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from freehold.optim.adamw import EPS, AdamW
from freehold.optim.config import OptimConfig
from freehold.optim.muon import Muon, ShardedMatrices


def is_hidden_matrix(name: str, tensor: Tensor) -> bool:
    """Return whether Muon steps a parameter: hidden matrices and expert stacks, not embedding, head or router."""
    return tensor.ndim >= 2 and not any(part in name for part in ("embed_tokens", "lm_head", "router"))


def decays(name: str, tensor: Tensor) -> bool:
    """Return whether weight decay may touch a parameter: never gains, embedding or bias."""
    return tensor.ndim >= 2 and "embed_tokens" not in name


class Optimizers:
    """Muon and AdamW side by side; `step(factor)` sets both rates to factor x peak and steps both.

    Weights that have one in `copies`, by name, are written there too (the weights in the dtype to compute in).
    `shapes` and `sharded`: see `Muon`, where only parts of the weights are here.
    """

    def __init__(
        self,
        named: Mapping[str, Tensor],
        config: OptimConfig,
        copies: Mapping[str, Tensor] | None = None,
        shapes: Mapping[str, torch.Size] | None = None,
        sharded: ShardedMatrices | None = None,
    ) -> None:
        # By tensor: an optimizer knows its parameters, not their names.
        twice = {named[name]: copy for name, copy in (copies or {}).items()}
        self.config, self.named = config, dict(named)
        # Muon is for maps between hidden spaces; embedding, head and router have a side that is a set of choices.
        matrices = {n: p for n, p in named.items() if config.matrices == "muon" and is_hidden_matrix(n, p)}
        others = {n: p for n, p in named.items() if n not in matrices}
        self.optimizers: list[tuple[Muon | AdamW, float]] = []
        if matrices:
            muon = Muon(
                matrices.items(),
                config.muon_lr,
                config.newton_schulz_steps,
                config.muon_weight_decay,
                twice,
                shapes,
                sharded,
            )
            self.optimizers.append((muon, config.muon_lr))
        groups = [
            {"params": [p for n, p in others.items() if decays(n, p)], "weight_decay": config.weight_decay},
            {"params": [p for n, p in others.items() if not decays(n, p)], "weight_decay": 0.0},
        ]
        self.optimizers.append((AdamW(groups, config.lr, config.betas, EPS, twice), config.lr))

    def step(self, factor: float, scale: float | Tensor = 1.0, keep: Tensor | None = None) -> None:
        """Step every parameter at `factor` times its peak rate, from `scale` times its gradient.

        keep: a 0-d bool on the device; where it is False nothing changes, whatever the gradients are.
        """
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                # Rates follow from the step alone, so they are in no checkpoint.
                group["lr"] = peak * factor
            optimizer.step(scale=scale, keep=keep)

    def state_dict(self) -> dict[str, Tensor]:
        """Return every state tensor as `<parameter>.<slot>` (momentum, exp_avg, exp_avg_sq, step)."""
        names = {id(parameter): name for name, parameter in self.named.items()}
        return {
            f"{names[id(parameter)]}.{slot}": value
            for optimizer, _ in self.optimizers
            for parameter, state in optimizer.state.items()
            for slot, value in state.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; the rates are not state (they follow from the step)."""
        owner = {
            id(parameter): optimizer
            for optimizer, _ in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for key, value in state.items():
            name, _, slot = key.rpartition(".")
            parameter = self.named[name]
            # A copy: the checkpoint may be read once more by the caller.
            owner[id(parameter)].state[parameter][slot] = value.to(parameter.device, copy=True)
