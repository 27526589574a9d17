"""The server among hostile and careless clients: limits, access, and how it ends."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import logging
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import httpx
import openai
import pydantic
import pytest
from serving import HELLO, JSON, MODEL, Running, Script, wait_for

from freehold import api
from freehold.core.errors import ConfigError
from freehold.stages.serve import access, limits, run
from freehold.stages.serve.app import create_app
from freehold.stages.serve.backends import Served
from freehold.stages.serve.config import KEY_VARIABLE, ServeConfig
from freehold.stages.serve.schema import ChatRequest, CompletionRequest, read

IDLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def application(tokenizer, key=None, **settings):
    """Return the application over a backend that says a given text."""
    backend = Script(tokenizer)
    served = Served(MODEL, backend, tokenizer, api.default_sampling(Path("nowhere"), tokenizer))
    return backend, create_app(served, ServeConfig(**settings), key)


def ended(client: socket.socket) -> bool:
    """Wait for the end of a connection."""
    with contextlib.suppress(ConnectionError):
        while client.recv(4096):
            pass
    return True


@pytest.fixture
def running(tiny_tokenizer):
    with Running(application(tiny_tokenizer)[1]) as server:
        yield server


def test_health_answers_among_many_idle_clients(tiny_checkpoint, tmp_path):
    """400 clients that send half a request, to a server that may open 256 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    log = tmp_path / "log"
    command = f"ulimit -n 256; exec {sys.executable} -m freehold.cli serve {tiny_checkpoint} --port 0"
    with log.open("w") as out:
        server = subprocess.Popen(["bash", "-c", command], stderr=out, stdout=out)
    clients = []
    try:
        wait_for(lambda: "serving" in log.read_text(), 60)
        address = log.read_text().split("http://")[1].split("/")[0]
        host, port = address.split(":")
        for _ in range(400):
            clients.append(socket.create_connection((host, int(port)), timeout=20))
            clients[-1].sendall(IDLE)
        for _ in range(3):
            with urllib.request.urlopen(f"http://{address}/health", timeout=10) as answer:
                assert answer.status == 200
        assert log.stat().st_size < 10_000
    finally:
        for client in clients:
            client.close()
        server.terminate()
        assert server.wait(20) == 0
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_limits_leave_files_for_everything_else():
    for files in (64, 256, 1024, 1 << 20):
        most, backlog = limits.connection_limits(files)
        assert 1 <= backlog < files // 4
        assert most + 2 * backlog < files


@pytest.mark.parametrize("sent", [IDLE, b"", POST + b"Content-Length: 9\r\n\r\n{"], ids=["headers", "nothing", "body"])
def test_slow_requests_are_ended(running, monkeypatch, sent):
    monkeypatch.setattr(limits, "HEADER_S", 0.3)
    monkeypatch.setattr(limits, "BODY_S", 0.3)
    client = running.connect(sent)
    if sent.endswith(b"{"):
        assert client.recv(4096).startswith(b"HTTP/1.1 408")
    assert ended(client)


def test_silent_client_is_ended_after_an_answer(running, monkeypatch):
    monkeypatch.setattr(limits, "HEADER_S", 0.3)
    client = running.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.recv(4096).startswith(b"HTTP/1.1 200")
    client.sendall(b"G")  # ends the wait for the next request, but is none
    assert ended(client)


def test_client_that_stops_reading_is_ended(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(limits, "FROZEN_S", 0.3)
    backend, app = application(tiny_tokenizer)
    backend.text = "word " * 100_000
    body = json.dumps({"model": MODEL, "prompt": "a", "stream": True}).encode()
    with Running(app) as server:
        server.connect(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: backend.closed == 1, 20)


def test_rest_of_a_refused_body_is_not_read_for_ever(running, monkeypatch):
    monkeypatch.setattr(limits, "DRAIN_S", 0.3)
    client = running.connect(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"%x\r\n" % (1 << 16) + b"a" * (1 << 16) + b"\r\n"
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 10:
            client.sendall(chunk)
    assert time.monotonic() - began < 10


def test_a_request_with_two_lengths_is_refused(running):
    client = running.connect(POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert client.recv(4096).startswith(b"HTTP/1.1 400")


def test_repeated_errors_are_muted():
    class Loop:
        now = 0.0

        def time(self):
            return self.now

    log, lines = logging.Logger("muted"), io.StringIO()
    log.addHandler(logging.StreamHandler(lines))
    loop, handle = Loop(), limits.mute_repeats(log)
    for _ in range(1000):
        handle(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many")})
    assert lines.getvalue().count("\n") == 1
    loop.now = limits.REPEAT_S
    handle(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many")})
    assert "999 repetitions" in lines.getvalue()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": [1] * 20_000}),
        (ChatRequest, {"messages": [{}] * 20_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 20_000}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": ""} | {str(i): 1 for i in range(20_000)}]}),
        (ChatRequest, {"messages": HELLO, "tools": [1] * 20_000}),
        (ChatRequest, {"messages": HELLO, "logit_bias": dict.fromkeys(map(str, range(20_000)), "x")}),
        (ChatRequest, {"messages": HELLO} | {str(i): 1 for i in range(20_000)}),
        (ChatRequest, {"messages": HELLO, "stop": [1] * 20_000}),
        (CompletionRequest, {"prompt": [True] * 20_000}),
        (CompletionRequest, {"prompt": [[True] * 200] * 100}),
        (CompletionRequest, {"prompt": [1] * 2_000_000}),
    ],
)
def test_wrong_body_makes_few_errors(kind, body):
    """What pydantic collects grows with the wrong items, but for the first of which nothing is used."""
    with pytest.raises(pydantic.ValidationError) as caught:
        read(kind, json.dumps({"model": MODEL} | body).encode())
    assert caught.value.error_count() <= 8


def test_other_requests_run_while_prompts_are_scored(tiny_checkpoint, monkeypatch):
    loaded = api.load(tiny_checkpoint)
    scored, original = [], loaded.engine.score_top
    monkeypatch.setattr(loaded.engine, "score_top", lambda p, top: scored.append(len(p)) or original(p, top))
    served = Served(MODEL, loaded.engine, loaded.tokenizer, loaded.sampling, running=2)
    body = {"model": MODEL, "prompt": [[5] * 900] * 7, "echo": True, "logprobs": 0, "max_tokens": 0}
    with Running(create_app(served, ServeConfig())) as server:
        answer = httpx.post(server.address + "/v1/completions", json=body, timeout=60).json()
    assert scored == [3, 3, 1]
    values = [choice["logprobs"]["token_logprobs"][1:] for choice in answer["choices"]]
    assert values == [pytest.approx(loaded.engine.score([[5] * 900])[0][1:], abs=1e-4)] * 7


def test_shutdown_ends_answers_with_an_error(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(run, "GRACE_S", 0.2)
    backend, app = application(tiny_tokenizer)
    backend.text, backend.pause_s = "word " * 5000, 0.01
    body = {"model": MODEL, "messages": HELLO}
    with Running(app) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        url = server.address + "/v1/chat/completions"
        streamed = pool.submit(httpx.post, url, json=body | {"stream": True}, timeout=20)
        wait_for(lambda: backend.begun)
        waiting = pool.submit(httpx.post, url, json=body, timeout=20)
        wait_for(lambda: app.state.front.worker.waiting == 1)
        server.server.should_exit = True
        lines = [line for line in streamed.result().text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "server_stopping"
    assert (waiting.result().status_code, waiting.result().json()["error"]["code"]) == (503, "server_stopping")


def test_stream_that_fails_ends_with_an_error_event(tiny_tokenizer):
    backend, app = application(tiny_tokenizer)
    backend.text, backend.tokenizer = "word word", tiny_tokenizer
    original = backend.turns

    def dies(prompts, settings, key=None):
        yield next(original(prompts, settings))
        raise OSError("the disk is gone")

    backend.turns = dies
    body = {"model": MODEL, "messages": HELLO, "stream": True}
    with Running(app) as server:
        lines = [x for x in httpx.post(server.address + "/v1/chat/completions", json=body).text.split("\n\n") if x]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "disk" not in lines[-2]


class TestAccess:
    def test_key_opens_everything_but_health(self, tiny_tokenizer):
        with Running(application(tiny_tokenizer, key="secret")[1]) as server:
            status = {
                (path, given): httpx.get(server.address + path, headers={"Authorization": given}).status_code
                for path in ("/metrics", "/v1/models", "/health", "/docs")
                for given in ("bearer secret", "Bearer secret", "secret", "Basic secret", "Bearer wrong", "")
            }
            assert httpx.head(server.address + "/health").status_code == 200
            unread = server.connect(POST + b"Content-Length: 500000\r\n\r\n")
            assert unread.recv(4096).startswith(b"HTTP/1.1 401")  # before the body is there
        for (path, given), code in status.items():
            right = path == "/health" or given in ("bearer secret", "Bearer secret")
            assert code == ((404 if path == "/docs" else 200) if right else 401), (path, given)

    @pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
    def test_no_pages_that_load_scripts_from_elsewhere(self, running, path):
        assert httpx.get(running.address + path).status_code == 404

    @pytest.mark.parametrize(
        ("host", "status"),
        [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 421), ("evil:80", 421)],
    )
    def test_foreign_host_names_are_refused_without_key(self, running, host, status):
        assert httpx.get(running.address + "/v1/models", headers={"Host": host}).status_code == status

    def test_server_for_others_takes_any_host_name(self):
        gate = access.Access(None, None, "0.0.0.0")
        assert gate._refusal({"host": "name.example"}, "/v1/models") is None

    def test_empty_key_is_refused(self, monkeypatch, tiny_checkpoint):
        monkeypatch.setenv(KEY_VARIABLE, " ")
        with pytest.raises(ConfigError, match="FREEHOLD_API_KEY is empty"):
            run.serve(ServeConfig(path=tiny_checkpoint, port=0))

    def test_browser_pages_may_ask_when_they_are_named(self, tiny_tokenizer):
        asked = {
            "Origin": "http://localhost:3000",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type,authorization",
        }
        found = []
        for origins in ([], ["http://localhost:3000"], ["http://other"]):
            with Running(application(tiny_tokenizer, key="secret", cors_origins=origins)[1]) as server:
                answer = httpx.options(server.address + "/v1/chat/completions", headers=asked)
            found.append((answer.status_code, answer.headers.get("access-control-allow-origin")))
        assert found[1] == (200, "http://localhost:3000")
        assert [origin for _, origin in (found[0], found[2])] == [None, None]


def test_own_server_is_asked_without_a_proxy(running, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert run._get(running.address + "/health") == {"status": "ok"}


def test_broken_pipe_of_a_client_is_no_error(running):
    for _ in range(5):
        running.connect(POST + b"Content-Length: 100\r\n\r\n{").close()
    assert httpx.get(running.address + "/health").status_code == 200


def test_errors_are_openais_own(running):
    client = openai.OpenAI(base_url=running.address + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [1]}])
    assert caught.value.param == "messages"
    assert httpx.post(running.address + "/v1/completions", content=b"[" * 100_000, headers=JSON).status_code == 400
