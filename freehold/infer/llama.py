"""llama.cpp in a process of its own, for whoever proves or serves a GGUF file. Needs no torch.

Run as a module it is that process: it opens the file, prints the address of its server on one line, and answers
until its standard input closes. So an abort in it, its log, its threads and its shutdown (which can wait for ever)
stay out of ours.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from freehold.core.errors import ArtifactError, RequestError
from freehold.infer.gguf_header import check_gguf

LOG_LINES = 12


class Llama:
    """A GGUF file opened by llama.cpp; `close`, or the end of a `with`, ends the process.

    `context_tokens` 0 = the model's. `exact`: fp32 cache, no flash attention, no GPU, the arithmetic a proof
    compares. `log`: the file that keeps what llama.cpp says. `slots`: requests at a time. `adapter`: a GGUF adapter to
    apply. ArtifactError, with the end of what it said, when the package is missing, the file is unsound or cannot be
    opened, or the process has died.
    """

    def __init__(
        self,
        path: Path,
        context_tokens: int,
        *,
        threads: int = 1,
        exact: bool = False,
        log: Path | None = None,
        slots: int = 1,
        adapter: Path | None = None,
    ) -> None:
        if not path.is_file():
            raise ArtifactError("no such file", where=path, expected="a .gguf file")
        check_gguf(path)
        if importlib.util.find_spec("xllamacpp") is None:
            raise ArtifactError(
                "opening GGUF files needs the package xllamacpp", where=path, todo="pip install 'freehold[export]'"
            )
        self.path = path
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        # A file, not a pipe: a pipe that no one reads would stop llama.cpp when it is full.
        self._log = tempfile.TemporaryFile() if log is None else log.open("w+b")  # noqa: SIM115  (`close` closes it)
        options = {
            "path": str(path),
            "context_tokens": context_tokens,
            "threads": threads,
            "exact": exact,
            "slots": slots,
            "adapter": "" if adapter is None else str(adapter),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(options)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C is for us, and we close it
        )
        assert self.process.stdout is not None
        # The process says one line when it listens; an end of file instead means that it died.
        address = urllib.parse.urlsplit(self.process.stdout.readline().strip())
        if not address.hostname:
            self.process.wait()
            error = self._error("llama.cpp cannot open the file", f"exit {self.process.returncode}")
            self.close()
            raise error
        self.url = address.geturl()
        """Where its HTTP server listens, on this machine only."""
        # Slots are asked from threads of their own, each over a connection of its own.
        self._address, self._local = (address.hostname, address.port), threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process and wait for it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # The end of its input is the signal to leave, so it also leaves when we are killed.
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._log.close()

    def ask(self, route: str, body: dict[str, Any] | None = None) -> Any:
        """Send one request (POST with a body, else GET) and return the answer.

        RequestError when llama.cpp refuses it, ArtifactError when there is no llama.cpp any more.
        """
        try:
            try:
                status, text = self._send(route, body)
            except ConnectionError:  # a connection that was idle for some seconds is closed: a new one
                self._connection.close()
                status, text = self._send(route, body)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise self._error(f"llama.cpp died at {route}", error) from error
        if status != http.HTTPStatus.OK:
            raise RequestError(f"llama.cpp refused {route}", found=text.decode(errors="replace")[:300])
        return json.loads(text)

    @property
    def _connection(self) -> http.client.HTTPConnection:
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection(*self._address)
        connection: http.client.HTTPConnection = self._local.connection
        return connection

    def _send(self, route: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body)
        self._connection.request("GET" if body is None else "POST", route, data, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def _error(self, what: str, found: object) -> ArtifactError:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        # llama.cpp marks its errors: `<time> E <where>: <what>`.
        errors = [line for line in lines if line.split(" ")[1:2] == ["E"]] or lines
        return ArtifactError(what, where=self.path, found="\n            ".join([str(found), *errors[-LOG_LINES:]]))


def _serve(path: str, context_tokens: int, threads: int, exact: bool, slots: int, adapter: str = "") -> None:
    """Open the file, print the server's address, and stay until standard input closes."""
    ours = os.dup(1)
    os.dup2(2, 1)  # whatever llama.cpp prints goes to the log
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    # One slot for a proof. More share one cache, so that each can have all of the context while others are short.
    parameters.n_ctx, parameters.n_parallel = context_tokens, slots
    if slots > 1:
        parameters.kv_unified = True
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.warmup, parameters.cache_ram_mib = False, 0
    if exact:
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.n_gpu_layers, parameters.fit_params = 0, False
    else:
        parameters.verbosity = 1  # errors only: a server's log must not grow with its requests
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        parameters.lora_adapters = [lora]
    server = xllamacpp.Server(parameters)
    os.write(ours, (server.listening_address + "\n").encode())
    sys.stdin.read()
    # Without running llama.cpp's destructors, some of which wait for threads that never end.
    os._exit(0)


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
