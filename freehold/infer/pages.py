"""Memory for keys and values: pages of 64 tokens, one pool with a budget, and each sequence's list of pages.

A page holds one layer's keys and values of 64 positions that follow each other, the first a multiple of 64. A global
layer keeps the pages of all positions; a sliding one gives back those that its window has left behind.

A worked example, with one global and three sliding layers and a window of 100: a sequence of 130 tokens has three
blocks of positions (0-63, 64-127, 128-191). The next query, at position 130, sees the keys from 31 on, so all three
blocks stay: 4 layers x 3 = 12 pages. At 164 tokens the next query sees from 65 on: the sliding layers give back the
first block, and 3 + 3 x 2 = 9 pages are left.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from freehold.core.errors import RequestError
from freehold.kernels import cpu, packed
from freehold.kernels.packed import PAGE_TOKENS
from freehold.model.config import ModelConfig

NO_PAGE = -1


def blocks_of(tokens: int) -> int:
    """Return how many blocks of positions hold this many tokens."""
    return -(-tokens // PAGE_TOKENS)


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one layer's page; the kernels fill values of narrow heads up to 64 columns."""
    return 4 * packed.page_words(config.num_key_value_heads, config.head_dim, dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that nothing uses now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class PagePool:
    """All pages of an engine. On a CPU memory is used page by page as they are written, not when the pool is made."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, pages: int) -> None:
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        self.windows = [config.sliding_window if sliding else None for sliding in kinds]
        """Of each layer; None: global"""
        self.pages = pages
        # The kernels read keys and values as they read weights; PyTorch reads plain rows.
        self.kernel = cpu.available(torch.empty(0, dtype=dtype, device=device), config.head_dim)
        if self.kernel:
            words = packed.page_words(config.num_key_value_heads, config.head_dim, dtype.itemsize)
            self.store = torch.empty(pages, words, dtype=torch.int32)
        else:
            shape = (pages, 2, config.num_key_value_heads, PAGE_TOKENS, config.head_dim)
            # Zeros, not whatever memory held: a masked key counts 0 times its value, and 0 times NaN is NaN.
            self.store = torch.zeros(shape, dtype=dtype, device=device)
        # Taken from the end: the lowest numbers first, so that little memory is touched.
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    @property
    def bytes(self) -> int:
        """The budget, in bytes."""
        return self.store.nbytes

    def most_tokens(self, step_tokens: int) -> int:
        """Return how long one sequence can grow if it has the pool for itself and comes in steps of this many."""
        globals_ = self.windows.count(None)
        sliding = sum(window_pages(w, step_tokens) for w in self.windows if w is not None)
        left = self.pages - sliding
        every = self.pages // len(self.windows)  # blocks that all layers can hold: short sequences
        return max(left // globals_ if globals_ and left > 0 else 0, every) * PAGE_TOKENS

    def take(self, count: int) -> list[int]:
        """Return pages that were free."""
        if count > self.free:
            raise RequestError("the cache has no page left", found=f"{self.free} free", expected=count)
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Take pages back; what they hold is never read again, because a page is cleared when its first key comes."""
        self._free.extend(pages)


def window_pages(window: int, step_tokens: int) -> int:
    """Return the most pages that a sliding layer of one sequence holds, in steps of this many tokens."""
    # The window, the step's own tokens, and a part of a page at each end.
    return blocks_of(window + step_tokens) + 1


class Pages:
    """The pages of one sequence. `length` is how many of its tokens are in them."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.length = 0
        self.table = np.full((len(pool.windows), 0), NO_PAGE, dtype=np.int32)
        """[layers, blocks]: the page of each block of positions"""

    def missing(self, tokens: int) -> int:
        """Return how many pages the next tokens need from the pool."""
        return (blocks_of(self.length + tokens) - self.table.shape[1]) * len(self.table)

    def extend(self, tokens: int) -> None:
        """Take the pages for the next tokens; RequestError when the pool has too few."""
        more = blocks_of(self.length + tokens) - self.table.shape[1]
        if more > 0:
            pages = np.array(self.pool.take(more * len(self.table)), dtype=np.int32)
            self.table = np.concatenate([self.table, pages.reshape(len(self.table), more)], axis=1)

    def advance(self, tokens: int) -> None:
        """Count tokens that were written, and give back what no later query sees."""
        self.length += tokens
        for layer, window in enumerate(self.pool.windows):
            # The next query stands at `length` and sees `window` keys with itself.
            behind = max(0, self.length - window + 1) // PAGE_TOKENS if window is not None else 0
            row = self.table[layer, :behind]
            held = row[row != NO_PAGE]
            if len(held):
                self.pool.give_back(held.tolist())
                row[:] = NO_PAGE

    def release(self) -> None:
        """Give everything back and start again at length 0."""
        self.pool.give_back(self.table[self.table != NO_PAGE].tolist())
        self.table, self.length = self.table[:, :0], 0
