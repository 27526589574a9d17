"""The cache changes nothing but time: with it and without it, hidden states agree."""

from __future__ import annotations

import pytest
import torch

from freehold.core.errors import RequestError
from freehold.infer.cache import KVCache

# The tiny model's window is 8 tokens; every 4th layer is global.


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def with_cache(model, tokens, lengths, pieces, max_tokens=64):
    """Feed right-padded rows in pieces; return the hidden state of each position."""
    cache = KVCache(model.config, len(lengths), max_tokens)
    lengths = torch.tensor(lengths)[:, None]
    out, start = [], 0
    for size in pieces:
        positions = torch.arange(start, start + size).expand(len(lengths), size)
        positions = torch.where(positions < lengths, positions, -1)
        out.append(model.hidden(tokens[:, start : start + size], positions=positions, cache=cache))
        start += size
    return torch.cat(out, dim=1)


@pytest.mark.parametrize(
    "pieces",
    [[30], [1] * 30, [5] + [1] * 25, [20] + [1] * 10, [7, 7, 7, 9], [8, 8, 8, 6], [1, 28, 1], [3, 1, 1, 12, 1, 12]],
    ids=str,
)
@torch.no_grad()
def test_cache_on_equals_cache_off(tiny_model, pieces):
    tokens = ids(3, 30)
    expected = tiny_model.hidden(tokens)
    found = with_cache(tiny_model, tokens, [30, 30, 30], pieces)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pieces", [[30], [1] * 30, [12, 12, 6], [5] + [1] * 25, [29, 1]], ids=str)
@torch.no_grad()
def test_rows_of_different_lengths_share_a_batch(tiny_model, pieces):
    tokens, lengths = ids(4, 30), [30, 3, 17, 1]
    found = with_cache(tiny_model, tokens, lengths, pieces)
    assert found.isfinite().all()
    for row, length in enumerate(lengths):
        alone = tiny_model.hidden(tokens[row : row + 1, :length])
        torch.testing.assert_close(found[row : row + 1, :length], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_decoding_continues_a_ragged_prefill(tiny_model):
    tokens, lengths = ids(3, 40), [20, 4, 9]
    cache = KVCache(tiny_model.config, 3, 64)
    positions = torch.arange(20).expand(3, 20)
    positions = torch.where(positions < torch.tensor(lengths)[:, None], positions, -1)
    tiny_model.hidden(tokens[:, :20], positions=positions, cache=cache)
    for _ in range(15):
        new = tokens.gather(1, cache.lengths[:, None])
        found = tiny_model.hidden(new, positions=cache.lengths[:, None], cache=cache)
    for row, length in enumerate(lengths):
        alone = tiny_model.hidden(tokens[row : row + 1, : length + 15])
        torch.testing.assert_close(found[row, 0], alone[0, -1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_removed_row_gives_its_place_to_the_last(tiny_model):
    tokens = ids(3, 20)
    cache = KVCache(tiny_model.config, 3, 64)
    tiny_model.hidden(tokens[:, :12], positions=torch.arange(12).expand(3, 12), cache=cache)
    cache.remove(0)
    rest = tokens[[2, 1]]
    for t in range(12, 20):
        found = tiny_model.hidden(rest[:, t : t + 1], positions=cache.lengths[:, None], cache=cache)
    torch.testing.assert_close(found[:, 0], tiny_model.hidden(rest)[:, -1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_sliding_layers_hold_one_window_and_global_layers_grow(tiny_model):
    config = tiny_model.config
    cache = KVCache(config, 1, 1000)
    before = cache.bytes
    tiny_model.hidden(ids(1, 600), positions=torch.arange(600)[None], cache=cache)
    sliding = [b for b, s in zip(cache._keys, cache.sliding, strict=True) if s]
    assert all(b.shape[2] == config.sliding_window + 1 for b in sliding)
    assert cache.bytes > before
    with pytest.raises(RequestError, match="at most 1000"):
        tiny_model.hidden(ids(1, 401), positions=torch.arange(600, 1001)[None], cache=cache)
