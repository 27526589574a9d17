"""Serve a model over HTTP until a signal stops it; in the walk: start it, ask it one question, keep the answer."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from freehold.core.artifact import Workspace, write_json
from freehold.core.errors import ConfigError, FreeholdError
from freehold.core.log import Log
from freehold.stages.serve import limits
from freehold.stages.serve.app import create_app
from freehold.stages.serve.backends import open_model
from freehold.stages.serve.config import KEY_VARIABLE, ServeConfig

GRACE_S = 5
"""How long answers being streamed may continue after the signal to stop."""


ANSWER_TOKENS = 64
"""Longest answer to the question of the walk."""
START_TIMEOUT_S = 120.0
"""How long the walk waits for the server to be ready."""


class ServeError(FreeholdError):
    """The server cannot start, or does not answer."""


def serve(config: ServeConfig, ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then return; `ready` is called with the address once it listens.

    Raises ServeError when the port is taken, ArtifactError or CheckpointError when there is no model at `path`.
    """
    if config.path is None:
        raise ConfigError("what to serve is not said", where="serve.path", expected="a checkpoint, HF folder or .gguf")
    key = _api_key()
    with ExitStack() as stack:
        listener = stack.enter_context(listen(config.host, config.port))  # before the model: a taken port is known
        host, port = listener.getsockname()[:2]
        log = Log()
        if key is None and not ipaddress.ip_address(host).is_loopback:
            log.warn(f"anyone who reaches {host} may use this model: {KEY_VARIABLE} is not set")
        log.say(f"opening {config.path}")
        served = open_model(config, config.path)
        stack.callback(served.close)
        server = make_server(create_app(served, config, key))
        log.say(served.backend.describe())
        log.say(f"serving {served.name} at http://{host}:{port}/v1 (context {served.backend.limit_tokens} tokens)")
        if ready is not None:
            ready(f"http://{host}:{port}")
        with _signals_end_quietly():
            server.run(sockets=[listener])
        log.say("stopped")


def _api_key() -> str | None:
    """Return the key that requests must carry; ConfigError when it is set and empty, which would let anyone in."""
    key = os.environ.get(KEY_VARIABLE)
    if key is not None and not key.strip():
        raise ConfigError(f"{KEY_VARIABLE} is empty", expected="a key", todo=f"set a key, or unset {KEY_VARIABLE}")
    return key and key.strip()


def make_server(app: FastAPI) -> uvicorn.Server:
    """Return the HTTP server of an application, with limits on its connections."""
    most, backlog = limits.connection_limits(limits.raise_open_files())
    protocol = type("Protocol", (limits.BoundedProtocol,), {"most": most})
    config = uvicorn.Config(
        app, http=protocol, ws="none", backlog=backlog, log_level="warning", lifespan="on",
        h11_max_incomplete_event_size=limits.HEADER_BYTES, timeout_graceful_shutdown=GRACE_S + 5,
    )  # fmt: skip
    return _Server(config)


class _Server(uvicorn.Server):
    """A server whose streams end with an error event when they take longer than the time of grace."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen; connections may wait in the kernel in greater number than are accepted in one turn."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(limits.KERNEL_BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, let answers end, then end those that have not."""
        worker = self.config.app.state.front.worker  # type: ignore[union-attr]
        timer = asyncio.get_running_loop().call_later(GRACE_S, worker.begin_to_stop)
        await super().shutdown(sockets)
        timer.cancel()


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket bound to the address; ServeError when it is taken or is not this machine's."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError as error:
        raise ServeError("cannot listen there", where=f"{host}:{port}", found=error.strerror or error) from error
    with listener:
        try:
            listener.bind(address)
            listener.listen()
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise ServeError(
                "the port is in use" if taken else "cannot listen there",
                where=f"{host}:{port}",
                found=None if taken else error.strerror,
                todo=f"stop what listens on port {port}, or choose another: --port {port + 1}" if taken else None,
            ) from error
        yield listener


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Let uvicorn end on SIGINT and SIGTERM without the process dying of them afterwards (it raises them again)."""
    try:
        before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are not ours
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(config: ServeConfig, work: Workspace) -> dict[str, Any]:
    """Start the server on a free port as a user would, ask the question over HTTP, write `answer.json`, stop it."""
    path = config.path or work.input("align") / "preview"
    log_path = work.folder / "log" / "server.txt"
    with _started(config, path, log_path) as address:
        work.log.say(f"asking {config.question!r} at {address}")
        model = _get(f"{address}/v1/models")["data"][0]["id"]
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": config.question}],
            "temperature": 0,
            "seed": work.seed,
            "max_tokens": ANSWER_TOKENS,
        }
        try:
            answer = _get(f"{address}/v1/chat/completions", asked)
        except urllib.error.HTTPError as error:
            reason = json.load(error)["error"]["message"]
            raise ServeError("the server does not answer the question", where="serve", found=reason) from error
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    work.log.say(f"it says: {text!r}")
    kept = {
        "question": config.question,
        "answer": text,
        "finish_reason": choice["finish_reason"],
        "model": model,
        "usage": answer["usage"],
    }
    write_json(work.folder / "answer.json", kept)
    return {"answer": text, **answer["usage"]}


@contextmanager
def _started(config: ServeConfig, path: Path, log_path: Path) -> Iterator[str]:
    """Yield the address of a server in a process of its own; it is stopped and waited for in any case."""
    with listen(config.host, 0) as probe:
        port = probe.getsockname()[1]
    own = {"path", "host", "port", "question"}
    settings = config.model_dump(mode="json", exclude=own, exclude_defaults=True)
    command = [sys.executable, "-m", "freehold.cli", "serve", str(path)]
    command += [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    command += ["--host", config.host, "--port", str(port), "--parent", str(os.getpid())]
    environment = {k: v for k, v in os.environ.items() if k != KEY_VARIABLE}
    address = f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{port}"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait(process, address, START_TIMEOUT_S, log_path)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=GRACE_S + 15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, timeout_s: float, log_path: Path) -> None:
    """Wait until /health answers; ServeError with the end of the server's log when it does not."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            _get(f"{address}/health", timeout_s=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    tail = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
    ended = process.poll()
    raise ServeError(
        "the server did not start" if ended is None else f"the server ended with code {ended}",
        where=log_path,
        found="\n            ".join(tail) or "nothing in its log",
        expected=f"an answer from {address}/health within {timeout_s:g} s",
    )


def _get(url: str, body: dict[str, Any] | None = None, timeout_s: float = 300) -> dict[str, Any]:
    """Send one request (POST with a body, else GET) and return the JSON that comes back."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    # It is this machine's own server: a proxy that the environment names must not see the question.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout_s) as answer:
        result: dict[str, Any] = json.load(answer)
    return result
