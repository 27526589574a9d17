"""Who may ask: the key, and the host names a browser may reach this machine by."""

from __future__ import annotations

import ipaddress
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from freehold.stages.serve.errors import ApiError, Json

OPEN_PATHS = {"/health", "/"}
"""Answered without a key: whether the server is there, and the page that asks for the key."""


class Access:
    """Refuses what does not carry the key, before its body is read.

    Without a key, a server on a loopback address answers only to addresses and `localhost`: a web site whose name
    resolves to 127.0.0.1 could otherwise read answers through its visitor's browser (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, key: str | None, host: str) -> None:
        self.app, self.key, self.host = app, key, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = self._refusal(Headers(scope=scope), scope["path"])
        if refusal is None:
            return await self.app(scope, receive, send)
        await Json(refusal.body, refusal.status_code)(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        if self.key is None:
            if _is_loopback(self.host) and not _is_local(headers.get("host", ""), self.host):
                message = "This host name is not served; set FREEHOLD_API_KEY to serve under any name."
                return ApiError(421, message, "unknown_host")
            return None
        if path in OPEN_PATHS:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), self.key.encode()):
            return None
        return ApiError(401, "Incorrect API key provided.", "invalid_api_key", kind="authentication_error")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_local(header: str, own: str) -> bool:
    """Whether a Host header names an address, `localhost`, or the name this server was started with."""
    name = header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header
    name = name.strip("[]").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in {"", "localhost", own.lower()} or name.endswith(".localhost")
    return True
