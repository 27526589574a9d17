"""Promotion: candidate, evaluated, audited, signed, served; each step is decided by gates and signed.

Gates are a YAML file of limits by figure. `freehold promote` decides them from what evaluate, audit and export
measured and writes one in-toto statement that names the model, the gates, the results, every verdict and who promoted.
A gate that fails needs a waiver, which is signed with the rest and printed on the model card. `freehold serve
--require promoted` serves nothing else.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from freehold.core.artifact import read_json, read_manifest, sha256_file, sha256_json, verify_files, write_atomic
from freehold.core.config import Config, fill, load_yaml
from freehold.core.errors import ArtifactError, ProofError
from freehold.core.gate import Gate, Verdict, decide
from freehold.proof.folder import RELEASE_KEY, KeyFolder
from freehold.proof.trust import read_chain
from freehold.proof.verify import STATEMENT_TYPE, json_list
from freehold.run import attestation
from freehold.run.layout import AUDIT, EVALUATE, EXPORT, RELEASE, RunFolder

PREDICATE = "urn:freehold:promotion:v1"
STATES = ("candidate", "evaluated", "audited", "promoted", "signed")


class Gates(Config):
    """A file of gates: what a model must keep before it is signed and served."""

    gates: dict[str, Gate] = Field(min_length=1, description="limits by figure, e.g. audit/leaks/personal_data")


class NotPromoted(ProofError):
    """A model that keeps not all of its gates, or that no trusted key has promoted."""

    code = 7


@dataclass(frozen=True)
class Promotion:
    """A decision, and what it rests on."""

    statement: dict[str, Any]

    @property
    def predicate(self) -> dict[str, Any]:
        """Return what was decided."""
        return dict(self.statement["predicate"])

    @property
    def subjects(self) -> set[str]:
        """Return the content hashes of what was promoted."""
        return {str(subject["digest"]["sha256"]) for subject in self.statement["subject"]}


def state(run: RunFolder) -> str:
    """Return how far the model of a run has come."""
    made = [run.finished(stage) for stage in (EXPORT, EVALUATE, AUDIT)]
    steps = [*made, run.promotion.exists(), run.finished(RELEASE)]
    reached = next((n for n, there in enumerate(steps) if not there), len(steps))
    return STATES[reached - 1] if reached else "not exported"


def promote(run_folder: Path, gates_file: Path, keys: KeyFolder, by: str, waived: Mapping[str, str]) -> Promotion:
    """Decide the gates of a file for a run's model, sign the decision, and enter it into the log.

    Raises NotPromoted for a gate that fails without a waiver, ConfigError for one on a figure that was not measured.
    """
    run = RunFolder(run_folder)
    manifests = {stage: read_manifest(run.stage(stage)) for stage in (EXPORT, EVALUATE, AUDIT)}
    for stage in (EXPORT, EVALUATE, AUDIT):
        verify_files(run.stage(stage), manifests[stage])
    measured = figures(manifests, read_json(run.evaluation), read_json(run.audits))
    gates = fill(Gates, load_yaml(gates_file), str(gates_file)).gates
    verdicts = decide(gates, measured, str(gates_file))
    unknown = sorted(set(waived) - {verdict.metric for verdict in verdicts if not verdict.passed})
    if unknown:
        raise NotPromoted("a waiver for a gate that does not fail", found=", ".join(unknown), where=gates_file)
    _refuse([v for v in verdicts if not v.passed and v.metric not in waived], gates_file)
    statement = _statement(run, manifests, gates, verdicts, by, waived)
    name, key = keys.signing(RELEASE_KEY)
    write_atomic(run.promotion, attestation.sign(statement, name, key))
    keys.log.append({"kind": "promotion", "run": run_folder.name, "statement_sha256": sha256_json(statement)})
    return Promotion(statement)


def _refuse(failed: list[Verdict], where: Path) -> None:
    if failed:
        raise NotPromoted(
            "the model does not keep its gates",
            where=where,
            found="; ".join(f"{v.metric} is {v.found:.4g}" for v in failed),
            expected="; ".join(f"{v.metric}: {v.gate.model_dump(exclude_none=True)}" for v in failed),
            todo="mend what the gate names, or --waive METRIC=REASON, which is signed and printed on the card",
        )


def _statement(
    run: RunFolder,
    manifests: dict[str, dict[str, Any]],
    gates: dict[str, Gate],
    verdicts: list[Verdict],
    by: str,
    waived: Mapping[str, str],
) -> dict[str, Any]:
    checkpoint = str(manifests[EXPORT]["config"]["checkpoint"])
    subjects = {checkpoint: read_manifest(run.root / checkpoint), EXPORT: manifests[EXPORT]}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": n, "digest": {"sha256": m["content_sha256"]}} for n, m in subjects.items()],
        "predicateType": PREDICATE,
        "predicate": {
            "decision": "promoted",
            "by": by,
            "gates": {metric: gate.model_dump(exclude_none=True) for metric, gate in sorted(gates.items())},
            "verdicts": [verdict.to_dict() for verdict in verdicts],
            "waivers": [{"metric": metric, "reason": reason, "by": by} for metric, reason in sorted(waived.items())],
            "results": {stage: manifests[stage]["content_sha256"] for stage in (EVALUATE, AUDIT)},
        },
    }


def figures(
    manifests: Mapping[str, dict[str, Any]], evaluation: dict[str, Any], audits: dict[str, Any]
) -> dict[str, Any]:
    """Return every figure that a gate may name, from what a run or a release holds."""
    found: dict[str, Any] = {f"{AUDIT}/{name}": value for name, value in audits.get("figures", {}).items()}
    for name, result in evaluation.get("checkpoints", {}).items():
        found[f"{EVALUATE}/bits_per_byte/{name}"] = result["bits_per_byte"]["overall"]["bits_per_byte"]
        if "tasks" in result:
            tasks = {"": result["tasks"]["overall"], **{f"/{t}": s for t, s in result["tasks"]["tasks"].items()}}
            for task, sums in tasks.items():
                value = {"value": sums["accuracy"], "low": sums["low"], "high": sums["high"]}
                found[f"{EVALUATE}/accuracy/{name}{task}"] = value
    for kind, value in manifests[EXPORT]["counts"].get("mean_kl", {}).items():
        found[f"{EXPORT}/mean_kl/{kind}"] = value
    return found


def decided_again(statement: dict[str, Any], measured: dict[str, Any]) -> bool:
    """Whether the verdicts of a promotion follow from its gates and from the figures, and each failure is waived."""
    said = statement["predicate"]
    verdicts = decide({m: fill(Gate, gate, m) for m, gate in said["gates"].items()}, measured, "gates")
    waived = {waiver["metric"] for waiver in said["waivers"]}
    kept = all(verdict.passed or verdict.metric in waived for verdict in verdicts)
    return kept and [verdict.to_dict() for verdict in verdicts] == said["verdicts"]


def unsigned(path: Path) -> dict[str, Any]:
    """Return the statement of a promotion without checking who signed it: for cards, never for trust."""
    envelope = read_json(path, ProofError)
    return dict(json.loads(base64.b64decode(envelope["payload"])))


def require(path: Path, root: str, keyring: Path | None = None) -> Promotion:
    """Return the promotion of a model at `path`, which must be in its run folder.

    Raises NotPromoted when there is none, when no release key under `root` signed it, or when it is of another model.
    """
    run = next((RunFolder(f) for f in (path, *path.resolve().parents) if RunFolder(f).promotion.exists()), None)
    if run is None:
        raise NotPromoted(
            "this model was not promoted", where=path, todo="freehold promote RUN --gates FILE --keys KEYS"
        )
    chain = json_list(keyring or run.keys / "keyring.json")
    keys = read_chain(chain, root)
    usable = keys.trusted(RELEASE_KEY)  # at the end of the log: a revoked key promotes nothing
    promotion = Promotion(attestation.read(run.promotion.read_bytes(), usable, run.promotion))
    found = content_of(path, run)
    if promotion.predicate.get("decision") != "promoted" or found not in promotion.subjects:
        raise NotPromoted("another model was promoted", where=path, found=found[:16], todo="promote this one")
    return promotion


def content_of(path: Path, run: RunFolder) -> str:
    """Return the content hash of what is served, after comparing every file with its manifest."""
    export = run.stage(EXPORT).resolve()
    if path.resolve().is_relative_to(export):
        manifest = read_manifest(export)
        wanted = path.resolve().relative_to(export).as_posix()
        files = {name: f for name, f in manifest["files"].items() if name == wanted or name.startswith(f"{wanted}/")}
        if not files:
            raise NotPromoted("not a file that the export proved", where=path)
        for name, record in files.items():
            if sha256_file(export / name) != record["sha256"]:
                raise NotPromoted("a file is not the one that was promoted", where=export / name)
        return str(manifest["content_sha256"])
    from freehold.api import find_model

    try:
        return str(read_manifest(find_model(path), verify=True)["content_sha256"])
    except ArtifactError as error:
        raise NotPromoted("the model is damaged or unfinished", where=path, found=error.what) from error
