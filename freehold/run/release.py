"""A release: a folder that says what a model is and what it was made of, the same bytes each time, signed.

    pack/
      README.md                what is here, and how to check it without us
      model/                   the HF folder and the GGUF files; with --detached only their hashes
      bom.cdx.json             CycloneDX 1.7: model, data, tokenizer, code (`bom.py`)
      card/                    the model card, the data documents, the facts and statements they are made of
      evaluation/ parity.json  results, an answer a row, the proof of the exports
      audits/                  what the audits found, and the verdicts of their gates
      ledger/                  sources with evidence, and the rights of every group of rows, without text
      lineage.json manifests/ recipe/   the chain, every manifest, every filled setting
      attestations/            one SLSA provenance statement a stage, signed (`attestation.py`)
      keys/ log/               the keyring, and the log up to this release
      pack.sig pack.log        the signature over all other files, and the log's checkpoint

Everything but the signature follows from the run, the statements and the keys; no clock is read.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.core.artifact import atomic_folder, read_json, read_manifest, sha256_file, verify_files
from freehold.core.config import fill
from freehold.core.errors import LicenceError, ProofError
from freehold.ledger.policy import Policy
from freehold.proof import log as logs
from freehold.proof.bundle import sign_folder
from freehold.proof.folder import LOG_KEY, RELEASE_KEY, KeyFolder
from freehold.proof.verify import (
    KEYRING,
    LOG_ENTRIES,
    LOG_NOTE,
    SIGNATURE,
    UNSIGNED,
    files_root,
    hash_files,
    pack_entry,
)
from freehold.run import attestation, bom, card, disclosure, model_card, pending, policy_check, promotion
from freehold.run.anchoring import anchor
from freehold.run.checkpoints import read_checkpoints
from freehold.run.layout import AUDIT, EVALUATE, EXPORT, GATHER, RELEASE, REPHRASE, RunFolder, before
from freehold.run.lineage import lineage
from freehold.run.report import write_data_picture

FORMAT_VERSION = 1
DESCRIPTION = "release.json"
PROMOTION = "attestations/promotion.dsse.json"
USES = ("redistribute",)
"""What a release asks of every row's licence, in addition to the uses of the run's own policy."""


@dataclass(frozen=True)
class Contents:
    """What a release is made of; the same contents give the same files."""

    run: RunFolder
    name: str
    manifests: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    stated: card.Statements
    rights: list[dict[str, Any]]
    detached: bool = False

    @property
    def export(self) -> dict[str, Any]:
        """Return the manifest of the export."""
        return self.manifests[EXPORT]

    def waivers(self) -> list[dict[str, str]]:
        """Return the waivers that the run's promotion was signed with."""
        path = self.run.promotion
        return list(promotion.unsigned(path)["predicate"]["waivers"]) if path.exists() else []

    def model_files(self) -> dict[str, dict[str, Any]]:
        """Return the exported model's files with their hashes, by path below `model/`."""
        return {name: f for name, f in self.export["files"].items() if name.startswith(("hf/", "gguf/"))}


def gather_contents(run_folder: Path, stated: card.Statements, name: str = "", detached: bool = False) -> Contents:
    """Read what a release of a run is made of.

    Raises ArtifactError when it has no proven export, LicenceError when a row may not be redistributed or nothing is
    known of a parent, ProofError while a take-down is pending.
    """
    run = RunFolder(run_folder)
    manifests = {stage: read_manifest(run.stage(stage)) for stage in before(RELEASE) if run.finished(stage)}
    if EXPORT not in manifests:
        read_manifest(run.stage(EXPORT))  # says what is missing and what to do
    export = manifests[EXPORT]
    verify_files(run.stage(EXPORT), export)
    pending.refuse(run_folder, str(export["config"]["checkpoint"]))
    rights = _rights(run, str(export["config"]["checkpoint"]), manifests)
    return Contents(
        run,
        name or stated.model_name or str(export["config"].get("name") or run_folder.name),
        manifests,
        json.loads(_json(card.facts(run_folder))),  # as a verifier will read them: key order counts in the cards
        stated,
        rights,
        detached,
    )


def _rights(run: RunFolder, checkpoint: str, manifests: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rights of every group of rows that the exported checkpoint learned from; LicenceError if one stops."""
    configs = [manifests.get(stage, {}).get("config", {}).get("policy") for stage in (GATHER, REPHRASE)]
    policy, rewritten = (fill(Policy, config, "policy") if config else None for config in configs)
    policy = policy or Policy()
    asked = [
        p.model_copy(update={"uses": tuple(dict.fromkeys([*p.uses, *USES]))}) for p in (policy, rewritten or policy)
    ]
    reservations = policy_check.recorded_reservations(run)
    snapshot = reservations.open() if reservations else None
    groups = policy_check.checkpoint(run.root, checkpoint, asked[0], asked[1], snapshot)
    policy_check.hold("the release", groups)
    if not groups:
        raise LicenceError("the ledger names no row that the model learned from", where=run.root)
    return policy_check.table(groups)


def build(contents: Contents, keys: KeyFolder, output: Path) -> str:
    """Write a signed release to `output` and return the hash of its files; nothing is left when it fails.

    The same contents and keys give the same bytes: a release that the log has already is made again, not entered
    twice. Raises ProofError when `output` exists.
    """
    if output.exists():
        raise ProofError("the folder of the release exists already", where=output, todo="name another, or move it away")
    log = keys.log
    anchor(contents.run, log)
    with atomic_folder(output) as folder:
        _fill(folder, contents, keys)
        _write(folder / LOG_ENTRIES, "")
        digests = hash_files(folder, UNSIGNED)
        index, entry = _place(folder, contents.name, digests, log)
        _sign(folder, contents.name, keys, log, index, entry)
    return str(json.loads(entry)["root_sha256"])


def _place(folder: Path, name: str, digests: dict[str, str], log: logs.Log) -> tuple[int, bytes]:
    """Write the log up to the release and return its index and entry: where it is already, else at the end."""
    again = [n for n, line in enumerate(log.entries) if json.loads(line).get("name") == name]
    for index in [*reversed(again), len(log.entries)]:
        _write(folder / LOG_ENTRIES, "".join(line.decode() + "\n" for line in log.entries[:index]))
        digests[LOG_ENTRIES] = sha256_file(folder / LOG_ENTRIES)
        entry = pack_entry(name, files_root(digests))
        if index == len(log.entries) or log.entries[index] == entry:
            break
    return index, entry


def _fill(folder: Path, contents: Contents, keys: KeyFolder) -> None:
    """Write every file that the signature covers but the log."""
    _copy_model(folder, contents)
    documents = disclosure.make(contents.facts, contents.stated, list(disclosure.MAKERS))
    texts = {f"card/{name}": text for name, text in documents.items()}
    texts["card/README.md"] = model_card.write(
        contents.name, contents.manifests, contents.facts, contents.stated, contents.waivers()
    )
    texts["card/facts.json"] = _json(contents.facts)
    texts["card/statements.json"] = _json(contents.stated.model_dump())
    texts["ledger/rights.json"] = _json(contents.rights)
    texts["lineage.json"] = _json(lineage(contents.run.root).to_dict())
    texts["bom.cdx.json"] = _json(bom.make(contents.name, contents.manifests, contents.facts, contents.rights))
    for stage, manifest in contents.manifests.items():
        texts[f"manifests/{stage}.json"] = _json(manifest)
        texts[f"recipe/{stage}.yaml"] = contents.run.resolved(stage).read_text(encoding="utf-8")
    for checkpoint in read_checkpoints(contents.run.root):
        if checkpoint.named:
            manifest = read_manifest(contents.run.root / checkpoint.path)
            texts[f"manifests/{checkpoint.path}.json"] = _json(manifest)
    name, key = keys.signing(RELEASE_KEY)
    for stage, manifest in contents.manifests.items():
        texts[f"attestations/{stage}.dsse.json"] = attestation.sign(attestation.provenance(manifest), name, key)
    if contents.run.promotion.exists():
        texts[PROMOTION] = contents.run.promotion.read_text(encoding="utf-8")
    texts[DESCRIPTION] = _json(
        {"format_version": FORMAT_VERSION, "name": contents.name, "detached": contents.detached,
         "root": keys.root_fingerprint, **({"keys": keys.label} if keys.label else {})}
    )  # fmt: skip
    texts["README.md"] = _readme(contents, keys)
    texts[KEYRING] = keys.chain_bytes().decode()
    for path, text in texts.items():
        _write(folder / path, text)
    _copy_evidence(folder, contents)


def _copy_model(folder: Path, contents: Contents) -> None:
    """Copy the exported model, or write its hashes where it is released by itself."""
    if contents.detached:
        _write(folder / "model" / "hashes.json", _json(contents.model_files()))
        return
    for name in contents.model_files():
        _copy(contents.run.stage(EXPORT) / name, folder / "model" / name)


def _copy_evidence(folder: Path, contents: Contents) -> None:
    """Copy what evaluate and export measured, and what gather says of its sources: files the manifests have hashed."""
    _copy(contents.run.sources, folder / "ledger" / contents.run.sources.name)
    write_data_picture(folder / "card" / disclosure.PICTURE, contents.facts)
    os.chmod(folder / "card" / disclosure.PICTURE, 0o644)
    _copy(contents.run.parity, folder / contents.run.parity.name)
    if AUDIT in contents.manifests:
        _copy(contents.run.audits, folder / "audits" / contents.run.audits.name)
    if EVALUATE in contents.manifests:
        for name in contents.manifests[EVALUATE]["files"]:
            if name == contents.run.evaluation.name or name.startswith("answers/"):
                _copy(contents.run.stage(EVALUATE) / name, folder / "evaluation" / name)


def _sign(folder: Path, name: str, keys: KeyFolder, log: logs.Log, index: int, entry: bytes) -> None:
    """Sign the folder, enter it into the log, and write the log's checkpoint at that entry."""
    _, release = keys.signing(RELEASE_KEY)
    log_name, log_key = keys.signing(LOG_KEY)
    _write(folder / SIGNATURE, sign_folder(folder, release, name=name, ignored=UNSIGNED).decode())
    if index == len(log.entries):
        log.append(json.loads(entry))
    checkpoint = log.checkpoint(index + 1)
    _write(folder / LOG_NOTE, logs.sign_note(checkpoint, log_key, log_name))


def _readme(contents: Contents, keys: KeyFolder) -> str:
    lines = [
        f"# {contents.name}: a release of Freehold",
        "",
        "What is here: the model (`model/`), what it was made of (`card/`, `ledger/`, `bom.cdx.json`, `lineage.json`), "
        "how it did (`evaluation/`, `audits/`, `parity.json`), and how it was made "
        "(`manifests/`, `recipe/`, `attestations/`).",
        "",
        "## How to check it",
        "",
        f"1. Get the root's fingerprint from the maker by another way than this folder. It should be "
        f"`{keys.root_fingerprint}`.",
        "2. `freehold verify PACK --root FINGERPRINT`, or without Freehold: its two files `proof/trust.py` and "
        "`proof/verify.py`, Python 3.11 and the package `cryptography`. Take them from a place you trust, never from "
        "here.",
        "",
        *([f"The keys of this release were {keys.label}.", ""] if keys.label else []),
        "Level 1 says that these are the files that were signed, and that the release is in the log. Level 2 derives "
        "hashes, results, cards and rights again from the rows in this folder. Neither runs the model.",
        "",
        f"Checked when it was made: exports against our own model (`parity.json`), licences of "
        f"{sum(row['documents'] for row in contents.rights):,} rows for {', '.join(USES)}.",
    ]
    return "\n".join(lines) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=str) + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    os.chmod(path, 0o644)  # a release has the same modes whatever the umask


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    os.chmod(target, 0o644)


def read_description(pack: Path) -> dict[str, Any]:
    """Return what a release says of itself; ProofError for a format that this version does not know."""
    description = read_json(pack / DESCRIPTION, ProofError, todo="get the release again")
    if description.get("format_version") != FORMAT_VERSION:
        raise ProofError(
            "a release of another format version",
            where=pack / DESCRIPTION,
            found=description.get("format_version"),
            expected=FORMAT_VERSION,
            todo="use a newer Freehold",
        )
    return description
