"""From logits to the next token of each row: temperature, nucleus, penalties, one random stream a request.

A row's token depends on its own logits, settings and seed only, never on which rows share its batch.
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from freehold.core.errors import RequestError

MAX_TOP_LOGPROBS = 20
COLDEST = 2.0**-126
"""The smallest normal float32: a processor may take what is smaller for 0, and 0/0 is no logit."""
RANKED = 1024
"""Tokens ranked before a whole vocabulary is."""


class Constraint(Protocol):
    """What may come next in one generation."""

    def mask(self, logits: Tensor) -> None:
        """Set the logits [V] of tokens that may not come next to minus infinity, in place."""
        ...

    def took(self, token: int) -> None:
        """Take note of the token that came."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens, in OpenAI's words. RequestError names the parameter that is out of range."""

    temperature: float = 1.0
    """0 = always the most probable token."""
    top_p: float = 1.0
    """Choose among the most probable tokens that together have this probability."""
    top_k: int = 0
    """Choose among this many most probable tokens; 0 = all."""
    min_p: float = 0.0
    """Choose among tokens at least this probable relative to the most probable one."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token generated before."""
    frequency_penalty: float = 0.0
    """Taken from the logit of each token for every time it was generated before."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    max_tokens: int | None = None
    """Stop after this many tokens; None = when the context is full."""
    stop_ids: tuple[int, ...] = ()
    """Stop after one of these; it is the last token of the generation."""
    seed: int | None = None
    """The same seed gives the same tokens; None = another draw each time."""
    constrain: Callable[[], Constraint] | None = None
    """Makes what limits the tokens of one generation, which may depend on those before; None = nothing does."""
    logprobs: int = 0
    """Also report this many most probable tokens at each position."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 2)
        _check("top_p", self.top_p, 0, 1, above=True)
        _check("top_k", self.top_k, 0, 2**31 - 1)  # what llama.cpp can hold
        _check("min_p", self.min_p, 0, 1)
        _check("presence_penalty", self.presence_penalty, -2, 2)
        _check("frequency_penalty", self.frequency_penalty, -2, 2)
        _check("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, 0, math.inf)
        for bias in self.logit_bias.values():
            _check("logit_bias", bias, -100, 100)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature < COLDEST

    @property
    def filters(self) -> bool:
        """Whether tokens must be ranked before one is drawn."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        """Whether what was generated before matters."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def _check(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    if not (low < value <= high if above else low <= value <= high):
        bounds = f"{'above' if above else 'at least'} {low}" + (f", at most {high}" if high < math.inf else "")
        raise RequestError(f"{name} is out of range", where=name, found=value, expected=bounds)


def check_ids(settings: Sequence[Sampling], vocab_size: int) -> None:
    """Refuse a `logit_bias` for what is no token of this vocabulary."""
    for s in settings:
        beyond = [i for i in s.logit_bias if not 0 <= i < vocab_size]
        if beyond:
            raise RequestError(
                "logit_bias names no token", where="logit_bias", found=beyond[0], expected=f"0 to {vocab_size - 1}"
            )


class Sampler:
    """Draws the next token of each row of a batch; holds each row's random stream and its counts."""

    def __init__(self, settings: Sequence[Sampling], vocab_size: int) -> None:
        self.settings = list(settings)
        self._random = [random.Random(s.seed) if s.seed is not None else random.Random() for s in settings]
        self._counts = [torch.zeros(vocab_size) if s.penalises else None for s in settings]
        self._constraints = [s.constrain() if s.constrain else None for s in settings]
        self._prepare()

    def remove(self, row: int) -> None:
        """Forget a row; the last row takes its place."""
        for rows in (self.settings, self._random, self._counts, self._constraints):
            _replace_by_last(rows, row)
        self._prepare()

    def draw(self, logits: Tensor) -> Tensor:
        """Return one token id a row [B] from float32 logits [B,V]; the logits are not changed."""
        if self._adjusted:
            logits = self._adjust(logits)
        if self._greedy_all:
            return logits.argmax(dim=-1)
        # The largest becomes 0, so that a temperature next to 0 cannot overflow.
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / self._temperature.to(logits.device)
        if self._filtered:
            rows = torch.tensor(self._filtered, device=logits.device)
            # A row alone is filtered as in company: every step works row by row.
            scaled[rows] = _filter(scaled[rows], [self.settings[r] for r in self._filtered])
        cumulative = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        # 32 bits, so that a draw times the total stays below the total: never past the last possible token.
        draws = [0.0 if s.greedy else r.getrandbits(32) / 2**32 for r, s in self._pairs]
        points = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, points, right=True)[:, 0]
        if self._greedy:
            rows = torch.tensor(self._greedy, device=logits.device)
            drawn[rows] = logits[rows].argmax(dim=-1)
        return drawn

    def count(self, ids: Sequence[int]) -> None:
        """Take note of the token each row got."""
        for counts, token in zip(self._counts, ids, strict=True):
            if counts is not None:
                counts[token] += 1
        for constraint, token in zip(self._constraints, ids, strict=True):
            if constraint is not None:
                constraint.took(token)

    def _prepare(self) -> None:
        """Work out, once for a set of rows, which steps they need."""
        self._pairs = list(zip(self._random, self.settings, strict=True))
        self._greedy = [r for r, s in enumerate(self.settings) if s.greedy]
        self._greedy_all = len(self._greedy) == len(self.settings)
        self._filtered = [r for r, s in enumerate(self.settings) if s.filters]
        self._adjusted = [r for r, s in enumerate(self.settings) if s.penalises or s.logit_bias or s.constrain]
        self._temperature = torch.tensor([[1.0 if s.greedy else s.temperature] for s in self.settings])

    def _adjust(self, logits: Tensor) -> Tensor:
        logits = logits.clone()
        for row in self._adjusted:
            s, counts = self.settings[row], self._counts[row]
            if counts is not None:
                penalty = s.presence_penalty * (counts > 0) + s.frequency_penalty * counts
                logits[row] -= penalty.to(logits.device)
            if s.logit_bias:
                ids = torch.tensor(list(s.logit_bias), device=logits.device)
                logits[row, ids] += torch.tensor(list(s.logit_bias.values()), device=logits.device)
            constraint = self._constraints[row]
            if constraint is not None:
                constraint.mask(logits[row])
        return logits


def _replace_by_last(rows: list[Any], row: int) -> None:
    rows[row] = rows[-1]
    rows.pop()


def _filter(logits: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Return the logits [B,V] with those outside top-k, top-p and min-p at minus infinity.

    Top-k first, then the nucleus and min-p of what is left, as vLLM and transformers do. At least one stays.
    Sorting a vocabulary costs more than a decoding step of a small model, so only the best are ranked at first; a
    row whose choice reaches beyond them is ranked whole. Which way a row goes depends on that row alone.
    """
    filtered = torch.full_like(logits, -torch.inf)
    rows = torch.arange(len(settings), device=logits.device)
    for width in (RANKED, logits.shape[1]):
        if width > logits.shape[1] or not len(rows):
            continue
        left = [settings[r] for r in rows.tolist()]
        whole = width == logits.shape[1]
        found = logits[rows]
        ranked, order = found.sort(dim=-1, descending=True, stable=True) if whole else found.topk(width, dim=-1)
        rank = torch.arange(width, device=logits.device)
        top_k = torch.tensor([[s.top_k or logits.shape[1]] for s in left], device=logits.device)
        top_p = torch.tensor([[s.top_p] for s in left], dtype=torch.float64, device=logits.device)
        min_p = torch.tensor([[s.min_p] for s in left], device=logits.device)
        total = ranked.masked_fill(rank >= top_k, -torch.inf).logsumexp(dim=-1, keepdim=True)
        if not whole:
            total = torch.where(top_k <= width, total, found.logsumexp(dim=-1, keepdim=True))
        chances = (ranked - total).exp()
        before = chances.cumsum(dim=-1, dtype=torch.float64) - chances
        # top_p = 1 keeps everything, whatever the rounding of the sum.
        inside = (rank < top_k) & ((before < top_p) | (top_p == 1)) & (chances >= min_p * chances[:, :1])
        inside[:, 0] = True
        # Who is inside is always a beginning of the ranking: when its end is outside, no token beyond is inside.
        done = torch.ones_like(inside[:, 0]) if whole else ~inside[:, -1]
        chosen = torch.full_like(found, -torch.inf).scatter_(1, order, ranked.masked_fill(~inside, -torch.inf))
        filtered[rows[done]] = chosen[done]
        rows = rows[~done]
    return filtered
