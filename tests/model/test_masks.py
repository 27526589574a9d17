"""Who sees whom: windows, documents, padding, explicit positions, and the cache seam."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from freehold.model import blockwise, masks
from freehold.model.afmoe import Afmoe
from freehold.model.attention import attend
from freehold.model.config import ModelConfig
from freehold.model.masks import FLEX_TOKENS, Mask, build_masks, first_seen, flex_mask, takes_flex


@pytest.fixture(params=["one piece", "blocks"])
def both_forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with PyTorch's attention and with the blockwise one, which short sequences would not use."""
    if request.param == "blocks":
        monkeypatch.setattr(blockwise, "BLOCK_TOKENS", 4)
    return request.param


@pytest.mark.usefixtures("both_forms")
def test_packed_documents_equal_each_document_alone(model: Afmoe) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [[9, 4, 10], [1, 20, 2]]
    ids = torch.randint(13, 96, (2, 23), generator=generator)
    documents = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    packed = model(ids, document_ids=documents)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            alone = model(ids[row : row + 1, start : start + length])
            torch.testing.assert_close(packed[row : row + 1, start : start + length], alone, rtol=1e-4, atol=1e-5)
            start += length


@pytest.mark.usefixtures("both_forms")
def test_no_gradient_crosses_documents_or_the_future(model: Afmoe) -> None:
    documents = torch.tensor([[5] * 8 + [2] * 7 + [-1] * 3])
    ids = torch.arange(13, 31)[None]
    influence = gradient_from(model, ids, 11, document_ids=documents)
    assert torch.equal(influence > 0, torch.tensor([False] * 8 + [True] * 4 + [False] * 6))


def gradient_from(model: Afmoe, ids: Tensor, position: int, **arguments: Tensor) -> Tensor:
    """Return how strongly each input position [T] acts on the output at `position`."""
    seen: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0]

    hook = model.model.embed_tokens.register_forward_hook(keep)
    model.hidden(ids, **arguments)[0, position].square().sum().backward()
    hook.remove()
    assert seen[0].grad is not None
    return seen[0].grad[0].abs().sum(-1)


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("window", [1, 3, 8, 19, 20, 21])
def test_a_window_is_exactly_w_tokens_with_the_current_one(
    hard: ModelConfig, make: Callable[[ModelConfig], Afmoe], window: int
) -> None:
    shape = hard.model_dump() | {
        "num_hidden_layers": 1, "layer_types": ("sliding_attention",), "sliding_window": window,
    }  # fmt: skip
    model = make(ModelConfig(**shape))
    influence = gradient_from(model, torch.arange(13, 33)[None], 19)
    assert (influence > 0).sum() == min(window, 20)
    assert (influence[-min(window, 20) :] > 0).all()


def embedded(tokens: int) -> torch.Tensor:
    """A stream in fp64, which the CPU kernels do not take: masks then have their general form."""
    return torch.zeros(1, tokens, 1, dtype=torch.float64)


def test_windows_and_documents_narrow_each_other(hard: ModelConfig) -> None:
    documents = torch.tensor([[0] * 9 + [1] * 3])
    built = build_masks(hard, embedded(12), None, documents)
    rows = torch.arange(12)
    distance = rows[:, None] - rows[None, :]
    same = documents[0][:, None] == documents[0][None, :]
    full, sliding = built["full_attention"].allowed, built["sliding_attention"].allowed
    assert full is not None
    assert sliding is not None
    assert torch.equal(full[0, 0], (distance >= 0) & same)
    assert torch.equal(sliding[0, 0], (distance >= 0) & (distance < 5) & same)
    assert full.dtype == torch.bool


def test_where_causal_order_says_it_all_no_matrix_is_built(hard: ModelConfig) -> None:
    found = build_masks(hard, embedded(5), None, None)
    assert all(mask.allowed is None and mask.causal for mask in found.values())
    found = build_masks(hard, embedded(6), None, None)
    assert found["full_attention"].allowed is None
    assert found["sliding_attention"].allowed is not None
    assert found["sliding_attention"].blocks is None


def test_long_sequences_are_cut_into_blocks_on_cpus_only(hard: ModelConfig) -> None:
    found = build_masks(hard, embedded(300), None, None)
    assert all(mask.blocks for mask in found.values())
    found = build_masks(hard, embedded(300).to("meta"), None, None)
    assert found["full_attention"].causal
    assert all(mask.blocks is None for mask in found.values())
    found = build_masks(hard, embedded(5000), None, None)
    assert found["full_attention"].causal
    assert all(mask.blocks is None for mask in found.values())


def test_long_sequences_take_block_masks_on_cuda_only() -> None:
    assert takes_flex(torch.device("cuda", 1), FLEX_TOKENS)
    assert not takes_flex(torch.device("cuda"), FLEX_TOKENS - 1)
    assert not takes_flex(torch.device("cpu"), FLEX_TOKENS)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_block_mask_lets_see_what_the_matrix_does(hard: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = torch.tensor([[0] * 90 + [1] * 60 + [2] * 150, [3] * 299 + [-1]])
    h = torch.zeros(2, 300, 1, dtype=torch.float64)
    plain = build_masks(hard, h, torch.arange(300), documents)
    monkeypatch.setattr(masks, "takes_flex", lambda device, tokens: True)
    flex = build_masks(hard, h, None, documents)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 300, 16, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    for kind, mask in flex.items():
        assert mask.flex is not None
        assert mask.allowed is None
        torch.testing.assert_close(attend(q, k, v, mask), attend(q, k, v, plain[kind]))
    seen = {kind: int(mask.flex.kv_num_blocks.sum()) for kind, mask in flex.items() if mask.flex is not None}
    assert seen == {"full_attention": 5 + 6, "sliding_attention": 5 + 5}  # of twice 9; 6 are not in the future
    crossed = attend(q, k, v, flex["full_attention"]) - attend(q, k, v, flex["sliding_attention"])
    assert crossed.abs().max() > 0.1


def test_a_block_mask_takes_no_matrix_of_pairs() -> None:
    start = first_seen(1 << 18, 256, None, 1)  # the matrix would hold 64 GiB
    assert start is not None
    assert flex_mask(start).kv_num_blocks.max() == 3


@pytest.mark.usefixtures("both_forms")
def test_explicit_positions_mean_the_same(model: Afmoe) -> None:
    ids = torch.arange(13, 43).view(2, 15)
    plain = model(ids)
    torch.testing.assert_close(model(ids, positions=torch.arange(15)), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(ids, positions=torch.arange(15).expand(2, 15) + 7), plain, rtol=1e-3, atol=1e-4)
    stretched = model(ids, positions=torch.arange(15) * 2)
    assert (stretched - plain).abs().max() > 1e-2


class Growing:
    """The smallest cache that honours the seam: it keeps everything and attends with a mask."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.positions = config, torch.arange(0)
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def attend(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        old, positions = self.kept.get(layer_index), self.positions
        if old is not None:
            k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        where = positions if old is None else torch.cat([old[2], positions])
        self.kept[layer_index] = (k, v, where)
        distance = positions[:, None] - where[None, :]
        sliding = self.config.layer_types[layer_index] == "sliding_attention"
        allowed = (distance >= 0) & ((distance < self.config.sliding_window) if sliding else True)
        return attend(q, k, v, Mask(allowed[None, None], False, None)).transpose(1, 2)


def test_the_cache_seam_gives_the_logits_of_the_whole_sequence(model: Afmoe) -> None:
    ids = torch.arange(13, 43).view(2, 15)
    model.eval()
    with torch.no_grad():
        whole, cache, parts = model(ids), Growing(model.config), []
        for start, end in ((0, 6), (6, 7), (7, 15)):
            cache.positions = torch.arange(start, end)
            parts.append(model(ids[:, start:end], positions=cache.positions, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_cache_needs_positions_and_takes_no_documents(model: Afmoe) -> None:
    ids = torch.arange(13, 23)[None]
    with pytest.raises(ValueError, match="positions are required"):
        model(ids, cache=Growing(model.config))
    with pytest.raises(ValueError, match="document_ids"):
        model(ids, cache=Growing(model.config), positions=torch.arange(10), document_ids=torch.zeros_like(ids))


@pytest.mark.parametrize("window", [None, 5])
def test_the_first_key_seen_says_the_same_as_the_mask(hard: ModelConfig, window: int | None) -> None:
    documents = torch.tensor([[0] * 9 + [1] * 3, [3, 3, 4] + [7] * 7 + [-1, -1]])
    start = first_seen(12, window, documents, 2)
    assert start is not None
    kind = "sliding_attention" if window else "full_attention"
    allowed = build_masks(hard, embedded(12).expand(2, -1, -1), None, documents)[kind].allowed
    assert allowed is not None
    keys = torch.arange(12)
    assert torch.equal((keys >= start[:, :, None]) & (keys <= keys[:, None]), allowed[:, 0])


def test_returning_document_id_is_another_document(hard: ModelConfig) -> None:
    documents = torch.tensor([[0, 1, 0], [0, -1, 0]])
    assert torch.equal(first_seen(3, None, documents, 2), torch.tensor([[0, 1, 2]] * 2, dtype=torch.int32))
    allowed = build_masks(hard, embedded(3).expand(2, -1, -1), None, documents)["full_attention"].allowed
    assert torch.equal(allowed, torch.eye(3, dtype=torch.bool).expand(2, 1, 3, 3))
    assert torch.equal(first_seen(3, 2, None, 2), torch.tensor([[0, 0, 1]] * 2, dtype=torch.int32))
