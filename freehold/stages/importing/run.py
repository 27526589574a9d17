"""Import: a published folder becomes `import/base`, a checkpoint that every stage takes as one of our own.

The weights are linked, not copied, and hashed into the checkpoint's manifest: a change of the original is noticed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from freehold.checkpoint import hf
from freehold.core.artifact import (
    MANIFEST,
    Workspace,
    atomic_folder,
    hash_files,
    read_json,
    write_atomic,
    write_json,
    write_manifest,
)
from freehold.core.config import to_yaml
from freehold.core.errors import ArtifactError, CheckpointError, DataError, LicenceError
from freehold.core.log import Log
from freehold.ledger.evidence import agreement, licence_text
from freehold.ledger.licence import from_free_text, normalise
from freehold.ledger.policy import Claim, gate
from freehold.model.config import ModelConfig, parameter_counts
from freehold.stages.importing.config import ImportConfig
from freehold.tokenizer.bpe import Tokenizer
from freehold.tokenizer.template import JINJA

BASE = "base"
"""Name of the checkpoint: what align and evaluate look for unless a recipe says otherwise."""
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
              "generation_config.json")  # fmt: skip
"""Files that are copied where they are there. Python files of a published folder are never taken."""
LONGEST_ROW = 512
"""Tokens of a row in the recipe that import writes, where the model's context is longer."""
LICENCE_FILES = ("LICEN[CS]E*", "COPYING*", "NOTICE*")
LONGEST_LICENCE_BYTES = 1_000_000


def run(config: ImportConfig, work: Workspace) -> dict[str, Any]:
    """Write `base/`, `rights.json` and `recipe.yaml`; return parameters, tensors and what the tokenizer can do.

    Raises LicenceError for a licence the policy stops or that a file of the folder contradicts, CheckpointError for
    weights that are not exactly an AFMoE model's or not finite, and ArtifactError when there is no such folder.
    """
    if not (config.path / "config.json").is_file():
        raise ArtifactError(
            "no model to import", where=config.path, expected="a folder with config.json and safetensors"
        )
    rights = judge(config)
    model = hf.check_hf(config.path)
    if config.check_finite:
        check_finite(config.path, work)
    tokenizer, why = read_tokenizer(config.path, model)
    with atomic_folder(work.folder / BASE) as folder:
        placed = [place(source, folder / name) for source, name in _weights(config.path)]
        for name in ("config.json", *TEXT_FILES):
            if (config.path / name).is_file():
                shutil.copyfile(config.path / name, folder / name)
        write_json(folder / "trainer.json", _facts(rights, tokenizer))
        write_manifest(folder, kind="checkpoint", counts={"tensors": hf.count_tensors(model)}, files=hash_files(folder))
    write_json(work.folder / "rights.json", rights)
    write_atomic(work.folder / "recipe.yaml", _recipe(work.folder / BASE, model, tokenizer))
    counts, linked = parameter_counts(model), all(placed)
    for line in _lines(config, rights, counts, linked, why):
        work.log.say(f"  {line}")
    return {
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "checkpoints": {BASE: "Imported"},
        "linked": linked,
        "tokenizer": "" if why else "byte-level BPE",
        "without_tokenizer": why,
    }


def import_model(config: ImportConfig, *, clean: bool = False, quiet: bool = False) -> Path:
    """Import into `<runs_dir>/<name>/import`; return that folder. ArtifactError when it is there and not `clean`."""
    folder = config.runs_dir / config.name / "import"
    if (folder / MANIFEST).exists() and not clean:
        raise ArtifactError(
            "there is a model of this name already",
            where=folder,
            todo="give another --name, or --clean to import again",
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = Log(folder, quiet=quiet)
    started = time.monotonic()
    counts = run(config, Workspace(folder, "import", config.name, 0, log))
    seconds = round(time.monotonic() - started, 1)
    # What is linked was hashed into the checkpoint's own manifest; reading it again would take as long once more.
    files = hash_files(folder, lambda path: path.parent == folder)
    recorded = config.model_dump(mode="json")
    write_manifest(
        folder, kind="import", counts=counts, files=files, inputs={}, seed=0, config=recorded, seconds=seconds
    )
    log.close()
    return folder


def judge(config: ImportConfig) -> dict[str, Any]:
    """Return the record of rights; LicenceError when the policy stops it or the folder's own files contradict it."""
    licence, evidence = normalise(config.licence), str(config.licence_evidence)
    _check_quote(config)
    conflicts = list(_conflicts(config.path, licence))
    if conflicts and not config.settled:
        raise LicenceError(
            "files of the model contradict its licence",
            where=config.path,
            found="\n            ".join(conflicts),
            expected=licence,
            todo="give the licence that the files show, or say with settled=REASON why they do not hold",
        )
    evidence += f"; settled: {config.settled}" if conflicts else ""
    confidence = "high" if config.licence_evidence.file and not conflicts else "medium"
    claim = Claim(config.name, config.origin or config.path.name, "", "", licence, evidence, confidence)
    for _ in gate([claim], config.policy):
        pass  # read to its end: it raises after the last claim
    return {
        "source": config.name,
        "source_version": config.origin or config.path.name,
        "licence": licence,
        "licence_evidence": evidence,
        "licence_confidence": confidence,
        "conflicts": conflicts,
        "vendor": config.vendor,
        "country": config.country,
        "files": hash_files(config.path, lambda path: path.name == "config.json"),
    }


def _check_quote(config: ImportConfig) -> None:
    """Raise LicenceError when the quote is not in the file it is said to be in, or shows another licence."""
    given = config.licence_evidence
    if not given.file:
        return
    paths = [path for path in sorted(config.path.glob(given.file)) if path.is_file()]
    texts = [_text(path) for path in paths]
    if not any(" ".join(given.quote.split()) in " ".join(text.split()) for text in texts):
        raise LicenceError(
            "the quoted evidence is not in the folder",
            where=config.path / given.file,
            found=", ".join(path.name for path in paths) or "no such file",
            expected=f'"{given.quote}"',
            todo="quote words that are there, or give a rule",
        )


def _conflicts(folder: Path, licence: str) -> Iterator[str]:
    """Yield what in the folder says another licence than the claimed one: licence files, and the card's first lines."""
    for pattern in LICENCE_FILES:
        for path in sorted(folder.glob(pattern)):
            found = licence_text(_text(path))
            if agreement(licence, found) == "contradicts":
                yield f"{path.name} is the text of {', '.join(found.ids)}"
    card = folder / "README.md"
    if not card.is_file():
        return
    for number, line in enumerate(_text(card).splitlines()[:60], 1):
        key, _, value = line.partition(":")
        if key.strip() == "license" and (said := from_free_text(value.strip())) and said not in licence:
            yield f"README.md:{number} says license: {said}"


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(LONGEST_LICENCE_BYTES).decode("utf-8", errors="replace")


def check_finite(folder: Path, work: Workspace) -> None:
    """Read every tensor once; CheckpointError names the first that holds NaN or infinity."""
    for name, tensor in work.log.track(hf.tensors(folder), "read weights", unit="tensors"):
        if not bool(tensor.isfinite().all()):
            raise CheckpointError("weights are not finite", where=f"{folder}: {name}", todo="fetch the file again")


def read_tokenizer(folder: Path, model: ModelConfig) -> tuple[Tokenizer | None, str]:
    """Return the folder's tokenizer, or None and why text cannot be turned into ids with it."""
    if not (folder / "tokenizer.json").is_file():
        return None, "the folder has no tokenizer.json"
    try:
        tokenizer = Tokenizer.load(folder)
    except DataError as error:
        return None, f"{error.what}: found {error.found}, expected {error.expected}"
    if tokenizer.vocab_size > model.vocab_size:
        return None, f"it has {tokenizer.vocab_size:,} tokens, the model {model.vocab_size:,} rows"
    return tokenizer, ""


def place(source: Path, target: Path) -> bool:
    """Give a file a second name, or copy it where the file system cannot; return whether it was linked."""
    try:
        os.link(source.resolve(), target)  # a cache of downloads holds links to the files
        return True
    except OSError:
        shutil.copyfile(source, target)
        return False


def _weights(folder: Path) -> Iterator[tuple[Path, str]]:
    for name in hf.files_of(folder):
        yield folder / name, name
    if (folder / hf.INDEX).is_file():
        yield folder / hf.INDEX, hf.INDEX


def _facts(rights: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return trainer.json: what a checkpoint says of itself, as far as a published model can say it."""
    return {
        "imported": True,
        "rights": rights,
        "stage": "import",
        "stage_type": "Imported",
        "step": 0,
        "tokens": 0,  # how many it had seen is not known
        "phase": "",
        "parent": "",
        "skipped_steps": [],
        "tokenizer_sha256": tokenizer.sha256 if tokenizer else "",
        "begins_with": list(tokenizer.prefix) if tokenizer else [],
    }


def _recipe(folder: Path, model: ModelConfig, tokenizer: Tokenizer | None) -> str:
    """Return the recipe that others take as `base:` to start from this model."""
    shape = model.model_dump(mode="json")
    batch = {"context_tokens": min(LONGEST_ROW, model.max_position_embeddings)}
    sections: dict[str, Any] = {
        "pretrain": {"model": shape, "parent": str(folder), "phases": {}, "batch": batch},
        "align": {"batch": batch},
        "evaluate": {
            "checkpoints": ["base", "preview"],
            "task_checkpoints": ["base", "preview"],
            "context_tokens": min(LONGEST_ROW, model.max_position_embeddings - 1),
        },
    }
    if tokenizer:
        sections["tokenize"] = {"tokenizer": str(folder), "vocab_size": tokenizer.vocab_size}
    text = (
        "# Made by `freehold import`. Begin a recipe of yours with `base: "
        + str(folder.parent / "recipe.yaml")
        + "`.\n"
    )
    return text + to_yaml(sections)


def _lines(
    config: ImportConfig, rights: dict[str, Any], counts: dict[str, int], linked: bool, why: str
) -> Iterator[str]:
    yield f"{config.path}: {counts['total']:,} parameters, {counts['active']:,} active a token, {rights['licence']}"
    yield "weights are linked, not copied" if linked else "weights are copied: the file system cannot link them"
    if why:
        yield f"no text with this model, only ids: {why}"
    elif _template(config.path) not in ("", JINJA.strip()):
        yield "its chat template is kept, but conversations are rendered by Freehold's own"


def _template(folder: Path) -> str:
    """Return the chat template of a folder; empty without one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _text(path).strip()
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return ""
    return str(read_json(config, CheckpointError, None).get("chat_template") or "").strip()
