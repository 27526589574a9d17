"""The HTTP front: OpenAI's routes, errors and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Generator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freehold.core.errors import RequestError
from freehold.core.version import VERSION
from freehold.infer.engine import ContextOverflow, Scored
from freehold.stages.serve import answers
from freehold.stages.serve.answers import Choice, Echo, Head, TextLogprobs
from freehold.stages.serve.backends import Served
from freehold.stages.serve.config import ServeConfig
from freehold.stages.serve.schema import ChatRequest, CompletionRequest, Request
from freehold.stages.serve.worker import Overloaded, Worker
from freehold.tokenizer.chat import render, render_ids
from freehold.tokenizer.output import AnswerParser, TextStream

DEFAULT_COMPLETION_TOKENS = 16
CLIENT_GONE = 499
BODY_BYTES, BODY_BYTES_PER_TOKEN = 1 << 20, 64
"""Longest body: so much, and so much for each token of the context (a token of escaped JSON seldom has 20 bytes)."""


class ApiError(HTTPException):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, code: str | None, *, param: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:  # fmt: skip
        super().__init__(status, message)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Metrics:
    """What /metrics tells; one registry a server."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "freehold_requests", "Requests answered", ["route", "status"], registry=self.registry
        )  # fmt: skip
        self.prompt_tokens = Counter("freehold_prompt_tokens", "Prompt tokens read", registry=self.registry)
        self.generated_tokens = Counter("freehold_generated_tokens", "Tokens generated", registry=self.registry)
        self.seconds = Histogram("freehold_request_seconds", "Seconds until the last byte", registry=self.registry)
        self.first_token_s = Histogram(
            "freehold_first_token_seconds", "Seconds until the first token", registry=self.registry
        )
        waiting = Gauge("freehold_waiting_requests", "Requests that have not begun", registry=self.registry)
        waiting.set_function(lambda: worker.waiting)


class Front:
    """Answers requests with one model."""

    def __init__(self, served: Served, config: ServeConfig) -> None:
        self.served, self.config = served, config
        self.tokenizer, self.backend = served.tokenizer, served.backend
        self.worker = Worker(config.max_queue, served.at_once)
        self.metrics = Metrics(self.worker)
        self.stop_ids = (self.tokenizer.eos, self.tokenizer.end_of_text)
        self.started = int(time.time())

    def model(self) -> dict[str, Any]:
        """Return the entry of /v1/models."""
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.started,
            "owned_by": "freehold",
            "max_model_len": self.backend.limit_tokens,
        }

    def check_model(self, name: str) -> None:
        """Raise 404 for any other model."""
        if name != self.served.name:
            message = f"The model `{name}` does not exist; this server has `{self.served.name}`."
            raise ApiError(404, message, "model_not_found", param="model")

    async def chat(self, request: ChatRequest) -> Response:
        """Answer `POST /v1/chat/completions`."""
        self.check_model(request.model)
        request.check()
        tools = request.offered_tools
        messages = [message.plain(number) for number, message in enumerate(request.messages)]
        prompt = await asyncio.to_thread(self._render, messages, tools)
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        top = request.top_logprobs or 0
        numbers = range(request.n or 1)
        settings = [request.sampling(self.stop_ids, choice=i, logprobs=top, max_tokens=limit) for i in numbers]
        choices = [Choice(self._text(request), AnswerParser(tools=bool(tools))) for _ in numbers]

        def work() -> Generator[answers.Event]:
            yield from self.backend.decode([prompt] * len(settings), settings)

        events = self.worker.run(work())
        moves = await self._started(events, choices, len(prompt))
        if request.stream:
            chunks = answers.chat_chunks(
                Head.new("chatcmpl", self.served.name, "chat.completion.chunk"), moves, choices, self.tokenizer,
                logprobs=bool(request.logprobs), usage_of_prompt_tokens=len(prompt) if request.usage_wanted else None,
            )  # fmt: skip
            return _stream(chunks)
        async for _ in moves:
            pass
        bodies = [
            {
                "index": number,
                "message": answers.chat_message(choice.said),
                "logprobs": answers.chat_logprobs(choice.tokens, self.tokenizer) if request.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for number, choice in enumerate(choices)
        ]
        head = Head.new("chatcmpl", self.served.name, "chat.completion")
        return Json(head.body(bodies, usage=answers.usage(len(prompt), choices)))

    async def complete(self, request: CompletionRequest) -> Response:
        """Answer `POST /v1/completions`."""
        self.check_model(request.model)
        request.check()
        prompts = await asyncio.to_thread(lambda: [self._encode(prompt) for prompt in request.prompts])
        prompt_tokens = sum(map(len, prompts))
        limit = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        top = request.logprobs or 0
        per_prompt = request.n or 1
        owners = [number for number in range(len(prompts)) for _ in range(per_prompt)]
        settings = len(prompts) * [
            request.sampling(self.stop_ids, choice=i, logprobs=top, max_tokens=limit) for i in range(per_prompt)
        ]
        choices = [Choice(self._text(request), None) for _ in owners]
        scoring = bool(request.echo) and request.logprobs is not None

        def work() -> Generator[answers.Event]:
            if scoring:
                yield self.backend.score_top(prompts, top)
            yield from self.backend.decode([prompts[number] for number in owners], settings)

        events = self.worker.run(work())
        scored: list[Scored] | None = None
        if scoring:
            first = await anext(events)
            assert isinstance(first, list)
            scored = first
        moves = await self._started(events, choices, prompt_tokens)
        echoes: list[Echo | None] = [None] * len(owners)
        if request.echo:
            told = await asyncio.to_thread(lambda: [self._decode(ids) for ids in prompts])
            hidden = [len(self.served.begins_with) if isinstance(prompt, str) else 0 for prompt in request.prompts]
            echoes = [Echo(told[i], prompts[i], scored[i] if scored else None, hidden[i]) for i in owners]
        logprobs = [
            TextLogprobs(self.tokenizer, top, 0 if echo is None or echo.scored else len(echo.text))
            if request.logprobs is not None else None
            for echo in echoes
        ]  # fmt: skip
        head = Head.new("cmpl", self.served.name, "text_completion")
        if request.stream:
            counted = prompt_tokens if request.usage_wanted else None
            return _stream(answers.text_chunks(head, moves, choices, echoes, logprobs, usage_of_prompt_tokens=counted))
        async for _ in moves:
            pass
        bodies = [
            answers.text_choice(number, choice, echoes[number], logprobs[number])
            for number, choice in enumerate(choices)
        ]
        return Json(head.body(bodies, usage=answers.usage(prompt_tokens, choices)))

    def _text(self, request: Request) -> TextStream:
        return TextStream(self.tokenizer, request.stops)

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """Return a conversation as ids; slow when it is long, so not for the thread that listens."""
        self._check_length(render(messages, tools=tools, generation=True))
        return render_ids(self.tokenizer, messages, tools=tools, generation=True)[0]

    def _encode(self, prompt: str | list[int]) -> list[int]:
        """Return a prompt as ids; slow when it is long, so not for the thread that listens."""
        if not isinstance(prompt, str):
            return prompt
        self._check_length(prompt)
        return [*self.served.begins_with, *self.tokenizer.encode(prompt)] or [self.tokenizer.end_of_text]

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
    ) -> AsyncIterator[tuple[int, list[Any]]]:
        """Wait for the first token, so that what cannot be answered is an error and not a stream; count tokens."""
        began = time.perf_counter()
        moves = answers.collect(events, choices)
        first = await anext(moves, None)
        self.metrics.first_token_s.observe(time.perf_counter() - began)
        self.metrics.prompt_tokens.inc(prompt_tokens)

        async def counted() -> AsyncIterator[tuple[int, list[Any]]]:
            try:
                if first is not None:
                    yield first
                    async for move in moves:
                        yield move
            finally:
                await moves.aclose()  # type: ignore[attr-defined]
                self.metrics.generated_tokens.inc(sum(choice.completion_tokens for choice in choices))
                self.metrics.seconds.observe(time.perf_counter() - began)

        return counted()


class CountRequests:
    """Counts answers by route and status, without touching what flows."""

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self.app, self.counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = "500"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self.counter.labels(getattr(scope.get("route"), "path", "other"), status).inc()


class LimitBody:
    """Refuses long bodies before they are read: parsing one keeps all others waiting."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self.app, self.limit_bytes = app, limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        read_bytes = 0

        async def counting() -> Message:
            nonlocal read_bytes
            message = await receive()
            read_bytes += len(message.get("body", b""))
            if read_bytes > self.limit_bytes:
                told = (
                    f"The body of the request is longer than {self.limit_bytes} bytes; no such prompt fits the context."
                )
                raise ApiError(413, told, "request_too_large")
            return message

        await self.app(scope, counting, send)


class Json(JSONResponse):
    """A body of JSON."""

    def render(self, content: Any) -> bytes:
        """Return its bytes."""
        return answers.to_bytes(content)


def create_app(served: Served, config: ServeConfig, api_key: str | None = None) -> FastAPI:
    """Return the application; its worker thread ends with it."""
    front = Front(served, config)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(front.worker.stop)

    app = FastAPI(title="Freehold", version=VERSION, lifespan=lifespan, default_response_class=Json)
    app.add_middleware(LimitBody, limit_bytes=BODY_BYTES + BODY_BYTES_PER_TOKEN * served.backend.limit_tokens)
    app.add_middleware(CountRequests, counter=front.metrics.requests)
    _add_errors(app)

    def authorised(authorization: Annotated[str | None, Header()] = None) -> None:
        given = (authorization or "").removeprefix("Bearer ").encode()
        if api_key and not secrets.compare_digest(given, api_key.encode()):
            raise ApiError(401, "Incorrect API key provided.", "invalid_api_key", kind="authentication_error")

    locked = [Depends(authorised)]

    @app.post("/v1/chat/completions", dependencies=locked)
    async def chat(body: ChatRequest, request: HttpRequest) -> Response:
        """Answer a conversation."""
        return await _unless_gone(request, front.chat(body))

    @app.post("/v1/completions", dependencies=locked)
    async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
        """Continue texts."""
        return await _unless_gone(request, front.complete(body))

    @app.get("/v1/models", dependencies=locked)
    async def models() -> dict[str, Any]:
        """List the one model there is."""
        return {"object": "list", "data": [front.model()]}

    @app.get("/v1/models/{name:path}", dependencies=locked)
    async def model(name: str) -> dict[str, Any]:
        """Describe the model."""
        front.check_model(name)
        return front.model()

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server is ready."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(generate_latest(front.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _stream(chunks: AsyncIterator[dict[str, Any]]) -> Response:
    return StreamingResponse(
        answers.server_sent(chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _unless_gone(request: HttpRequest, work: Coroutine[Any, Any, Response]) -> Response:
    """Do the work, but stop it when the client leaves before the answer begins."""
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({task}, timeout=0.25))[0]:
            if await request.is_disconnected():
                return Response(status_code=CLIENT_GONE)
        return task.result()
    finally:
        task.cancel()


def _add_errors(app: FastAPI) -> None:
    """Give every error OpenAI's form and the right status."""

    @app.exception_handler(ApiError)
    async def api_error(request: HttpRequest, error: ApiError) -> Response:
        return Json(error.body, error.status_code)

    @app.exception_handler(RequestError)
    async def refused(request: HttpRequest, error: RequestError) -> Response:
        message = "; ".join(
            f"{label}{text}"
            for label, text in (("", error.what), ("found ", error.found), ("expected ", error.expected))
            if text is not None
        )
        param = None if error.where is None else str(error.where)
        if isinstance(error, Overloaded):
            told = ApiError(429, message, "queue_full", kind="rate_limit_error")
            return Json(told.body, told.status_code, headers={"Retry-After": "1"})
        code = "context_length_exceeded" if isinstance(error, ContextOverflow) else "invalid_value"
        return Json(ApiError(400, message, code, param=param).body, 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: HttpRequest, error: RequestValidationError) -> Response:
        return Json(_explain(error.errors()[0]).body, 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: HttpRequest, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return Json(ApiError(error.status_code, message, None).body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(request: HttpRequest, error: Exception) -> Response:
        told = ApiError(500, "The server had an error; its log says more.", None, kind="server_error")
        return Json(told.body, 500)


def _explain(problem: dict[str, Any]) -> ApiError:
    """Turn pydantic's first complaint into an error that names the parameter."""
    place = [str(part) for part in problem["loc"] if part != "body"]
    param = place[0] if place else None
    if problem["type"] == "json_invalid":
        return ApiError(400, "The body of the request is not JSON.", "invalid_json")
    if problem["type"] == "extra_forbidden":
        name = ".".join(place)
        return ApiError(400, f"Unrecognized request argument supplied: {name}", "unknown_parameter", param=name)
    if problem["type"] == "missing":
        name = ".".join(place) or "body"
        return ApiError(400, f"Missing required parameter: '{name}'.", "missing_required_parameter", param=name)
    return ApiError(
        400, f"Invalid value for '{'.'.join(place) or 'body'}': {problem['msg']}", "invalid_type", param=param
    )
