"""AFMoE, the architecture of Arcee's Trinity models, in plain single-device PyTorch.

Parameter names are those of `transformers.AfmoeForCausalLM` in memory (5.23).
Shapes: B sequences, T tokens, d model width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from freehold.kernels.packed import Packed
from freehold.model.attention import Attention, Cache, Context
from freehold.model.config import ModelConfig
from freehold.model.layers import Embedding, Linear, RMSNorm, SwiGLU, rotary
from freehold.model.masks import Mask, build_masks, count_positions
from freehold.model.moe import Experts, MoE, Router, Routing


class Block(nn.Module):
    """One layer: attention and feed-forward, each between a norm before and a norm after, added to the stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, index)
        # Sandwich norms: one before and one after each half keep the stream's scale independent of depth.
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.pre_mlp_layernorm = RMSNorm(width, eps)
        self.post_mlp_layernorm = RMSNorm(width, eps)
        # The first layers are dense: with hardly mixed tokens a router has nothing to choose experts by.
        dense = index < config.num_dense_layers
        self.mlp: SwiGLU | MoE = SwiGLU(width, config.intermediate_size) if dense else MoE(config)

    def forward(self, h: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
        """Return the stream after this layer, and from a MoE its routing.

        The routing is returned rather than kept, so that a layer run again for its gradient counts nothing.
        """
        h = h + self.post_attention_layernorm(self.self_attn(self.input_layernorm(h), context))
        x, routing = self.pre_mlp_layernorm(h), None
        if isinstance(self.mlp, MoE):
            f, routing = self.mlp(x, context.token_mask)
        else:
            f = self.mlp(x)
        return h + self.post_mlp_layernorm(f), routing


class Trunk(nn.Module):
    """Embedding, layers (keyed by absolute index, so that some of them alone keep their names) and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        # A dictionary, not a list: a pipeline rank deletes layers and the others keep their checkpoint names.
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.num_hidden_layers)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Afmoe(nn.Module):
    """The language model. Set `recompute` to trade time for memory: layers are run again for their gradient.

    `positions` says where tokens stand when the caller does not, `masks` who sees whom; with the `core` of each
    attention layer they are the seam for context parallelism.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.positions: Callable[[Tensor], Tensor] = count_positions
        self.masks: Callable[[ModelConfig, Tensor, Tensor | None, Tensor | None], dict[str, Mask]] = build_masks
        self.model = Trunk(config)
        # Not tied to the embedding: AFMoE trains two matrices, and Hugging Face stores two.
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Return logits [B, T, V] for ids [B, T]; arguments as in `hidden`."""
        return self.lm_head(
            self.hidden(input_ids, positions=positions, document_ids=document_ids, cache=cache, token_mask=token_mask)
        )

    def hidden(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        token_mask: Tensor | None = None,
        routings: list[Routing] | None = None,
        layers: Sequence[int] | None = None,
    ) -> Tensor:
        """Return what the head is applied to, [B, T, d].

        positions [T] or [B, T]: 0, 1, 2, ... when None; required with a cache. document_ids [B, T]: tokens see
        only tokens of the same id; -1 is padding. token_mask [B, T] bool: False tokens (and padding) are
        computed but not counted in expert loads. routings: a list to which the routing of each MoE layer is added,
        for losses on it; their logits then live until the backward pass, recompute or not. layers: the ones to run,
        all when None; without the first, input_ids is the stream [B, T, d] that enters them, without the last, the
        stream that leaves them is returned.
        """
        config, trunk = self.config, self.model
        if cache is not None and (positions is None or document_ids is not None):
            raise ValueError("with a cache, positions are required and document_ids cannot be given")
        if document_ids is not None:
            # Padding is routed like any token, because shapes must not depend on values, but it counts for no expert.
            real = document_ids != -1
            token_mask = real if token_mask is None else token_mask & real
        numbers = range(config.num_hidden_layers) if layers is None else layers
        h = input_ids
        if numbers[0] == 0:
            h = trunk.embed_tokens(input_ids)
            # Embeddings start at sigma 0.5/sqrt(d); times sqrt(d) the stream starts near the scale of what layers add.
            if config.mup_enabled:
                h = h * config.hidden_size**0.5
        # Built once for all layers of a kind; with a cache, the cache decides what each query sees.
        masks = {} if cache is not None else self.masks(config, h, positions, document_ids)
        where = self.positions(input_ids) if positions is None else positions
        cos, sin = rotary(where, config.head_dim, config.rope_theta, h.dtype)
        context = Context(cos, sin, masks, cache, token_mask)
        for block in (trunk.layers[str(number)] for number in numbers):
            if self.recompute and self.training and torch.is_grad_enabled():
                # The whole layer is run again: its routing is recomputed from the same inputs, so it chooses the same
                # experts.
                h, routing = checkpoint(block, h, context, use_reentrant=False)
            else:
                h, routing = block(h, context)
            if routing is not None and routings is not None:
                routings.append(routing)
        return trunk.norm(h) if numbers[-1] == config.num_hidden_layers - 1 else h

    def compile_layers(self, backend: str = "inductor") -> None:
        """Have torch.compile make each layer's code for training when it first runs; names and gradients stay.

        Layers of one kind share their code. What no compiler takes (all-to-all, the CPU kernels) runs in between.
        Without gradients, where shapes change, layers run as they are.
        """
        for block in self.model.layers.values():
            plain = block.forward
            # One shape in training, so no symbolic sizes: they would cost a guard at each call.
            compiled = torch.compile(plain, backend=backend, dynamic=False)
            block.forward = functools.partial(_with_gradients, compiled, plain)  # type: ignore[method-assign]

    def pack(self) -> Afmoe:
        """Have every forward pass without a gradient use weights packed once for each of their versions; CPUs only.

        The bits stay those of training. Returns the model, which then holds its matrices twice.
        """
        for module in self.modules():
            if isinstance(module, Router) and not (module.gate.pack and module.gate.pack.alone):
                module.gate.pack = Packed(exact=True)
            elif isinstance(module, SwiGLU | Experts) and not (module.packs and module.packs[0].alone):
                module.packs = (Packed(), Packed())
            elif isinstance(module, Linear) and module.pack is None:
                module.pack = Packed()
        return self

    def moe_layers(self) -> dict[str, MoE]:
        """Return the MoE of each layer that has one, by name (`model.layers.1.mlp`)."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MoE)}

    def initial_values(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield the fp32 values of each parameter for a first step, by name; the parameters may be on the meta device.

        Matrices: normal, sigma = initializer_range, cut at 3 sigma. Gains: 1, but 1/sqrt(layers) for the norms
        after attention and feed-forward. The numbers depend on the generator alone, not on the dtype.
        """
        # In fp32 from one generator: bf16 and fp32 runs, and any sharding, start from the same numbers.
        sigma = self.config.initializer_range
        for name, parameter in self.named_parameters():
            values = torch.empty(parameter.shape, dtype=torch.float32, device=generator.device)
            if parameter.ndim > 1:
                yield name, nn.init.trunc_normal_(values, 0.0, sigma, -3 * sigma, 3 * sigma, generator)
            else:
                # What a layer adds starts at 1/sqrt(layers), so the sum over all layers starts at the scale of the
                # embedding.
                post = name.endswith(("post_attention_layernorm.weight", "post_mlp_layernorm.weight"))
                yield name, values.fill_(self.config.num_hidden_layers**-0.5 if post else 1.0)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter (see `initial_values`) and buffer for a first step."""
        parameters = dict(self.named_parameters())
        for name, values in self.initial_values(generator):
            parameters[name].copy_(values)
        for moe in self.moe_layers().values():
            # No expert is preferred before any load was counted.
            moe.expert_bias.zero_()

    def to_compute(self, dtype: torch.dtype) -> Afmoe:
        """Cast the matrices to the dtype to compute in; gains and `expert_bias` stay fp32. Returns the model."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.to(dtype)
        return self


def _with_gradients(compiled: Callable[..., Any], plain: Callable[..., Any], *arguments: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else plain)(*arguments)
