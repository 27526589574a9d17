"""Requests that share an engine: admitted by pages, decoded together, pre-empted and read again when pages run out.

One step takes a token of every request that decodes, then pieces of the prompts that wait, up to a number of tokens.
A request's answer depends on none of this where the kernels compute (docs/speed.md), so no user sees it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Iterator, Sequence

from freehold.infer.pages import PagePool, Pages
from freehold.infer.prefixes import EVERY_BLOCKS, Node, Prefixes
from freehold.infer.sampler import Draw, Sampling
from freehold.kernels.packed import PAGE_TOKENS

Top = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Token:
    """One generated token; `finish_reason` is "stop" or "length" on the last one, else None.

    Log-probabilities are the model's own: before temperature, bias and penalties.
    """

    id: int
    logprob: float
    top_logprobs: Top = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    cached_tokens: int = 0
    """On the first token of an answer: how many tokens of its prompt were read from kept pages."""


class Request:
    """One prompt and what was generated for it; `tokens` holds what no one has read yet.

    key: with whom it shares kept prefixes; None: with no one.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        budget: int,
        pool: PagePool,
        vocab_size: int,
        key: Hashable = None,
    ) -> None:
        # Prompt and answer in one list: a request whose pages were taken reads all of them again.
        self.ids = list(prompt)
        self.sampling, self.budget = sampling, budget
        self.draw = Draw(sampling, vocab_size, len(prompt))
        # Looked up once for each token.
        self.stop_ids = frozenset(sampling.stop_ids)
        self.pages = Pages(pool)
        self.tokens: deque[Token] = deque()
        self.finished = budget == 0
        self.adapter = 0
        """Which of the engine's adapters answers; 0 is the base"""
        self.preempted = 0
        """How often its pages were taken away."""
        self.key, self.prompt_tokens = key, len(prompt)
        self.cached_tokens: int | None = None
        """Tokens of the prompt that were read from kept pages; None: the request did not begin yet."""
        self._standing: Node | None = None

    @property
    def pending(self) -> int:
        """Tokens that the model has not read: 1 while decoding, more while the prompt is read."""
        return len(self.ids) - self.pages.length

    def unread(self) -> Iterator[Token]:
        """Yield the tokens that no one has read yet."""
        while self.tokens:
            yield self.tokens.popleft()

    def resume(self, prefixes: Prefixes) -> None:
        """Begin with the longest kept prefix, and keep the places from which others can begin."""
        prefixes.resume(self.key, self.ids, self.pages)
        places = self._places()
        self.pages.passed = lambda before, after: self._keep(prefixes, places, before, after)

    def begun(self, prefixes: Prefixes | None) -> None:
        """Count, the first time, how many tokens of the prompt were read from kept pages."""
        if self.cached_tokens is None:
            self.cached_tokens = self.pages.length
            if prefixes is not None:
                prefixes.asked_tokens += self.prompt_tokens
                prefixes.found_tokens += self.cached_tokens

    def _places(self) -> set[int]:
        """Return after which blocks of the prompt others may begin: where turns end, where it ends, and between."""
        ends = {
            (at + 1) // PAGE_TOKENS for at, token in enumerate(self.ids[: self.prompt_tokens]) if token in self.stop_ids
        }
        return ends | {(self.prompt_tokens - 1) // PAGE_TOKENS}

    def _keep(self, prefixes: Prefixes, places: set[int], before: int, after: int) -> None:
        """Keep the prefixes that a step has completed."""
        for block in range(before // PAGE_TOKENS + 1, after // PAGE_TOKENS + 1):
            lasting = block in places or block % EVERY_BLOCKS == 0
            # In the answer: only the last place, since a next turn begins after the answer.
            if not lasting and block * PAGE_TOKENS < self.prompt_tokens:
                continue
            node = prefixes.keep(self.key, self.ids, self.pages, block, lasting=lasting)
            if self._standing is not None and self._standing is not node:
                prefixes.came_further(self._standing)
            self._standing = node

    def take(self, token: int, logprob: float, top: Top) -> None:
        """Add a token that was drawn."""
        self.ids.append(token)
        # Position and counts move here and nowhere else, so reading a request again draws nothing twice.
        self.draw.took(token)
        self.budget -= 1
        reason = "stop" if token in self.stop_ids else "length" if self.budget == 0 else None
        self.finished = reason is not None
        cached = self.cached_tokens or 0 if len(self.ids) == self.prompt_tokens + 1 else 0
        self.tokens.append(Token(token, logprob, top, reason, cached))


class Queue:
    """Decides who is in the next step. First come, first served; the youngest gives way when pages run out."""

    def __init__(self, pool: PagePool, max_batch: int, step_tokens: int, prefixes: Prefixes | None = None) -> None:
        self.pool, self.max_batch, self.step_tokens = pool, max_batch, step_tokens
        self.prefixes = prefixes
        self.preempted = 0
        """How often pages of running requests were taken away."""
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In order of admission"""

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        if not request.finished:
            self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request, finished or not; its pages are free for others."""
        request.finished = True
        request.pages.release()
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def next_step(self, only: Sequence[Request] | None = None) -> list[tuple[Request, int]]:
        """Return who takes part in the next step (`only` of these), with how many tokens; their pages are taken."""
        self._admit()
        # Decoding rows first: a long prompt must not make those who read an answer wait.
        order = sorted(self.running, key=lambda request: request.pending > 1)
        # The budget bounds how long one step takes, which is how long each reader waits for a token.
        left, parts = self.step_tokens, []
        for request in order if only is None else [r for r in order if r in only]:
            count = min(request.pending, left)
            if count and request in self.running and self._make_room(request, count):
                request.pages.extend(count)
                parts.append((request, count))
                left -= count
        # One that was taken into the step may have given way to an older one since.
        return [(request, count) for request, count in parts if request in self.running]

    def _admit(self) -> None:
        """Let requests in as long as the pages of their next piece are free."""
        promised = 0
        while self.waiting and len(self.running) < self.max_batch:
            # Only the first in line is looked at: letting a small request overtake could keep a large one out for ever.
            request = self.waiting[0]
            if self.prefixes is not None:
                request.resume(self.prefixes)
            promised += request.pages.missing(min(request.pending, self.step_tokens))
            # The first always enters: alone it fits, or it would have been refused.
            if self.running and not self.pool.has_room(promised):
                request.pages.release()  # kept pages must not be held by one that waits
                return
            self.running.append(self.waiting.popleft())
            request.begun(self.prefixes)

    def preempt_all(self) -> None:
        """Take all pages away; requests keep their order."""
        # The youngest first, each to the front: at the end they wait in the order in which they came.
        for request in reversed(self.running.copy()):
            self.preempt(request)

    def preempt(self, request: Request) -> None:
        """Take a request's pages away; it waits at the front, to be read again from its first token."""
        self.running.remove(request)
        request.pages.release()
        request.preempted += 1
        self.preempted += 1
        self.waiting.appendleft(request)

    def _make_room(self, request: Request, count: int) -> bool:
        """Free the pages a request needs by pre-empting younger ones; False when it is the youngest itself."""
        while not self.pool.has_room(request.pages.missing(count)):
            # The youngest has the least to compute again, and the oldest always moves on, so someone always finishes.
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is request:
                return False
        return True
