"""Level 2 of verifying a release: what its files say follows from the rows and manifests in it.

Level 1 (`proof/verify.py`) says that these are the files that were signed. Here all that can be derived again is:
manifests from their files' hashes, the chain of inputs, the model's files, results from the rows of answers, cards from
the facts, statements from the manifests, the bill's references, licences by the recorded policy. No model is run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freehold.core.artifact import read_json, sha256_file, sha256_json
from freehold.core.config import fill
from freehold.core.errors import ProofError
from freehold.core.gate import Gate, decide
from freehold.ledger.policy import SEVERITY
from freehold.proof.folder import RELEASE_KEY
from freehold.proof.trust import Keyring, read_chain
from freehold.proof.verify import KEYRING, Verified, json_list
from freehold.run import attestation, bom, disclosure, promotion
from freehold.run.card import Statements
from freehold.run.layout import AUDIT, CURATE, EVALUATE, EXPORT, RunFolder
from freehold.run.release import PROMOTION, read_description


class Inconsistent(ProofError):
    """A release whose files are signed but contradict each other."""

    code = 4


@dataclass
class Report:
    """What level 2 looked at."""

    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check(pack: Path, verified: Verified, root_fingerprint: str) -> Report:
    """Derive again what can be derived; Inconsistent names what does not follow."""
    description = read_description(pack)
    manifests = {path.stem: read_json(path, Inconsistent) for path in sorted((pack / "manifests").glob("*.json"))}
    if EXPORT not in manifests:
        raise Inconsistent("a release without the manifest of its export", where=pack / "manifests")
    keyring = read_chain(json_list(pack / KEYRING), root_fingerprint)
    report, release = Report(), _Release(pack, manifests, verified, keyring, bool(description.get("detached")))
    for name, find in CHECKS.items():
        try:
            report.problems += [f"{name}: {problem}" for problem in find(release)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            report.problems.append(f"{name}: a file has not the form it should have ({error!r})")
        report.checked.append(name)
    report.not_checked = ["how the model behaves: nothing was run", "that training gave these weights: not repeated"]
    if release.detached:
        report.not_checked.append("the model's files: they are not in this release, only their hashes")
    if not verified.witnesses:
        report.not_checked.append("that others saw the log: no witness signed its checkpoint")
    if report.problems:
        raise Inconsistent(
            "the release contradicts itself",
            where=pack,
            found="; ".join(report.problems[:8]),
            todo="do not use it; ask its maker",
        )
    return report


@dataclass(frozen=True)
class _Release:
    pack: Path
    manifests: dict[str, dict[str, Any]]
    """Of stages, by name."""
    verified: Verified
    keyring: Keyring
    detached: bool

    def json(self, name: str) -> Any:
        return json.loads((self.pack / name).read_text(encoding="utf-8"))

    def all_manifests(self) -> dict[str, dict[str, Any]]:
        """Return the manifests of stages and of named checkpoints, by path."""
        root = self.pack / "manifests"
        return {p.relative_to(root).with_suffix("").as_posix(): json.loads(p.read_text()) for p in root.rglob("*.json")}


def _manifests(release: _Release) -> Iterator[str]:
    """Each content hash is that of the files listed; each input is the hash of the stage it names."""
    for name, manifest in release.all_manifests().items():
        files = {path: record["sha256"] for path, record in manifest["files"].items()}
        if sha256_json({"kind": manifest["kind"], "files": files}) != manifest["content_sha256"]:
            yield f"{name}: the content hash is not that of its files"
        for stage, recorded in manifest.get("inputs", {}).items():
            made = release.manifests.get(stage)
            if made is not None and made["content_sha256"] != recorded:
                yield f"{name} was made from another {stage}"


def _model(release: _Release) -> Iterator[str]:
    """The model's files are those that the export proved."""
    files = release.manifests[EXPORT]["files"]
    wanted = {name: record["sha256"] for name, record in files.items() if name.startswith(("hf/", "gguf/"))}
    if release.detached:
        here = {name: record["sha256"] for name, record in release.json("model/hashes.json").items()}
    else:
        prefix = "model/"
        here = {n.removeprefix(prefix): h for n, h in release.verified.files.items() if n.startswith(prefix)}
    for name in sorted({*wanted, *here}):
        if wanted.get(name) != here.get(name):
            yield f"{name} is not what the export proved"
    parity = RunFolder(Path()).parity.name
    if sha256_file(release.pack / parity) != files[parity]["sha256"]:
        yield "the proof of the exports is not the export's own"


def _results(release: _Release) -> Iterator[str]:
    """Results are those of the evaluation, and their counts follow from the answers, row by row."""
    if EVALUATE not in release.manifests:
        return
    folder, files = release.pack / "evaluation", release.manifests[EVALUATE]["files"]
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if files.get(name, {}).get("sha256") != sha256_file(path):
            yield f"{name} is not the evaluation's own"
    for checkpoint, figures in release.json(f"evaluation/{RunFolder(Path()).evaluation.name}")["checkpoints"].items():
        rows = folder / "answers" / f"{checkpoint}.jsonl"
        if not rows.exists():
            continue
        answers = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        items, right = Counter(a["task"] for a in answers), Counter(a["task"] for a in answers if a["correct"])
        for task, sums in figures["tasks"]["tasks"].items():
            if (sums["items"], sums["correct"]) != (items[task], right[task]):
                said, counted = (sums["correct"], sums["items"]), (right[task], items[task])
                yield f"{checkpoint}, {task}: {said} right of all, its rows say {counted}"


def _audits(release: _Release) -> Iterator[str]:
    """Findings are the audit's own, and each verdict follows from its figure and limit."""
    if AUDIT not in release.manifests:
        return
    manifest, path = release.manifests[AUDIT], release.pack / "audits" / RunFolder(Path()).audits.name
    if sha256_file(path) != manifest["files"][path.name]["sha256"]:
        yield f"{path.name} is not the audit's own"
    results = release.json(f"audits/{path.name}")
    gates = {metric: fill(Gate, gate, metric) for metric, gate in manifest["config"]["gates"].items()}
    answered = {metric: gate for metric, gate in gates.items() if metric in results["figures"]}
    decided = [verdict.to_dict() for verdict in decide(answered, results["figures"], "audit.gates")]
    if decided != results["gates"] or decided != manifest["counts"]["gates"]:
        yield "the verdicts do not follow from the figures"


def _promotion(release: _Release) -> Iterator[str]:
    """A promotion is signed by a release key, of this model, and its verdicts follow from the results here."""
    path = release.pack / PROMOTION
    if not path.exists():
        return
    keys = release.keyring.trusted(RELEASE_KEY, release.verified.index)
    statement = attestation.read(path.read_bytes(), keys, path)
    if release.manifests[EXPORT]["content_sha256"] not in promotion.Promotion(statement).subjects:
        yield "it is of another model"
    run = RunFolder(Path())
    evaluation, audits = (
        release.json(f"{name}/{p.name}") for name, p in (("evaluation", run.evaluation), ("audits", run.audits))
    )
    if not promotion.decided_again(statement, promotion.figures(release.manifests, evaluation, audits)):
        yield "its verdicts do not follow from the results"


def _cards(release: _Release) -> Iterator[str]:
    """Every document about the data follows from the facts and statements; the facts are of this corpus."""
    facts = release.json("card/facts.json")
    stated = fill(Statements, release.json("card/statements.json"), "statements")
    if facts["content_sha256"] != release.manifests[CURATE]["content_sha256"]:
        yield "the facts are of another corpus"
    for name, text in disclosure.make(facts, stated, list(disclosure.MAKERS)).items():
        if (release.pack / "card" / name).read_text(encoding="utf-8") != text:
            yield f"card/{name} does not follow from the facts"


def _statements(release: _Release) -> Iterator[str]:
    """Each stage's statement is signed by a release key and says what the manifest says."""
    keys = release.keyring.trusted(RELEASE_KEY, release.verified.index)
    for stage, manifest in release.manifests.items():
        path = release.pack / "attestations" / f"{stage}.dsse.json"
        if not path.exists():
            yield f"{stage} has no statement"
        elif attestation.read(path.read_bytes(), keys, path) != attestation.provenance(manifest):
            yield f"the statement of {stage} is not what its manifest says"


def _bill(release: _Release) -> Iterator[str]:
    """The bill of materials follows from the manifests, and each reference and hash leads somewhere."""
    bill = release.json("bom.cdx.json")
    facts, rights = release.json("card/facts.json"), release.json("ledger/rights.json")
    if bill != json.loads(json.dumps(bom.make(release.verified.name, release.manifests, facts, rights), default=str)):
        yield "it does not follow from manifests, facts and rights"
    yield from bom.problems(bill, release.manifests)


def _rights(release: _Release) -> Iterator[str]:
    """No group of rows was refused, and every source of the corpus that was read is judged."""
    rows = release.json("ledger/rights.json")
    yield from (f"{row['source']}: {row['decision']}" for row in rows if SEVERITY[row["decision"]] > SEVERITY["allow"])
    judged = {row["source"] for row in rows}
    read = {row["source"] for row in release.json("card/facts.json")["read"] if row["documents"]}
    yield from (f"the rights of {source} were not judged" for source in sorted(read - judged))


CHECKS: dict[str, Callable[[_Release], Iterator[str]]] = {
    "manifests and the chain of inputs": _manifests,
    "the model's files against the export's proof": _model,
    "results against the rows of answers": _results,
    "audits and their gates": _audits,
    "promotion": _promotion,
    "documents about the data": _cards,
    "statements of provenance": _statements,
    "bill of materials": _bill,
    "rights of what was read": _rights,
}
