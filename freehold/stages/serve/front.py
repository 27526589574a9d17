"""Answers requests with one model: from OpenAI's words to ids, through the worker, and back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Sequence
from typing import Any, NamedTuple

from starlette.responses import Response, StreamingResponse

from freehold.guard.policy import Policy
from freehold.infer.engine import Scored
from freehold.infer.limits import ContextOverflow
from freehold.infer.sampler import Sampling
from freehold.stages.serve import answers, guards, responses
from freehold.stages.serve.answers import Choice, Echo, Head, TextLogprobs
from freehold.stages.serve.backends import Served
from freehold.stages.serve.config import ServeConfig
from freehold.stages.serve.errors import ApiError, as_api_error
from freehold.stages.serve.guards import Guards
from freehold.stages.serve.metrics import Metrics
from freehold.stages.serve.responses import ResponsesRequest
from freehold.stages.serve.schema import ChatRequest, CompletionRequest, Request
from freehold.stages.serve.structure import Structures
from freehold.stages.serve.worker import Worker
from freehold.tokenizer.chat import render, render_ids
from freehold.tokenizer.dialects import Piece
from freehold.tokenizer.output import TextStream

LOG = logging.getLogger("uvicorn.error")
INTERNAL = 500
DEFAULT_COMPLETION_TOKENS = 16
SCORE_TOKENS = 2048
"""Tokens of prompts scored in one turn: others wait no longer than that takes."""


Moves = AsyncGenerator[tuple[int, list[Piece]]]


class Asker(NamedTuple):
    """Who sent a request: whose turn it takes, and with whom it may share kept prompts."""

    tenant: str = ""
    salt: str = ""
    route: str = ""


class Front:
    """Answers requests with one model."""

    def __init__(self, served: Served, config: ServeConfig) -> None:
        self.served, self.config = served, config
        self.tokenizer, self.backend = served.tokenizer, served.backend
        self.worker = Worker(config.max_queue, served.running, served.threads, config.queue_timeout_s)
        self.guards = Guards(config.guard)
        self.metrics = Metrics(lambda: self.worker.waiting, self.backend.stats, self.guards.counts)
        self.structures = Structures(self.tokenizer, served.answers)
        self.started = int(time.time())

    def model(self) -> dict[str, Any]:
        """Return the entry of /v1/models."""
        sampling = self.served.sampling
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.started,
            "owned_by": "freehold",
            "max_model_len": self.backend.limit_tokens,
            "engine": self.backend.describe(),
            "default_sampling": {
                name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")
            },
        }  # fmt: skip

    def check_model(self, name: str) -> None:
        """Raise 404 for any other model; `NAME:ADAPTER` is the model with an adapter."""
        if name not in self.names():
            message = f"The model `{name}` does not exist; this server has `{self.served.name}`."
            raise ApiError(404, message, "model_not_found", param="model")

    def names(self) -> list[str]:
        """Return what clients may ask for: the model, and the model with each adapter."""
        return [self.served.name, *(f"{self.served.name}:{adapter}" for adapter in self.served.adapters)]

    def _default(self, name: str) -> Sampling:
        """Return how the model that a request names is sampled: with its adapter."""
        return dataclasses.replace(self.served.sampling, adapter=name.removeprefix(self.served.name).lstrip(":"))

    async def _converse(self, request: ChatRequest, asker: Asker) -> tuple[int, list[Choice], Moves]:
        """Start the answers to a conversation; return the tokens of its prompt, the answers, and their pieces."""
        self.check_model(request.model)
        request.check()
        tools = request.offered_tools
        messages = [message.plain(number) for number, message in enumerate(request.messages)]
        policy = self.guards.of(asker.route)
        guards.check_logprobs(policy, request.logprobs)
        choices = [
            Choice(self._text(request), self.served.answers.parser(tools), guards.answer_guard(policy))
            for _ in range(request.n or 1)
        ]
        blocked = await asyncio.to_thread(guards.judge_messages, policy, messages)
        if blocked:
            return 0, choices, guards.withheld(choices, policy.config.message)
        prompt = await asyncio.to_thread(self._render, messages, tools)
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        top = request.top_logprobs or 0
        numbers = range(len(choices))
        structure = await asyncio.to_thread(self.structures.of, request)
        default = dataclasses.replace(self._default(request.model), constrain=structure)
        settings = [request.sampling(default, choice=i, logprobs=top, max_tokens=limit) for i in numbers]
        work = self._answers([prompt] * len(settings), settings, (asker.salt, request.cache_salt))
        events: answers.Events = self.worker.run(work, asker.tenant)
        return len(prompt), choices, await self._started(events, choices, len(prompt))

    def _answers(self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling], key: Hashable) -> answers.Turns:
        """Yield what the model says, and None where others may have their turn."""
        with contextlib.closing(self.backend.turns(prompts, settings, key)) as turns:
            for turn in turns:
                yield from turn
                if not turn:
                    yield None

    async def chat(self, request: ChatRequest, asker: Asker) -> Response:
        """Answer `POST /v1/chat/completions`."""
        prompt_tokens, choices, moves = await self._converse(request, asker)
        if request.stream:
            return _stream(
                answers.chat_chunks(
                    Head.new("chatcmpl", request.model, "chat.completion.chunk"), moves, choices, self.tokenizer,
                    logprobs=bool(request.logprobs),
                    usage_of_prompt_tokens=prompt_tokens if request.usage_wanted else None,
                )
            )  # fmt: skip
        async for _ in moves:
            pass
        head = Head.new("chatcmpl", request.model, "chat.completion")
        return await _body(
            lambda: head.body(
                [answers.chat_choice(n, c, self.tokenizer, bool(request.logprobs)) for n, c in enumerate(choices)],
                usage=answers.usage(prompt_tokens, choices),
            )
        )

    async def respond(self, request: ResponsesRequest, asker: Asker) -> Response:
        """Answer `POST /v1/responses`."""
        prompt_tokens, (choice,), moves = await self._converse(request.as_chat(), asker)
        body = responses.Body(request)
        if request.stream:
            return _stream(responses.events(body, moves, choice, prompt_tokens), named=True)
        output = responses.Output()
        async for _, pieces in moves:
            for piece in pieces:
                list(output.feed(piece))
        list(output.close("incomplete" if choice.finish_reason in responses.CUT else "completed"))
        return await _body(lambda: body.ended(output, choice, prompt_tokens))

    async def complete(self, request: CompletionRequest, asker: Asker) -> Response:
        """Answer `POST /v1/completions`."""
        self.check_model(request.model)
        request.check()
        policy = self.guards.of(asker.route)
        guards.check_logprobs(policy, request.logprobs is not None)
        asked = await asyncio.to_thread(lambda: [self._judged(policy, prompt) for prompt in request.prompts])
        prompts = await asyncio.to_thread(lambda: [self._encode(prompt or "") for prompt in asked])
        prompt_tokens = sum(map(len, prompts))
        limit = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        top = request.logprobs or 0
        per_prompt = request.n or 1
        owners = [number for number in range(len(prompts)) for _ in range(per_prompt)]
        settings = len(prompts) * [
            request.sampling(self._default(request.model), choice=i, logprobs=top, max_tokens=limit)
            for i in range(per_prompt)
        ]
        choices = [Choice(self._text(request), None, guards.answer_guard(policy)) for _ in owners]
        scoring = bool(request.echo) and request.logprobs is not None

        def work() -> answers.Turns:
            if scoring:
                yield from self._scores(prompts, top, settings[0].adapter)
            yield from self._answers([prompts[number] for number in owners], settings, (asker.salt, request.cache_salt))

        events: answers.Events = self.worker.run(work(), asker.tenant)
        scored: list[Scored] = []
        while scoring and len(scored) < len(prompts):
            turn = await anext(events)
            assert isinstance(turn, list)
            scored += turn
        moves = await self._started(events, choices, prompt_tokens)
        echoes: list[Echo | None] = [None] * len(owners)
        if request.echo:
            texts = await asyncio.to_thread(lambda: [self._decode(ids) for ids in prompts])
            hidden = [len(self.served.begins_with) if isinstance(prompt, str) else 0 for prompt in request.prompts]
            echoes = [Echo(texts[i], prompts[i], scored[i] if scored else None, hidden[i]) for i in owners]
        logprobs = [
            TextLogprobs(self.tokenizer, top, 0 if echo is None or echo.scored else len(echo.text))
            if request.logprobs is not None else None
            for echo in echoes
        ]  # fmt: skip
        head = Head.new("cmpl", request.model, "text_completion")
        if request.stream:
            counted = prompt_tokens if request.usage_wanted else None
            return _stream(
                answers.text_chunks(
                    head, moves, choices, echoes, logprobs, usage_of_prompt_tokens=counted, per_prompt=per_prompt
                )
            )
        async for _ in moves:
            pass
        return await _body(
            lambda: head.body(
                [answers.text_choice(n, c, echoes[n], logprobs[n]) for n, c in enumerate(choices)],
                usage=answers.usage(prompt_tokens, choices, per_prompt),
            )
        )

    def _judged(self, policy: Policy, prompt: str | list[int]) -> str | list[int]:
        """Return a prompt as it may be used; RequestError when it may not."""
        text = prompt if isinstance(prompt, str) else self._decode(prompt)
        found = policy.judge(text, "prompt")
        if found.blocked:
            raise guards.Withheld(policy.config.message, where="prompt")
        return prompt if found.text == text else found.text

    def _scores(self, prompts: Sequence[Sequence[int]], top: int, adapter: str) -> answers.Turns:
        """Yield the scores of the prompts in order, about SCORE_TOKENS of them a turn."""
        batch: list[Sequence[int]] = []
        for number, prompt in enumerate(prompts):
            batch.append(prompt)
            if sum(map(len, batch)) >= SCORE_TOKENS or number + 1 == len(prompts):
                yield self.backend.score_top(batch, top, *([adapter] if adapter else []))
                batch = []

    def _text(self, request: Request) -> TextStream:
        return TextStream(self.tokenizer, request.stops)

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """Return a conversation as ids; slow when it is long, so not for the thread that listens."""
        self._check_length(render(messages, tools=tools, generation=True))
        return render_ids(self.tokenizer, messages, tools=tools, generation=True)[0]

    def _encode(self, prompt: str | list[int]) -> list[int]:
        """Return a prompt as ids; an empty one is the beginning of a document.

        Slow when it is long, so not for the thread that listens.
        """
        if isinstance(prompt, str):
            self._check_length(prompt)
            prompt = self.served.text_ids(prompt)
        return prompt or self.served.text_ids("")

    def _check_length(self, text: str) -> None:
        """Refuse what cannot fit the context however well it is encoded, and spare us encoding it."""
        size = len(text.encode(errors="replace"))
        if size > self.backend.limit_tokens * self.tokenizer.longest_token_bytes:
            raise ContextOverflow(
                "the prompt is longer than the context",
                where="prompt",
                found=f"{size} bytes",
                expected=f"at most {self.backend.limit_tokens} tokens",
            )

    def _decode(self, ids: list[int]) -> str:
        text = TextStream(self.tokenizer)
        return "".join(text.feed(i) for i in ids) + text.finish()

    async def _started(
        self, events: answers.Events, choices: list[Choice], prompt_tokens: int
    ) -> AsyncGenerator[tuple[int, list[Any]]]:
        """Wait for the first token, so that what cannot be answered is an error and not a stream; count tokens."""
        began = time.perf_counter()
        moves = answers.collect(events, choices)
        first = await anext(moves, None)
        self.metrics.first_token_s.observe(time.perf_counter() - began)
        self.metrics.prompt_tokens.inc(prompt_tokens)

        async def counted() -> AsyncGenerator[tuple[int, list[Any]]]:
            try:
                if first is not None:
                    yield first
                    async for move in moves:
                        yield move
            finally:
                await moves.aclose()
                self.metrics.generated_tokens.inc(sum(choice.completion_tokens for choice in choices))
                self.metrics.seconds.observe(time.perf_counter() - began)

        return counted()


def _stream(chunks: AsyncGenerator[dict[str, Any]], *, named: bool = False) -> Response:
    return StreamingResponse(
        server_sent(chunks, named=named), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def server_sent(chunks: AsyncGenerator[dict[str, Any]], *, named: bool) -> AsyncIterator[bytes]:
    """Return chunks as server-sent events; what ends a stream early is an event of its own.

    `named`: each event has its type as its name, as clients of /v1/responses want it; else `[DONE]` is the last.
    """

    def event(body: dict[str, Any]) -> bytes:
        name = f"event: {body['type']}\n".encode() if named else b""
        return name + b"data: " + answers.to_bytes(body) + b"\n\n"

    async with contextlib.aclosing(chunks):
        try:
            async for chunk in chunks:
                yield event(chunk)
        except Exception as error:
            known = as_api_error(error)
            if known.status_code == INTERNAL:
                LOG.error("a stream was cut", exc_info=error)
            yield event({"type": "error", **known.body["error"]} if named else known.body)
    if not named:
        yield b"data: [DONE]\n\n"


async def _body(make: Callable[[], Any]) -> Response:
    """Return a body of JSON; a long one takes a while to write, so not in the thread that listens."""
    return Response(await asyncio.to_thread(lambda: answers.to_bytes(make())), media_type="application/json")
