"""The HTTP application: routes, and what every request passes through before them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import pydantic
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware

from freehold.core.version import VERSION
from freehold.stages.serve.access import Access
from freehold.stages.serve.backends import Served
from freehold.stages.serve.config import ServeConfig
from freehold.stages.serve.errors import ApiError, Json, add_errors, explain
from freehold.stages.serve.front import Asker, Front
from freehold.stages.serve.limits import LimitBody, mute_repeats
from freehold.stages.serve.metrics import CountRequests
from freehold.stages.serve.page import PAGE_HEADERS, page_html
from freehold.stages.serve.responses import ResponsesRequest
from freehold.stages.serve.schema import ChatRequest, CompletionRequest, Request, read

CLIENT_GONE = 499
BODY_BYTES, BODY_BYTES_PER_TOKEN = 1 << 20, 64
"""The longest body: some bytes, and more for each token of the context (escaped JSON seldom has 20 for a token)."""
R = TypeVar("R", bound=Request)


def create_app(served: Served, config: ServeConfig, api_key: str | None = None) -> FastAPI:
    """Return the application; its worker thread ends with it. `app.state.front` is what answers."""
    front = Front(served, config)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(mute_repeats(logging.getLogger("uvicorn.error")))
        yield
        await asyncio.to_thread(front.worker.stop)

    # No pages of documentation: they load scripts from elsewhere, and answer without a key.
    app = FastAPI(
        title="Freehold", version=VERSION, lifespan=lifespan, default_response_class=Json,
        docs_url=None, redoc_url=None, openapi_url=None,
    )  # fmt: skip
    app.state.front = front
    app.add_middleware(LimitBody, limit_bytes=BODY_BYTES + BODY_BYTES_PER_TOKEN * served.backend.limit_tokens)
    app.add_middleware(Access, key=api_key, host=config.host)
    app.add_middleware(CountRequests, counter=front.metrics.requests)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    add_errors(app)
    _add_models(app, front)

    @app.post("/v1/chat/completions")
    async def chat(request: HttpRequest) -> Response:
        """Answer a conversation."""
        return await _unless_gone(request, front.chat(await _read(ChatRequest, request), _asker(request)))

    @app.post("/v1/completions")
    async def completions(request: HttpRequest) -> Response:
        """Continue texts."""
        return await _unless_gone(request, front.complete(await _read(CompletionRequest, request), _asker(request)))

    @app.post("/v1/responses")
    async def respond(request: HttpRequest) -> Response:
        """Answer a conversation, in OpenAI's newer form."""
        return await _unless_gone(request, front.respond(await _read(ResponsesRequest, request), _asker(request)))

    @app.api_route("/v1/embeddings", methods=["GET", "POST"])
    async def embeddings() -> Response:
        """Say why there are none."""
        message = "This model was trained to write, not to embed: its hidden states are no measure of likeness."
        raise ApiError(404, message, "embeddings_not_supported")

    @app.get("/")
    async def page() -> Response:
        """Show the page to talk to the model."""
        return Response(page_html(), media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, str]:
        """Say that the server is ready."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(generate_latest(front.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _add_models(app: FastAPI, front: Front) -> None:
    """Add the routes that describe the one model there is."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the model."""
        return {"object": "list", "data": [{**front.model(), "id": name} for name in front.names()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe the model."""
        front.check_model(name)
        return {**front.model(), "id": name}


def _asker(request: HttpRequest) -> Asker:
    return Asker(request.scope["tenant"], request.scope["salt"], request.scope["route"].path)


async def _read(kind: type[R], request: HttpRequest) -> R:
    """Return the request in a body; ApiError when it is not one."""
    body = await request.body()
    try:
        return await asyncio.to_thread(read, kind, body)
    except pydantic.ValidationError as error:
        raise explain(error) from None
    except ValueError:
        raise ApiError(400, "The body of the request is not JSON.", "invalid_json") from None


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
