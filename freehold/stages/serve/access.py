"""Who may ask: the key, and the host names a browser may reach this machine by."""

from __future__ import annotations

import hashlib
import ipaddress
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from freehold.stages.serve.errors import ApiError, Json

OPEN_PATHS = {"/health", "/"}
"""Answered without a key: whether the server is there, and the page that asks for the key."""


class Access:
    """Refuses what does not carry the key, before its body is read.

    Several keys are separated by commas; requests with different keys share no kept prompts. Without a key, a server on
    a loopback address answers only to addresses and `localhost`: a web site whose name resolves to 127.0.0.1 could
    otherwise read answers through its visitor's browser (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, key: str | None, host: str) -> None:
        self.app, self.host = app, host
        self.keys = None if key is None else [part.strip().encode() for part in key.split(",") if part.strip()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        # Who asks, for fairness: a key, or without keys the machine. Who may share kept prompts: a key's own requests.
        given, client = _bearer(headers), (scope.get("client") or ("",))[0]
        scope["tenant"] = client if self.keys is None else hashlib.sha256(given).hexdigest()
        scope["salt"] = "" if self.keys is None else scope["tenant"]
        refusal = self._refusal(headers, scope["path"])
        if refusal is None:
            return await self.app(scope, receive, send)
        await Json(refusal.body, refusal.status_code)(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        if self.keys is None:
            if _is_loopback(self.host) and not _is_local(headers.get("host", ""), self.host):
                message = "This host name is not served; set FREEHOLD_API_KEY to serve under any name."
                return ApiError(421, message, "unknown_host")
            return None
        if path in OPEN_PATHS:
            return None
        # Every key is compared, so that the time says nothing about which one was nearly right.
        if sum(secrets.compare_digest(_bearer(headers), key) for key in self.keys):
            return None
        return ApiError(401, "Incorrect API key provided.", "invalid_api_key", kind="authentication_error")


def _bearer(headers: Headers) -> bytes:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip().encode() if scheme.lower() == "bearer" else b""


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
