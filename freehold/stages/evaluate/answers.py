"""Greedy answers and the room that requests have, for tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from freehold.core.errors import DataError
from freehold.infer.sampler import Sampling

if TYPE_CHECKING:
    from freehold.api import Loaded


def check_fits(tokens: int, most: int, where: str) -> None:
    """Raise DataError for a request that is longer than the context: the harness itself would cut it silently."""
    if tokens > most:
        raise DataError(
            "a request of a task does not fit the model's context",
            where=where,
            found=f"{tokens} tokens",
            expected=f"at most {most}",
            todo="shorten the task's prompts, ask for fewer examples (num_fewshot), or leave the task",
        )


def answer(loaded: Loaded, prompt: Sequence[int], until: Sequence[str], max_tokens: int, where: str) -> str:
    """Return a greedy answer, ended before the first of `until`; DataError when the prompt leaves no room."""
    check_fits(len(prompt) + 1, loaded.config.max_position_embeddings, where)
    room = loaded.config.max_position_embeddings - len(prompt)
    sampling = Sampling(temperature=0.0, max_tokens=min(max_tokens, room), stop_ids=loaded.stop_ids)
    text = loaded.tokenizer.decode(loaded.engine.generate([list(prompt)], sampling)[0].ids, skip_specials=True)
    for end in filter(None, until):
        text = text.split(end)[0]
    return text
