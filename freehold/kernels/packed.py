"""The kernels of answering: weights packed once for each of their versions, attention over pages, log-partitions.

They share with training every function that rounds, so a row has the same bits in both, in a batch of any size.
No gradients. Shapes: N tokens, S sequences, H query heads, K key heads, D head width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freehold.kernels.cpu import call, rows_of

PAGE_TOKENS = 64
"""Tokens of a page: the width of a panel, so that a block of keys never depends on where a request started."""
_PANEL = 64
SHARED = 32
"""Values of one token that share a scale where keys and values have 8 bits."""


def _words(ins: int, outs: int, itemsize: int) -> int:
    """Return the 32-bit words of a packed matrix."""
    return -(-ins * itemsize // 4) * (-(-outs // _PANEL) * _PANEL)


class Packed:
    """Weights as the kernels read them, packed again when one has changed.

    A change shows in the address or the version counter, which PyTorch raises in every in-place operation and our
    optimizer kernels raise, too. Writing through `.data` or NumPy does not: pack a new object then.
    exact: pack in fp32, whatever the weights are, and fill the rows up to a multiple of 16 with zeros.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self.exact = exact
        self._seen: list[tuple[int, int]] = []
        # Held, so that no new weight can have the address of an old one.
        self._held: list[Tensor] = []
        self._words = torch.empty(0, dtype=torch.int32)
        self.alone = False
        """Whether the weights are gone, so that only their packed form is there and cannot change."""

    def keep_alone(self, *weights: Tensor) -> None:
        """Pack weights now and let go of them; `words` gives this packed form from then on, whatever it is asked."""
        self.words(*weights)
        self._held, self._seen, self.alone = [], [], True

    def words(self, *weights: Tensor) -> Tensor:
        """Return the packed words (int32 [E, n]) of weights [m, n], or stacks [E, m, n], one after the other."""
        if self.alone:
            return self._words
        seen = [(w.data_ptr(), w._version) for w in weights]
        if seen != self._seen:
            self._held = [w.detach() for w in weights]
            self._words, self._seen = self._pack([self._as_stack(w) for w in self._held]), seen
        return self._words

    def _as_stack(self, weight: Tensor) -> Tensor:
        stack = weight if weight.ndim == 3 else weight[None]  # [E, m, n]
        if not self.exact:
            return stack
        return torch.nn.functional.pad(stack.float(), (0, 0, 0, -stack.shape[1] % 16))

    def _pack(self, stacks: list[Tensor]) -> Tensor:
        # Expert by expert, so that what a token reads is in one place: gate and up of an expert follow each other.
        sizes = [_words(w.shape[2], w.shape[1], w.element_size()) for w in stacks]
        out = torch.empty(len(stacks[0]), sum(sizes), dtype=torch.int32)
        for expert in range(len(out)):
            for stack, part in zip(stacks, out[expert].split(sizes), strict=True):
                weight = stack[expert].contiguous()
                call("pack", weight, weight, part, 1, weight.shape[1], weight.shape[0])
        return out


def linear(x: Tensor, packed: Tensor, outs: int) -> Tensor:
    """Return x w^T for a packed w [outs, n]: x [..., n] -> [..., outs]."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outs)
    call("linear_packed", x, x, packed, y, rows_of(x), x.shape[-1], outs)
    return y


def experts(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, inner: int) -> Tensor:
    """Return each row's SwiGLU by its expert; x [R, d] sorted by expert, counts int64 [E]."""
    x = x.contiguous()
    y, both, product = torch.empty_like(x), x.new_empty(rows_of(x), 2 * inner), x.new_empty(rows_of(x), inner)
    call("swiglu_packed", x, x, counts, len(counts), gate_up, down, both, product, y, x.shape[-1], inner)
    return y


def page_words(heads: int, width: int, itemsize: int) -> int:
    """Return the 32-bit words of one layer's page, of `heads` key heads of this width; itemsize 1: with scales."""
    if itemsize == 1:
        return heads * 2 * PAGE_TOKENS * (width + width // SHARED * 2) // 4
    keys = width * itemsize // 4 * _PANEL
    return heads * (keys + _words(PAGE_TOKENS, width, itemsize))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    first: Tensor,
    table: Tensor,
    store: Tensor,
    window: int | None,
    small: bool = False,
) -> Tensor:
    """Keep the keys and values of new tokens in their pages and attend from each to what its sequence holds.

    q [N, H, D], k and v [N, K, D]: sequence s has the rows offsets[s] .. offsets[s + 1] (int64 [S + 1]), the first at
    position first[s] (int64 [S]); block b of 64 positions is page table[s, b] (int32 [S, blocks]) of `store`.
    small: pages of 8 bits a value.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    _, heads, width = q.shape
    call(
        "attention_pages", q, q, k, v, offsets, first, table, table.shape[1], store, window or 0, width**-0.5, out,
        len(first), heads, k.shape[1], width, int(small),
    )  # fmt: skip
    return out


def log_partition(logits: Tensor) -> Tensor:
    """Return log(sum(exp(logits))) of each row, fp32 [n], for logits [n, V]."""
    logits = logits.contiguous()
    result = logits.new_empty(len(logits), dtype=torch.float32)
    call("log_partition", logits, logits, result, *logits.shape)
    return result
