"""Requests that share an engine: admitted by pages, decoded together, pre-empted and read again when pages run out.

One step takes a token of every request that decodes, then pieces of the prompts that wait, up to a number of tokens.
A request's answer depends on none of this where the kernels compute (docs/speed.md), so no user sees it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

from freehold.infer.pages import PagePool, Pages
from freehold.infer.sampler import Draw, Sampling

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


class Request:
    """One prompt and what was generated for it; `tokens` holds what no one has read yet."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, budget: int, pool: PagePool, vocab_size: int) -> None:
        self.ids = list(prompt)
        self.sampling, self.budget = sampling, budget
        self.draw = Draw(sampling, vocab_size, len(prompt))
        self.stop_ids = frozenset(sampling.stop_ids)
        self.pages = Pages(pool)
        self.tokens: deque[Token] = deque()
        self.finished = budget == 0
        self.preempted = 0
        """How often its pages were taken away."""

    @property
    def pending(self) -> int:
        """Tokens that the model has not read: 1 while decoding, more while the prompt is read."""
        return len(self.ids) - self.pages.length

    def take(self, token: int, logprob: float, top: Top) -> None:
        """Add a token that was drawn."""
        self.ids.append(token)
        self.draw.took(token)
        self.budget -= 1
        reason = "stop" if token in self.stop_ids else "length" if self.budget == 0 else None
        self.finished = reason is not None
        self.tokens.append(Token(token, logprob, top, reason))


class Queue:
    """Decides who is in the next step. First come, first served; the youngest gives way when pages run out."""

    def __init__(self, pool: PagePool, max_batch: int, step_tokens: int) -> None:
        self.pool, self.max_batch, self.step_tokens = pool, max_batch, step_tokens
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
            request = self.waiting[0]
            promised += request.pages.missing(min(request.pending, self.step_tokens))
            # The first always enters: alone it fits, or it would have been refused.
            if self.running and promised > self.pool.free:
                return
            self.running.append(self.waiting.popleft())

    def preempt_all(self) -> None:
        """Take all pages away; requests keep their order."""
        for request in reversed(self.running.copy()):
            self.preempt(request)

    def preempt(self, request: Request) -> None:
        """Take a request's pages away; it waits at the front, to be read again from its first token."""
        self.running.remove(request)
        request.pages.release()
        request.preempted += 1
        self.waiting.appendleft(request)

    def _make_room(self, request: Request, count: int) -> bool:
        """Free the pages a request needs by pre-empting younger ones; False when it is the youngest itself."""
        while request.pages.missing(count) > self.pool.free:
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is request:
                return False
        return True
