"""`freehold verify-serving`: what holds for a model on this machine, by comparing answers bit for bit.

Each check answers the same prompts in another way than alone, on one thread, in one piece, and compares every token and
its log-probability. Prompts are random ids whose lengths are on both sides of page and window ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from freehold.infer.engine import Engine
from freehold.infer.sampler import Sampling
from freehold.infer.threads import computing_threads
from freehold.kernels.packed import PAGE_TOKENS
from freehold.losses.cross_entropy import head_logits
from freehold.losses.logprob import token_logprobs

ANSWER_TOKENS = 8

Answer = list[tuple[int, float]]
"""Tokens with their log-probabilities"""


@dataclass(frozen=True)
class Check:
    """What one comparison found."""

    name: str
    compared: int
    """Tokens"""
    difference: str | None
    """The first one; None when every bit is equal"""


def verify_serving(engine: Engine) -> list[Check]:
    """Compare answers in a batch, cut, read again, on all threads, and scored and trained, with answers alone."""
    prompts = _prompts(engine)
    settings = [Sampling(seed=i, max_tokens=ANSWER_TOKENS, temperature=float(i % 2)) for i in range(len(prompts))]

    def together(**changes: int) -> list[Answer]:
        return _answers(engine, prompts, settings, **changes)

    with computing_threads(1):
        alone = [_answers(engine, [p], [s])[0] for p, s in zip(prompts, settings, strict=True)]
        ways: dict[str, Callable[[], list[Answer]]] = {
            "batch: alone = together with others": together,
            "chunk: a prompt in one piece = in pieces of 7 tokens": lambda: together(step_tokens=7 + len(prompts)),
            "cache: keys kept = read again in mid-answer": lambda: together(preempt_at=ANSWER_TOKENS // 2),
            "scoring = answering": lambda: _scored(engine, prompts, alone),
            "training = answering": lambda: _trained(engine, prompts, alone),
        }
        checks = [_compare(name, alone, way()) for name, way in ways.items()]
    count = torch.get_num_threads()
    checks.insert(3, _compare(f"threads: 1 = {count}", alone, together()))
    return checks


def table(engine: Engine, checks: Sequence[Check]) -> str:
    """Return the checks as lines for people."""
    lines = [f"engine: {engine.describe()}"]
    for check in checks:
        found = "every bit equal" if check.difference is None else f"DIFFERS, first at {check.difference}"
        lines.append(f"  {check.name}: {check.compared} tokens, {found}")
    return "\n".join(lines)


def _prompts(engine: Engine) -> list[list[int]]:
    window = engine.model.config.sliding_window
    most = engine.limit_tokens - ANSWER_TOKENS
    lengths = {1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 2 * PAGE_TOKENS + 5}
    # A window of thousands of tokens would take minutes to fill; pages have their ends at the same places.
    lengths |= {window - 1, window, window + 1} if window <= 512 else set()
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(engine.vocab_size, (n,), generator=generator).tolist() for n in sorted(lengths) if 0 < n <= most
    ]


def _answers(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Sampling],
    step_tokens: int | None = None,
    preempt_at: int | None = None,
) -> list[Answer]:
    """Answer all prompts in shared steps of some size; take all pages away after some steps."""
    usual, requests = engine.queue.step_tokens, [engine.submit(*each) for each in zip(prompts, settings, strict=True)]
    engine.queue.step_tokens = step_tokens or usual
    try:
        steps = 0
        while engine.step():
            steps += 1
            if steps == preempt_at:
                engine.queue.preempt_all()
    finally:
        engine.queue.step_tokens = usual
    return [[(token.id, token.logprob) for token in request.tokens] for request in requests]


def _scored(engine: Engine, prompts: Sequence[list[int]], answers: Sequence[Answer]) -> list[Answer]:
    ids = [[token for token, _ in answer] for answer in answers]
    found = engine.score([prompt + own for prompt, own in zip(prompts, ids, strict=True)])
    return [list(zip(own, values[-len(own) :], strict=True)) for own, values in zip(ids, found, strict=True)]


def _trained(engine: Engine, prompts: Sequence[list[int]], answers: Sequence[Answer]) -> list[Answer]:
    """Return the log-probabilities of the forward pass that training takes."""
    model, found = engine.model, []
    training = model.training
    # With gradients enabled no weight is packed ahead: this is the pass that the loss is computed from.
    with torch.enable_grad():
        model.train()
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = [token for token, _ in answer]
            tokens = torch.tensor([prompt + ids], device=model.lm_head.weight.device)
            hidden = model.hidden(tokens[:, :-1])[0, -len(ids) :]  # [n, d]
            values = token_logprobs(head_logits(hidden, model.lm_head.weight), tokens[0, -len(ids) :])
            found.append(list(zip(ids, values.tolist(), strict=True)))
    model.train(training)
    return found


def _compare(name: str, expected: Sequence[Answer], found: Sequence[Answer]) -> Check:
    difference = None
    for prompt, (one, other) in enumerate(zip(expected, found, strict=True)):
        for place, (wanted, got) in enumerate(zip(one, other, strict=True)):
            if wanted != got and difference is None:
                difference = f"prompt {prompt}, token {place}: {wanted} alone, {got}"
    return Check(name, sum(map(len, expected)), difference)
