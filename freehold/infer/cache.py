"""What one forward pass sees of the pages: any number of sequences, each with any number of new tokens.

Shapes: N new tokens of all sequences, S sequences, T the most new tokens of one, H query heads, K key heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.infer.pages import NO_PAGE, PagePool, Pages
from freehold.kernels import packed
from freehold.kernels.packed import PAGE_TOKENS


class Step:
    """The cache of one forward pass over [1, N] tokens: those of the first sequence, then those of the next, ...

    The pages for them must have been taken (`Pages.extend`). A token's result depends on its own sequence alone.
    """

    def __init__(self, pool: PagePool, parts: Sequence[tuple[Pages, int]]) -> None:
        self.pool = pool
        counts = [count for _, count in parts]
        self.first = torch.tensor([pages.length for pages, _ in parts])
        """int64 [S]: the position of each sequence's first new token"""
        self.offsets = torch.tensor(np.concatenate([[0], np.cumsum(counts)]))
        """int64 [S + 1]: where each sequence's tokens are"""
        # Tables are filled up to the longest; the kernel reads no block beyond a sequence's own position.
        blocks = max(pages.table.shape[1] for pages, _ in parts)
        tables = np.full((len(pool.windows), len(parts), blocks), NO_PAGE, dtype=np.int32)
        for number, (pages, _) in enumerate(parts):
            tables[:, number, : pages.table.shape[1]] = pages.table
        self.tables = torch.from_numpy(tables)  # [layers, S, blocks]
        self.positions = torch.cat([torch.arange(p.length, p.length + n) for p, n in parts])[None]  # [1, N]
        self._device = pool.store.device
        # One interface for both ways, so the engine does not ask which one computes.
        self._plain: _Plain | None = None if pool.kernel else _Plain(self, counts)
        self.positions = self.positions.to(self._device)

    def attend(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v [1, N, K, D]; return what the queries q [1, N, H, D] find, [1, N, H, D]."""
        # Keys are written before any query reads: a token sees itself, and those next to it in this step.
        window, table = self.pool.windows[layer_index], self.tables[layer_index]
        if self._plain is not None:
            return self._plain.attend(q[0], k[0], v[0], table, window)[None]
        return packed.attention(
            q[0], k[0], v[0], self.offsets, self.first, table, self.pool.store, window, self.pool.small
        )[None]


class _Plain:
    """The same through PyTorch's attention, on any device: not bit-invariant, since its sums depend on the shapes."""

    def __init__(self, step: Step, counts: list[int]) -> None:
        self.pool, device = step.pool, step.pool.store.device
        # Queries are padded to the longest part; padding repeats the last token and is thrown away.
        within = torch.arange(max(counts))[None].minimum(torch.tensor(counts)[:, None] - 1)  # [S, T]
        self.rows = (step.offsets[:-1, None] + within).to(device)
        self.positions = (step.first[:, None] + within).to(device)  # [S, T]
        real = torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]
        self.real = real.to(device)
        self.owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)  # [N]
        self.own = step.positions[0].to(device)
        self.first, self.last = step.first, step.first + torch.tensor(counts)
        self.masks: dict[int | None, tuple[Tensor, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, window: int | None) -> Tensor:
        device = q.device
        table = table.to(device).long()
        page, place = table[self.owners, self.own // PAGE_TOKENS], self.own % PAGE_TOKENS
        # Scattered by (page, place): new tokens of many sequences in one assignment.
        self._put(page, 0, place, k)
        self._put(page, 1, place, v)
        # One mask for all layers of a window; sliding layers share it.
        if window not in self.masks:
            self.masks[window] = self._mask(window, table.shape[1], device)
        blocks, allowed = self.masks[window]
        # NO_PAGE becomes page 0, which the mask hides: indices must be valid even where nothing is read.
        pages = table.gather(1, blocks).clamp_min(0)  # [S, blocks seen]
        held = self._read(pages, q.dtype).permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # [2, S, K, S keys, D]
        found = F.scaled_dot_product_attention(
            q[self.rows].transpose(1, 2), held[0], held[1], attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1]
        )
        return found.transpose(1, 2)[self.real]  # [N, H, D]

    def _put(self, page: Tensor, half: int, place: Tensor, values: Tensor) -> None:
        """Keep keys (half 0) or values (1) [N, K, D] of new tokens."""
        if self.pool.small:
            parts = values.float().unflatten(-1, (-1, packed.SHARED))  # [N, K, D / 32, 32]
            # The scale that is kept, so that half of a step is the most that is lost.
            scales = (parts.abs().amax(-1) / 127).bfloat16().float()
            self.pool.scales[page, half, :, place] = scales
            parts = parts / scales.where(scales > 0, 1)[..., None]
            values = parts.round().clamp(-127, 127).to(torch.int8).flatten(-2)
        self.pool.store[page, half, :, place] = values

    def _read(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """Return keys and values of pages [S, n] as numbers [S, n, 2, K, 64, D]."""
        held = self.pool.store[pages]
        if not self.pool.small:
            return held
        scales = self.pool.scales[pages][..., None]
        return (held.float().unflatten(-1, (-1, packed.SHARED)) * scales).flatten(-2).to(dtype)

    def _mask(self, window: int | None, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the blocks of positions that are read [S, n], and who sees whom [S, 1, T, n x 64]."""
        # A sliding layer reads its window only, from where each sequence's first new token sees.
        low = (self.first - window + 1).clamp_min(0) // PAGE_TOKENS if window else torch.zeros_like(self.first)
        count = int(((self.last - 1) // PAGE_TOKENS - low).max()) + 1
        number = (low[:, None] + torch.arange(count)).to(device)  # [S, n]
        keys = (number[..., None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=device)).flatten(1)[:, None]
        # By absolute positions: a sequence that was cut into pieces has the mask it would have whole.
        allowed = keys <= self.positions[..., None]  # [S, T, n x 64]
        if window:
            allowed = allowed & (keys > self.positions[..., None] - window)
        return number.clamp_max(blocks - 1), allowed[:, None]
