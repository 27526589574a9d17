"""The card of a released model: Hugging Face front matter, then what the run's own records say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from freehold.core.table import Table
from freehold.run.card import Statements
from freehold.run.layout import AUDIT, EVALUATE, EXPORT, PRETRAIN, training

UNSTATED = "not stated"


def write(
    name: str,
    manifests: dict[str, dict[str, Any]],
    facts: dict[str, Any],
    stated: Statements,
    waivers: Sequence[dict[str, str]] = (),
) -> str:
    """Return the card as Markdown; the same records give the same text."""
    export = manifests[EXPORT]
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- afmoe", "- freehold"]
    licences = sorted({row["licence"] for row in facts["licences"]})
    front += ["datasets_licences:", *(f"- {licence}" for licence in licences), "---"]
    lines = [*front, "", f"# {name}", "", stated.purpose or f"Purpose: {UNSTATED}.", ""]
    lines += [f"Provider: {stated.provider or UNSTATED}.", ""]
    lines += ["## What it is", "", *_identity(export, manifests), ""]
    lines += [_sources(facts).markdown()]
    lines += ["The data card (data.md), the summary for the EU (eu-training-content.md) and the ledger say more.", ""]
    lines += [_exports(export).markdown()]
    if EVALUATE in manifests:
        lines += ["## Evaluation", "", "Every answer is in `evaluation/answers/`, the sums in `results.json`.", ""]
    if AUDIT in manifests:
        lines += [_gates(manifests[AUDIT]["counts"]).markdown(), "All figures are in `audits/`.", ""]
    if waivers:
        rows = [[w["metric"], w["reason"], w["by"]] for w in waivers]
        lines += [Table("Waivers", ["gate", "why it was waived", "by"], rows, left=(0, 1, 2)).markdown()]
    lines += [
        "## Limits",
        "",
        "A model says what text like its training text would say; it can be wrong and does not know that it is. No "
        "audit of bias, memorisation or safety is part of this release unless it is listed above.",
    ]
    return "\n".join(lines) + "\n"


def _identity(export: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"- exported checkpoint: `{export['config']['checkpoint']}`", f"- content: `{export['content_sha256']}`"]
    for stage in training():
        if stage in manifests:
            counts = manifests[stage]["counts"]
            kept = {key: counts[key] for key in ("steps", "tokens", "parameters", "active_parameters") if key in counts}
            lines.append(
                f"- {stage}: " + ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in kept.items())
            )
    if PRETRAIN in manifests:
        machine = manifests[PRETRAIN].get("machine", {})
        lines.append(f"- trained on: {machine.get('cpu', UNSTATED)}, {manifests[PRETRAIN].get('seconds', 0):,.0f} s")
    return lines


def _gates(counts: dict[str, Any]) -> Table:
    rows = [
        [gate["metric"], f"{gate['found']:.4g}", "passed" if gate["passed"] else "FAILED"] for gate in counts["gates"]
    ]
    rows += [[name, "", f"not answered: {why}"] for name, why in sorted(counts["not_answered"].items())]
    return Table("Audits", ["figure", "found", "verdict"], rows, left=(0, 2))


def _sources(facts: dict[str, Any]) -> Table:
    rows = [
        [row["source"], row["version"], *(f"{row[key]:,}" for key in ("documents", "conversations", "bytes"))]
        for row in facts["sources"]
    ]
    return Table("What it was trained on", ["source", "version", "documents", "conversations", "bytes"], rows)


def _exports(export: dict[str, Any]) -> Table:
    rows = [[kind, f"{value:.2g}"] for kind, value in sorted(export["counts"].get("mean_kl", {}).items())]
    return Table("How its files compare with the checkpoint", ["file", "mean KL"], rows)
