"""llama.cpp in a process of its own, so that an abort in it, its log and its threads stay out of ours.

Run as a module it is that process: it opens a GGUF file, prints the address of its server on one line and
answers until its standard input closes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from freehold.core.errors import ExportError

LOG_LINES = 8


class Llama:
    """A GGUF file opened by llama.cpp with an fp32 cache and without flash attention: its exact arithmetic."""

    def __init__(self, path: Path, context_tokens: int, log: Path, threads: int = 1) -> None:
        self.path, self.log = path, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = log.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path), str(context_tokens), str(threads)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
        )

    def __enter__(self) -> Llama:
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            self.process.wait()
            self.__exit__(None, None, None)
            raise self._error("llama.cpp cannot open the file", f"exit {self.process.returncode}")
        self._letter = self.tokenize("a")[0]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._log_file.close()

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """Send one request and return the answer; ExportError with the end of the log when there is none."""
        request = urllib.request.Request(
            self.address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise self._error(f"llama.cpp refused {route}", error.read().decode(errors="replace")[:300]) from error
        except OSError as error:
            raise self._error(f"llama.cpp died at {route}", error) from error

    def log_probabilities(self, ids: list[int], vocab_size: int) -> np.ndarray:
        """Return the normalised log-probabilities (float64 [V]) of the token after `ids`; -inf where not told."""
        # Probabilities are told before sampling. What is drawn must be plain text all the same: a token that ends
        # the answer, or half a character, would be told without them.
        drawn = {"logit_bias": [[self._letter, 1e4]], "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        answer = self.post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": vocab_size, **drawn})
        result = np.full(vocab_size, -np.inf)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            result[entry["id"]] = entry["logprob"]
        return result - np.logaddexp.reduce(result)

    def tokenize(self, text: str, *, specials: bool = False) -> list[int]:
        """Return llama.cpp's ids of a text; with `specials` as of a prompt: special tokens are known, BOS is added."""
        body = {"content": text, "add_special": specials, "parse_special": specials}
        return [int(i) for i in self.post("/tokenize", body)["tokens"]]

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """Return a conversation as the file's own chat template renders it, ready for an answer, without the BOS."""
        body: dict[str, Any] = {"messages": messages} | ({"tools": tools} if tools else {})
        return str(self.post("/apply-template", body)["prompt"])

    def _error(self, what: str, found: object) -> ExportError:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        # llama.cpp marks its errors: `<time> E <where>: <what>`.
        told = [line for line in lines if line.split(" ")[1:2] == ["E"]] or lines
        return ExportError(what, where=self.path, found="\n            ".join([str(found), *told[-LOG_LINES:]]))


def _serve(path: str, context_tokens: int, threads: int) -> None:
    """Open the file, print the server's address, and stay until standard input closes."""
    ours = os.dup(1)
    os.dup2(2, 1)  # whatever llama.cpp prints goes to the log
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx, parameters.n_parallel = context_tokens, 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_gpu_layers = 0
    parameters.warmup, parameters.fit_params, parameters.cache_ram_mib = False, False, 0
    server = xllamacpp.Server(parameters)
    os.write(ours, (server.listening_address + "\n").encode())
    sys.stdin.read()
    os._exit(0)  # llama.cpp's own shutdown can wait for idle threads


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
