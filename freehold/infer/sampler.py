"""From logits to the next token of each row: temperature, nucleus, penalties, one random number a position.

A row's token depends on its own logits, settings, seed and position only, never on which rows share its batch.
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from freehold.core.errors import RequestError
from freehold.losses.logprob import log_partition

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
    adapter: str = ""
    """The adapter that answers, by its name in the engine; empty = the base."""

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


class Draw:
    """What one request needs to draw its next token: its settings, the position, and what it generated so far.

    The random number of a position depends on seed and position alone, so a request that is read again, or in other
    company, draws the same tokens.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, position: int = 0) -> None:
        self.sampling, self.position = sampling, position
        # One seed for the whole generation: without one it is drawn here, so even then each draw depends on the
        # position.
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        # A vocabulary of floats for each request that needs it, and for no other.
        self.counts = torch.zeros(vocab_size) if sampling.penalises else None
        self.constraint = sampling.constrain() if sampling.constrain else None

    def took(self, token: int) -> None:
        """Take note of the token that the request got."""
        self.position += 1
        if self.counts is not None:
            self.counts[token] += 1
        if self.constraint is not None:
            self.constraint.took(token)

    def point(self) -> float:
        """Return the random number of this position, in [0, 1)."""
        if self.sampling.greedy:
            return 0.0
        # A hash of seed and position, not a generator's state: batch, cuts and pre-emption cannot move the draws.
        digest = hashlib.blake2b(f"{self.seed} {self.position}".encode(), digest_size=4).digest()
        # 32 bits, so that a draw times the total stays below the total: never past the last possible token.
        return int.from_bytes(digest, "little") / 2**32

    def adjust(self, logits: Tensor) -> None:
        """Apply penalties, bias and constraint to the logits [V] in place."""
        s = self.sampling
        if self.counts is not None:
            # OpenAI's formula: subtracted from logits, once for having occurred and once for each time.
            penalty = s.presence_penalty * (self.counts > 0) + s.frequency_penalty * self.counts
            logits -= penalty.to(logits.device)
        if s.logit_bias:
            ids = torch.tensor(list(s.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(s.logit_bias.values()), device=logits.device)
        if self.constraint is not None:
            self.constraint.mask(logits)


def draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return one token id a row, int64 [B], from float32 logits [B, V]; the logits are not changed.

    Every step works row by row: a row alone draws what it draws in company.
    """
    settings = [d.sampling for d in draws]
    if any(s.penalises or s.logit_bias or s.constrain for s in settings):
        logits = logits.clone()
        for row, one in enumerate(draws):
            one.adjust(logits[row])
    # argmax takes the lowest id of equal logits, on every device.
    best = logits.argmax(dim=-1)  # [B]
    if all(s.greedy for s in settings):
        return best
    temperature = torch.tensor([[1.0 if s.greedy else s.temperature] for s in settings], device=logits.device)
    # The largest becomes 0, so that a temperature next to 0 cannot overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    filtered = [row for row, s in enumerate(settings) if s.filters]
    if filtered:
        rows = torch.tensor(filtered, device=logits.device)
        scaled[rows] = _filter(scaled[rows], [settings[r] for r in filtered])
    # float64: in float32 the rounding of a long sum would be larger than a rare token's share.
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    points = torch.tensor([d.point() for d in draws], dtype=torch.float64, device=logits.device)[:, None]
    # Inverse transform sampling: times the total, because the sum of rounded probabilities is not exactly 1.
    drawn = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)[:, 0]
    greedy = torch.tensor([s.greedy for s in settings], device=logits.device)
    # Greedy and sampling requests share a batch; each row takes its own.
    return torch.where(greedy, best, drawn)


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
        total = log_partition(ranked.masked_fill(rank >= top_k, -torch.inf))[:, None]
        if not whole:
            total = torch.where(top_k <= width, total, log_partition(found)[:, None])
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
