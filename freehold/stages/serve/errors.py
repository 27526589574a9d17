"""Errors in OpenAI's form, each with its status."""

from __future__ import annotations

from typing import Any

import pydantic
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from freehold.core.errors import RequestError
from freehold.infer.limits import ContextOverflow
from freehold.stages.serve import answers
from freehold.stages.serve.guards import Withheld
from freehold.stages.serve.worker import Overloaded, Stopping


class Json(JSONResponse):
    """A body of JSON."""

    def render(self, content: Any) -> bytes:
        """Return its bytes."""
        return answers.to_bytes(content)


class ApiError(HTTPException):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, code: str | None, *, param: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:  # fmt: skip
        super().__init__(status, message)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(error: Exception) -> ApiError:
    """Return any error as the client sees it: a mistake of its own with its reason, one of ours without."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, RequestError):
        return ApiError(500, "The server had an error; its log says more.", None, kind="server_error")
    parts = (("", error.what), ("found ", error.found), ("expected ", error.expected), ("", error.todo))
    message = "; ".join(f"{label}{text}" for label, text in parts if text is not None)
    if isinstance(error, Overloaded):
        return ApiError(429, message, "queue_full", kind="rate_limit_error")
    if isinstance(error, Stopping):
        return ApiError(503, message, "server_stopping", kind="server_error")
    if isinstance(error, Withheld):
        return ApiError(400, message, "content_filter", param=str(error.where))
    param = None if error.where is None else str(error.where)
    code = "context_length_exceeded" if isinstance(error, ContextOverflow) else "invalid_value"
    return ApiError(400, message, code, param=param)


def add_errors(app: FastAPI) -> None:
    """Give every error OpenAI's form and the right status."""

    def answer(error: Exception) -> Response:
        known = as_api_error(error)
        after_s = error.retry_s if isinstance(error, Overloaded) else 1
        headers = {"Retry-After": str(after_s)} if known.status_code in (429, 503) else {}
        if known.status_code in (408, 413):  # the rest of the body is not read
            headers["Connection"] = "close"
        return Json(known.body, known.status_code, headers=headers)

    @app.exception_handler(ApiError)
    async def api_error(request: HttpRequest, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestError)
    async def refused(request: HttpRequest, error: RequestError) -> Response:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: HttpRequest, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return Json(ApiError(error.status_code, message, None).body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(request: HttpRequest, error: Exception) -> Response:
        return answer(error)


def explain(error: pydantic.ValidationError) -> ApiError:
    """Turn pydantic's first complaint into an error that names the parameter."""
    try:
        problem: dict[str, Any] = dict(error.errors(include_url=False, include_input=False)[0])
    except UnicodeError:  # half a surrogate pair in a name
        return ApiError(400, "The body of the request is not valid Unicode.", "invalid_value")
    place = [str(part)[:100] for part in problem["loc"]]
    param = place[0] if place else None
    if problem["type"] == "unknown_field":
        name = ".".join([*place, problem["ctx"]["name"]])
        message = f"Unrecognized request argument supplied: {name}"
        return ApiError(400, message, "unknown_parameter", param=name)
    if problem["type"] == "missing":
        name = ".".join(place) or "body"
        return ApiError(400, f"Missing required parameter: '{name}'.", "missing_required_parameter", param=name)
    return ApiError(
        400, f"Invalid value for '{'.'.join(place) or 'body'}': {problem['msg']}", "invalid_type", param=param
    )
