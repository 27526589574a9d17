"""What answers: our engine on a checkpoint or an HF folder, or llama.cpp on a GGUF file; ids in, tokens out."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from freehold import api
from freehold.core.errors import ArtifactError, RequestError
from freehold.infer.engine import ContextOverflow, Scored, Token
from freehold.infer.sampler import Sampling, check_ids
from freehold.stages.serve.config import StageConfig
from freehold.tokenizer.bpe import Tokenizer


class Backend(Protocol):
    """What the server asks of whatever runs the model; `infer.Engine` has it by itself."""

    limit_tokens: int

    def decode(self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling]) -> Iterator[tuple[int, Token]]:
        """Yield (number of the prompt, token) as tokens are made; refuse a bad request before the first."""
        ...

    def score_top(self, sequences: Sequence[Sequence[int]], top: int) -> list[Scored]:
        """Return the log-probability of each token given those before it."""
        ...


@dataclass(frozen=True)
class Served:
    """A model ready to answer."""

    name: str
    backend: Backend
    tokenizer: Tokenizer


def open_model(config: StageConfig, path: Path) -> Served:
    """Open a checkpoint, run folder, HF folder or .gguf file; ArtifactError when it is none of these."""
    if path.suffix == ".gguf":
        tokenizer = Tokenizer.load(_tokenizer_folder(config, path))
        return Served(config.model_name or path.stem, Gguf(path, tokenizer, config.max_model_len), tokenizer)
    folder = api.find_model(path)
    loaded = api.load(folder, config.dtype, max_batch=config.max_batch, limit_tokens=config.max_model_len)
    return Served(config.model_name or folder.resolve().name, loaded.engine, loaded.tokenizer)


def _tokenizer_folder(config: StageConfig, path: Path) -> Path:
    if config.tokenizer is not None:
        return config.tokenizer
    for folder in (path.parent, path.parent.parent / "hf"):
        if (folder / "tokenizer.json").exists():
            return folder
    raise ArtifactError(
        "no tokenizer beside the GGUF file",
        where=path,
        expected=f"tokenizer.json in {path.parent} or {path.parent.parent / 'hf'}",
        todo="name its folder: tokenizer=FOLDER",
    )


class Gguf:
    """A GGUF file run by llama.cpp inside this process; prompts of one request follow each other."""

    def __init__(self, path: Path, tokenizer: Tokenizer, limit_tokens: int | None) -> None:
        if not path.is_file():
            raise ArtifactError("no such file", where=path, expected="a .gguf file")
        try:
            import xllamacpp
        except ImportError as error:
            raise ArtifactError(
                "serving GGUF files needs the package xllamacpp", where=path, todo="pip install 'freehold[export]'"
            ) from error
        self._vocab_size = tokenizer.vocab_size
        self._eos = tokenizer.eos
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = limit_tokens or 0
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = _threads()
        parameters.warmup, parameters.verbosity = False, -1
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise ArtifactError("llama.cpp cannot open the file", where=path, found=error) from error
        self.limit_tokens = limit_tokens or self._context_tokens()

    def decode(self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling]) -> Iterator[tuple[int, Token]]:
        """Yield (number of the prompt, token), one prompt after the other."""
        check_ids(settings, self._vocab_size)
        for prompt, sampling in zip(prompts, settings, strict=True):
            self._check(prompt, sampling)
        for number, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True)):
            if sampling.max_tokens != 0:
                for token in self._stream(prompt, sampling):
                    yield number, token

    def score_top(self, sequences: Sequence[Sequence[int]], top: int) -> list[Scored]:
        """Refuse: llama.cpp's server does not tell the log-probabilities of a prompt."""
        raise RequestError(
            "log-probabilities of the prompt are not available from a GGUF file",
            where="echo",
            todo="serve the checkpoint or the HF folder instead",
        )

    def _check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        if not prompt:
            raise RequestError("the prompt is empty", where="prompt", expected="at least one token")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise RequestError(
                "the prompt holds an id that is no token", where="prompt", expected=f"0 to {self._vocab_size - 1}"
            )
        if len(prompt) + (1 if sampling.max_tokens is None else sampling.max_tokens) > self.limit_tokens:
            raise ContextOverflow(
                "the prompt and what is to be generated do not fit the context",
                where="prompt",
                found=f"{len(prompt)} prompt tokens + {sampling.max_tokens or 'at least 1'} to generate",
                expected=f"at most {self.limit_tokens} tokens together",
            )

    def _stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        chunks: queue.Queue[dict[str, Any] | None] = queue.Queue()
        closed = threading.Event()

        def take(chunk: dict[str, Any]) -> bool:
            chunks.put(chunk)
            return closed.is_set()  # True makes llama.cpp stop

        def work() -> None:
            try:
                answer = self._server.handle_completions(self._body(prompt, sampling), take)
                if answer is not None:
                    chunks.put(answer)
            finally:
                chunks.put(None)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from self._tokens(chunks, sampling)
        finally:
            closed.set()
            thread.join()

    def _tokens(self, chunks: queue.Queue[dict[str, Any] | None], sampling: Sampling) -> Iterator[Token]:
        """Turn llama.cpp's chunks into tokens; the end is told in a chunk of its own, so one token is held back."""
        held: Token | None = None
        while (chunk := chunks.get()) is not None:
            if "error" in chunk:
                raise RequestError("llama.cpp refused the request", found=chunk["error"].get("message"))
            choice = chunk["choices"][0]
            for entry in (choice["logprobs"] or {}).get("content", []):
                if held is not None:
                    yield held
                top = [(t["id"], t["logprob"]) for t in entry["top_logprobs"][: sampling.logprobs]]
                held = Token(entry["id"], entry["logprob"], top)
                if held.id in sampling.stop_ids:
                    yield Token(held.id, held.logprob, top, "stop")
                    return
            if choice["finish_reason"] is not None:
                if choice["finish_reason"] == "length" and held is not None:
                    yield Token(held.id, held.logprob, held.top_logprobs, "length")
                else:  # the token that ended the turn is not told, nor how likely it was
                    if held is not None:
                        yield held
                    yield Token(self._eos, 0.0, [], "stop")
                return

    def _body(self, prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
        return {
            "prompt": list(prompt),
            "stream": True,
            "n_predict": -1 if sampling.max_tokens is None else sampling.max_tokens,
            "n_probs": max(1, sampling.logprobs),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repeat_last_n": -1,
            "logit_bias": [[token, bias] for token, bias in sampling.logit_bias.items()],
            "seed": -1 if sampling.seed is None else sampling.seed % 2**32,
            "cache_prompt": False,
        }

    def _context_tokens(self) -> int:
        import json
        import urllib.request

        with urllib.request.urlopen(self._server.listening_address + "/props", timeout=10) as answer:
            return int(json.load(answer)["default_generation_settings"]["n_ctx"])


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
