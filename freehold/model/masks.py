"""Who sees whom: causal order, windows, documents, in the form that the fast way of a device and dtype wants.

Shapes: B sequences, T queries, S keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.kernels import cpu
from freehold.model import blockwise
from freehold.model.config import ModelConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK = 128
FLEX_TOKENS = 4096
"""From here on a CUDA device gets block masks: a dense one of 4,096 tokens holds 16 MiB a row, of 65,536 4 GiB."""


class Mask(NamedTuple):
    """Who sees whom: `allowed` (bool, broadcastable to [B, 1, T, S]), or None for plain causal order if `causal`.

    `start`, `blocks` or `flex` is the same in the form that the fast way of this device and dtype wants.
    """

    allowed: Tensor | None
    causal: bool
    window: int | None
    blocks: list[blockwise.Block] | None = None
    start: Tensor | None = None
    flex: BlockMask | None = None


def count_positions(input_ids: Tensor) -> Tensor:
    """Return where the tokens [B, T] (or their stream [B, T, d]) stand in their rows: 0, 1, 2, ... [T]."""
    return torch.arange(input_ids.shape[1], device=input_ids.device)


def document_starts(document_ids: Tensor) -> Tensor:
    """Return where in its row each token's document starts, int32 [B, T], for ids [B, T].

    A document is a run of equal ids: packing puts its tokens next to each other. So nothing here depends on values in a
    way that would make the host wait for the device.
    """
    place = torch.arange(document_ids.shape[1], dtype=torch.int32, device=document_ids.device)
    first = torch.zeros(document_ids.shape, dtype=torch.int32, device=document_ids.device)
    first[:, 1:] = (document_ids.diff(dim=1) != 0) * place[1:]
    # The latest start so far is that of the document a token is in.
    return first.cummax(1).values


def first_seen(tokens: int, window: int | None, document_ids: Tensor | None, rows: int) -> Tensor:
    """Return the first key each query sees (int32 [B, T]); it sees all from there to itself.

    That holds for causal order, a window, and documents whose tokens follow each other (ids [B, T]; padding is -1).
    """
    device = torch.device("cpu") if document_ids is None else document_ids.device
    if document_ids is None:
        start = torch.zeros(rows, tokens, dtype=torch.int32, device=device)
    else:
        start = document_starts(document_ids)
    place = torch.arange(tokens, dtype=torch.int32, device=device)
    return start if window is None else torch.maximum(start, place - window + 1)


def takes_flex(device: torch.device, tokens: int) -> bool:
    """Return whether attention over this many tokens skips the blocks that no query sees, instead of masking them."""
    return device.type == "cuda" and tokens >= FLEX_TOKENS


def flex_mask(start: Tensor) -> BlockMask:
    """Return flex attention's block mask where query t of a row sees the keys start[b, t] .. t, start int32 [B, T].

    Blocks follow from the bounds alone; PyTorch's own way to find them evaluates the mask for every pair.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens = start.shape[1]
    count = -(-tokens // FLEX_BLOCK)
    padded = F.pad(start, (0, count * FLEX_BLOCK - tokens), value=tokens)
    # A block of queries needs the keys from the earliest one any of them sees.
    first = padded.unflatten(1, (count, FLEX_BLOCK)).amin(2) // FLEX_BLOCK  # [B, blocks]
    numbers = torch.arange(count, dtype=torch.int32, device=start.device)
    indices = (first[..., None] + numbers).clamp_max(count - 1)  # [B, blocks, blocks]

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= start[row, query])

    return BlockMask.from_kv_blocks(
        (numbers - first + 1)[:, None], indices[:, None], BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )  # fmt: skip


def build_masks(
    config: ModelConfig, h: Tensor, positions: Tensor | None, document_ids: Tensor | None
) -> dict[str, Mask]:
    """Return the mask of each kind of layer for embedded tokens h [B, T, d] that see each other only.

    A token sees itself, and earlier ones of the same document within the window. `positions` None means
    0, 1, 2, ...; where causal order alone says it all, no matrix is built.
    """
    masks: dict[str, Mask] = {}
    rows, tokens, device = len(h), h.shape[1], h.device
    # Intervals need positions that count up by one, which only we can promise.
    as_intervals = positions is None and cpu.available(h, config.head_dim)
    as_blocks = positions is None and takes_flex(device, tokens)
    for kind in sorted(set(config.layer_types)):
        window = config.sliding_window if kind == "sliding_attention" else None
        if as_intervals or as_blocks:
            start = first_seen(tokens, window, document_ids, rows)
            flex = None if as_intervals else flex_mask(start.to(device))
            masks[kind] = Mask(None, False, window, start=start if as_intervals else None, flex=flex)
        else:
            masks[kind] = _dense(h, window, positions, document_ids)
    return masks


def _dense(h: Tensor, window: int | None, positions: Tensor | None, document_ids: Tensor | None) -> Mask:
    """Return the mask as a matrix, or as plain causal order where that says the same."""
    tokens, device = h.shape[1], h.device
    # Only here do CPUs gain from skipping blocks: PyTorch's kernel for short rows is as fast.
    as_blocks = device.type == "cpu" and blockwise.BLOCK_TOKENS < tokens <= blockwise.BLOCKWISE_MAX_TOKENS
    narrow = window is not None and (positions is not None or window < tokens)
    if positions is None and document_ids is None and not narrow and not as_blocks:
        return Mask(None, True, window)
    order = torch.arange(tokens, device=device) if positions is None else positions
    order = order.int().expand(1, -1) if order.ndim == 1 else order.int()  # [B or 1, T]
    distance = order[:, :, None] - order[:, None, :]  # [B or 1, T, T]
    seen = distance >= 0
    if document_ids is not None:
        # Starts rather than ids: an id that comes back is another document here, too.
        starts = document_starts(document_ids)
        seen = seen & (starts[:, :, None] == starts[:, None, :])
    if window is not None and narrow:
        seen = seen & (distance < window)
    allowed = seen[:, None]  # [B or 1, 1, T, T]
    return Mask(allowed, False, window, blockwise.attention_blocks(allowed) if as_blocks else None)
