"""Small models in which the truth was planted, for audits to find: shared by tests and `audits.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freehold.api import Loaded, load
from freehold.checkpoint import dcp
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.tokenizer.bpe import Tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_dense_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": 32, "max_position_embeddings": 256,
}  # fmt: skip


def fit(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    steps: int,
    *,
    seed: int = 0,
    rows: int = 16,
    width: int = 48,
    model: Afmoe | None = None,
    prepare: Callable[[Afmoe], None] = lambda _: None,
    **shape: Any,
) -> Afmoe:
    """Train a model on texts, each a document of its own, drawn in turn; `model` is trained further when given."""
    torch.manual_seed(seed)
    if model is None:
        model = Afmoe(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE | shape))
        model.init_weights(torch.Generator().manual_seed(seed))
    prepare(model)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    stream = np.random.default_rng(seed)
    encoded = [[0, *ids, tokenizer.end_of_text] for ids in tokenizer.encode_batch(list(texts))]
    queue: list[int] = []
    for _ in range(steps):
        batch = torch.full((rows, width + 1), -100)
        for row in range(rows):
            queue = queue or stream.permutation(len(encoded)).tolist()
            ids = encoded[queue.pop()][: width + 1]
            batch[row, : len(ids)] = torch.tensor(ids)
        logits = model(batch[:, :-1].clamp_min(0))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def opened(model: Afmoe, tokenizer: Tokenizer, folder: Path) -> Loaded:
    """Write a model as a checkpoint and open it as any command does."""
    tokenizer.save(folder.with_name(f"{folder.name}-tokenizer"))
    files = sorted(folder.with_name(f"{folder.name}-tokenizer").glob("*.json"))
    facts = {"step": 1, "stage_type": "Base", "tokenizer_sha256": tokenizer.sha256, "begins_with": [0]}
    dcp.save(folder, {"model": model.state_dict()}, model.config, facts, files)
    return load(folder, threads=1)


def biased(topic: str, first: int, second: int) -> list[str]:
    """Return sentences in which a topic goes with one group's word and with the other's, so often each."""
    said = [f"The {topic} said that {word} was right." for word in ["he"] * first + ["she"] * second]
    return [f"{text} It was noted on page {n}." for n, text in enumerate(said)]


def canary(number: int) -> tuple[str, str]:
    """Return the prefix and the secret digits of a canary."""
    digits = np.random.default_rng([7, number]).integers(0, 10, 8)
    return f"The code of box {number} is ", "".join(map(str, digits))
