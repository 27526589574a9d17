"""The model on the device: transformers' numbers, grouped products, flex attention."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F

from freehold.model import ops, reference
from freehold.model.afmoe import Afmoe
from freehold.model.attention import attend
from freehold.model.config import ModelConfig, to_hf_dict
from freehold.model.masks import Mask, first_seen, flex_mask

# A width whose rows are multiples of 16 bytes in bfloat16: what grouped products need.
ALIGNED = {"moe_intermediate_size": 32, "hidden_size": 64, "head_dim": 16}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_logits_and_gradients_are_those_of_transformers(device, dtype, limit):
    transformers = pytest.importorskip("transformers")
    config = tiny.hard(**ALIGNED)
    model = tiny.disturb(Afmoe(config))
    hf = transformers.AfmoeConfig(**to_hf_dict(config, "float32"), attn_implementation="eager")
    theirs = transformers.AfmoeForCausalLM(hf)
    theirs.load_state_dict(model.state_dict(), strict=True)
    # In float32 on both sides; ours computes in bfloat16 where asked, and is compared with the exact answer.
    theirs, model = theirs.to(device), model.to_compute(getattr(torch, dtype)).to(device)
    # 13 and up: transformers gives the row of the padding id (12) no gradient.
    ids, targets = torch.randint(13, 96, (2, 2, 23), generator=torch.Generator().manual_seed(5)).to(device)
    logits, expected = model(ids), theirs(ids).logits
    assert relative(logits, expected) < limit
    for each in (logits, expected):
        F.cross_entropy(each.float().flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    worst = {name: relative(p.grad, gradients[name]) for name, p in model.named_parameters()}
    # In bfloat16 a token at a tie may go to another expert: the median gradient is judged, in float32 each of them.
    judged = max(worst.values()) if dtype == "float32" else sorted(worst.values())[len(worst) // 2]
    assert judged < (5 * limit if dtype == "float32" else 0.2), worst


@pytest.mark.parametrize(
    "counts",
    [[5, 0, 19, 40], [0, 0, 64, 0], [1, 1, 1, 61], [0, 0, 0, 0], [16, 16, 16, 16]],
    ids=["ragged", "one", "single rows", "empty", "even"],
)
def test_grouped_products_of_ragged_and_empty_experts(device, counts):
    generator = torch.Generator().manual_seed(0)
    sizes = ((sum(counts), 64), (4, 64, 64), (4, 64, 32))
    made = [torch.randn(size, generator=generator).mul(0.3).to(torch.bfloat16) for size in sizes]
    inputs = [x.to(device).requires_grad_() for x in made]
    exact = [x.detach().double().requires_grad_() for x in made]
    found = ops.grouped_swiglu_gemm(inputs[0], torch.tensor(counts, device=device), *inputs[1:])
    expected = reference.grouped_swiglu(exact[0], torch.tensor(counts), *exact[1:])
    assert found.shape == expected.shape
    if not sum(counts):
        return
    assert relative(found.cpu(), expected) < 2e-2
    found.float().square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(inputs, exact, strict=True):
        assert relative(mine.grad.cpu(), theirs.grad) < 4e-2


@pytest.mark.parametrize("window", [None, 300])
def test_flex_attention_is_that_of_a_dense_mask(device, window):
    rows, tokens, heads, keys, width = 2, 1000, 4, 2, 32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, n, tokens, width, generator=generator).to(device) for n in (heads, keys, keys))
    documents = (torch.arange(tokens) // 400).repeat(rows, 1).to(device)
    start = first_seen(tokens, window, documents, rows)  # [B, T]
    place = torch.arange(tokens, device=device)
    seen = (place[None, None] <= place[None, :, None]) & (place[None, None] >= start[:, :, None])  # [B, T, T]
    for x in (q, k, v):
        x.requires_grad_(device.type == "cuda")  # PyTorch has no backward pass for it on a CPU
    found, expected = (attend(q, k, v, mask) for mask in (Mask(None, False, window, flex=flex_mask(start)),
                                                          Mask(seen[:, None], False, window)))  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    if device.type != "cuda":
        return
    weight = torch.randn(expected.shape, generator=generator).to(device)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("only_cuda")
def test_long_rows_take_flex_attention_without_a_wait(device):
    model = Afmoe(ModelConfig.model_validate({"preset": "laptop", "max_position_embeddings": 8192}))
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.to_compute(torch.bfloat16).to(device)
    ids = torch.randint(2, 1000, (1, 8192), device=device)
    documents = (torch.arange(8192, device=device) // 3000)[None]
    model.hidden(ids, document_ids=documents)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        hidden = model.hidden(ids, document_ids=documents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    alone = model.hidden(ids[:, 3000:6000])
    assert relative(hidden[:, 3000:6000], alone) < 5e-2
