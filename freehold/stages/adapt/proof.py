"""The written adapter opened by the tools of others, on the same base, and compared with ours; all in float32."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freehold.checkpoint import adapter as adapters
from freehold.checkpoint import base as frozen
from freehold.checkpoint import hf
from freehold.core.artifact import package_versions
from freehold.infer.llama import Llama
from freehold.model import adapted
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig

POSITIONS = 6
"""Distributions asked of llama.cpp."""


def prove(
    folder: Path,
    gguf: Path,
    base: Path,
    config: ModelConfig,
    ids: list[int],
    tolerance: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return a record for each tool: the largest difference of a log-probability, or why it did not run.

    Ours is the base with the adapter as read back from its folder. Whether the adapter changes the answer at all is in
    the record, too: a tool that ignores it would otherwise pass.
    """
    room = folder.with_name("proof.tmp")
    shutil.rmtree(room, ignore_errors=True)
    model = frozen.build(base, config, torch.float32)
    # What every tool opens is the base as it is published: matrices rounded to bfloat16.
    state = {n: t.bfloat16().float() if t.ndim > 1 else t for n, t in model.state_dict().items()}
    model.load_state_dict(state)
    plain = _logprobs(model, ids)
    adapters.put_on(model, adapters.read(folder, config))
    ours = _logprobs(model, ids)
    record: dict[str, Any] = {"tokens": len(ids), "tolerance": tolerance, "canary": float((ours - plain).abs().max())}
    try:
        hf.save_hf(room / "hf", config, state, torch.float32)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if (base / name).is_file():
                shutil.copyfile(base / name, room / "hf" / name)
        record["tools"] = {
            "peft": _tried(lambda: _peft(room / "hf", folder, ids, ours)),
            "transformers": _tried(lambda: _transformers(room / "hf", folder, ids, ours)),
            "llama.cpp": _tried(lambda: _llama(room, gguf, ids, ours)),
            "vLLM": {"not_run": "its 2-D layout is checked by keys and shapes", **check_layout(folder, config)},
        }
    finally:
        shutil.rmtree(room, ignore_errors=True)
    record["failures"] = _failures(record, tolerance)
    for tool, found in record["tools"].items():
        difference = found.get("difference")
        say(f"  {tool}: " + (f"{difference:.1e} in a log-probability" if difference is not None else found["not_run"]))
    return record


def _failures(record: dict[str, Any], tolerance: float) -> list[str]:
    found = []
    if record["canary"] == 0:
        found.append("the adapter changes no answer")
    for tool, result in record["tools"].items():
        if result.get("difference", 0.0) > tolerance or result.get("wrong"):
            found.append(f"{tool}: {result.get('wrong') or result['difference']}")
    return found


def _tried(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a tool said, or that it is not installed."""
    try:
        return run()
    except ImportError as missing:
        return {"not_run": f"not installed ({missing.name})"}


@torch.no_grad()
def _logprobs(model: Afmoe, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids]))[0].double().log_softmax(-1)


def _difference(ours: Tensor, logits: Tensor) -> dict[str, Any]:
    theirs = logits.double().log_softmax(-1)
    return {"difference": float((theirs - ours).abs().max())}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the tools say of keys that they rename while they load."""
    import logging
    import warnings

    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger("transformers").setLevel(level)


def _open(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )


def _peft(base: Path, folder: Path, ids: list[int], ours: Tensor) -> dict[str, Any]:
    import peft

    with _quiet(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(_open(base), folder)
        found = _difference(ours, model(torch.tensor([ids])).logits[0])
    return {"version": peft.__version__, **found}


def _transformers(base: Path, folder: Path, ids: list[int], ours: Tensor) -> dict[str, Any]:
    import peft  # which it needs for adapters
    import transformers

    del peft
    with _quiet(), torch.no_grad():
        model = _open(base)
        model.load_adapter(str(folder))
        found = _difference(ours, model(torch.tensor([ids])).logits[0])
    return {"version": transformers.__version__, **found}


def _llama(room: Path, gguf: Path, ids: list[int], ours: Tensor) -> dict[str, Any]:
    """Export the base as F32 GGUF by our own command and open it with the adapter."""
    if importlib.util.find_spec("xllamacpp") is None:
        return {"not_run": "not installed (xllamacpp)"}
    if not (room / "hf" / "tokenizer.json").is_file():
        return {"not_run": "the base has no tokenizer.json"}
    command = [sys.executable, "-m", "freehold.cli", "export", str(room / "hf"), "--types", "F32", "--output",
               str(room / "gguf"), "--quiet"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"wrong": f"the base could not be exported: {done.stderr[-300:]}"}
    path = next((room / "gguf").glob("*.gguf"))
    worst = 0.0
    with Llama(path, len(ids) + 16, exact=True, log=room / "llama.txt", adapter=gguf) as llama:
        for length in np.linspace(len(ids) // 2, len(ids), POSITIONS).astype(int):
            drawn = {"logit_bias": [[_letter(llama), 1e4]], "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
            body = {"prompt": ids[:length], "n_predict": 1, "n_probs": ours.shape[1], **drawn}
            top = llama.ask("/completion", body)["completion_probabilities"][0]["top_logprobs"]
            theirs = np.full(ours.shape[1], -np.inf)
            for entry in top:
                theirs[entry["id"]] = entry["logprob"]
            theirs -= np.logaddexp.reduce(theirs)
            mine = ours[length - 1].numpy()
            said = np.isfinite(theirs) & (mine > -20)
            worst = max(worst, float(np.abs(theirs - mine)[said].max()))
    return {"version": package_versions().get("xllamacpp", ""), "difference": worst, "positions": POSITIONS}


def _letter(llama: Llama) -> int:
    return int(llama.ask("/tokenize", {"content": "a", "add_special": False, "parse_special": False})["tokens"][0])


def check_layout(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Return what is wrong with an adapter in vLLM's 2-D layout, by keys and shapes; empty when nothing is."""
    found = adapters.read(folder, config)
    with torch.device("meta"):
        model = Afmoe(config)
    places = {name: adapted.shape_of(module, attribute) for _, name, module, attribute in adapted.sites(model)}
    for name, pair in found.pairs.items():
        stacks, outs, ins = places[name]
        if pair.a.shape != (stacks, pair.rank, ins) or pair.b.shape != (stacks, outs, pair.rank):
            return {"wrong": f"{name}: {tuple(pair.a.shape)}, {tuple(pair.b.shape)}"}
    return {"matrices": len(found.pairs)}
