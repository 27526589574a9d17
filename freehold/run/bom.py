"""The bill of materials of a release: CycloneDX 1.7 (cyclonedx.org/docs/1.7/json), made from manifests and ledger.

The schema accepts references that lead nowhere and hashes that fit nothing, so `problems` checks those too.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

from freehold.core.artifact import sha256_json
from freehold.core.version import VERSION
from freehold.run.layout import EXPORT, TOKENIZE

SPEC = "1.7"
NAMESPACE = uuid.UUID("6f1f3c9e-3d0e-5b0a-9a56-1d6f0e5b7a11")
"""Of serial numbers: the same contents have the same one."""


def make(
    name: str, manifests: dict[str, dict[str, Any]], facts: dict[str, Any], rights: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the bill: the model, its files, the sources it learned from, tokenizer, packages, and the stages."""
    data = [_data(row, rights) for row in facts["sources"]]
    files = [
        _file(path, record)
        for path, record in sorted(manifests[EXPORT]["files"].items())
        if path.startswith(("hf/", "gguf/"))
    ]
    packages = [_package(package, version) for package, version in sorted(manifests[EXPORT]["versions"].items())]
    model = _model(name, manifests, [component["bom-ref"] for component in data])
    bill = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "version": 1,
        "metadata": {
            "component": model,
            "tools": {"components": [{"type": "application", "name": "freehold", "version": VERSION}]},
        },
        "components": [*files, *data, _tokenizer(manifests), *packages],
        "dependencies": [
            {"ref": model["bom-ref"], "dependsOn": [c["bom-ref"] for c in [*files, *data, *packages]] + ["tokenizer"]}
        ],
        "formulation": [
            {"bom-ref": "formulation", "workflows": [_workflow(s, m) for s, m in sorted(manifests.items())]}
        ],
    }
    return {"serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, sha256_json(bill))}", **bill}


def problems(bill: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> list[str]:
    """Return what the schema cannot see: names given twice, references and hashes that lead nowhere."""
    names = Counter(value for key, value in _walk(bill) if key == "bom-ref")
    found = [f"bom-ref given twice: {name}" for name, number in names.items() if number > 1]
    for key, value in _walk(bill):
        if key in ("ref", "dependsOn") and value not in names:
            found.append(f"a reference leads nowhere: {value}")
    known = {record["sha256"] for manifest in manifests.values() for record in manifest["files"].values()}
    known |= {manifest["content_sha256"] for manifest in manifests.values()}
    for component in [bill["metadata"]["component"], *bill["components"]]:
        for entry in component.get("hashes", []):
            if entry["content"] not in known:
                found.append(f"a hash is in no manifest: {component['bom-ref']}")
    return found


def _model(name: str, manifests: dict[str, dict[str, Any]], data: list[str]) -> dict[str, Any]:
    export = manifests[EXPORT]
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": export["content_sha256"][:16],
        "hashes": [_hash(export["content_sha256"])],
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer, sparse mixture of experts",
                "modelArchitecture": "AfmoeForCausalLM",
                "datasets": [{"ref": ref} for ref in data],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {"type": "mean KL divergence from the exported checkpoint", "slice": kind, "value": str(value)}
                    for kind, value in sorted(export["counts"].get("mean_kl", {}).items())
                ]
            },
        },
    }


def _data(row: dict[str, Any], rights: list[dict[str, Any]]) -> dict[str, Any]:
    licences = sorted({right["licence"] for right in rights if right["source"] == row["source"]})
    component: dict[str, Any] = {
        "type": "data",
        "bom-ref": f"data:{row['source']}",
        "name": row["source"],
        "version": str(row.get("version", "")),
        "data": [{"type": "dataset", "name": row["source"]}],
    }
    if licences:
        joined = licences[0] if len(licences) == 1 else " AND ".join(f"({licence})" for licence in licences)
        component["licenses"] = [{"expression": joined}]
    return component


def _file(path: str, record: dict[str, Any]) -> dict[str, Any]:
    return {"type": "file", "bom-ref": f"file:{path}", "name": path, "hashes": [_hash(record["sha256"])]}


def _tokenizer(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    files = manifests.get(TOKENIZE, manifests[EXPORT])["files"]
    record = next(record for path, record in files.items() if path.endswith("tokenizer.json"))
    return {"type": "file", "bom-ref": "tokenizer", "name": "tokenizer.json", "hashes": [_hash(record["sha256"])]}


def _package(name: str, version: str) -> dict[str, Any]:
    kind = "pkg:generic" if name == "python" else "pkg:pypi"
    return {
        "type": "platform" if name == "python" else "library",
        "bom-ref": f"package:{name}",
        "name": name,
        "version": version,
        "purl": f"{kind}/{name}@{version}",
    }


def _workflow(stage: str, manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "bom-ref": f"stage:{stage}",
        "uid": manifest["content_sha256"],
        "name": stage,
        "description": f"seed {manifest.get('seed')}, settings {manifest.get('config_sha256', '')}",
        "taskTypes": ["build"],
    }


def _hash(sha256: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": sha256}


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every (key, text) of a tree; the members of a list have the list's key."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _walk(child, name)
    elif isinstance(value, list):
        for child in value:
            yield from _walk(child, key)
    elif isinstance(value, str):
        yield key, value
