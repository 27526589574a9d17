"""The parity card of a GGUF file: what it holds, how it was made, and what was proven, as JSON and Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from freehold.core.artifact import read_json, write_atomic, write_json
from freehold.core.errors import ExportError
from freehold.kernels.quantize import widen
from freehold.stages.export.mix import Choice, layer_of
from freehold.stages.export.source import Weights
from freehold.stages.export.stream import Target, Tensor
from freehold.stages.export.types import TENSOR_TYPES

WORST = 5
QUANTIZERS = "bit for bit those of llama.cpp on x86-64, built without contraction"
CLASSES = {
    "ffn_gate_exps": "experts", "ffn_up_exps": "experts", "ffn_down_exps": "experts, down",
    "ffn_gate_shexp": "shared experts", "ffn_up_shexp": "shared experts", "ffn_down_shexp": "shared experts, down",
    "ffn_gate_inp": "router", "exp_probs_b": "router", "ffn_gate": "dense", "ffn_up": "dense",
    "ffn_down": "dense, down", "attn_q": "attention", "attn_k": "attention", "attn_v": "attention, values",
    "attn_output": "attention", "attn_gate": "attention", "token_embd": "embedding", "output": "head",
}  # fmt: skip


def tensor_class(name: str) -> str:
    """Return the class of a tensor by its GGUF name."""
    part = name.split(".")[-2]
    return "norms" if part.endswith("norm") else CLASSES[part]


def histogram(choices: Mapping[str, Choice]) -> dict[str, dict[str, int]]:
    """Return how many tensors of each class have each type."""
    found: dict[str, Counter[str]] = {}
    for name, choice in choices.items():
        found.setdefault(tensor_class(name), Counter())[choice.type] += 1
    return {kind: dict(sorted(types.items())) for kind, types in sorted(found.items())}


def relative_error(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Return the sums of squares of the error and of the weights."""
    off = np.square(found - wanted, dtype=np.float64).sum()
    return float(off), float(np.square(wanted, dtype=np.float64).sum())


def sampled_errors(weights: Weights, tensors: list[Tensor], target: Target) -> dict[str, float]:
    """Read tensors of the first, middle and last layer back from a file; return each one's relative error.

    Of each matrix (each expert) the first slab of rows is read, so memory stays that of a slab whatever the size.
    """
    last = max(layer_of(tensor.name) for tensor in tensors)
    layers = {-1, 0, last // 2, last}
    errors = {}
    with target.path.open("rb", buffering=0) as file:
        for tensor in (t for t in tensors if layer_of(t.name) in layers):
            kind = TENSOR_TYPES[target.choices[tensor.name].type]
            sums = np.zeros(2)
            for source, first, count in tensor.slabs():
                if first:
                    continue
                file.seek(target.offsets[tensor.name] + source * tensor.rows * kind.row_bytes(tensor.width))
                data = np.frombuffer(file.read(count * kind.row_bytes(tensor.width)), np.uint8).reshape(count, -1)
                wanted = widen(weights.read_rows(tensor.sources[source], first, count))
                sums += relative_error(wanted, dequantize(data, kind.number))  # type: ignore[arg-type]
            errors[tensor.name] = float(np.sqrt(sums[0] / sums[1])) if sums[1] else 0.0
    return errors


def worst(errors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the tensors with the largest relative error, largest first."""
    ordered = sorted(errors.items(), key=lambda item: (-item[1], item[0]))[:WORST]
    return [{"tensor": name, "relative_error": float(f"{error:.3g}")} for name, error in ordered]


def make_card(
    path: Path, file_type: str, choices: Mapping[str, Choice], *, planned_bytes: int, calibration: Mapping[str, Any],
    errors: Mapping[str, float], proof: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return the card of one file; `proof` is its record in parity.json, or says that it was not run."""
    size = path.stat().st_size
    return {
        "file": path.name,
        "file_type": file_type,
        "bytes": size,
        "planned_bytes": planned_bytes,
        "types": histogram(choices),
        "instead_of": dict(Counter(f"{c.instead_of} -> {c.type}" for c in choices.values() if c.instead_of)),
        "quantizers": QUANTIZERS,
        "calibration": dict(calibration),
        "worst_tensors": worst(errors),
        "max_mean_kl": None,
        "proof": dict(proof),
    }


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Write `<file>.card.json` and `<file>.card.md` next to a GGUF file."""
    write_json(path.with_suffix(".card.json"), card)
    write_atomic(path.with_suffix(".card.md"), markdown(card))


def add_proof(path: Path, proof: Mapping[str, Any], errors: Mapping[str, float], limit: float) -> None:
    """Put the proof of a file, and the errors of all its tensors, into the card next to it."""
    card = read_json(path.with_suffix(".card.json"), ExportError)
    write_card(path, {**card, "proof": dict(proof), "worst_tensors": worst(errors), "max_mean_kl": limit})


def markdown(card: Mapping[str, Any]) -> str:
    """Return a card for people."""
    lines = [f"# {card['file']}", "", f"{card['bytes']:,} bytes, planned {card['planned_bytes']:,}.", ""]
    lines += ["| tensors | types |", "|---|---|"]
    for kind, types in card["types"].items():
        lines.append(f"| {kind} | {', '.join(f'{count} x {name}' for name, count in types.items())} |")
    for change, count in card["instead_of"].items():
        lines.append(f"\n{count} tensors {change}, because their rows are no whole blocks.")
    lines += ["", f"Quantizers: {card['quantizers']}.", "", "## Calibration", ""]
    lines += [f"- {key}: {value}" for key, value in card["calibration"].items()]
    lines += ["", "## Proof", ""]
    lines += [f"- {key}: {value}" for key, value in card["proof"].items() if key != "failures"]
    lines += [f"- FAILED: {line}" for line in card["proof"].get("failures", [])]
    if card["max_mean_kl"] is not None:
        lines.append(f"- limit of the mean KL: {card['max_mean_kl']:g}")
    lines += ["", "## Largest relative errors of tensors", "", "| tensor | error |", "|---|--:|"]
    lines += [f"| {row['tensor']} | {row['relative_error']:.3g} |" for row in card["worst_tensors"]]
    return "\n".join(lines) + "\n"
