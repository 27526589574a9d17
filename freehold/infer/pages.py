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
from collections.abc import Callable, Sequence

import numpy as np
import torch

from freehold.core.errors import ConfigError, RequestError
from freehold.kernels import cpu, packed
from freehold.kernels.packed import PAGE_TOKENS
from freehold.model.config import ModelConfig

NO_PAGE = -1


def blocks_of(tokens: int) -> int:
    """Return how many blocks of positions hold this many tokens."""
    return -(-tokens // PAGE_TOKENS)


def page_bytes(config: ModelConfig, dtype: torch.dtype, small: bool = False) -> int:
    """Return the bytes of one layer's page; the kernels fill values of narrow heads up to 64 columns.

    small: 8 bits a value, and a scale for each 32 of them.
    """
    if small:
        return 4 * packed.page_words(config.num_key_value_heads, config.head_dim, 1)
    return 4 * packed.page_words(config.num_key_value_heads, config.head_dim, dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that nothing uses now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Free pages only, not the file cache: the first estimate of a budget should not push files out.
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class PagePool:
    """All pages of an engine. On a CPU memory is used page by page as they are written, not when the pool is made.

    small: keys and values have 8 bits, and a scale for each 32 of a token and head; ConfigError when heads are not
    multiples of 32 wide.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, pages: int, small: bool = False
    ) -> None:
        if small and config.head_dim % packed.SHARED:
            raise ConfigError(
                "keys and values of 8 bits share a scale by 32",
                where="cache_type",
                found=f"heads of width {config.head_dim}",
                expected="a multiple of 32",
                todo="cache_type=auto",
            )
        self.small = small
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        self.windows = [config.sliding_window if sliding else None for sliding in kinds]
        """Of each layer; None: global"""
        self.pages = pages
        # The kernels read keys and values as they read weights; PyTorch reads plain rows.
        self.kernel = cpu.available(torch.empty(0, dtype=dtype, device=device), config.head_dim)
        if self.kernel:
            words = page_bytes(config, dtype, small) // 4
            self.store = torch.empty(pages, words, dtype=torch.int32)
        else:
            shape = (pages, 2, config.num_key_value_heads, PAGE_TOKENS, config.head_dim)
            # Zeros, not whatever memory held: a masked key counts 0 times its value, and 0 times NaN is NaN.
            self.store = torch.zeros(shape, dtype=torch.int8 if small else dtype, device=device)
            self.scales = torch.zeros(*shape[:-1], config.head_dim // packed.SHARED if small else 0, device=device)
        # Taken from the end: the lowest numbers first, so that little memory is touched.
        self._free = list(range(pages - 1, -1, -1))
        self._holders = np.zeros(pages, dtype=np.int32)
        self.reclaim: Callable[[int], None] = lambda missing: None
        """Asked to free this many pages that are kept only because they may be useful again."""

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    @property
    def bytes(self) -> int:
        """The budget, in bytes."""
        return self.store.nbytes + (0 if self.kernel else self.scales.nbytes)

    def most_tokens(self, step_tokens: int) -> int:
        """Return how long one sequence can grow if it has the pool for itself and comes in steps of this many."""
        globals_ = self.windows.count(None)
        sliding = sum(window_pages(w, step_tokens) for w in self.windows if w is not None)
        # Sliding layers stop growing at their window; what is left is for the layers that see everything.
        left = self.pages - sliding
        every = self.pages // len(self.windows)  # blocks that all layers can hold: short sequences
        return max(left // globals_ if globals_ and left > 0 else 0, every) * PAGE_TOKENS

    def has_room(self, count: int) -> bool:
        """Return whether this many pages are free, after kept prefixes gave way."""
        if count > self.free:
            self.reclaim(count - self.free)
        return count <= self.free

    def take(self, count: int) -> list[int]:
        """Return pages that were free; the taker is their one holder."""
        if not self.has_room(count):
            raise RequestError("the cache has no page left", found=f"{self.free} free", expected=count)
        # From the end of a list: no search, and a page given back is taken again while it is still in the cache.
        pages = [self._free.pop() for _ in range(count)]
        self._holders[pages] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Count one holder more; only full pages are shared, and no one writes to them."""
        self._holders[list(pages)] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """Give up pages, each once; the last holder's are free for others.

        What they hold is never read again, because a page is cleared when its first key comes.
        """
        pages = list(pages)
        self._holders[pages] -= 1
        self._free.extend(page for page in pages if self._holders[page] == 0)


def first_block(length: int, window: int | None) -> int:
    """Return the first block of positions that the query at `length` sees."""
    # It sees `window` keys with itself.
    return max(0, length - window + 1) // PAGE_TOKENS if window is not None else 0


def window_pages(window: int, step_tokens: int) -> int:
    """Return the most pages that a sliding layer of one sequence holds, in steps of this many tokens."""
    # The window, the step's own tokens, and a part of a page at each end.
    return blocks_of(window + step_tokens) + 1


class Pages:
    """The pages of one sequence. `length` is how many of its tokens are in them."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.length = 0
        # A matrix, not lists: a step copies the tables of all its sequences for the kernel.
        self.table = np.full((len(pool.windows), 0), NO_PAGE, dtype=np.int32)
        """[layers, blocks]: the page of each block of positions"""
        self.passed: Callable[[int, int], None] | None = None
        """Called with the lengths before and after a step, while every page that its queries saw is still held."""

    def missing(self, tokens: int) -> int:
        """Return how many pages the next tokens need from the pool."""
        return (blocks_of(self.length + tokens) - self.table.shape[1]) * len(self.table)

    def extend(self, tokens: int) -> None:
        """Take the pages for the next tokens; RequestError when the pool has too few."""
        # Each layer takes a page for each block, sliding ones too: what their window leaves is given back after the
        # step.
        more = blocks_of(self.length + tokens) - self.table.shape[1]
        if more > 0:
            pages = np.array(self.pool.take(more * len(self.table)), dtype=np.int32)
            self.table = np.concatenate([self.table, pages.reshape(len(self.table), more)], axis=1)

    def advance(self, tokens: int) -> None:
        """Count tokens that were written, and give back what no later query sees."""
        if self.passed is not None:
            self.passed(self.length, self.length + tokens)
        self.length += tokens
        for layer, window in enumerate(self.pool.windows):
            behind = first_block(self.length, window)
            row = self.table[layer, :behind]
            held = row[row != NO_PAGE]
            if len(held):
                self.pool.give_back(held.tolist())
                # The kernel skips these blocks by position; the mark is for `release`, which must not give a page back
                # twice.
                row[:] = NO_PAGE

    def begin_with(self, table: np.ndarray) -> None:
        """Start with full pages [layers, blocks] of others, which are shared; only for a sequence without pages."""
        self.pool.share(table[table != NO_PAGE].tolist())
        self.table, self.length = table, table.shape[1] * PAGE_TOKENS

    def release(self) -> None:
        """Give everything back and start again at length 0."""
        self.pool.give_back(self.table[self.table != NO_PAGE].tolist())
        # The tokens are kept by the request, so everything can be computed again, to the same bits.
        self.table, self.length = self.table[:, :0], 0
