"""Three lines to an answer.

>>> from freehold import api
>>> model = api.load("runs/laptop")
>>> print(model.generate("What is the capital of France?"))
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from freehold.checkpoint import adapter, base, dcp, hf
from freehold.core import environment
from freehold.core.artifact import MANIFEST, read_json, read_manifest
from freehold.core.errors import ArtifactError, CheckpointError, RequestError
from freehold.infer.engine import CacheType, Engine
from freehold.infer.runner import not_exact_as
from freehold.infer.sampler import Sampling
from freehold.infer.threads import choose_threads
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.model.device import Device, choose_device
from freehold.model.filling import fill
from freehold.model.lora import Pair
from freehold.tokenizer.bpe import BOS, END_OF_TEXT, Tokenizer
from freehold.tokenizer.chat import render_ids
from freehold.tokenizer.output import AnswerFormat, Piece, TextStream, read_format

Message = dict[str, Any]
Dtype = Literal["float32", "bfloat16"]

# Where a run folder or a stage's folder keeps its models, the most finished one first.
MODELS = (
    "align/preview", "preview", "pretrain/base", "base", "import/base", "pretrain/truebase", "truebase", "export/hf",
    "hf",
)  # fmt: skip


DEFAULT: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "top_k": 50}
"""Sampling of a model that says nothing of its own: at temperature 1 a small model writes noise."""


class NoTokenizer:
    """Stands in a model that was imported without a tokenizer of ours; any question raises ArtifactError."""

    bos = end_of_text = eos = -1  # no id: nothing ends an answer
    prefix: tuple[int, ...] = ()

    def __init__(self, folder: Path, why: str) -> None:
        self._folder, self._why = folder, why

    def __getattr__(self, name: str) -> Any:
        raise ArtifactError(
            "this model has no tokenizer to turn text into ids with",
            where=self._folder,
            found=self._why,
            expected="tokenizer.json with Trinity's special tokens",
            todo="use .model and .engine with ids, or import the folder again with its tokenizer",
        )


@dataclass(frozen=True)
class Loaded:
    """A model that can be asked."""

    model: Afmoe
    tokenizer: Tokenizer
    config: ModelConfig
    engine: Engine
    folder: Path
    """Where it was found."""
    answers: AnswerFormat
    """How it writes reasoning and tool calls, as recorded with its chat template."""
    sampling: Sampling
    """How it likes to be sampled (`generation_config.json`, else DEFAULT), with the tokens that end an answer."""
    begins_with: tuple[int, ...] = (BOS,)
    """The ids that the model reads before a plain text, as it was trained: BOS, or what its checkpoint says."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: of the turn, and of the text."""
        return self.sampling.stop_ids

    def generate(
        self, prompt: str | Sequence[Message], *, max_tokens: int | None = None, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """Answer a question (one user message) or a conversation (`[{"role", "content"}, ...]`).

        Returns the answer without its reasoning or tool calls; `answer` yields those too. `max_tokens` None = until
        the model ends or its context is full. ContextOverflow when prompt and `max_tokens` do not fit the context.
        """
        sampling = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed, stop_ids=self.stop_ids)
        return "".join(piece.text for piece in self.answer(prompt, sampling) if piece.kind == "content")

    def text_ids(self, text: str) -> list[int]:
        """Return a plain text as the ids the model is given: what begins a text, then the text; never empty."""
        return [*self.begins_with, *self.tokenizer.encode(text)] or [self.tokenizer.end_of_text]

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return a question or a conversation as the ids the model is given, ready for its answer."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return render_ids(self.tokenizer, messages, generation=True)[0]

    def answer(self, prompt: str | Sequence[Message], sampling: Sampling) -> Iterator[Piece]:
        """Yield the pieces of an answer as they become certain: content, reasoning, tool calls."""
        text, parser = TextStream(self.tokenizer), self.answers.parser(())
        for token in self.engine.stream(self.prompt_ids(prompt), sampling):
            yield from parser.feed(text.feed(token.id))
        yield from parser.feed(text.finish())
        yield from parser.finish()

    def complete(
        self, text: str, *, max_tokens: int | None = None, temperature: float = 0.0, seed: int = 0
    ) -> str:  # fmt: skip
        """Continue a text, as a model does that was not taught to converse; return what follows.

        `max_tokens` and ContextOverflow as in `generate`.
        """
        sampling = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed, stop_ids=self.stop_ids)
        ids = self.text_ids(text)
        stream = TextStream(self.tokenizer)
        return "".join(stream.feed(i) for i in self.engine.generate([ids], sampling)[0].ids) + stream.finish()


def load(
    path: str | Path,
    dtype: Dtype = "float32",
    *,
    device: Device = "auto",
    max_batch: int = 32,
    limit_tokens: int | None = None,
    threads: int | None = None,
    cache_bytes: int | None = None,
    prefix_cache: bool = False,
    cache_type: CacheType = "auto",
    trainable: bool = False,
    answers_only: bool = False,
    adapters: Mapping[str, Path] | None = None,
) -> Loaded:
    """Open a checkpoint, a run or stage folder (its most finished model), or an AFMoE folder in HF form.

    Raises ArtifactError when the path is none of these, CheckpointError when the model is damaged or its
    tokenizer is another one's, ConfigError when `device` is cuda and there is none. `auto` prints what it chose.

    threads: PyTorch's threads in this process; None = as many as decode fastest here, which is measured. The answers
    do not depend on it. cache_bytes, prefix_cache, cache_type: as for `infer.engine.Engine`. trainable: the parameters
    take gradients, for a training loop of your own; give them float32. answers_only: keep the weights only as the CPU
    kernels read them, about half the memory; `model` can then neither be saved nor trained. adapters:
    folders of adapters by name, for `Sampling(adapter=NAME)`; CheckpointError for one of another base or tokenizer.
    """
    environment.prepare()
    place = choose_device(device)
    folder = find_model(Path(path))
    ours = (folder / MANIFEST).exists() and read_manifest(folder)["kind"] == "checkpoint"
    config, weights = dcp.stream_model(folder) if ours else hf.stream_hf(folder)
    tokenizer = _read_tokenizer(folder, config)
    number = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    with torch.device("meta"):  # weights are assigned: a model of its own would be a second copy
        model = Afmoe(config)
    packed = answers_only and place.type == "cpu" and not_exact_as(config, number) is None
    fill(model, weights, number, packed=packed)
    model.requires_grad_(trainable)
    if not packed:  # the weights of a packed one are in its packs, where they stay
        model.to(place)
    engine = Engine(model, max_batch, limit_tokens, cache_bytes, prefix_cache=prefix_cache, cache_type=cache_type)
    if adapters:
        engine.add_adapters(_read_adapters(adapters, model, config, tokenizer))
    if threads is None:
        choose_threads(engine)
    else:
        torch.set_num_threads(threads)
    begins_with, sampling = text_beginning(folder, tokenizer), default_sampling(folder, tokenizer)
    return Loaded(model, tokenizer, config, engine, folder, read_format(folder), sampling, begins_with)


def _read_adapters(
    folders: Mapping[str, Path], model: Afmoe, config: ModelConfig, tokenizer: Tokenizer
) -> dict[str, Mapping[str, Pair]]:
    """Return the factors of adapters; each must be of this very base."""
    found = base.fingerprint(model.state_dict().items())
    result: dict[str, Mapping[str, Pair]] = {}
    for name, folder in folders.items():
        one = adapter.read(Path(folder), config)
        adapter.check_base(one, found, tokenizer.sha256, folder)
        adapter.check_shapes(one, model)
        result[name] = one.pairs
    return result


def text_beginning(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that a model folder's plain texts begin with.

    A checkpoint says how it was trained; one that does not is of the time when texts began with the end of the one
    before. Any other folder begins as its tokenizer.json does.
    """
    facts = folder / "trainer.json"
    if not facts.exists():
        return tokenizer.prefix
    return tuple(json.loads(facts.read_text(encoding="utf-8")).get("begins_with", [END_OF_TEXT]))


def default_sampling(folder: Path, tokenizer: Tokenizer) -> Sampling:
    """Return how a model likes to be sampled: its `generation_config.json`, or DEFAULT.

    Raises CheckpointError when the file is not an object, or holds a value no sampler can use.
    """
    path, stops = folder / "generation_config.json", (tokenizer.eos, tokenizer.end_of_text)
    if not path.is_file():
        return Sampling(**DEFAULT, stop_ids=stops)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        values = {
            name: facts[name] for name in ("temperature", "top_p", "top_k", "min_p") if facts.get(name) is not None
        }
        if facts.get("do_sample") is False:
            values["temperature"] = 0.0
        return Sampling(**values, stop_ids=stops)
    except (ValueError, TypeError, AttributeError, RecursionError, RequestError) as error:
        raise CheckpointError(
            "not a generation config", where=path, found=error, todo="mend the file, or remove it"
        ) from error


def find_model(path: Path) -> Path:
    """Return the folder of the model that `path` means; ArtifactError with what was looked for."""
    if not path.exists():
        raise ArtifactError("no such path", where=path, todo="give a run folder (runs/NAME) or a checkpoint")
    if path.is_file():
        raise ArtifactError(
            "a file is not a model folder",
            where=path,
            expected="a run, checkpoint or HF folder",
            todo="`freehold serve` opens .gguf files" if path.suffix == ".gguf" else None,
        )
    if _is_model(path):
        return path
    for name in MODELS:
        if _is_model(path / name):
            return path / name
    for steps in (path, path / "checkpoints", path / "pretrain" / "checkpoints"):
        found = sorted(p for p in steps.glob("step_*") if _is_model(p))
        if found:
            return found[-1]
    raise ArtifactError(
        "no model here",
        where=path,
        found=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder",
        expected="a finished checkpoint, a run with one in align/ or pretrain/, or an AFMoE folder in HF form",
        todo="`freehold run RECIPE` makes one",
    )


def _is_model(folder: Path) -> bool:
    """Whether a folder is a finished checkpoint or an AFMoE folder in HF form."""
    config = folder / "config.json"
    if not config.is_file():
        return False
    if (folder / dcp.STATE).exists():
        return (folder / MANIFEST).exists()
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "afmoe"
    except (ValueError, RecursionError, AttributeError):  # not JSON, not UTF-8, too deep, or no object
        return False


def _read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """Return the tokenizer of a model folder; for an import without one, what refuses in words when it is used."""
    if dcp.is_imported(folder) and not read_json(folder / "trainer.json").get("tokenizer_sha256"):
        found = "another tokenizer.json" if (folder / "tokenizer.json").is_file() else "no tokenizer.json"
        return cast(Tokenizer, NoTokenizer(folder, found))
    tokenizer = Tokenizer.load(folder)
    _check_tokenizer(folder, tokenizer, config)
    return tokenizer


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Refuse a tokenizer that is not the model's."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            "the tokenizer has more tokens than the model",
            where=folder / "tokenizer.json",
            found=f"{tokenizer.vocab_size:,} tokens",
            expected=f"at most {config.vocab_size:,}",
            todo="put the tokenizer the model was trained with next to the weights",
        )
    facts = folder / "trainer.json"
    recorded = read_json(facts, CheckpointError, None).get("tokenizer_sha256") if facts.exists() else None
    if recorded and recorded != tokenizer.sha256:
        raise CheckpointError(
            "not the tokenizer this model was trained with",
            where=folder / "tokenizer.json",
            found=tokenizer.sha256[:16],
            expected=recorded[:16],
            todo="put the tokenizer the model was trained with next to the weights",
        )
