"""Run the audits of a recipe, or of any model folder, and decide their gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.api import NoTokenizer, find_model, load
from freehold.core.artifact import MANIFEST, Workspace, read_manifest, write_atomic, write_json
from freehold.core.errors import ArtifactError
from freehold.core.gate import Gate, Verdict, decide
from freehold.core.log import Log
from freehold.core.table import Table
from freehold.data.shards import INDEX, ShardSet
from freehold.stages.audit import bias, delta, leaks, memorisation, roles
from freehold.stages.audit.config import MADE_BY, AuditConfig
from freehold.stages.audit.subject import CannotAnswer, Finding, Subject
from freehold.stages.audit.text_trace import Span, trace, trace_words

FORMAT_VERSION = 1
AUDITS: dict[str, Callable[[Subject, Any], Finding]] = {
    "memorisation": memorisation.audit,
    "leaks": leaks.audit,
    "bias": bias.audit,
    "delta": delta.audit,
    "roles": roles.audit,
}


@dataclass
class Report:
    """What the audits found, and what they could not answer."""

    findings: dict[str, Finding]
    unanswered: dict[str, str]
    verdicts: list[Verdict]

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON-able data."""
        return {
            "format_version": FORMAT_VERSION,
            "figures": {k: v for finding in self.findings.values() for k, v in finding.figures.items()},
            "details": {name: finding.details for name, finding in self.findings.items() if finding.details},
            "not_answered": self.unanswered,
            "gates": [verdict.to_dict() for verdict in self.verdicts],
            "passed": all(verdict.passed for verdict in self.verdicts),
            "tables": [vars(table) for table in self.tables()],
        }

    def tables(self) -> list[Table]:
        """Return the gates, then every audit's tables."""
        rows = [[v.metric, f"{v.found:.4g}", _limit(v.gate), "passed" if v.passed else "FAILED"] for v in self.verdicts]
        gates = Table("Gates of the audits", ["figure", "found", "limit", "verdict"], rows, left=(0, 2, 3))
        return [*([gates] if rows else []), *(table for finding in self.findings.values() for table in finding.tables)]


def run(config: AuditConfig, work: Workspace) -> dict[str, Any]:
    """Audit the checkpoints of a run; write results.json, results.md and pictures; return the headline figures."""
    folders: dict[str, Path] = {name: work.input(MADE_BY[name]) / name for name in config.checkpoints}
    subject = open_subject(folders, config, work.log, work.seed, work.inputs)
    report = audit(subject, config)
    write(report, work.folder)
    results = report.to_dict()
    return {key: results[key] for key in ("passed", "gates", "not_answered")}


def audit_path(path: Path, config: AuditConfig, output: Path, log: Log) -> Report:
    """Audit a run folder, one of its checkpoints, or a model folder by itself, which leaves questions unanswered."""
    report = audit(subject_of(path, config, log), config)
    write(report, output)
    return report


def find_text(path: Path, text: str, config: AuditConfig, log: Log) -> list[Span]:
    """Return where the training text of a run says what `text` says: token for token, else word for word."""
    subject = subject_of(path, config.model_copy(update={"checkpoints": config.checkpoints[-1:]}), log)
    return trace(subject, subject.product.tokenizer.encode(text)) or trace_words(subject, text)


def subject_of(path: Path, config: AuditConfig, log: Log) -> Subject:
    """Open what a path means: a run's checkpoints, one of them, or a model folder with no run around it."""
    around = (path, *path.resolve().parents[:3])
    run = next((folder for folder in around if (folder / "tokenize" / MANIFEST).exists()), None)
    stages = ("pretrain", "align", "tokenize", "curate")
    inputs = {stage: run / stage for stage in stages if (run / stage / MANIFEST).exists()} if run else {}
    named = {name: path / MADE_BY[name] / name for name in config.checkpoints}
    folders: dict[str, Path] = {name: folder for name, folder in named.items() if (folder / MANIFEST).exists()}
    if not folders:
        found = find_model(path)
        folders = {found.name: found}
    seed = int(read_manifest(inputs["tokenize"]).get("seed", 0)) if "tokenize" in inputs else 0
    return open_subject(folders, config, log, seed, inputs)


def open_subject(
    folders: dict[str, Path], config: AuditConfig, log: Log, seed: int, inputs: dict[str, Path]
) -> Subject:
    """Open checkpoints, and the shards and corpus that they were made from where those are there."""
    models = {name: load(folder, dtype=config.dtype, threads=None) for name, folder in folders.items()}
    tokens = inputs["tokenize"] / "tokens" if "tokenize" in inputs else None
    shards = ShardSet.load(tokens) if tokens is not None and (tokens / INDEX).exists() else None
    last = list(models.values())[-1]
    if shards is not None and (
        isinstance(last.tokenizer, NoTokenizer) or last.tokenizer.sha256 != shards.tokenizer_sha256
    ):
        shards = None  # ids of another tokenizer mean something else
    trained = tuple(inputs[stage] for stage in ("pretrain", "align") if stage in inputs)
    return Subject(models, log, seed, shards, inputs.get("curate"), trained)


def audit(subject: Subject, config: AuditConfig) -> Report:
    """Do every audit that the recipe sizes above 0; decide the gates.

    A gate on an audit that was not done is named among what is not answered. Raises ConfigError for a gate on a figure
    that no audit measures.
    """
    findings, unanswered = {}, {}
    for name, size in sizes(config).items():
        if not size:
            continue
        try:
            findings[name] = AUDITS[name](subject, getattr(config, name))
            subject.log.say(f"  {name}: {len(findings[name].figures)} figures")
        except (CannotAnswer, ArtifactError) as error:  # the second: it has no tokenizer
            unanswered[name] = error.what
            subject.log.warn(f"{name} is not answered: {error.what}")
    figures = {k: v for finding in findings.values() for k, v in finding.figures.items()}
    silent = {name for name, size in sizes(config).items() if not size or name in unanswered}
    gates = {m: g for m, g in config.gates.items() if m in figures or m.partition("/")[0] not in silent}
    for metric in sorted(set(config.gates) - set(gates)):
        unanswered.setdefault(metric, "the audit that measures it was not done")
    return Report(findings, unanswered, decide(gates, figures, "audit.gates"))


def sizes(config: AuditConfig) -> dict[str, int]:
    """Return the size of each audit, 0 for one that is not asked for."""
    return {
        "memorisation": config.memorisation.documents or int(config.memorisation.canaries is not None),
        "leaks": config.leaks.answers,
        "bias": len(config.bias.topics),
        "delta": config.delta.prompts,
        "roles": config.roles.tokens_per_source,
    }


def write(report: Report, folder: Path) -> None:
    """Write results.json, results.md and one SVG a picture."""
    write_json(folder / "results.json", report.to_dict())
    parts = [table.markdown() for table in report.tables()]
    for name, finding in report.findings.items():
        for picture, svg in finding.pictures.items():
            write_atomic(folder / "pictures" / f"{name}_{picture}.svg", svg)
            parts.append(f"![{name}: {picture}](pictures/{name}_{picture}.svg)\n")
    parts += [f"Not answered: {name}: {why}.\n" for name, why in report.unanswered.items()]
    write_atomic(folder / "results.md", "# Audits\n\n" + "\n".join(parts))


def _limit(gate: Gate) -> str:
    limits = [
        f"{word} {value:g}" for word, value in (("at most", gate.most), ("at least", gate.least)) if value is not None
    ]
    return " and ".join(limits) + ("" if gate.bound == "value" else f" ({gate.bound} end of the interval)")
