"""The mixture of experts: router, dispatcher and experts as three objects with a seam each.

Shapes: N tokens, k experts per token, E experts, d model width, i expert width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from freehold.kernels import grouped
from freehold.kernels.grouped import Weights
from freehold.model import lora, ops
from freehold.model.config import ModelConfig
from freehold.model.layers import Linear, SwiGLU, packed_weights
from freehold.model.rows import route


class Dispatcher(Protocol):
    """Takes rows sorted by expert to where the experts are, and their results back."""

    def dispatch(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Return the rows of the experts held here, their counts, and what `combine` needs."""
        ...

    def combine(self, y: Tensor, context: Any) -> Tensor:
        """Return the rows in the order `dispatch` received them."""
        ...


class LocalDispatcher:
    """All experts are here: nothing moves."""

    def dispatch(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the rows as they are."""
        return x, counts, None

    def combine(self, y: Tensor, context: None) -> Tensor:
        """Return the rows as they are."""
        return y


class Routing(NamedTuple):
    """What the router of one layer decided for the tokens of one forward pass: all that balancing and replay need.

    A NamedTuple, because FSDP and torch.compile look into tuples for tensors with a gradient, and not into dataclasses.
    """

    logits: Tensor
    """[N, E] fp32, in the graph: what a loss on the routing reads"""
    chosen: Tensor
    """int64 [N, k] experts of each token, the best first"""
    weights: Tensor
    """[N, k] fp32, in the graph: how much each counts"""
    counts: Tensor
    """int64 [E] assignments per expert, of tokens that count"""


class Router(nn.Module):
    """Sigmoid scores, in fp32 whatever the weights are; the bias decides who is chosen, not how much it weighs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.route_scale = config.num_experts_per_tok, config.route_scale
        self.gate = Linear(config.hidden_size, config.num_experts)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [N, E], weights [N, k] (both fp32) and the chosen experts [N, k] for tokens [N, d]."""
        # fp32: the margin between the last expert chosen and the next is often smaller than a bf16 rounding.
        logits = self._logits(x)  # [N, E]
        weights, chosen = ops.choose(logits, bias, self.top_k, self.route_scale)  # [N, k]
        return logits, weights, chosen

    def _logits(self, x: Tensor) -> Tensor:
        logits = ops.router_logits(x, self.gate.weight, self.gate.pack)  # [N, E]
        factors = self.gate.factors
        if factors is None or not factors.enabled:
            return logits
        # In fp32 as the base: a router's margins are smaller than a bf16 rounding.
        low = x.to(logits.dtype) @ factors.a[0].to(logits.dtype).t()  # [N, r]
        return logits + factors.scale * (low @ factors.b[0].to(logits.dtype).t())


class Experts(nn.Module):
    """All routed experts, stacked: gate and up in one matrix [E, 2i, d], down [E, d, i]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        # Stacked and fused: one tensor for a grouped product, one optimizer state, half the reads of x.
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        self.packs: ops.Packs | None = None
        self.factors_gate_up_proj: lora.Factors | None = None
        self.factors_down_proj: lora.Factors | None = None
        self.gate_up_blocks: Weights | None = None
        self.down_blocks: Weights | None = None

    def local_weights(self) -> tuple[Tensor, Tensor]:
        """Return the stacked weights held on this device: the seam for expert parallelism."""
        return self.gate_up_proj, self.down_proj

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Map rows sorted by expert, `counts` of each, [rows, d] -> [rows, d]."""
        factors = self.factors_gate_up_proj, self.factors_down_proj
        if self.gate_up_blocks is not None and self.down_blocks is not None:
            return lora.experts(x, counts, self.gate_up_blocks, self.down_blocks, *factors)
        if any(each is not None for each in factors):
            stacks, packs = self.local_weights(), self.packs or (None, None)
            gate_up, down = packed_weights(stacks[0], packs[0]), packed_weights(stacks[1], packs[1])
            return lora.experts(x, counts, gate_up, down, *factors)
        return ops.grouped_swiglu(x, counts, *self.local_weights(), self.packs)

    @torch.no_grad()
    def quantize(self, kind: str) -> None:
        """Keep the stacks as blocks of a type from now on, frozen; their numbers are freed."""
        stacks = self.local_weights()
        self.gate_up_blocks, self.down_blocks = (grouped.pack(kind, stack) for stack in stacks)
        del self.gate_up_proj, self.down_proj


class MoE(nn.Module):
    """A shared expert that is always on, plus the chosen experts weighted by the router.

    `expert_bias` is fp32 whatever the model is cast to: its steps are too small for bf16.
    """

    expert_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts)
        # Expert parallelism replaces this object; nothing else in the layer changes.
        self.dispatcher: Dispatcher = LocalDispatcher()
        # Set where several adapters share the model: whose rows a pass holds.
        self.adapter_rows: lora.Rows | None = None
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> MoE:
        """Follow the model to another device, but not to another precision."""
        # nn.Module.to(bfloat16) casts buffers too; the bias moves by 1e-3 and less, which bf16 would swallow.
        exact = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != torch.float32:
            self.expert_bias = exact.to(self.expert_bias.device)
        return self

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Return [B, T, d] and how its tokens were routed; `token_mask` [B, T] False: computed but not counted."""
        flat = x.flatten(0, -2)
        logits, weights, chosen = self.router(flat, self.expert_bias)
        experts = self.expert_bias.numel()
        # Counted before dispatch: ranks exchange counts first, to know how many rows will come.
        counts = _loads(chosen, experts)
        # Sorted by expert, so that each expert reads one stretch of rows and its product is one matrix multiplication.
        path = route(chosen)
        # Stable by token, so the rows of an expert are sorted by adapter as the tokens are.
        groups = counts if self.adapter_rows is None else self.adapter_rows.pairs(chosen, experts)
        rows, local_counts, context = self.dispatcher.dispatch(ops.gather(flat, path), groups)
        # The experts see rows only: neither tokens nor weights, so they can be on any rank.
        results = self.dispatcher.combine(self.experts(rows, local_counts), context)
        # The shared expert is the start of the sum: no extra pass over [N, d] to add it.
        out = ops.combine(results, path, weights, self.shared_experts(flat))
        # Worked example: 3 tokens choose (0, 2), (2, 1), (0, 1) of 4 experts, the last token is padding. All rows:
        # counts [2, 2, 2, 0]. Counted loads: [1, 1, 2, 0].
        counted = counts if token_mask is None else _loads(chosen, experts, token_mask)
        return out.view_as(x), Routing(logits, chosen, weights, counted)


def _loads(chosen: Tensor, experts: int, token_mask: Tensor | None = None) -> Tensor:
    """Return how many of the (masked) tokens chose each expert [E]; no shape depends on values: none is waited for."""
    one = torch.ones_like(chosen) if token_mask is None else token_mask.flatten()[:, None].expand_as(chosen).long()
    return chosen.new_zeros(experts).scatter_add_(0, chosen.flatten(), one.flatten())
