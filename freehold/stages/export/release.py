"""What goes next to GGUF files: a Modelfile for Ollama each, a README with front matter, and the licence. No torch."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freehold.core.artifact import write_atomic
from freehold.model.config import ModelConfig

LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*")
GO_TEMPLATE = """{{- range .Messages }}<|im_start|>{{ if eq .Role "tool" }}user
<tool_response>
{{ .Content }}
</tool_response>{{ else }}{{ .Role }}
{{ .Content }}{{ end }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
"""Our chat template in Ollama's language, without tools; Ollama adds the begin token itself."""


def write_release(
    folder: Path, files: Mapping[str, Path], config: ModelConfig, *, name: str, source: Path, licence: str = "",
    generation: Mapping[str, Any] | None = None, notes: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write Modelfiles, README.md and LICENSE for GGUF files (type: path) into their folder.

    `source` is the model folder, whose LICENSE and chat template are taken; `licence` an SPDX expression; `notes` a
    line about each type for the README.
    """
    for path in files.values():
        text = modelfile(path.name, config, chat_template(source), generation or {})
        write_atomic(path.with_suffix(".Modelfile"), text)
    found = next((path for pattern in LICENCE_FILES for path in sorted(source.glob(pattern)) if path.is_file()), None)
    if found and not licence:
        shutil.copyfile(found, folder / "LICENSE")
    else:
        write_atomic(folder / "LICENSE", licence_text(licence))
    write_atomic(folder / "README.md", readme(files, config, name, licence, notes or {}))


def vllm_line(folder: Path, name: str, dialect: str) -> str:
    """Return the command that serves a Hugging Face folder with vLLM, with its parsers for this dialect of calls."""
    parser = {"hermes": "hermes", "xml": "qwen3_coder"}[dialect]
    return (
        f"vllm serve {shlex.quote(folder.as_posix())} --served-model-name {shlex.quote(name)}"
        f" --enable-auto-tool-choice --tool-call-parser {parser} --reasoning-parser deepseek_r1"
    )


def licence_text(licence: str) -> str:
    """Return the LICENSE of weights whose licence is only named, or not stated at all."""
    if licence:
        return f"SPDX-License-Identifier: {licence}\n\nThe weights in this folder are licensed as named above.\n"
    return (
        "No licence has been stated for the weights in this folder: without one, only their owner may use them.\n"
        "State it with `export.licence` in the recipe, or put a LICENSE into the model folder.\n"
    )


def chat_template(folder: Path) -> str:
    """Return the chat template of a model folder; empty when it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = settings.get("chat_template")
    return template if isinstance(template, str) else ""


def modelfile(file: str, config: ModelConfig, template: str, generation: Mapping[str, Any]) -> str:
    """Return an Ollama Modelfile; with a template where the model's is ours, else Ollama takes the one in the file."""
    from freehold.tokenizer.template import JINJA

    lines = [f"FROM ./{file}"]
    if template == JINJA:
        lines.append(f'TEMPLATE """{GO_TEMPLATE}"""')
    lines += [f"PARAMETER num_ctx {config.max_position_embeddings}", 'PARAMETER stop "<|im_end|>"']
    lines += [f"PARAMETER {key} {value}" for key, value in generation.items()]
    return "\n".join(lines) + "\n"


def readme(files: Mapping[str, Path], config: ModelConfig, name: str, licence: str, notes: Mapping[str, str]) -> str:
    """Return the README of a folder of GGUF files."""
    front = ["---", f"license: {licence.lower() or 'other'}", "library_name: gguf", "pipeline_tag: text-generation"]
    front += [f"base_model: {name}", "tags:", "- gguf", "- afmoe", "- freehold", "---"]
    rows = ["| file | type | MB | |", "|---|---|--:|---|"]
    for kind, path in files.items():
        rows.append(f"| {path.name} | {kind} | {path.stat().st_size / 1e6:,.1f} | {notes.get(kind, '')} |")
    first = next(iter(files.values())).name if files else f"{name}.gguf"
    return "\n".join([
        *front, "", f"# {name}, GGUF", "",
        f"AFMoE, {config.num_hidden_layers} layers, {config.num_experts} experts of which a token uses "
        f"{config.num_experts_per_tok}. Context: at most {config.max_position_embeddings:,} tokens.",
        "", *rows, "",
        "Each file has a card (`.card.md`, `.card.json`) with what was proven, and a Modelfile.", "",
        f"    llama-cli -m {first} -cnv", f"    ollama create {name.lower()} -f {Path(first).stem}.Modelfile", "",
        "The licence is in LICENSE.", "",
    ])  # fmt: skip
