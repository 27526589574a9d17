"""The engine: token ids in, token ids out, in batches, with exact log-probabilities; it knows no text.

Shapes: B rows, T tokens of one forward pass, M positions scored at once, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from freehold.core.errors import RequestError
from freehold.infer.cache import KVCache
from freehold.infer.sampler import Sampler, Sampling, check_ids
from freehold.model.afmoe import Afmoe

PREFILL_TOKENS = 2048
"""Tokens of one forward pass over prompts, all rows together: bounds activations and masks."""
HEAD_BYTES = 64 << 20
"""Size of one piece of float32 logits when sequences are scored."""

Top = list[tuple[int, float]]


class ContextOverflow(RequestError):
    """More tokens than the model was made for."""


@dataclass(frozen=True)
class Token:
    """One generated token; `finish_reason` is "stop" or "length" on the last one, else None.

    Log-probabilities are the model's own: before temperature, bias and penalties.
    """

    id: int
    logprob: float
    top_logprobs: Top = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Generation:
    """What was generated for one prompt; a stop id that ended it is the last of `ids`."""

    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Top] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass(frozen=True)
class Scored:
    """The log-probability of each token given those before it; the first has none and counts 0."""

    logprobs: list[float]
    top_logprobs: list[Top]
    """The most probable tokens at each position; empty at the first."""


class Engine:
    """Runs a model that someone else may be training: weights are read anew at every step, nothing is copied.

    Each call puts the model in eval mode. Results do not depend on how prompts are batched, up to the rounding
    of matrix products of another size.
    """

    def __init__(self, model: Afmoe, max_batch: int = 32, limit_tokens: int | None = None) -> None:
        self.model = model
        self.max_batch = max_batch
        self.limit_tokens = min(
            limit_tokens or model.config.max_position_embeddings, model.config.max_position_embeddings
        )
        self.vocab_size = model.config.vocab_size

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]) -> list[Generation]:
        """Continue each prompt (ids, not empty); prompts of similar length share a batch.

        RequestError names an empty prompt or an id outside the vocabulary, ContextOverflow the limit.
        """
        settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        results = [Generation(len(prompt)) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for place, token in self.decode([prompts[i] for i in order], [settings[i] for i in order]):
            result = results[order[place]]
            result.ids.append(token.id)
            result.logprobs.append(token.logprob)
            result.top_logprobs.append(token.top_logprobs)
            result.finish_reason = token.finish_reason or "length"
        return results

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        """Yield the tokens that continue one prompt, as they are made; closing the iterator stops the work."""
        for _, token in self.decode([prompt], [sampling]):
            yield token

    def decode(self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling]) -> Iterator[tuple[int, Token]]:
        """Yield (number of the prompt, token) as tokens are made, `max_batch` prompts at a time.

        A finished prompt leaves its batch at once. A prompt with `max_tokens=0` yields nothing. What cannot be
        answered is refused before the first token; closing the iterator stops the work.
        """
        budgets = self._budgets(prompts, settings)
        check_ids(settings, self.vocab_size)
        for first in range(0, len(prompts), self.max_batch):
            batch = slice(first, first + self.max_batch)
            for row, token in self._decode(prompts[batch], settings[batch], budgets[batch]):
                yield first + row, token

    def _decode(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling], budgets: list[int]
    ) -> Iterator[tuple[int, Token]]:
        """Decode one batch."""
        rows = [i for i, budget in enumerate(budgets) if budget > 0]
        if not rows:
            return
        self.model.eval()
        sampler = Sampler([settings[i] for i in rows], self.vocab_size)
        stops = [frozenset(s.stop_ids) for s in settings]
        cache = self._cache(len(rows), max(len(prompts[i]) + budgets[i] for i in rows))
        hidden = self._prefill([prompts[i] for i in rows], cache)
        while rows:
            ids, logprobs, tops = self._choose(hidden, sampler)
            finished = []
            for place, (number, token) in enumerate(zip(rows, ids, strict=True)):
                budgets[number] -= 1
                reason = "stop" if token in stops[number] else "length" if budgets[number] == 0 else None
                if reason:
                    finished.append(place)
                yield number, Token(token, logprobs[place], tops[place], reason)
            for place in reversed(finished):
                for items in (rows, ids):
                    items[place] = items[-1]
                    items.pop()
                cache.remove(place)
                sampler.remove(place)
            if rows:
                hidden = self._step(ids, cache)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the natural log-probability of each token given those before it; 0.0 for the first."""
        return [scored.logprobs for scored in self.score_top(sequences, 0)]

    def score_top(self, sequences: Sequence[Sequence[int]], top: int) -> list[Scored]:
        """Score sequences, and report the `top` most probable tokens at each position."""
        self._check(sequences)
        self.model.eval()
        results = [Scored([0.0], [[]]) for _ in sequences]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for start in range(0, len(order), self.max_batch):
            batch = order[start : start + self.max_batch]
            self._score([sequences[i] for i in batch], top, [results[i] for i in batch])
        return results

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        for ids in sequences:
            if not ids:
                raise RequestError("the prompt is empty", where="prompt", expected="at least one token")
            if min(ids) < 0 or max(ids) >= self.vocab_size:
                wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
                raise RequestError(
                    "the prompt holds an id that is no token",
                    where="prompt",
                    found=wrong,
                    expected=f"0 to {self.vocab_size - 1}",
                )
            if len(ids) > self.limit_tokens:
                raise ContextOverflow(
                    "the prompt is longer than the context",
                    where="prompt",
                    found=f"{len(ids)} tokens",
                    expected=f"at most {self.limit_tokens} tokens",
                )

    def _budgets(self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling]) -> list[int]:
        """Return how many tokens each prompt may get; refuse what does not fit the context."""
        self._check(prompts)
        budgets = []
        for prompt, s in zip(prompts, settings, strict=True):
            room = self.limit_tokens - len(prompt)
            if s.max_tokens is None and room == 0 or s.max_tokens is not None and s.max_tokens > room:
                raise ContextOverflow(
                    "the prompt and what is to be generated do not fit the context",
                    where="max_tokens" if s.max_tokens else "prompt",
                    found=f"{len(prompt)} prompt tokens + {s.max_tokens or 'at least 1'} to generate",
                    expected=f"at most {self.limit_tokens} tokens together",
                )
            budgets.append(room if s.max_tokens is None else s.max_tokens)
        return budgets

    def _cache(self, batch: int, max_tokens: int) -> KVCache:
        weight = self.model.lm_head.weight
        return KVCache(self.model.config, batch, max_tokens, weight.dtype, weight.device)

    @torch.inference_mode()
    def _pieces(self, sequences: Sequence[Sequence[int]], start: int, stop: int, cache: KVCache | None) -> Tensor:
        """Return hidden states [B,T,d] of the positions from `start` to `stop`; those of padding mean nothing."""
        device = self.model.lm_head.weight.device
        width = stop - start
        ids = torch.tensor([[*s[start:stop], *[0] * (width - len(s[start:stop]))] for s in sequences], device=device)
        positions = torch.arange(start, stop, device=device).expand(len(sequences), width)
        lengths = torch.tensor([len(s) for s in sequences], device=device)[:, None]
        mask = positions < lengths
        if cache is None:  # right padding: causal attention alone keeps it out
            return self.model.hidden(ids, token_mask=mask)
        return self.model.hidden(ids, positions=positions.masked_fill(~mask, -1), cache=cache, token_mask=mask)

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Read the prompts into the cache; return the hidden state of each one's last token [B,d]."""
        longest = max(map(len, prompts))
        step = max(1, PREFILL_TOKENS // len(prompts))
        last: list[Tensor] = [torch.empty(0)] * len(prompts)
        for start in range(0, longest, step):
            stop = min(start + step, longest)
            hidden = self._pieces(prompts, start, stop, cache)
            for row, prompt in enumerate(prompts):
                if start < len(prompt) <= stop:
                    last[row] = hidden[row, len(prompt) - 1 - start]
        return torch.stack(last)

    @torch.inference_mode()
    def _step(self, ids: list[int], cache: KVCache) -> Tensor:
        """Read one more token of each row; return its hidden state [B,d]."""
        new = torch.tensor(ids, device=cache.lengths.device)[:, None]
        return self.model.hidden(new, positions=cache.lengths[:, None], cache=cache)[:, -1]

    @torch.inference_mode()
    def _choose(self, hidden: Tensor, sampler: Sampler) -> tuple[list[int], list[float], list[Top]]:
        logits = self.model.lm_head(hidden).float()
        drawn = sampler.draw(logits)
        ids: list[int] = drawn.tolist()
        sampler.count(ids)
        wanted = [s.logprobs for s in sampler.settings]
        logprobs, tops = _logprobs(logits, drawn, max(wanted))
        return ids, logprobs, [top[:n] for top, n in zip(tops, wanted, strict=True)]

    @torch.inference_mode()
    def _score(self, sequences: Sequence[Sequence[int]], top: int, results: list[Scored]) -> None:
        """Append to `results` what each position of a batch says about its successor."""
        longest = max(map(len, sequences)) - 1  # the last token predicts nothing asked for
        step = max(1, PREFILL_TOKENS // len(sequences))
        cache = self._cache(len(sequences), longest) if longest > step else None
        head_tokens = max(1, HEAD_BYTES // (4 * self.vocab_size))
        for start in range(0, longest, step):
            stop = min(start + step, longest)
            hidden = self._pieces([s[:-1] for s in sequences], start, stop, cache)
            owners = [row for row, s in enumerate(sequences) for _ in s[start + 1 : stop + 1]]
            places = [t for s in sequences for t in range(len(s[start + 1 : stop + 1]))]
            targets = torch.tensor([i for s in sequences for i in s[start + 1 : stop + 1]], device=hidden.device)
            flat = hidden[owners, places]  # [M,d]
            for first in range(0, len(owners), head_tokens):
                piece = slice(first, first + head_tokens)
                logits = self.model.lm_head(flat[piece]).float()
                logprobs, tops = _logprobs(logits, targets[piece], top)
                for row, logprob, best in zip(owners[piece], logprobs, tops, strict=True):
                    results[row].logprobs.append(logprob)
                    results[row].top_logprobs.append(best)


def _logprobs(logits: Tensor, ids: Tensor, top: int) -> tuple[list[float], list[Top]]:
    """Return the log-probability of one id a row of float32 logits [B,V], and the `top` best with theirs."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    chosen = (logits.gather(1, ids[:, None]) - total)[:, 0].tolist()
    if not top:
        return chosen, [[] for _ in chosen]
    values, best = logits.topk(min(top, logits.shape[1]), dim=-1)
    values = values - total
    return chosen, [list(zip(i, v, strict=True)) for i, v in zip(best.tolist(), values.tolist(), strict=True)]
