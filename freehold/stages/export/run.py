"""The export stage: one checkpoint becomes a Hugging Face folder and GGUF files, proven or refused."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freehold.checkpoint.dcp import read_model
from freehold.checkpoint.hf import save_hf
from freehold.core.artifact import Workspace, read_json, read_manifest, write_json
from freehold.core.errors import ExportError
from freehold.infer.threads import computing_threads
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.model.device import choose_device
from freehold.stages.export.calibrate import calibrate, held_out
from freehold.stages.export.card import add_proof
from freehold.stages.export.check import check, check_tokenizer
from freehold.stages.export.config import ExportConfig
from freehold.stages.export.files import write_files
from freehold.stages.export.proof import Record, experts_reached, prove_gguf, prove_hf
from freehold.stages.export.reference import passages, settled
from freehold.stages.export.release import vllm_line, write_release
from freehold.tokenizer.bpe import Tokenizer
from freehold.tokenizer.output import read_format

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def run(config: ExportConfig, work: Workspace) -> dict[str, Any]:
    """Write `hf/`, `gguf/` and `parity.json` below the workspace; return sizes and figures.

    ExportError when the model cannot be expressed (nothing is written then), when tensors do not add up, or
    when a proof fails (`parity.json` then says where).
    """
    stage, _, name = config.checkpoint.partition("/")
    if stage not in work.inputs:
        raise ExportError(
            "the export does not read that stage", where="checkpoint", found=stage, expected=", ".join(work.inputs)
        )
    checkpoint = work.input(stage) / name
    model_config, state = read_model(checkpoint)
    # What llama.cpp cannot express concerns its files alone.
    reasons = check(model_config) if config.types else []
    reasons += check_tokenizer(read_json(checkpoint / TOKENIZER_FILES[0]), model_config, gguf=bool(config.types))
    if reasons:
        raise ExportError("this model cannot be exported", where=checkpoint, found="\n            ".join(reasons))

    hf, dtype = work.folder / "hf", getattr(torch, config.dtype)
    save_hf(hf, model_config, state, dtype)
    shutil.copyfile(checkpoint / TOKENIZER_FILES[0], hf / TOKENIZER_FILES[0])
    settings = read_json(checkpoint / TOKENIZER_FILES[1])
    # Without it transformers takes a tokenizer for one without limit and cuts nothing.
    write_json(hf / TOKENIZER_FILES[1], settings | {"model_max_length": model_config.max_position_embeddings})
    tokenizer = Tokenizer.load(hf)
    begins_with = read_json(checkpoint / "trainer.json").get("begins_with", [tokenizer.end_of_text])
    if begins_with != list(tokenizer.prefix):
        work.log.warn(
            f"the model learned texts that begin with {begins_with}; its exports begin with {list(tokenizer.prefix)}"
        )
    write_json(hf / "generation_config.json", _generation(config, tokenizer))
    work.log.say(f"hf/: {_megabytes(hf)}")
    work.log.say(f"with vLLM: {vllm_line(hf, config.name, read_format(hf).dialect)}")
    rounded = {name: _rounded(tensor, dtype) for name, tensor in state.items()}
    with computing_threads(config.proof.threads):
        model = _model(config, model_config, rounded)
        imatrix = _calibrated(config, work, model, tokenizer) if config.calibration.tokens else None
        files = _gguf_files(config, work, model_config, hf, imatrix)
        parity = prove(config, work, model, rounded, tokenizer, hf, files)
    write_json(work.folder / "parity.json", parity)
    failures = [f"{name}: {line}" for name, record in parity["exports"].items() for line in record["failures"]]
    if failures:
        lossy = all(re.match(r"(BF16|Q\w+): mean KL", line) for line in failures)
        raise ExportError(
            "an export is not the model it was made from",
            where=work.folder / "parity.json",
            found="\n            ".join(failures),
            todo="raise the limit in `proof` if this loss of precision is acceptable, or remove the type"
            if lossy
            else "do not use what was written: something was converted wrongly",
        )
    return {
        "tensors": len(state),
        "files": {path.name: path.stat().st_size for path in files.values()},
        "mean_kl": {name: record["mean_kl"] for name, record in parity["exports"].items()},
    }


def _model(config: ExportConfig, model_config: ModelConfig, weights: dict[str, Tensor]) -> Afmoe:
    """Return our model in fp32 with the weights that every export holds."""
    with torch.device("meta"):
        model = Afmoe(model_config)
    model.load_state_dict(weights, assign=True)
    return model.to(choose_device(config.proof.device, "proof.device", quiet=True)).eval()


def _calibrated(config: ExportConfig, work: Workspace, model: Afmoe, tokenizer: Tokenizer) -> Path:
    """Write the importance matrix `<name>.imatrix.gguf` and its report; return its path."""
    folder = work.input("tokenize")
    text, digest = held_out(folder), read_manifest(folder)["content_sha256"]
    path = work.folder / f"{config.name}.imatrix.gguf"
    found = calibrate(
        model, tokenizer, text, path, dataset=f"held-out text of {digest[:16]}, and sample conversations",
        tokens=config.calibration.tokens, floor=config.calibration.floor_tokens,
        candidates=config.calibration.candidates,
    )  # fmt: skip
    write_json(work.folder / "calibration.json", found)
    work.log.say(
        f"{path.name}: {found['tokens']:,} tokens, {len(found['prior_only'])} expert matrices with a prior only"
    )
    return path


def _gguf_files(
    config: ExportConfig, work: Workspace, model_config: ModelConfig, hf: Path, imatrix: Path | None
) -> dict[str, Path]:
    """Write the GGUF files with what belongs next to them; return their paths by type."""
    folder = work.folder / "gguf"
    files: dict[str, Path] = {kind: folder / f"{config.name}-{kind}.gguf" for kind in config.types}
    for path in files.values():  # a stage that starts again starts from the beginning
        path.unlink(missing_ok=True)
    if files:
        write_files(hf, model_config, files, name=config.name, imatrix=imatrix, say=work.log.say)
        how = config.generation
        write_release(
            folder, files, model_config, name=config.name, source=hf, licence=config.licence,
            generation=how.model_dump() if how.temperature else {"temperature": 0},
        )  # fmt: skip
    for path in files.values():
        work.log.say(f"gguf/{path.name}: {_megabytes(path)}")
    return files


def prove(
    config: ExportConfig,
    work: Workspace,
    model: Afmoe,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    hf: Path,
    files: dict[str, Path],
) -> dict[str, Any]:
    """Compare every export with our model holding `weights`, and return what goes into `parity.json`."""
    model_config, device = model.config, next(model.parameters()).device
    named = list(passages(tokenizer, model_config))
    said, cut_tokens = settled(model, named)
    tokens = sum(len(p.ids) for p in said)
    if tokens < cut_tokens:
        raise ExportError(
            "the model's routing is too close to call to prove anything",
            where=config.checkpoint,
            found=f"{cut_tokens} of {cut_tokens + tokens} tokens follow a tie between experts",
            todo="train the router (ties are rare in a trained model), or look for experts with equal weights",
        )
    work.log.say(f"our model on {len(said)} passages, {tokens:,} tokens, on {device}")
    exports: dict[str, Record] = {}
    start = time.monotonic()
    for name in ("hf", *files):
        if name == "hf":
            record = prove_hf(hf, weights, said, tokenizer, config.proof, device)
        else:
            log = work.folder / "log" / f"llama_{name}.txt"
            record = prove_gguf(files[name], hf, name, model_config, said, tokenizer, config.proof, log)
        exact, errors = record.pop("_exact_mean_kl"), record.pop("_errors", None)
        if errors is not None:
            add_proof(files[name], record, errors, config.proof.limit(name))
        exports[name] = record
        now = time.monotonic()
        work.log.metrics(len(exports), {f"export/{name}/mean_kl": exact, f"export/{name}/proof_s": now - start})
        verdict = "proven" if record["passed"] else "FAILED"
        work.log.say(
            f"{name} {verdict}: mean KL {exact:.2g}, same best token {record['top1_agreement']:.1%} "
            f"of {record['positions']} positions, {now - start:.1f} s"
        )
        start = now
    return {
        "reference": "our model in fp32, holding the exported weights",
        "weights": config.dtype,
        "passages": len(said),
        "tokens": tokens,
        "tokens_after_routing_ties_skipped": cut_tokens,
        "experts_reached": experts_reached(said, model_config),
        "limits": {name: config.proof.limit(name) for name in ("HF", *files)},
        "exports": exports,
        "note": "KL below 1e-8 is given as the power of ten above it; exact figures are in metrics.jsonl.",
    }


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as every export holds it, in fp32: matrices rounded, vectors as they are."""
    return tensor.to(dtype).float() if tensor.ndim > 1 else tensor.float()


def _generation(config: ExportConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    how = config.generation
    sampling = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k} if how.temperature else {}
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": [tokenizer.eos, tokenizer.end_of_text],
        "pad_token_id": tokenizer.pad,
        "do_sample": how.temperature > 0,
        **sampling,
    }


def _megabytes(path: Path) -> str:
    total = sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size
    return f"{total / 1e6:,.1f} MB"
