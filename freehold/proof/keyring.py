"""Which keys a root trusts: a keyring that is signed, versioned and chained, with validity by log index.

Offline there is no trusted clock, so a key counts from one log index up to another, not between dates. A new keyring
names the hash of the one before and is signed by enough root keys of both: who holds only the new roots, or only the
old ones, cannot replace it. A verifier trusts the first keyring by the fingerprint it was given out of band.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from freehold.core.errors import ProofError
from freehold.proof.bundle import pae
from freehold.proof.keys import PublicKey, SigningKey, fingerprint, parse_public, public_pem, verifies

KEYRING_TYPE = "application/vnd.freehold.keyring.v1+json"
MAX_KEYRING_BYTES = 1 << 20


class Entry(BaseModel):
    """One release, log or witness key and the log indices for which it counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str = Field(pattern="^(release|log|witness)$")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,99}$")
    pem: str = Field(max_length=4096)
    from_index: int = Field(0, ge=0)
    until_index: int | None = Field(None, ge=0)
    """First index at which it no longer counts; None: it has not been revoked."""


class Keyring(BaseModel):
    """The keys that a root vouches for, from one version to the next."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(ge=1)
    previous_sha256: str = ""
    roots: list[str] = Field(min_length=1, max_length=32)
    """PEM of the root keys; only these sign keyrings."""
    threshold: int = Field(1, ge=1)
    """How many different roots must sign."""
    keys: list[Entry] = Field(max_length=1024)

    def payload(self) -> bytes:
        """Return the bytes that roots sign: JSON with sorted keys."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()

    def sha256(self) -> str:
        """Return the hex SHA-256 that the next version names as its previous one."""
        return hashlib.sha256(self.payload()).hexdigest()

    def root_keys(self) -> list[PublicKey]:
        """Return the root keys; ProofError when one cannot be read or is listed twice."""
        keys = [parse_public(pem.encode(), "keyring: roots") for pem in self.roots]
        if len({fingerprint(key) for key in keys}) != len(keys):
            raise ProofError("a root key is listed twice", where="keyring: roots")
        return keys

    def trusted(self, role: str, index: int | None = None) -> dict[str, PublicKey]:
        """Return the keys of a role by name that count at a log index (None: at the end of the log)."""
        return {
            entry.name: parse_public(entry.pem.encode(), f"keyring: {entry.name}")
            for entry in self.keys
            if entry.role == role and _counts(entry, index)
        }


def entry_for(role: str, name: str, key: PublicKey, from_index: int = 0) -> Entry:
    """Return a keyring's entry for a public key."""
    return Entry(role=role, name=name, pem=public_pem(key).decode(), from_index=from_index)


def sign_keyring(keyring: Keyring, roots: list[SigningKey]) -> dict[str, Any]:
    """Return the keyring with a signature of each given root: a DSSE envelope."""
    payload = keyring.payload()
    message = pae(payload, KEYRING_TYPE)
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": KEYRING_TYPE,
        "signatures": [
            {"keyid": fingerprint(root.public), "sig": base64.b64encode(root.sign(message)).decode()} for root in roots
        ],
    }


def read_chain(envelopes: list[dict[str, Any]], root_fingerprint: str, seen_version: int = 0) -> Keyring:
    """Verify a chain of keyrings from the first to the newest and return the newest.

    The first must list, and be signed by, the root that `root_fingerprint` names; each later one must follow its
    predecessor and be signed by the threshold of the old roots and of the new ones. `seen_version` is the newest
    version this verifier has met before: an older chain is a rollback. Raises ProofError.
    """
    if not envelopes:
        raise ProofError("there is no keyring", expected="at least one version")
    before: Keyring | None = None
    for number, envelope in enumerate(envelopes, 1):
        where = f"keyring version {number}"
        keyring, signed = _open(envelope, where, before.root_keys() if before else [])
        if keyring.version != number or keyring.previous_sha256 != (before.sha256() if before else ""):
            raise ProofError("a keyring does not follow the one before", where=where, found=keyring.version)
        if before is None and root_fingerprint.lower() not in signed:
            raise ProofError(
                "the first keyring is not signed by the root you trust",
                where=where,
                found=", ".join(sorted(signed)) or "no valid signature",
                expected=root_fingerprint,
            )
        for trusted in [keyring] if before is None else [before, keyring]:
            roots = {fingerprint(key) for key in trusted.root_keys()}
            if len(roots & signed) < trusted.threshold:
                raise ProofError(
                    "too few roots signed a keyring",
                    where=where,
                    found=len(roots & signed),
                    expected=f"{trusted.threshold} of {len(roots)}",
                )
        before = keyring
    assert before is not None
    if before.version < seen_version:
        raise ProofError("an older keyring than one seen before", found=before.version, expected=f">= {seen_version}")
    return before


def _open(envelope: dict[str, Any], where: str, old_roots: list[PublicKey]) -> tuple[Keyring, set[str]]:
    """Return a keyring and the fingerprints of the roots, its own or the previous version's, that validly signed it."""
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        if envelope["payloadType"] != KEYRING_TYPE or len(payload) > MAX_KEYRING_BYTES:
            raise ValueError(f"payload type {envelope['payloadType']!r}, {len(payload):,} bytes")
        keyring = Keyring.model_validate_json(payload)
        signatures = [(s["keyid"], base64.b64decode(s["sig"], validate=True)) for s in envelope["signatures"][:64]]
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ProofError("a keyring cannot be read", where=where, found=str(error).splitlines()[0]) from error
    if keyring.payload() != payload:
        raise ProofError("a keyring is not in its one form", where=where, expected="JSON with sorted keys")
    message = pae(payload, KEYRING_TYPE)
    known = {fingerprint(key): key for key in [*old_roots, *keyring.root_keys()]}
    signed = {name for name, signature in signatures if name in known and verifies(known[name], signature, message)}
    return keyring, signed


def _counts(entry: Entry, index: int | None) -> bool:
    if index is None:
        return entry.until_index is None
    return entry.from_index <= index and (entry.until_index is None or index < entry.until_index)
