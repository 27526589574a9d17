"""The engine: token ids in, token ids out, many requests in one batch, exact log-probabilities; it knows no text.

Where the CPU kernels compute, an answer has the same bits alone and in company, however its prompt was cut, with any
number of threads, and the log-probabilities are those of training. `describe` says whether that holds here.

Shapes: N tokens of one forward pass, B rows, d hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from freehold.core.errors import ConfigError, RequestError
from freehold.infer import scoring
from freehold.infer.adapters import Adapters, Shared
from freehold.infer.limits import check_prompts, token_budgets
from freehold.infer.pages import PagePool, blocks_of, free_bytes, page_bytes, window_pages
from freehold.infer.prefixes import Prefixes
from freehold.infer.requests import Queue, Request, Token, Top
from freehold.infer.runner import Runner, not_exact
from freehold.infer.sampler import Sampling, check_ids, draw
from freehold.infer.scoring import Scored
from freehold.kernels import cpu
from freehold.kernels.packed import PAGE_TOKENS
from freehold.model.afmoe import Afmoe

PREFILL_TOKENS = 2048
"""Tokens of one forward pass when sequences are scored: bounds activations."""
STEP_TOKENS = 512
"""Tokens of one step of answering: decoding rows, then pieces of prompts. More would make those who read wait."""
CacheType = Literal["auto", "int8"]
USUAL_TOKENS = 1024
"""Prompt and answer of a usual request, for how many are let in at the same time."""
MEMORY_SHARE = 0.5
"""Of the free memory, the most that keys and values take when no budget is given."""


@dataclass
class Generation:
    """What was generated for one prompt; a stop id that ended it is the last of `ids`."""

    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Top] = field(default_factory=list)
    finish_reason: str = "length"


class Engine:
    """Runs a model that someone else may be training: changed weights are seen at the next step.

    Each call puts the model in eval mode. max_batch: requests that decode together. limit_tokens: prompt and answer of
    one request; the model's context when None. cache_bytes: what keys and values may take; when None, what `max_batch`
    full contexts need, at most half of the free memory. share_steps: whether the requests of different calls are in one
    forward pass; when None, where that changes no bit. prefix_cache: keep the pages of prompts for those that begin
    the same. cache_type: int8 keeps keys and values in 8 bits, in about half of the memory that bfloat16 needs; answers
    then differ from training, not from each other. Raises ConfigError when `limit_tokens` do not fit the budget.
    """

    def __init__(
        self,
        model: Afmoe,
        max_batch: int = 32,
        limit_tokens: int | None = None,
        cache_bytes: int | None = None,
        share_steps: bool | None = None,
        prefix_cache: bool = False,
        cache_type: CacheType = "auto",
    ) -> None:
        self.model = model
        self.max_batch = max_batch
        self.vocab_size = model.config.vocab_size
        context = min(limit_tokens or model.config.max_position_embeddings, model.config.max_position_embeddings)
        # Decided once: it must not change between two steps of one answer.
        self.exact = not_exact(model) is None
        self.share_steps = self.exact if share_steps is None else share_steps
        # All memory for keys and values is fixed here: a server that starts does not die later of a long prompt.
        self.pool = _pool(model, max_batch, context, cache_bytes, cache_type == "int8")
        fits = self.pool.most_tokens(STEP_TOKENS)
        if fits < context and (limit_tokens or fits == 0):
            raise _too_small(self.pool, fits, context)
        self.limit_tokens = min(context, fits)
        self.prefixes = Prefixes(self.pool) if prefix_cache else None
        self.queue = Queue(self.pool, max_batch, STEP_TOKENS, self.prefixes)
        # None until some are added: a model that is being trained must not be touched.
        self.adapters: Shared | None = None
        # Several threads may read answers; one of them at a time makes the next step for all.
        self._lock = threading.RLock()
        self._runner = Runner(model, self.pool, self.exact)

    def add_adapters(self, adapters: Adapters) -> None:
        """Let requests name adapters; each answers with the bits it has alone, and so does the base."""
        with self._lock:
            self.adapters = Shared(self.model, adapters)
            # Factors are not among what the fused way computes, and nothing that was read before has their numbers.
            self._runner.one_call = False
            self.queue.preempt_all()

    def describe(self) -> str:
        """Say in one line what computes, what it promises, and what memory it may use."""
        dtype = self.model.lm_head.weight.dtype
        reason = not_exact(self.model)
        promise = "bit-invariant" if reason is None else f"not bit-invariant ({reason})"
        device = self.pool.store.device
        what = cpu.describe(dtype) if device.type == "cpu" else f"PyTorch on {device}"
        bits = "of 8 bits, " if self.pool.small else ""
        size = f"{self.pool.bytes / 2**20:,.0f} MiB for keys and values, {bits}{self.pool.pages:,} pages"
        return f"{what}, {promise}; {size}"

    def usual_requests(self) -> int:
        """Return how many requests of ordinary length (1,024 tokens, or the context) have room at the same time."""
        return max(1, self.pool.pages // _pages_for(self.model, min(self.limit_tokens, USUAL_TOKENS)))

    def stats(self) -> dict[str, float]:
        """Return what is used and what was saved; what only grows ends with `_total`."""
        found: dict[str, float] = {
            "cache_pages": self.pool.pages,
            "cache_free_pages": self.pool.free,
            "running_requests": len(self.queue.running),
            "preempted_total": self.queue.preempted,
        }
        return found if self.prefixes is None else found | self.prefixes.stats()

    # -- answering -----------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]) -> list[Generation]:
        """Continue each prompt (ids, not empty).

        RequestError names an empty prompt or an id outside the vocabulary, ContextOverflow the limit.
        """
        # One setting may serve all prompts; a seed then gives each the same draws, since position and seed decide them.
        settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        results = [Generation(len(prompt)) for prompt in prompts]
        for number, token in self.decode(prompts, settings):
            result = results[number]
            result.ids.append(token.id)
            result.logprobs.append(token.logprob)
            result.top_logprobs.append(token.top_logprobs)
            result.finish_reason = token.finish_reason or "length"
        return results

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        """Yield the tokens that continue one prompt, as they are made; closing the iterator stops the work."""
        yield from (token for _, token in self.decode([prompt], [sampling]))

    def decode(self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling]) -> Iterator[tuple[int, Token]]:
        """Yield (number of the prompt, token) as tokens are made, `max_batch` requests at a time.

        A finished request makes room immediately. A prompt with `max_tokens=0` yields nothing. What cannot be answered
        is refused before the first token; closing the iterator stops the work. Iterators that are read in turns, or by
        several threads, share every step.
        """
        with contextlib.closing(self.turns(prompts, settings)) as turns:
            for turn in turns:
                yield from turn

    def turns(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling], key: Hashable = None
    ) -> Generator[list[tuple[int, Token]]]:
        """Yield after each step what these prompts got, which may be nothing; the rest as `decode`.

        So one that reads a long prompt can be stopped in the middle, and does not keep others from their tokens.
        key: with whom kept prefixes are shared.
        """
        budgets = self._allowed(prompts, settings)
        check_ids(settings, self.vocab_size)
        requests = [self._request(*each, key) for each in zip(prompts, settings, budgets, strict=True)]
        try:
            with self._lock:
                for request in requests:
                    self.queue.add(request)
            while True:
                # Tokens may be there already: another reader's step made them.
                made = [(number, token) for number, r in enumerate(requests) for token in r.unread()]
                if made:
                    yield made
                if all(request.finished for request in requests):
                    return
                # Where company changes bits a call has its steps for itself, unless others hold the room it needs.
                if self.share_steps or not self.step(requests):
                    self.step()
                if not any(request.tokens for request in requests):
                    yield []
        finally:
            with self._lock:
                for request in requests:
                    self.queue.remove(request)

    def submit(self, prompt: Sequence[int], sampling: Sampling, key: Hashable = None) -> Request:
        """Let one request wait for its turn; `step` fills its `tokens`. Errors as in `generate`."""
        (budget,) = self._allowed([prompt], [sampling])
        check_ids([sampling], self.vocab_size)
        request = self._request(prompt, sampling, budget, key)
        with self._lock:
            self.queue.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Stop a request; its pages are free for others."""
        with self._lock:
            self.queue.remove(request)

    @torch.inference_mode()
    def step(self, only: Sequence[Request] | None = None) -> bool:
        """Run the model once for all requests that fit, or `only` for some; False when there was nothing to do."""
        with self._lock:
            # Checked in each step: training may have changed the weights since the last one.
            if self._runner.weights_changed():
                self._forget()
            parts = self.queue.next_step(only)
            if not parts:
                return False
            # Rows of one adapter follow each other: its factors are one more stretch of one product.
            parts.sort(key=lambda part: part[0].adapter)
            self._begin([(r.adapter, count) for r, count in parts])
            # Only the last new token of a sequence has a next one to draw, and a prompt that is read in pieces draws
            # nothing before its last piece.
            last = accumulate(count for _, count in parts)
            ready = [(r, end - 1) for (r, count), end in zip(parts, last, strict=True) if r.pending == count]
            rows = [(r.pages, r.ids[r.pages.length :][:count]) for r, count in parts]
            found = self._runner.read(rows, [row for _, row in ready])
            if ready:
                self._draw([r for r, _ in ready], found.logits, found.partition)
            return True

    def _draw(self, requests: list[Request], logits: Tensor, partition: Tensor) -> None:
        """Give each request the token that follows; logits [B, V] after its last one."""
        drawn = draw(logits.float(), [request.draw for request in requests])
        wanted = [request.sampling.logprobs for request in requests]
        logprobs, tops = scoring.logprobs(logits, drawn, max(wanted), partition)
        for request, token, logprob, top, count in zip(requests, drawn.tolist(), logprobs, tops, wanted, strict=True):
            request.take(token, logprob, top[:count])
            if request.finished:
                self.queue.remove(request)

    # -- scoring -------------------------------------------------------------------------------------------------

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the natural log-probability of each token given those before it; 0.0 for the first."""
        return [scored.logprobs for scored in self.score_top(sequences, 0)]

    @torch.inference_mode()
    def score_top(self, sequences: Sequence[Sequence[int]], top: int, adapter: str = "") -> list[Scored]:
        """Score sequences, and report the `top` most probable tokens at each position."""
        check_prompts(sequences, self.vocab_size, self.limit_tokens)
        number = self._adapter(adapter)
        results = [Scored([0.0], [[]]) for _ in sequences]
        with self._lock:
            # Kept prefixes give way to a full pass; answers that are being made, only to what one sequence needs.
            self.pool.has_room(min(self.pool.pages, PREFILL_TOKENS // PAGE_TOKENS * len(self.pool.windows)))
            for pieces in scoring.pieces(self.pool, sequences, PREFILL_TOKENS):
                needed = sum(pages.missing(count) for _, pages, _, count in pieces)
                while not self.pool.has_room(needed) and self.queue.running:
                    self.queue.preempt(self.queue.running[-1])
                parts = [(pages, sequences[row][start : start + count]) for row, pages, start, count in pieces]
                self._begin([(number, len(ids)) for _, ids in parts])
                hidden = self._runner.read(parts, []).hidden
                at = 0
                for row, pages, start, count in pieces:
                    targets = sequences[row][start + 1 : start + count + 1]
                    scoring.append(self.model.lm_head, hidden[at : at + count], targets, top, results[row])
                    at += count
                    if pages.length == len(sequences[row]) - 1:
                        pages.release()
        return results

    def _forget(self) -> None:
        """Read every request again: no key of the old weights survives."""
        self.queue.preempt_all()
        if self.prefixes is not None:
            self.prefixes.clear()

    def _allowed(self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling]) -> list[int]:
        """Return how many tokens each prompt may get; errors as in `generate`."""
        check_prompts(prompts, self.vocab_size, self.limit_tokens)
        return token_budgets(prompts, settings, self.limit_tokens)

    def _request(self, prompt: Sequence[int], sampling: Sampling, budget: int, key: Hashable) -> Request:
        # The weights are not in the key: when they change, nothing that was kept survives (`_forget`).
        # The adapter is: keys and values of one say nothing of another's.
        number = self._adapter(sampling.adapter)
        shared = (key, number) if number and key is not None else key
        request = Request(prompt, sampling, budget, self.pool, self.vocab_size, shared)
        request.adapter = number
        return request

    def _adapter(self, name: str) -> int:
        if self.adapters is not None:
            return self.adapters.number(name)
        if name:
            raise RequestError("no such adapter", where="adapter", found=name, expected="none is loaded")
        return 0

    def _begin(self, parts: Sequence[tuple[int, int]]) -> None:
        """Say whose tokens the next pass holds: (adapter, tokens) of each sequence, sorted by adapter."""
        if self.adapters is not None:
            self.adapters.begin([number for number, _ in parts], [count for _, count in parts])


def _pages_for(model: Afmoe, tokens: int) -> int:
    """Return the pages of one sequence of this many tokens."""
    config = model.config
    sliding = min(blocks_of(tokens), window_pages(config.sliding_window, STEP_TOKENS))
    return sum(sliding if kind == "sliding_attention" else blocks_of(tokens) for kind in config.layer_types)


def _pool(model: Afmoe, max_batch: int, context: int, cache_bytes: int | None, small: bool) -> PagePool:
    """Return the pages the engine may use."""
    weight = model.lm_head.weight
    page = page_bytes(model.config, weight.dtype, small)
    # Counted in pages of one layer, since sliding and global layers hold different numbers of them.
    if cache_bytes is not None:
        pages = cache_bytes // page
    else:
        # Scoring reads a pass of other sequences at the same time.
        wanted = max_batch * _pages_for(model, context) + _pages_for(model, PREFILL_TOKENS)
        pages = max(min(wanted, int(free_bytes(weight.device) * MEMORY_SHARE) // page), 1)
    return PagePool(model.config, weight.dtype, weight.device, pages, small)


def _too_small(pool: PagePool, fits: int, context: int) -> ConfigError:
    return ConfigError(
        "the memory for keys and values does not hold one request",
        where="cache_bytes",
        found=f"{pool.bytes:,} bytes: {fits} tokens",
        expected=f"{context} tokens",
        todo="a larger budget, or a smaller limit_tokens",
    )
