"""vLLM behind our front, against a server that speaks its protocol over the same tiny model."""

from __future__ import annotations

import http.server
import json
import math
import sys
import threading

import httpx
import pytest
from serving import HELLO, MODEL, Running

from freehold import api
from freehold.core.errors import ConfigError
from freehold.infer.sampler import Sampling
from freehold.stages.serve.app import create_app
from freehold.stages.serve.backends import open_model
from freehold.stages.serve.config import ServeConfig
from freehold.stages.serve.remote import RemoteError, read_tokens


class Protocol(http.server.BaseHTTPRequestHandler):
    """vLLM's completions with token ids, as its documentation has them; `trouble` makes it misbehave."""

    loaded = None
    trouble = ""
    bodies: list[dict] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self._json({"data": [] if self.trouble == "no model" else [{"id": "served", "max_model_len": 1000}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).bodies.append(body)
        if self.trouble == "refuse":
            return self._json({"error": {"message": "top_k must be -1"}}, 400)
        if self.trouble == "broken":
            return self._json({}, 500)
        if "prompt_logprobs" in body:
            return self._json({"choices": [{"prompt_logprobs": self._scored(body)}]})
        self.send_response(200)
        self.end_headers()
        for event in self._events(body):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if self.trouble == "cut":
                return None
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _scored(self, body):
        scored = self.loaded.engine.score_top([body["prompt"]], body["prompt_logprobs"])[0]
        rows = zip(body["prompt"], scored.logprobs, scored.top_logprobs, strict=True)
        return [None, *({str(i): {"logprob": p} for i, p in [*top, (t, lp)]} for t, lp, top in list(rows)[1:])]

    def _events(self, body):
        sampling = Sampling(
            temperature=body["temperature"], top_p=body["top_p"], top_k=max(body["top_k"], 0), min_p=body["min_p"],
            presence_penalty=body["presence_penalty"], frequency_penalty=body["frequency_penalty"], seed=body["seed"],
            logit_bias={int(i): b for i, b in body["logit_bias"].items()}, max_tokens=body["max_tokens"],
            stop_ids=tuple(body["stop_token_ids"]), logprobs=body["logprobs"],
        )  # fmt: skip
        for t in self.loaded.engine.stream(body["prompt"], sampling):
            logprobs = {
                "token_logprobs": [t.logprob], "top_logprobs": [{f"token_id:{i}": p for i, p in t.top_logprobs}]
            }  # fmt: skip
            yield {
                "choices": [{"index": 0, "token_ids": [t.id], "logprobs": logprobs, "finish_reason": t.finish_reason}]
            }

    def _json(self, body, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return api.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def remote(loaded, tiny_checkpoint):
    Protocol.loaded = loaded
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Protocol)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}/v1"
    served = open_model(ServeConfig(backend="vllm", endpoint=endpoint, model_name=MODEL), tiny_checkpoint)
    yield served
    server.shutdown()


@pytest.fixture(autouse=True)
def _no_trouble():
    Protocol.trouble = ""


def test_answers_are_those_of_the_model_behind(remote, loaded):
    settings = [Sampling(seed=i, max_tokens=9, logprobs=2, stop_ids=loaded.stop_ids) for i in range(3)]
    prompts = [[0, 40, 50], [0, 41], [0] * 70]
    found = [pair for turn in remote.backend.turns(prompts, settings, ("salt", None)) for pair in turn]
    for number, expected in enumerate(loaded.engine.generate(prompts, settings)):
        tokens = [token for n, token in found if n == number]
        assert [t.id for t in tokens] == expected.ids
        assert [t.logprob for t in tokens] == pytest.approx(expected.logprobs, abs=1e-4)
        assert tokens[-1].finish_reason == expected.finish_reason
    assert Protocol.bodies[-1]["cache_salt"] == "('salt', None)"
    assert Protocol.bodies[-1]["return_token_ids"]
    scored, own = (backend.score_top([[0, 40, 50, 60]], 2)[0] for backend in (remote.backend, loaded.engine))
    assert scored.logprobs == pytest.approx(own.logprobs, abs=1e-4)
    assert [[i for i, _ in top] for top in scored.top_logprobs[1:]] == [[i for i, _ in t] for t in own.top_logprobs[1:]]


def test_front_is_the_same(remote, loaded):
    body = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 12}
    with Running(create_app(remote, ServeConfig())) as server:
        url = server.address + "/v1/chat/completions"
        answer = httpx.post(url, json=body, timeout=60).json()
        shape = {"type": "json_object"}
        refused = httpx.post(url, json=body | {"response_format": shape}, timeout=60).json()
        assert "vLLM" in httpx.get(server.address + "/v1/models").json()["data"][0]["engine"]
    assert answer["choices"][0]["message"]["content"] == loaded.generate(HELLO[0]["content"], max_tokens=12)
    assert refused["error"]["param"] == "response_format"


@pytest.mark.parametrize(("trouble", "said"), [("cut", "broke off"), ("broken", "with an error"), ("refuse", "top_k")])
def test_trouble_behind_the_endpoint_is_named(remote, trouble, said):
    Protocol.trouble = trouble
    with pytest.raises(Exception, match=said):
        list(remote.backend.turns([[0, 40]], [Sampling(max_tokens=5)]))


def test_wrong_endpoints_are_refused(remote, tiny_checkpoint):
    with pytest.raises(ConfigError, match="not an endpoint"):
        open_model(ServeConfig(backend="vllm", endpoint="ftp://x"), tiny_checkpoint)
    with pytest.raises(RemoteError, match="does not answer"):
        open_model(ServeConfig(backend="vllm", endpoint="http://127.0.0.1:9/v1"), tiny_checkpoint)
    command = f"{sys.executable} -c pass"
    with pytest.raises(RemoteError, match="command that starts vLLM ended"):
        open_model(ServeConfig(backend="vllm", endpoint="http://127.0.0.1:9/v1", command=command), tiny_checkpoint)


def test_missing_stop_token_is_put_back():
    choice = {"token_ids": [5], "finish_reason": "stop"}
    first, last = read_tokens(choice, Sampling(stop_ids=(3,)))
    assert (first.id, first.finish_reason, last.id, last.finish_reason) == (5, None, 3, "stop")
    assert math.isnan(last.logprob)
