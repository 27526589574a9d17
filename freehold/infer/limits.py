"""What the engine refuses before it begins: prompts that are none, and more tokens than the context holds."""

from __future__ import annotations

from collections.abc import Sequence

from freehold.core.errors import RequestError
from freehold.infer.sampler import Sampling


class ContextOverflow(RequestError):
    """More tokens than the model was made for."""


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, limit_tokens: int) -> None:
    """Raise RequestError for an empty prompt or an id outside the vocabulary, ContextOverflow above the limit."""
    for ids in prompts:
        if not ids:
            raise RequestError("the prompt is empty", where="prompt", expected="at least one token")
        if min(ids) < 0 or max(ids) >= vocab_size:
            wrong = next(i for i in ids if not 0 <= i < vocab_size)
            raise RequestError(
                "the prompt holds an id that is no token",
                where="prompt",
                found=wrong,
                expected=f"0 to {vocab_size - 1}",
            )
        if len(ids) > limit_tokens:
            raise ContextOverflow(
                "the prompt is longer than the context",
                where="prompt",
                found=f"{len(ids)} tokens",
                expected=f"at most {limit_tokens} tokens",
            )


def token_budgets(prompts: Sequence[Sequence[int]], settings: Sequence[Sampling], limit_tokens: int) -> list[int]:
    """Return how many tokens each prompt may get; ContextOverflow for what does not fit the context."""
    budgets = []
    for prompt, s in zip(prompts, settings, strict=True):
        room = limit_tokens - len(prompt)
        if s.max_tokens is None and room == 0 or s.max_tokens is not None and s.max_tokens > room:
            raise ContextOverflow(
                "the prompt and the tokens to generate do not fit the context",
                where="max_tokens" if s.max_tokens else "prompt",
                found=f"{len(prompt)} prompt tokens + {s.max_tokens or 'at least 1'} to generate",
                expected=f"at most {limit_tokens} tokens together",
            )
        budgets.append(room if s.max_tokens is None else s.max_tokens)
    return budgets
