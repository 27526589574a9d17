"""AdamW (Loshchilov & Hutter 2019) on float32 weights, from gradients in the dtype they were computed in.

On CPU one pass over memory does what the step needs: it scales the gradient (to clip its norm), moves both moments and
the weights, and writes the copy that the model computes with. Otherwise PyTorch's fused AdamW does the first part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from freehold.kernels import cpu

# Added to the root of the second moment: the default of Kingma & Ba 2015 and of PyTorch.
EPS = 1e-8


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients together, summed in float32 or wider whatever their dtype."""
    squares = [
        cpu.square_sums(g).double().sum()
        if cpu.available(g, g.numel())
        else torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).double().square()
        for g in gradients
    ]
    return torch.stack(squares).sum().sqrt()


class AdamW(torch.optim.Optimizer):
    """AdamW whose gradients may be narrower than its weights (`weight.grad_dtype = None` allows that in PyTorch).

    The learning rate is set from outside each step through `param_groups`. The state is that of torch.optim.AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        copies: Mapping[Tensor, Tensor],
    ) -> None:
        """Take parameter groups, each with its weight_decay; `copies`: where a weight is wanted a second time."""
        self.copies = copies
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, scale: float | Tensor = 1.0, keep: Tensor | None = None
    ) -> None:
        """Take one step from `scale` times the gradients in `.grad`; parameters without one stay as they are.

        keep: a 0-d bool on the device; where it is False nothing changes (the `found_inf` of the fused kernel).
        """
        host = not isinstance(scale, Tensor) and keep is None  # the CPU kernel takes numbers
        for group in self.param_groups:
            settings: dict[str, Any] = {name: group[name] for name in ("lr", "weight_decay", "eps")}
            settings["beta1"], settings["beta2"] = group["betas"]
            rest = []
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                # State is made when first needed, as PyTorch does: a checkpoint before step 1 has none.
                state, copy = self.state[weight], self.copies.get(weight)
                if not state:
                    state["step"] = torch.zeros((), device=weight.device)  # where the fused step reads it
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                if host and weight.dtype == torch.float32 and cpu.available(weight.grad, weight.numel()):
                    # A tensor, as torch.optim.AdamW keeps it: the fused kernel reads it.
                    state["step"] += 1
                    written = copy if copy is not None and copy.dtype == weight.grad.dtype else None
                    moments = state["exp_avg"], state["exp_avg_sq"]
                    step = int(state["step"])
                    cpu.adamw_(weight, weight.grad, *moments, written, scale=scale, step=step, **settings)
                    if copy is not None and copy is not written:
                        copy.copy_(weight)
                else:
                    # All of them go to one fused kernel below.
                    rest.append(weight)
            adamw(
                rest,
                [weight.grad.to(weight.dtype) * scale for weight in rest],
                [self.state[weight]["exp_avg"] for weight in rest],
                [self.state[weight]["exp_avg_sq"] for weight in rest],
                [],
                [self.state[weight]["step"] for weight in rest],
                fused=True,
                amsgrad=False,
                maximize=False,
                found_inf=None if keep is None else (~keep).float(),
                **settings,
            )
            for weight in rest:
                # The fused kernel knows nothing of the copy.
                if weight in self.copies:
                    self.copies[weight].copy_(weight)
