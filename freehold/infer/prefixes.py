"""Prompts that begin as earlier ones did: their keys and values are kept, and read from instead of computed again.

A tree over blocks of 64 tokens; a node holds the pages of its block in the global layers. Sliding layers need only
their last window, so a prefix can be resumed from where a copy of the windows' page numbers was kept: at the end of
each turn, at the end of the prompt, every 2,048 tokens, and where the answer stands. Pages are shared, not copied;
keys and values are the same bits as if computed again, so an answer does not depend on what is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from freehold.infer.pages import NO_PAGE, PagePool, Pages, first_block
from freehold.kernels.packed import PAGE_TOKENS

EVERY_BLOCKS = 2048 // PAGE_TOKENS
"""Blocks between two places from which a long prompt can be resumed, wherever its turns end."""


@dataclass(eq=False)
class Node:
    """A block of 64 tokens after those of its parents."""

    tokens: bytes
    """int32 [64], compared in full: the hash only finds candidates"""
    parent: Node | None
    depth: int
    """Blocks up to the end of this one"""
    pages: np.ndarray
    """int32 [global layers]"""
    windows: list[np.ndarray] | None = None
    """Of each sliding layer, the pages that the query after this block sees; None: no request can resume here."""
    children: dict[int, list[Node]] = field(default_factory=dict)
    lasting: bool = True
    """False: kept for a request that is being answered, and dropped when it has come further."""
    key: Hashable = None
    """Of a root"""


class Prefixes:
    """The prefixes that a pool of pages keeps; they give way, the longest unused first, when pages are needed.

    key: what keys and values depend on, apart from tokens and weights, and who may share them. digest: a block's hash.
    """

    def __init__(self, pool: PagePool, digest: Callable[[bytes], int] = hash) -> None:
        self.pool, self.digest = pool, digest
        pool.reclaim = self.evict
        self._sliding = [layer for layer, window in enumerate(pool.windows) if window is not None]
        self._global = [layer for layer, window in enumerate(pool.windows) if window is None]
        self._roots: dict[Hashable, Node] = {}
        # Least recently used first. Every leaf can be resumed from, so dropping from here frees all there is.
        self._resumable: OrderedDict[Node, None] = OrderedDict()
        self.blocks = 0
        """Blocks of 64 tokens that are kept."""
        self.asked_tokens = self.found_tokens = self.evicted = 0
        """Tokens of prompts that were looked up, those that were found, and resumable places dropped for others."""

    def resume(self, key: Hashable, ids: Sequence[int], pages: Pages) -> int:
        """Give a sequence the longest kept prefix of its tokens, without the last one; return its tokens."""
        found, node = None, self._roots.get(key)
        blocks = _blocks(ids, (len(ids) - 1) // PAGE_TOKENS)
        while node is not None:
            found = node if node.windows is not None else found
            tokens = next(blocks, None)
            node = None if tokens is None else self._child(node, tokens)
        if found is None or found.depth == 0:
            return 0
        self._resumable.move_to_end(found)
        found.lasting = True  # another request came this way, so its maker does not take it along
        pages.begin_with(self._table(found))
        return pages.length

    def keep(self, key: Hashable, ids: Sequence[int], pages: Pages, block: int, *, lasting: bool = True) -> Node:
        """Make the first `block` blocks of a sequence resumable; its pages must still hold their windows."""
        node = self._roots.setdefault(key, Node(b"", None, 0, np.empty(0, np.int32), key=key))
        for depth, tokens in enumerate(_blocks(ids, block)):
            child = self._child(node, tokens)
            if child is None:
                child = self._add(node, tokens, pages.table[self._global, depth])
            node = child
            if not self._sliding and node.windows is None:  # then every block can be resumed from
                self._set_windows(node, [])
        if node.windows is None:
            low = [first_block(block * PAGE_TOKENS, self.pool.windows[layer]) for layer in self._sliding]
            held = [pages.table[layer, at:block].copy() for layer, at in zip(self._sliding, low, strict=True)]
            self._set_windows(node, held)
            node.lasting = lasting
        node.lasting |= lasting
        self._resumable.move_to_end(node)
        return node

    def came_further(self, node: Node) -> None:
        """Drop a place that was kept for a request which now has a later one."""
        if node.windows is not None and not node.lasting and node.children:
            self._drop(node)

    def evict(self, missing: int) -> None:
        """Free this many pages if that many are kept for no running request."""
        wanted = self.pool.free + missing
        while self._resumable and self.pool.free < wanted:
            self.evicted += 1
            self._drop(next(iter(self._resumable)))

    def clear(self) -> None:
        """Forget everything: what the weights computed is not what they would compute now."""
        while self._resumable:
            self._drop(next(iter(self._resumable)))
        self._roots.clear()

    def stats(self) -> dict[str, float]:
        """Return what is kept and what it saved; what only grows ends with `_total`."""
        return {
            "prefix_blocks": self.blocks,
            "prefix_asked_tokens_total": self.asked_tokens,
            "prefix_found_tokens_total": self.found_tokens,
            "prefix_evicted_total": self.evicted,
        }

    def _child(self, node: Node, tokens: bytes) -> Node | None:
        # By hash, then by every token: prompts of other users must not be found by collision.
        return next((c for c in node.children.get(self.digest(tokens), ()) if c.tokens == tokens), None)

    def _add(self, node: Node, tokens: bytes, pages: np.ndarray) -> Node:
        self.blocks += 1
        child = Node(tokens, node, node.depth + 1, pages.copy())
        node.children.setdefault(self.digest(tokens), []).append(child)
        self.pool.share(child.pages.tolist())
        return child

    def _set_windows(self, node: Node, windows: list[np.ndarray]) -> None:
        node.windows = windows
        self._resumable[node] = None
        for pages in windows:
            self.pool.share(pages.tolist())

    def _drop(self, node: Node) -> None:
        """No request can resume here any more; blocks that lead to no such place go, too."""
        for pages in node.windows or ():
            self.pool.give_back(pages.tolist())
        node.windows = None
        del self._resumable[node]
        above: Node | None = node
        while above is not None and above.parent is not None and not above.children and above.windows is None:
            self.pool.give_back(above.pages.tolist())
            self.blocks -= 1
            siblings = above.parent.children[self.digest(above.tokens)]
            siblings.remove(above)
            if not siblings:
                del above.parent.children[self.digest(above.tokens)]
            above = above.parent
        if above is not None and above.parent is None and not above.children:
            self._roots.pop(above.key, None)  # keys come from users: they must not fill the memory

    def _table(self, node: Node) -> np.ndarray:
        """Return the pages [layers, blocks] of a sequence that stands at the end of a node."""
        table = np.full((len(self.pool.windows), node.depth), NO_PAGE, dtype=np.int32)
        for layer, pages in zip(self._sliding, node.windows or (), strict=True):
            table[layer, node.depth - len(pages) :] = pages
        above: Node | None = node
        while above is not None and above.parent is not None:
            table[self._global, above.depth - 1] = above.pages
            above = above.parent
        return table


def _blocks(ids: Sequence[int], count: int) -> Iterator[bytes]:
    """Yield the first blocks of tokens."""
    data = np.asarray(ids[: count * PAGE_TOKENS], dtype=np.int32).tobytes()
    size = 4 * PAGE_TOKENS
    yield from (data[at : at + size] for at in range(0, len(data), size))
