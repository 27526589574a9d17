"""How each stage was made, as in-toto statements with SLSA provenance (slsa.dev/spec/v1.0/provenance), signed (DSSE).

A statement's subject is a stage's content hash; its materials are the content hashes of the stages it read. So a chain
of statements is checked as the lineage is, with tools that know nothing of Freehold.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from freehold.core.errors import ProofError
from freehold.proof.keys import SigningKey
from freehold.proof.trust import PAYLOAD_TYPE, PublicKey, canonical, pae, parsing, verifies
from freehold.proof.verify import STATEMENT_TYPE

PROVENANCE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:freehold:stage:v1"


def provenance(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance statement of a finished stage or checkpoint, from its manifest alone."""
    inputs = sorted(manifest.get("inputs", {}).items())
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": str(manifest["kind"]), "digest": {"sha256": manifest["content_sha256"]}}],
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"config": manifest.get("config", {}), "seed": manifest.get("seed")},
                "internalParameters": {"contract": manifest.get("contract", {}), "versions": manifest["versions"]},
                "resolvedDependencies": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in inputs],
            },
            "runDetails": {
                "builder": {"id": "urn:freehold", "version": {"freehold": manifest["freehold_version"]}},
                "metadata": {"invocationId": str(manifest.get("run", "")), "finishedOn": manifest["created"]},
            },
        },
    }


def sign(statement: dict[str, Any], name: str, key: SigningKey) -> str:
    """Return a statement in a DSSE envelope, as JSON text; the same text each time."""
    payload = canonical(statement)
    signature = {"keyid": name, "sig": base64.b64encode(key.sign(pae(payload))).decode()}
    envelope = {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": [signature]}
    return canonical(envelope).decode() + "\n"


def read(data: bytes, keys: dict[str, PublicKey], where: object) -> dict[str, Any]:
    """Return the statement in an envelope that one of `keys` signed; ProofError otherwise."""
    with parsing("not a signed statement", where, PAYLOAD_TYPE):
        envelope = json.loads(data)
        payload = base64.b64decode(envelope["payload"], validate=True)
        (signature,) = envelope["signatures"]
        raw, kind = base64.b64decode(signature["sig"], validate=True), envelope["payloadType"]
        statement = json.loads(payload)
        if not isinstance(statement, dict):
            raise TypeError("not an object")
    if kind != PAYLOAD_TYPE or not any(verifies(key, raw, pae(payload)) for key in keys.values()):
        raise ProofError("a statement is signed by no trusted key", where=where, expected=", ".join(keys))
    return statement
