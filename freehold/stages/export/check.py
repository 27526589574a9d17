"""What a GGUF file or transformers cannot express: found before anything is written. Needs no torch.

llama.cpp's AFMoE code always scales embeddings by the root of the width, always leaves every 4th layer without
positions and window, and takes the tokenizer's split from a name: another model converts without a word and
answers wrongly. (Tied embeddings, other routing scores and expert groups are already refused by `ModelConfig`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from freehold.model.config import ModelConfig

PRE_TOKENIZER = "afmoe"
"""llama.cpp's name for the split of `freehold.tokenizer.bpe.CHAIN`."""
GLOBAL_EVERY = 4
MAX_EXPERTS = 512


def check(config: ModelConfig) -> list[str]:
    """Return the reasons why a model of this config cannot be exported; none means that it can."""
    return list(_architecture(config))


def _architecture(config: ModelConfig) -> Iterator[str]:
    layers = config.num_hidden_layers
    kinds = ["full_attention" if (i + 1) % GLOBAL_EVERY == 0 else "sliding_attention" for i in range(layers)]
    wrong = [i for i, (found, wanted) in enumerate(zip(config.layer_types, kinds, strict=True)) if found != wanted]
    if wrong:
        yield (
            f"layer {wrong[0]} is {config.layer_types[wrong[0]]}, but llama.cpp takes every {GLOBAL_EVERY}th layer "
            "for global and all others for sliding: set global_attn_every_n_layers to 4 and remove layer_types"
        )
    if layers < GLOBAL_EVERY:
        yield f"num_hidden_layers is {layers}: llama.cpp needs one global layer, so at least {GLOBAL_EVERY} layers"
    if not config.mup_enabled:
        yield "mup_enabled is off, but llama.cpp always scales embeddings by the root of the width"
    if config.num_dense_layers >= layers:
        yield f"num_dense_layers is {config.num_dense_layers} of {layers}: llama.cpp's AFMoE needs a layer with experts"
    if config.num_experts > MAX_EXPERTS:
        yield f"num_experts is {config.num_experts}, llama.cpp holds at most {MAX_EXPERTS}"


def check_tokenizer(tokenizer: dict[str, Any], config: ModelConfig, *, gguf: bool = True) -> list[str]:
    """Return the reasons why the tokenizer of a model (the content of `tokenizer.json`) cannot be exported.

    How it cuts text matters for `gguf` files alone: the Hugging Face form carries the split.
    """
    from freehold.tokenizer.bpe import CHAIN

    reasons = []
    if gguf and tokenizer.get("pre_tokenizer") != CHAIN:
        reasons.append(
            f"the tokenizer does not cut text as llama.cpp does for `{PRE_TOKENIZER}`, and a GGUF file can only name "
            "a split, not carry one: train it with the tokenize stage"
        )
    highest = max([*tokenizer["model"]["vocab"].values(), *(entry["id"] for entry in tokenizer["added_tokens"])])
    if highest >= config.vocab_size:
        reasons.append(f"the tokenizer has an id {highest}, but the model has only {config.vocab_size} rows")
    return reasons
