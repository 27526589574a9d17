"""What answers: our engine on a checkpoint or an HF folder, or llama.cpp on a GGUF file; ids in, tokens out."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import queue
import secrets
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from freehold import api
from freehold.core.errors import ArtifactError, RequestError
from freehold.core.log import Log
from freehold.infer.engine import Scored, Token
from freehold.infer.limits import ContextOverflow
from freehold.infer.llama import Llama
from freehold.infer.sampler import Constraint, Sampling, check_ids
from freehold.stages.serve.config import ServeConfig
from freehold.stages.serve.remote import Vllm
from freehold.tokenizer.bpe import BOS, Tokenizer
from freehold.tokenizer.output import AnswerFormat, read_format

ALLOWED_BIAS = 1e4
"""Added to the logits of allowed tokens where few are: no other can come then."""
GGUF_SLOTS = 4
"""Requests that llama.cpp answers at the same time; each takes a thread of ours."""
REMOTE_RUNNING = 64
"""Requests that are sent to vLLM at the same time; it batches them."""
MOST_RUNNING = 64
"""Requests in one forward pass, where memory allows: more would make each wait longer than it gains."""


class Backend(Protocol):
    """What the server asks of whatever runs the model; `infer.Engine` has it by itself."""

    limit_tokens: int

    def describe(self) -> str:
        """Say in one line what computes, and whether answers are bit-invariant."""
        ...

    def turns(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling], key: Hashable = None
    ) -> Generator[Sequence[tuple[int, Token]]]:
        """Yield (number of the prompt, token) as tokens are made, also nothing; refuse a bad request before the first.

        key: only requests with the same one may share what is kept of their prompts.
        """
        ...

    def score_top(self, sequences: Sequence[Sequence[int]], top: int, adapter: str = "") -> list[Scored]:
        """Return the log-probability of each token given those before it."""
        ...

    def stats(self) -> dict[str, float]:
        """Return what /metrics shows: counters end with `_total`."""
        ...


@dataclass(frozen=True)
class Served:
    """A model ready to answer."""

    name: str
    backend: Backend
    tokenizer: Tokenizer
    sampling: Sampling
    """How it is sampled where a request does not say otherwise, and the tokens that end its answers."""
    answers: AnswerFormat = AnswerFormat()
    """How the model writes reasoning and tool calls."""
    running: int = 1
    """Requests that may take turns in one thread."""
    threads: int = 1
    begins_with: tuple[int, ...] = (BOS,)
    """The ids before a prompt that is plain text."""
    adapters: tuple[str, ...] = ()
    """Adapters that a request may name."""
    close: Callable[[], None] = lambda: None
    """Ends what does not end by itself."""

    def text_ids(self, text: str) -> list[int]:
        """Return a plain text as the ids the model is given: what begins a text, then the text; never empty."""
        return [*self.begins_with, *self.tokenizer.encode(text)] or [self.tokenizer.end_of_text]


def open_model(config: ServeConfig, path: Path) -> Served:
    """Open a checkpoint, run folder, HF folder or .gguf file; ArtifactError when it is none of these."""
    if config.backend == "vllm":
        return _open_vllm(config, path)
    if path.suffix == ".gguf":
        folder = _tokenizer_folder(config, path)
        tokenizer = Tokenizer.load(folder)
        slots = config.max_running or GGUF_SLOTS
        gguf = Gguf(path, tokenizer, config.max_model_len, slots)
        sampling, answers = api.default_sampling(folder, tokenizer), _format(config, read_format(folder))
        name = config.model_name or path.stem
        return Served(
            name, gguf, tokenizer, sampling, answers, threads=slots, begins_with=tokenizer.prefix, close=gguf.close
        )
    folder = api.find_model(path)
    loaded = api.load(
        folder, config.dtype, device=config.device, limit_tokens=config.max_model_len,
        max_batch=config.max_running or MOST_RUNNING, prefix_cache=config.prefix_cache, cache_type=config.cache_type,
        cache_bytes=None if config.cache_mib is None else config.cache_mib << 20,
        answers_only=not config.adapters, adapters=config.adapters,
    )  # fmt: skip
    running = config.max_running or min(MOST_RUNNING, loaded.engine.usual_requests())
    name, answers = config.model_name or folder.resolve().name, _format(config, loaded.answers)
    return Served(
        name, loaded.engine, loaded.tokenizer, loaded.sampling, answers, running, begins_with=loaded.begins_with,
        adapters=tuple(config.adapters),
    )  # fmt: skip


def _open_vllm(config: ServeConfig, path: Path) -> Served:
    """Open the server at the endpoint; `path` is the folder it serves, for tokenizer, template and defaults."""
    folder = api.find_model(path)
    tokenizer = Tokenizer.load(folder)
    remote = Vllm(config.endpoint, tokenizer.vocab_size, config.max_model_len, config.command)
    sampling, answers = api.default_sampling(folder, tokenizer), _format(config, read_format(folder))
    return Served(
        config.model_name or folder.resolve().name, remote, tokenizer, sampling, answers,
        threads=config.max_running or REMOTE_RUNNING, begins_with=api.text_beginning(folder, tokenizer),
        close=remote.close,
    )  # fmt: skip


def _format(config: ServeConfig, recorded: AnswerFormat) -> AnswerFormat:
    """Return the format of answers that is asked for; print when it is not the one the model was taught."""
    found = recorded
    if config.dialect != "auto":
        found = dataclasses.replace(found, dialect=config.dialect)
    if config.calls_in_reasoning is not None:
        found = dataclasses.replace(found, calls_in_reasoning=config.calls_in_reasoning)
    if found.dialect != recorded.dialect:
        Log().warn(f"tool calls are read as {found.dialect}; this model's chat template records {recorded.dialect}")
    return found


def _tokenizer_folder(config: ServeConfig, path: Path) -> Path:
    if config.tokenizer is not None:
        return config.tokenizer
    for folder in (path.parent, path.parent.parent / "hf"):
        if (folder / "tokenizer.json").exists():
            return folder
    raise ArtifactError(
        "no tokenizer next to the GGUF file",
        where=path,
        expected=f"tokenizer.json in {path.parent} or {path.parent.parent / 'hf'}",
        todo="name its folder: tokenizer=FOLDER",
    )


class Gguf:
    """A GGUF file run by llama.cpp in a process of its own, several requests at a time, each in a slot of its cache.

    Prompts of one request follow each other.

    llama.cpp is asked for one token at a time (its prompt cache makes that as fast as asking for all): only so
    does it report the id of every token, also of those that end a turn or are half a character. The latter come
    without log-probability.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, limit_tokens: int | None, slots: int = 1) -> None:
        self._free_slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free_slots.put(slot)
        self._vocab_size = tokenizer.vocab_size
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        self._llama = Llama(path, limit_tokens or 0, threads=threads, slots=slots)
        context_tokens = int(self._llama.ask("/props")["default_generation_settings"]["n_ctx"])
        self.limit_tokens = min(limit_tokens or context_tokens, context_tokens)

    def describe(self) -> str:
        """Say in one line what computes."""
        return "llama.cpp, not bit-invariant"

    def close(self) -> None:
        """End llama.cpp."""
        self._llama.close()

    def stats(self) -> dict[str, float]:
        """Return nothing: llama.cpp counts for itself."""
        return {}

    def turns(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling], key: Hashable = None
    ) -> Generator[Sequence[tuple[int, Token]]]:
        """Yield a token at a time; llama.cpp keeps one conversation, which `key` cannot share."""
        for pair in self.decode(prompts, settings):
            yield [pair]

    def decode(self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling]) -> Iterator[tuple[int, Token]]:
        """Yield (number of the prompt, token), one prompt after the other."""
        check_ids(settings, self._vocab_size)
        for prompt, sampling in zip(prompts, settings, strict=True):
            self._check(prompt, sampling)
        for number, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True)):
            for token in self._stream(prompt, sampling):
                yield number, token

    def score_top(self, sequences: Sequence[Sequence[int]], top: int, adapter: str = "") -> list[Scored]:
        """Refuse: llama.cpp's server does not report the log-probabilities of a prompt."""
        raise RequestError(
            "log-probabilities of the prompt are not available from a GGUF file",
            where="echo",
            todo="serve the checkpoint or the HF folder instead",
        )

    def _check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        if not prompt:
            raise RequestError("the prompt is empty", where="prompt", expected="at least one token")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise RequestError(
                "the prompt holds an id that is no token", where="prompt", expected=f"0 to {self._vocab_size - 1}"
            )
        if len(prompt) + (1 if sampling.max_tokens is None else sampling.max_tokens) > self.limit_tokens:
            raise ContextOverflow(
                "the prompt and the requested tokens do not fit the context",
                where="prompt",
                found=f"{len(prompt)} prompt tokens + {sampling.max_tokens or 'at least 1'} to generate",
                expected=f"at most {self.limit_tokens} tokens together",
            )

    def _stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        # A slot for all of an answer: llama.cpp finds its keys and values there again for each token.
        slot = self._free_slots.get()
        try:
            yield from self._answer(prompt, sampling, slot)
        finally:
            self._free_slots.put(slot)

    def _answer(self, prompt: Sequence[int], sampling: Sampling, slot: int) -> Iterator[Token]:
        ids = list(prompt)
        counts: Counter[int] = Counter()
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        constraint = sampling.constrain() if sampling.constrain else None
        budget = self.limit_tokens - len(ids) if sampling.max_tokens is None else sampling.max_tokens
        for left in range(budget - 1, -1, -1):
            body = self._body(ids, sampling, counts, seed) | {"id_slot": slot}
            if constraint is not None:
                body["logit_bias"] = self._only_allowed(constraint, body["logit_bias"])
            answer = self._llama.ask("/completion", body)
            token = int(answer["tokens"][0])
            if constraint is not None:
                constraint.took(token)
            ids.append(token)
            counts[token] += 1
            found = next(iter(answer.get("completion_probabilities") or ()), None)
            logprob = found["logprob"] if found else math.nan
            top = [(t["id"], t["logprob"]) for t in found["top_logprobs"][: sampling.logprobs]] if found else []
            ends = token in sampling.stop_ids or answer["stop_type"] == "eos"
            reason = "stop" if ends else None if left else "length"
            yield Token(token, logprob, top, reason)
            if reason:
                return

    def _only_allowed(self, constraint: Constraint, biases: list[Any]) -> list[Any]:
        """Return biases that leave only the tokens which may come next, in whichever form is shorter."""
        logits = torch.zeros(self._vocab_size)
        constraint.mask(logits)
        allowed = logits > -torch.inf
        own = {token: bias for token, bias in biases if allowed[token]}
        if int(allowed.sum()) * 2 > self._vocab_size:
            return [*map(list, own.items()), *([int(token), False] for token in (~allowed).nonzero().flatten())]
        # The same for all of them, so that it changes nothing between them.
        return [[int(token), ALLOWED_BIAS + own.get(int(token), 0.0)] for token in allowed.nonzero().flatten()]

    @staticmethod
    def _body(ids: list[int], sampling: Sampling, counts: Counter[int], seed: int) -> dict[str, Any]:
        # Penalties are given as biases: llama.cpp's own would count the prompt's tokens too.
        bias = dict(sampling.logit_bias)
        for token, count in counts.items() if sampling.penalises else ():
            penalty = sampling.presence_penalty + sampling.frequency_penalty * count
            bias[token] = bias.get(token, 0.0) - penalty
        return {
            "prompt": ids,
            "n_predict": 1,
            "return_tokens": True,
            "n_probs": max(1, sampling.logprobs),
            # Next to 0 llama.cpp overflows, and draws anything.
            "temperature": sampling.temperature if sampling.temperature > 1e-6 else 0.0,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repeat_last_n": 0,
            "logit_bias": [[token, value] for token, value in bias.items()],
            # Of the position alone, as our own draws: not of what was drawn before.
            "seed": int.from_bytes(hashlib.blake2b(f"{seed} {len(ids)}".encode(), digest_size=4).digest(), "little"),
            "cache_prompt": True,
        }
