"""A longer context: what changes in the settings of a branch, and what is refused.

Only global layers see more, for they have no positional encoding; windows and the rotary base stay. Source: Arcee
Trinity Large Technical Report, section 3.5; the gain of the query norm as in SWAN-GPT (arXiv:2504.08719), as a weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from freehold.core.artifact import sha256_json
from freehold.core.errors import ConfigError
from freehold.data.config import BufferConfig
from freehold.data.long import LongOrder
from freehold.data.needles import Encode
from freehold.model.config import ModelConfig
from freehold.parallel.config import validate_layout
from freehold.stages.pretrain.config import PretrainConfig
from freehold.tokenizer.bpe import Tokenizer


def extended(config: PretrainConfig, shape: ModelConfig, facts: dict[str, Any]) -> PretrainConfig:
    """Return the settings of a branch with longer rows: the rows of a step, and the context that the model will state.

    A step keeps its tokens. `shape` and `facts` are the parent's. Raises ConfigError for a model whose windows cover
    its context, that has no global layer, or whose rows would not be longer.
    """
    length, trained = config.extended_tokens, trained_tokens(shape, facts)
    if not length:
        return config
    check_can_extend(shape, trained)
    if length <= trained:
        raise ConfigError(
            "the phase does not extend the context",
            where="pretrain.phases.<name>.context_tokens",
            found=length,
            expected=f"more than the {trained:,} tokens that the parent was trained on",
        )
    if config.extension.target_tokens > length:
        raise ConfigError(
            "a context that was not trained cannot be stated",
            where="pretrain.extension.target_tokens",
            found=config.extension.target_tokens,
            expected=f"at most the rows of {length:,} tokens",
        )
    before, states = config.batch, config.extension.target_tokens or length
    batch = before.model_copy(
        update={
            "context_tokens": length,
            "sequences": max(1, before.step_tokens // length),
            "micro_sequences": max(1, before.micro * before.context_tokens // length),
            # Rows of a joined document come from its buffer in order; the stream would cut it at its inner ends.
            "order": before.order if before.order.kind == "buffer" else BufferConfig(),
        }
    )
    validate_layout(
        config.parallel, config.model, context_tokens=length, sequences=batch.sequences,
        micro_sequences=batch.micro_sequences, stage="pretrain",
    )  # fmt: skip
    model = config.model.model_copy(update={"max_position_embeddings": max(states, shape.max_position_embeddings)})
    return config.model_copy(update={"batch": batch, "model": model})


def trained_tokens(shape: ModelConfig, facts: dict[str, Any]) -> int:
    """Return the length of the rows that a checkpoint was trained on; what its config states where nothing says it."""
    return int(facts.get("context_tokens", shape.max_position_embeddings))


def check_can_extend(shape: ModelConfig, trained: int) -> None:
    """Raise ConfigError when no layer of the model can see more than it was trained on."""
    if not shape.num_full_layers:
        raise ConfigError(
            "the model has no global layer to extend", where="layer_types", expected="at least one full_attention"
        )
    if shape.sliding_window >= trained:
        # Its windows never ended inside a row: sliding layers would meet distances, and an end, they have not learned.
        raise ConfigError(
            "the model's window is not smaller than its context",
            where="sliding_window",
            found=f"{shape.sliding_window} for rows of {trained}",
            expected=f"less than {trained}",
            todo="train with a window of at most half a row first",
        )


def global_gains(shape: ModelConfig) -> list[str]:
    """Return the names of the query norms of the global layers: a weight that every form of a model carries."""
    kinds = enumerate(shape.layer_types)
    return [f"model.layers.{i}.self_attn.q_norm.weight" for i, kind in kinds if kind == "full_attention"]


def sharpen(model: dict[str, Tensor], shape: ModelConfig, gain: float) -> None:
    """Multiply the query norms of the global layers, in place: all scores of these layers grow by the factor."""
    for name in global_gains(shape) if gain != 1.0 else ():
        model[name].mul_(gain)


def encoder(folder: Path) -> Encode:
    """Return what turns the words of needles into ids."""
    return Tokenizer.load(folder).encode


def identity(data: dict[str, str], config: PretrainConfig) -> dict[str, str]:
    """Return the hashes of the text as this branch reads it: the same source, sampled and joined, is other text."""
    settings = config.extension.model_dump(mode="json", exclude={"target_tokens", "global_q_gain"})
    return {name: sha256_json([digest, settings]) for name, digest in data.items()}


def long_order(config: PretrainConfig, encode: Encode, sources: Any, segments: Any, **shape: Any) -> LongOrder:
    """Return the order of the longer rows."""
    order = config.batch.order
    assert isinstance(order, BufferConfig)
    return LongOrder(
        sources, segments, settings=config.extension, encode=encode, **shape,
        context_tokens=config.batch.context_tokens, sequences=config.batch.sequences, limit=config.batch.epochs,
        documents=order.documents, refill=order.refill, workers=order.workers,
    )  # fmt: skip
