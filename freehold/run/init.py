"""`freehold init`: look at files, and write a commented recipe that fits them and this machine.

What can be seen is not asked: kinds of files, conversations and their format, a model, the amount of text, its
language, a licence file, the device and its speed. What cannot be seen is whether the text may be used: without
`--licence` and without a licence file the recipe says so, and gather stops there.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from freehold.conversations.files import format_of
from freehold.conversations.survey import survey
from freehold.core.errors import ArtifactError, DataError
from freehold.run.sizing import Machine, Size, choose

TEXT = (".txt", ".md", ".rst", ".text", ".html", ".htm", ".pdf")
ROWS = (".jsonl", ".ndjson")
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*")
UNSTATED = "LicenseRef-Unstated"
SAMPLE_FILES, SAMPLE_CHARACTERS = 20, 2000
CONVERSATION_EPOCHS = 3
CHARACTERS_PER_TOKEN = 3.2


@dataclass
class Found:
    """What is in the files."""

    folders: list[Path] = field(default_factory=list)
    """Folders of text."""
    endings: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0
    texts: int = 0
    rows: list[Path] = field(default_factory=list)
    """JSON lines with a text in each."""
    conversations: dict[Path, str] = field(default_factory=dict)
    """File -> format."""
    models: list[Path] = field(default_factory=list)
    licence_file: Path | None = None
    languages: tuple[str, ...] = ()
    ignored: Counter[str] = field(default_factory=Counter)
    """Endings that no reader takes."""


def look(paths: list[Path]) -> Found:
    """Look at files and folders; ArtifactError when one is not there, DataError when nothing can be used."""
    found = Found()
    for path in paths:
        if not path.exists():
            raise ArtifactError("no such file or folder", where=path, todo="give the folder that holds your text")
        if path.is_dir() and (path / "config.json").is_file():
            found.models.append(path)
        elif path.is_dir():
            _look_into(path, found)
        else:
            _look_at(path, found, alone=True)
    if not (found.texts or found.rows or found.conversations or found.models):
        raise DataError(
            "nothing here can be trained on",
            where=", ".join(map(str, paths)),
            found=", ".join(f"{n} x {ending or 'no ending'}" for ending, n in found.ignored.most_common(5))
            or "no files",
            expected="text (" + ", ".join(TEXT) + "), JSON lines, or an AFMoE model in Hugging Face form",
            todo="docs/own-data.md lists the formats and how to add one",
        )
    found.languages = _languages(found)
    return found


def _endings(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} x {ending or 'no ending'}" for ending, count in counts.most_common(5))


def _look_into(folder: Path, found: Found) -> None:
    before = found.texts
    # Sorted, and links not followed: as the folder reader of gather does it.
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            _look_at(file, found)
    if found.texts > before:
        found.folders.append(folder)
    licences = [path for pattern in LICENCES for path in sorted(folder.glob(pattern)) if path.is_file()]
    found.licence_file = found.licence_file or (licences[0] if licences else None)


def _look_at(file: Path, found: Found, *, alone: bool = False) -> None:
    ending = file.suffix.lower()
    if ending in ROWS or (ending == ".json" and alone):
        try:
            found.conversations[file] = format_of(file)
        except DataError:
            # Not conversations: rows of text, if they have any.
            (found.rows.append(file) if _has_text(file) else found.ignored.update([ending]))
            found.text_bytes += file.stat().st_size if file in found.rows else 0
    elif ending in TEXT and not any(file.match(pattern) for pattern in LICENCES):
        found.texts += 1
        found.endings[ending] += 1
        # A page or a PDF is mostly what surrounds its text.
        found.text_bytes += file.stat().st_size // (4 if ending in (".html", ".htm", ".pdf") else 1)
        if alone:
            found.folders.append(file.parent)
    else:
        found.ignored[ending] += 1


def _has_text(file: Path) -> bool:
    """Return whether the first row of JSON lines is an object with a key `text`."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        try:
            row = json.loads(next(lines, ""))
        except ValueError:
            return False
    return isinstance(row, dict) and isinstance(row.get("text"), str)


def _languages(found: Found) -> tuple[str, ...]:
    """Return the languages of some of the files, the commonest first."""
    from freehold.text.language import language_detector

    detect, counts = language_detector(), Counter[str]()
    files = [f for folder in found.folders for f in sorted(folder.rglob("*")) if f.suffix.lower() in (".txt", ".md")]
    for file in files[:: max(len(files) // SAMPLE_FILES, 1)][:SAMPLE_FILES]:
        with file.open(encoding="utf-8", errors="replace") as stream:
            text = stream.read(SAMPLE_CHARACTERS)
        if text.strip():
            counts[detect(text.replace("\n", " "))[0]] += 1
    return tuple(language for language, _ in counts.most_common(3) if language != "unknown")


# -- the recipe ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A recipe, and what to say about it."""

    text: str
    said: list[str]
    """What was seen and chosen, a line each."""
    next: list[str]
    """The commands to type now."""


def write_recipe(found: Found, name: str, output: Path, machine: Machine, limit_s: float, licence: str = "") -> Written:
    """Return the recipe for what was found; `output` is where it will be, for the commands."""
    if found.models:
        return _from_model(found, name, output, licence)
    size = choose(found.text_bytes, machine, limit_s)
    parts = [
        _head(found, size, name, machine),
        _sources(found, licence),
        _curate(found),
        _pretrain(size, machine),
        _align(found, size, machine),
    ]
    said = [*_seen(found), _chosen(size, machine)]
    if _rights(found, licence)[0] == UNSTATED:
        said.append(
            f"not seen: the right to use this text. Set `licence` and `licence_evidence` in {output}, or run this "
            "again with --licence (an SPDX expression, or LicenseRef-Own for your own work)"
        )
    return Written("\n".join(parts), said, [f"freehold run {output} --dry-run", f"freehold run {output}"])


def _seen(found: Found) -> list[str]:
    lines = []
    if found.texts:
        kinds = ", ".join(f"{count:,} {ending}" for ending, count in found.endings.most_common())
        lines.append(f"text: {found.texts:,} files ({kinds}), about {found.text_bytes / 1e6:,.1f} MB")
    lines += [f"rows of text: {path}" for path in found.rows]
    lines += [f"conversations: {path} ({kind})" for path, kind in found.conversations.items()]
    lines += [f"model: {path}" for path in found.models]
    if found.languages:
        lines.append(f"languages: {', '.join(found.languages)}")
    if found.licence_file:
        lines.append(f"licence file: {found.licence_file}")
    if found.ignored:
        lines.append(f"not taken: {_endings(found.ignored)}")
    return lines


def _chosen(size: Size, machine: Machine) -> str:
    return (
        f"chosen: {size.name}, {size.active / 1e6:.1f} M parameters active, vocabulary {size.vocab_size:,}; "
        f"{size.steps:,} steps of {size.step_tokens:,} tokens ({size.epochs:.1f} readings of the text), about "
        f"{_time(size.seconds)} on {machine.device}"
    )


def _time(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _head(found: Found, size: Size, name: str, machine: Machine) -> str:
    files = f"{len(found.rows)} files of rows, {len(found.conversations)} of conversations"
    return f"""# Written by `freehold init`. Every line is yours to change; `freehold schema` lists what else there is.
#
# {found.texts:,} text files and {files}: about {found.text_bytes / 1e6:,.1f} MB of text.
# By the planner pre-training takes about {_time(size.seconds)} and {size.peak_bytes / 1e9:.1f} GB on {machine.device}.
# That is an estimate: the first minute of the run shows tokens/s and the time left.
name: {name}
seed: 0
"""


def _rights(found: Found, licence: str) -> tuple[str, str, list[str]]:
    """Return licence, the lines of its evidence, and what the policy must allow beyond its defaults."""
    if licence:
        return licence, '{rule: "stated by whoever typed freehold init --licence"}', [licence]
    if found.licence_file:
        return "detect", "", []
    return UNSTATED, '{rule: "not stated: whoever runs this has to say what the text is under"}', []


def _sources(found: Found, licence: str) -> str:
    expression, evidence, allowed = _rights(found, licence)
    rights = [f"licence: {expression}", *([f"licence_evidence: {evidence}"] if evidence else [])]
    # Nothing next to a single file says what it is under.
    file_rights = rights if expression != "detect" else [f"licence: {UNSTATED}"]
    members = f"members: {json.dumps([f'*{ending}' for ending in sorted(found.endings)])}"
    reader = ["reader: auto               # pages and PDF as well as text"] if _mixed(found) else []
    lines = ["gather:", "  sources:"]
    for number, folder in enumerate(dict.fromkeys(found.folders)):
        lines += _source("text", number, "folder", folder, [members, *reader, *rights])
    for number, path in enumerate(found.rows):
        lines += _source("rows", number, "jsonl", path, file_rights)
    for number, (path, kind) in enumerate(found.conversations.items()):
        lines += _source("talks", number, "conversations", path, [f"format: {kind}", *file_rights])
    if not found.conversations:
        lines += ["    generated:                 # exercises and talk, so that there is something to align on"]
        lines += [f"      {key}" for key in ("kind: generated", "factbook: null", "max_bytes: 300_000")]
        lines += ["      conversations: 4_000"]
    if allowed:
        # What the generated text and the exercises in it are under.
        own = [] if found.conversations else ["LicenseRef-Freehold-Generated", "Apache-2.0"]
        lines += ["  policy:", f"    allow: {json.dumps(list(dict.fromkeys([*allowed, *own])))}"]
    return "\n".join(lines) + "\n"


def _source(name: str, number: int, kind: str, path: Path, settings: list[str]) -> list[str]:
    """Return the lines of one source; the second of a kind is called name1."""
    place = f"path: {json.dumps(str(path.absolute()))}"
    return [f"    {name}{number or ''}:", *(f"      {line}" for line in (f"kind: {kind}", place, *settings))]


def _mixed(found: Found) -> bool:
    return any(ending in found.endings for ending in (".html", ".htm", ".pdf"))


def _curate(found: Found) -> str:
    if not found.languages or found.languages == ("en",):
        return ""
    # Stop words are known of English only: for other languages that filter would drop everything.
    return f"""curate:
  kinds:
    prose: {{languages: {json.dumps(list(found.languages))}, quality: false}}   # as detected; the default is en
"""


def _pretrain(size: Size, machine: Machine) -> str:
    model = ", ".join(f"{key}: {value}" for key, value in size.model.items())
    stable = max(size.steps // 2, 1)
    anneal = max(size.steps - stable, 1)
    every = max(size.steps // 10, 10)
    micro = f", micro_sequences: {size.micro_sequences}" if size.micro_sequences < size.sequences else ""
    device = "cpu" if machine.device == "cpu" else "cuda"
    return f"""tokenize:
  vocab_size: {size.vocab_size}             # for this much text; the model has the same

pretrain:
  model: {{{model}}}
  batch: {{context_tokens: {size.context_tokens}, sequences: {size.sequences}{micro}}}
  balance: {{kind: smebu, rate: 5e-3}}    # short runs need larger steps than the default
  trainer: {{checkpoint_every_steps: {every}, validate_every_steps: {5 * every}, validation_tokens: 8192}}
  parallel: {{device: {device}}}
  phases:                        # {size.epochs:.1f} readings of the text; the second half anneals
    stable: {{steps: {stable}, warmup_steps: {min(20, stable)}, checkpoint: truebase, stage_type: TrueBase}}
    anneal: {{steps: {anneal}, shape: linear, end: 0.0, checkpoint: base, stage_type: Base}}
"""


def align_steps(found: Found, step_tokens: int) -> int:
    """Return the steps that read the conversations a few times; a default for generated ones."""
    if not found.conversations:
        return 60
    characters = 0.0
    for path, kind in found.conversations.items():
        characters += sum(survey(path, kind).lengths)
    return max(round(CONVERSATION_EPOCHS * characters / CHARACTERS_PER_TOKEN / step_tokens), 5)


def _align(found: Found, size: Size, machine: Machine) -> str:
    steps = align_steps(found, size.step_tokens)
    device = "cpu" if machine.device == "cpu" else "cuda"
    why = f"about {CONVERSATION_EPOCHS} readings of the conversations" if found.conversations else "of generated talk"
    return f"""align:
  batch: {{context_tokens: {size.context_tokens}, sequences: {size.sequences}}}
  parallel: {{device: {device}}}
  phases:                        # {why}
    sft:
      {_sft(steps)}
"""


def _sft(steps: int) -> str:
    warmup = min(5, steps)
    return (
        f"{{steps: {steps}, warmup_steps: {warmup}, shape: linear, end: 0.0, checkpoint: preview, stage_type: Preview}}"
    )


def _from_model(found: Found, name: str, output: Path, licence: str) -> Written:
    """Return the recipe that starts from a published model, on conversations if there are some."""
    model, base = found.models[0], f"{name}-model"
    rights = licence or "SPDX-EXPRESSION"
    sources = _sources(found, licence) if found.conversations or found.texts else ""
    text = f"""# Written by `freehold init`. It starts from the model in {model}; import that first (docs/import.md).
base: {Path("runs").absolute() / base / "import" / "recipe.yaml"}
name: {name}

{sources}
align:
  phases:
    sft:
      {_sft(align_steps(found, 4096))}
export: {{types: []}}             # GGUF files need a tokenizer of Freehold's own chain
"""
    step = f'freehold import {model} --name {base} --licence {rights} --evidence "LICENSE: WORDS OF THE LICENCE"'
    lines = [*_seen(found), *([] if found.conversations else ["there are no conversations to align it on: add a file"])]
    return Written(text, lines, [step, f"freehold run {output} --dry-run"])


def measured_machine() -> Machine:
    """Return this machine as the planner sees it, with the matrix rate it has now; loads PyTorch."""
    import torch

    from freehold.model.device import choose_device
    from freehold.trainer.monitor import gemm_flops_per_s

    device = choose_device("auto", quiet=True)
    rate = gemm_flops_per_s(torch.bfloat16, device, size=8192 if device.type == "cuda" else 1024)
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else "cpu"
    known = next((kind for kind in ("b300", "b200", "h200", "h100", "a100") if kind in name), None)
    return Machine("cpu" if device.type == "cpu" else known or "h100", rate)
