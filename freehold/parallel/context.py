"""Context parallelism: each rank holds a contiguous chunk of every row, and attention fetches the keys it lacks.

Full layers gather the keys and values of all ranks. Sliding layers fetch only the rows their window reaches into the
chunk before. Both are exact: the same pairs of tokens meet as on one device, and gradients go back the same way.
Every layer but attention works on single tokens and needs nothing.

Shapes: B rows, T tokens of a whole row, C = T / ranks tokens of a chunk, S keys a chunk sees, H query heads,
K key-value heads, D head width, W window (the token itself counts).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from freehold.model import blockwise
from freehold.model.afmoe import Afmoe
from freehold.model.attention import Attention, attend
from freehold.model.config import ModelConfig
from freehold.model.masks import Mask


class ContextParallel:
    """The chunk of one rank, and what attention does to see beyond it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.degree = group, dist.get_rank(group), dist.get_world_size(group)

    def apply(self, model: Afmoe) -> None:
        """Make a model treat its rows as chunks of longer ones: positions, masks and attention cores."""
        # These three are the only places where a token looks beyond itself; all other layers stay as they are.
        model.positions, model.masks = self.positions, self.masks
        for attention in (module for module in model.modules() if isinstance(module, Attention)):
            attention.core = self.attend_halo if attention.kind == "sliding_attention" else self.attend_gathered

    def positions(self, input_ids: Tensor) -> Tensor:
        """Return the positions of the tokens of a chunk [B, C] in their row, [C]: what the rotary embedding needs."""
        return torch.arange(input_ids.shape[1], device=input_ids.device) + self.rank * input_ids.shape[1]

    def masks(
        self, config: ModelConfig, h: Tensor, positions: Tensor | None, document_ids: Tensor | None
    ) -> dict[str, Mask]:
        """Return the mask of each kind of layer for a chunk h [B, C, d]: [B or 1, 1, C, S] over the keys its core sees.

        The document numbers of the other chunks are fetched. Positions must be None: they follow from the rank.
        """
        if positions is not None:
            raise ValueError("the positions of a chunk's tokens follow from its rank; positions cannot be given")
        chunk, device = h.shape[1], h.device
        # Keys end with this chunk: what comes later is masked for all of its tokens, and is not fetched.
        here = torch.arange(chunk, device=device) + self.rank * chunk
        there = torch.arange((self.rank + 1) * chunk, device=device)
        distance = here[:, None] - there[None, :]  # [C, S]
        seen = (distance >= 0)[None]
        if document_ids is not None:
            # A document may begin in an earlier chunk; int32 halves what is sent.
            ids = collectives.all_gather_single(document_ids.int().contiguous(), 1, self.group)[:, : len(there)]
            seen = seen & (document_ids[:, :, None] == ids[:, None, :])
        masks: dict[str, Mask] = {}
        for kind in sorted(set(config.layer_types)):
            window, allowed = None, seen
            if kind == "sliding_attention":
                # `attend_halo` sees the end of the chunk before and this one, so the mask loses its first columns.
                window = config.sliding_window
                first = max(self.rank * chunk - self.halo_tokens(window, chunk), 0)
                allowed = (seen & (distance < window))[:, :, first:]
            allowed = allowed[:, None]  # [B, 1, C, S]
            # The same rule as on one device, so that both take the same path and give the same bits.
            as_blocks = (
                device.type == "cpu" and blockwise.BLOCK_TOKENS < allowed.shape[-1] <= blockwise.BLOCKWISE_MAX_TOKENS
            )
            masks[kind] = Mask(allowed, False, window, blockwise.attention_blocks(allowed) if as_blocks else None)
        return masks

    def halo_tokens(self, window: int, chunk: int) -> int:
        """Return how many tokens before its chunk a rank's first token sees (the first rank has none)."""
        if window - 1 > chunk:
            raise ValueError(f"a window of {window} reaches over more than one chunk of {chunk} tokens")
        return window - 1

    def attend_gathered(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Attend to the chunks up to this one: q [B, H, C, D], k and v [B, K, C, D] -> [B, H, C, D]."""
        # One collective for keys and values: the start of a collective costs more than its width.
        both = collectives.all_gather_single_autograd(torch.cat([k, v], -1).contiguous(), 2, self.group)
        k, v = both[:, :, : (self.rank + 1) * q.shape[2]].chunk(2, -1)
        return attend(q, k, v, mask)

    def attend_halo(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Attend to this chunk and the end of the one before: q [B, H, C, D], k and v [B, K, C, D] -> [B, H, C, D]."""
        assert mask.window is not None
        both = torch.cat([k, v], -1)
        k, v = torch.cat([self._halo(both, self.halo_tokens(mask.window, q.shape[2])), both], 2).chunk(2, -1)
        return attend(q, k, v, mask)

    def _halo(self, x: Tensor, tokens: int) -> Tensor:
        """Give the last tokens of x [B, K, C, D] to the next rank; return those of the rank before, or none."""
        # An all-to-all in which each rank sends to one neighbour: its backward pass returns the gradients the same way.
        give, take = [0] * self.degree, [0] * self.degree
        if self.rank + 1 < self.degree:
            give[self.rank + 1] = tokens
        if self.rank:
            take[self.rank - 1] = tokens
        # Tokens first: an all-to-all cuts the first dimension. The last rank's slice is empty.
        tail = x.movedim(2, 0)[x.shape[2] - sum(give) :].contiguous()
        return collectives.all_to_all_single_autograd(tail, take, give, self.group).movedim(0, 2)
