"""vLLM behind our front: its completions endpoint with token ids, so template, parsers and guardrails are ours.

The endpoint is OpenAI's `/v1/completions` with vLLM's fields for ids (`return_token_ids`, `stop_token_ids`,
`prompt_logprobs`). Structure by our masks is not available there, and answers are not bit-invariant.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import shlex
import subprocess
import time
import urllib.parse
from collections.abc import Generator, Hashable, Iterator, Sequence
from typing import Any

from freehold.core.errors import ConfigError, FreeholdError, RequestError
from freehold.infer.engine import Scored, Token, Top
from freehold.infer.limits import ContextOverflow
from freehold.infer.sampler import Sampling, check_ids

TIMEOUT_S = 600.0
START_S = 900.0
"""How long a command may take until its server answers: large weights are read from disk."""
MOST_LINE_BYTES = 16 << 20


class RemoteError(FreeholdError):
    """The server behind the endpoint does not answer, or says what is not the protocol."""


class Vllm:
    """A vLLM server at an endpoint (`http://host:port/v1`), or one that a command starts and `close` ends."""

    def __init__(self, endpoint: str, vocab_size: int, limit_tokens: int | None, command: str | None = None) -> None:
        self._place = urllib.parse.urlsplit(endpoint)
        if self._place.scheme not in ("http", "https") or not self._place.hostname:
            raise ConfigError("not an endpoint", where="serve.endpoint", found=endpoint, expected="http://HOST:PORT/v1")
        self._vocab_size = vocab_size
        self._process = subprocess.Popen(shlex.split(command), start_new_session=True) if command else None
        try:
            facts = self._wait_for_models()
            self._model, known = str(facts["id"]), facts.get("max_model_len")
        except BaseException:
            self.close()
            raise
        if known is None and limit_tokens is None:
            raise ConfigError("the endpoint does not say its context", where="serve.max_model_len", expected="a number")
        self.limit_tokens = min(n for n in (known, limit_tokens) if n is not None)

    def describe(self) -> str:
        """Say in one line what computes."""
        return f"vLLM at {self._place.geturl()} ({self._model}), not bit-invariant"

    def stats(self) -> dict[str, float]:
        """Return nothing: vLLM has metrics of its own."""
        return {}

    def close(self) -> None:
        """End the server if it is ours."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def turns(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling], key: Hashable = None
    ) -> Generator[Sequence[tuple[int, Token]]]:
        """Yield tokens as they come; all prompts are asked at the same time, and read in turn."""
        check_ids(settings, self._vocab_size)
        for prompt, sampling in zip(prompts, settings, strict=True):
            self._check(prompt, sampling)
        with contextlib.ExitStack() as stack:
            streams: dict[int, Generator[list[Token]]] = {}
            for number, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True)):
                if sampling.max_tokens != 0:
                    streams[number] = stack.enter_context(contextlib.closing(self._stream(prompt, sampling, key)))
            while streams:
                for number in list(streams):
                    tokens = next(streams[number], None)
                    if tokens is None:
                        del streams[number]
                    else:
                        yield [(number, token) for token in tokens]

    def score_top(self, sequences: Sequence[Sequence[int]], top: int, adapter: str = "") -> list[Scored]:
        """Return the log-probability of each token given those before it, as vLLM computes it."""
        return [self._score(ids, top) for ids in sequences]

    def _score(self, ids: Sequence[int], top: int) -> Scored:
        self._check(ids, Sampling(max_tokens=0))
        body = {"model": self._model, "prompt": list(ids), "max_tokens": 1, "prompt_logprobs": top}
        with self._ask("/completions", body) as answer:
            found = _json(answer.read(MOST_LINE_BYTES))["choices"][0]["prompt_logprobs"]
        logprobs, tops = [0.0], [[]]  # type: tuple[list[float], list[Top]]
        for token, entry in zip(ids[1:], found[1:], strict=True):
            values = {int(i): float(each["logprob"]) for i, each in entry.items()}
            logprobs.append(values[token])
            tops.append(sorted(values.items(), key=lambda pair: -pair[1])[:top])
        return Scored(logprobs, tops)

    def _check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        if sampling.constrain is not None:
            raise RequestError(
                "answers of a given structure are not available through this endpoint",
                where="response_format",
                todo="serve the checkpoint or the HF folder with our engine instead",
            )
        if not prompt or min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise RequestError("the prompt is empty or holds an id that is no token", where="prompt")
        if len(prompt) + (1 if sampling.max_tokens is None else sampling.max_tokens) > self.limit_tokens:
            raise ContextOverflow(
                "the prompt and the requested tokens do not fit the context",
                where="prompt",
                found=f"{len(prompt)} prompt tokens + {sampling.max_tokens or 'at least 1'} to generate",
                expected=f"at most {self.limit_tokens} tokens together",
            )

    def _stream(self, prompt: Sequence[int], sampling: Sampling, key: Hashable) -> Generator[list[Token]]:
        """Yield the tokens of one answer, some at a time."""
        with self._ask("/completions", self._body(prompt, sampling, key)) as answer:
            yield []  # asked: the next prompt can be asked too, before this one is read
            ended = False
            for event in _events(answer):
                for choice in event.get("choices") or ():
                    tokens = read_tokens(choice, sampling)
                    ended = ended or choice.get("finish_reason") is not None
                    if tokens:
                        yield tokens
            if not ended:
                raise RemoteError("the answer of vLLM broke off", where=self._place.geturl())

    def _body(self, prompt: Sequence[int], sampling: Sampling, key: Hashable) -> dict[str, Any]:
        most = self.limit_tokens - len(prompt) if sampling.max_tokens is None else sampling.max_tokens
        salt = "" if key is None else repr(key)
        return {
            "model": self._model, "prompt": list(prompt), "stream": True, "max_tokens": most,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p, "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty, "seed": sampling.seed, "logprobs": sampling.logprobs,
            "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()},
            # Our parser reads tags, and ends turns itself: ids with all special tokens.
            "stop_token_ids": list(sampling.stop_ids), "skip_special_tokens": False, "add_special_tokens": False,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        } | ({"cache_salt": salt} if salt else {})  # fmt: skip

    def _wait_for_models(self) -> dict[str, Any]:
        """Return the first model of the endpoint; one that a command starts may take its time."""
        deadline = time.monotonic() + (START_S if self._process is not None else 0)
        while True:
            try:
                with self._ask("/models") as answer:
                    found: dict[str, Any] = _json(answer.read(MOST_LINE_BYTES))["data"][0]
                    return found
            except (RemoteError, LookupError, TypeError) as error:
                if self._process is not None and self._process.poll() is not None:
                    raise RemoteError(
                        "the command that starts vLLM ended", where="serve.command", found=self._process.returncode
                    ) from error
                if time.monotonic() >= deadline:
                    raise error if isinstance(error, RemoteError) else RemoteError(
                        "the endpoint names no model", where=self._place.geturl()
                    ) from error  # fmt: skip
                time.sleep(0.5)

    @contextlib.contextmanager
    def _ask(self, route: str, body: dict[str, Any] | None = None) -> Iterator[http.client.HTTPResponse]:
        """Send one request; RequestError when vLLM refuses it, RemoteError when there is no vLLM."""
        kind = http.client.HTTPSConnection if self._place.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._place.hostname or "", self._place.port, timeout=TIMEOUT_S)
        try:
            data = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", self._place.path.rstrip("/") + route, data, headers)
            answer = connection.getresponse()
            if answer.status in (400, 404, 413, 422):
                said = answer.read(2000).decode(errors="replace")
                raise RequestError("vLLM refuses the request", found=said[:300])
            if answer.status != http.HTTPStatus.OK:
                raise RemoteError("vLLM answers with an error", where=self._place.geturl(), found=answer.status)
            yield answer
        except (OSError, http.client.HTTPException) as error:
            raise RemoteError("vLLM does not answer", where=self._place.geturl(), found=error) from error
        finally:
            connection.close()


def _events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the server-sent events of an answer up to `[DONE]`."""
    while line := answer.readline(MOST_LINE_BYTES):
        text = line.strip()
        if text == b"data: [DONE]":
            return
        if text.startswith(b"data:"):
            event = _json(text[5:])
            if "error" in event:
                raise RemoteError("vLLM ends the answer with an error", found=str(event["error"])[:300])
            yield event


def read_tokens(choice: dict[str, Any], sampling: Sampling) -> list[Token]:
    """Return the tokens of one event, with their log-probabilities where there are some."""
    ids, block = choice.get("token_ids") or [], choice.get("logprobs") or {}
    chances = block.get("token_logprobs") or [math.nan] * len(ids)
    tops = block.get("top_logprobs") or [None] * len(ids)
    reason = choice.get("finish_reason")
    reason = None if reason is None else "stop" if reason == "stop" else "length"
    tokens = [Token(int(i), float(p), _top(t, sampling.logprobs)) for i, p, t in zip(ids, chances, tops, strict=True)]
    if reason == "stop" and (not tokens or tokens[-1].id not in sampling.stop_ids):
        # Where the token that ends a turn is not part of the answer, it is put back: the front expects it.
        tokens.append(Token(next(iter(sampling.stop_ids), 0), math.nan))
    if reason == "length" and not tokens:
        raise RemoteError("vLLM ends an answer without its last token", expected="token_ids: vLLM 0.11 or newer")
    if reason is not None:
        last = tokens[-1]
        tokens[-1] = Token(last.id, last.logprob, last.top_logprobs, reason)
    return tokens


def _top(entry: dict[str, float] | None, most: int) -> Top:
    pairs = [(int(name.removeprefix("token_id:")), float(p)) for name, p in (entry or {}).items()]
    return sorted(pairs, key=lambda pair: -pair[1])[:most]


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RemoteError("vLLM says what is not JSON", found=data[:100]) from error
