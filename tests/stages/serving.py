"""What the tests of the server share: a running server, and a backend that says a given text."""

from __future__ import annotations

import socket
import threading
import time

from freehold.infer.engine import Token
from freehold.stages.serve.run import make_server

MODEL = "tiny"
HELLO = [{"role": "user", "content": "The capital of France?"}]
JSON = {"content-type": "application/json"}


class Running:
    """A server in a thread of this process, on a free port."""

    def __init__(self, app) -> None:
        self.app = app
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.server = make_server(app)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def connect(self, data: bytes = b"") -> socket.socket:
        """Return a raw connection that has sent some bytes."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        client.sendall(data)
        return client


class Script:
    """A backend that says a given text, a token at a time: what a trained model would say."""

    limit_tokens = 1000

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.text, self.reason, self.pause_s, self.closed = tokenizer, "", "stop", 0.0, 0
        self.error = None
        self.begun = 0

    def describe(self) -> str:
        return "a script"

    def turns(self, prompts, settings, key=None):
        ids = self.tokenizer.encode(self.text, specials=True)
        if self.error:
            raise self.error
        self.begun += 1
        try:
            for number in range(len(prompts)):
                for token in ids:
                    time.sleep(self.pause_s)
                    yield [(number, Token(token, -0.5))]
                last = self.tokenizer.eos if self.reason == "stop" else ids[0]
                yield [(number, Token(last, -0.5, finish_reason=self.reason))]
        finally:
            self.closed += 1

    def stats(self):
        return {}

    def score_top(self, sequences, top):
        raise AssertionError("these tests score nothing")


def wait_for(condition, timeout_s: float = 5) -> None:
    """Wait until something holds; it must within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
