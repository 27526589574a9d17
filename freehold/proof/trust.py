"""Which keys to trust: public keys, keyrings with their chain of versions, and the signed checkpoints of a log.

Half of what verifies a release offline; `verify.py` is the other. Both need Python 3.11 and the package `cryptography`
only, so that an auditor can copy the two files and read them.

Offline there is no trusted clock: a key counts from one log index up to another, not between dates. A new keyring names
the hash of the one before and is signed by enough root keys of both, so that who holds only the new roots, or only the
old ones, cannot replace it. A verifier trusts the first keyring by the fingerprint it was given out of band.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

try:
    from freehold.core.errors import ProofError
except ImportError:  # run on its own

    class ProofError(Exception):  # type: ignore[no-redef]
        """Something that cannot be trusted."""

        def __init__(self, what: str, **facts: object) -> None:
            lines = [f"  {name}: {value}" for name, value in facts.items() if value is not None]
            super().__init__("\n".join([what, *lines]))


PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
KEYRING_TYPE = "application/vnd.freehold.keyring.v1+json"
ROLES = ("release", "log", "witness")
# Bounds on what is read before anything in it is trusted.
MAX_PEM_BYTES = 16_384
MAX_KEYRING_BYTES = 1 << 20


@contextlib.contextmanager
def parsing(what: str, where: object, expected: str | None = None) -> Iterator[None]:
    """Turn whatever malformed JSON, base64, PEM or fields raise into a ProofError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError, UnsupportedAlgorithm) as error:
        raise ProofError(what, where=where, found=str(error).partition("\n")[0], expected=expected) from error


def parse_public(pem: bytes, where: object) -> PublicKey:
    """Parse a public key of PEM; ProofError when it is none, or of a kind we do not use."""
    if len(pem) > MAX_PEM_BYTES:
        raise ProofError("a file is too large for a key", where=where, found=f"{len(pem):,} bytes")
    with parsing("not a public key", where, "PEM"):
        key = serialization.load_pem_public_key(pem)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise ProofError("a key of another kind", where=where, found=type(key).__name__, expected="ECDSA P-256 or Ed25519")


def public_pem(key: PublicKey) -> bytes:
    """Return a public key as SubjectPublicKeyInfo PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: PublicKey) -> str:
    """Return the hex SHA-256 of the key's SubjectPublicKeyInfo DER: 64 characters that name it."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def verifies(key: PublicKey, signature: bytes, message: bytes) -> bool:
    """Return whether `signature` is the key's over `message`."""
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        else:
            key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def pae(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """Return what DSSE signs: type and payload with their lengths (DSSE 1.0, pre-authentication encoding)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def canonical(value: Any) -> bytes:
    """Return JSON in its one form: sorted keys, no white space, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True)
class Entry:
    """One release, log or witness key and the log indices for which it counts."""

    role: str
    name: str
    pem: str
    from_index: int = 0
    until_index: int | None = None
    """First index at which it no longer counts; None: it has not been revoked."""


@dataclass(frozen=True)
class Keyring:
    """The keys that a root vouches for, from one version to the next."""

    version: int
    roots: Sequence[str]
    """PEM of the root keys; only these sign keyrings."""
    keys: Sequence[Entry]
    previous_sha256: str = ""
    threshold: int = 1
    """How many different roots must sign."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "roots", tuple(self.roots))
        object.__setattr__(self, "keys", tuple(self.keys))

    def payload(self) -> bytes:
        """Return the bytes that roots sign: JSON with sorted keys."""
        fields = {name: getattr(self, name) for name in ("version", "previous_sha256", "threshold")}
        return canonical(fields | {"roots": list(self.roots), "keys": [vars(entry) for entry in self.keys]})

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


def read_chain(envelopes: Sequence[dict[str, Any]], root_fingerprint: str, seen_version: int = 0) -> Keyring:
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
        keyring, signed = _open_keyring(envelope, where, before.root_keys() if before else [])
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


def _open_keyring(envelope: dict[str, Any], where: str, old_roots: list[PublicKey]) -> tuple[Keyring, set[str]]:
    """Return a keyring and the fingerprints of the roots, its own or the previous version's, that validly signed it."""
    with parsing("a keyring cannot be read", where):
        payload = base64.b64decode(envelope["payload"], validate=True)
        if envelope["payloadType"] != KEYRING_TYPE or len(payload) > MAX_KEYRING_BYTES:
            raise ValueError(f"payload type {envelope['payloadType']!r}, {len(payload):,} bytes")
        keyring = _keyring(json.loads(payload))
        signatures = [(s["keyid"], base64.b64decode(s["sig"], validate=True)) for s in envelope["signatures"][:64]]
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


def _keyring(fields: dict[str, Any]) -> Keyring:
    """Return a keyring from its JSON fields; ValueError, KeyError or TypeError when one is not what it should be."""
    entries = tuple(Entry(**entry) for entry in fields["keys"])
    counts = [fields["version"], fields["threshold"], *(entry.from_index for entry in entries)]
    counts += [entry.until_index for entry in entries if entry.until_index is not None]
    if not all(type(count) is int and count >= 0 for count in counts) or min(counts[:2]) < 1:
        raise ValueError("a version, threshold or index is not a whole number")
    if not 0 < len(fields["roots"]) <= 32 or len(entries) > 1024:
        raise ValueError(f"{len(fields['roots'])} roots, {len(entries)} keys")
    if any(
        entry.role not in ROLES or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}", entry.name)
        for entry in entries
    ):
        raise ValueError("a key has an unknown role or a bad name")
    return Keyring(**fields | {"keys": entries})


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of a leaf (RFC 6962, 2.1)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of two subtrees (RFC 6962, 2.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """Return the tree's root over leaf hashes; of none, the hash of nothing."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    level = list(leaves)
    while len(level) > 1:
        # An odd node is carried up as it is: that is the tree of RFC 6962, whose left part is a power of two.
        pairs = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(level) & ~1 :]
    return level[0]


@dataclass(frozen=True)
class LogCheckpoint:
    """The signed state of a log: origin, number of entries, root (C2SP tlog-checkpoint)."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """Return the three lines that are signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


def read_note(note: str, keys: dict[str, PublicKey]) -> tuple[LogCheckpoint, list[str]]:
    """Return a note's checkpoint and the names of the given keys that signed it, each key counted once.

    Raises ProofError when the note is malformed or none of the keys signed it.
    """
    fields = note_parts(note)[0].split("\n")
    with parsing("a log checkpoint cannot be read", None, "origin, size, root"):
        if len(fields) != 4 or not fields[0] or not re.fullmatch(r"[0-9]{1,12}", fields[1]):
            raise ValueError("not three lines")
        checkpoint = LogCheckpoint(fields[0], int(fields[1]), base64.b64decode(fields[2], validate=True))
    signers = note_signers(note, keys)
    if not signers:
        raise ProofError("a log checkpoint is signed by no trusted key", where=checkpoint.origin, expected=list(keys))
    return checkpoint, signers


def note_parts(note: str) -> tuple[str, list[str]]:
    """Return a signed note's text and its signature lines (C2SP signed-note)."""
    text, separator, signatures = note.rpartition("\n\n")
    if not separator or not signatures.endswith("\n"):
        raise ProofError("not a signed note", expected="a text, an empty line, signatures")
    return text + "\n", signatures[:-1].split("\n")


def note_signers(note: str, keys: dict[str, PublicKey]) -> list[str]:
    """Return the names of the keys that signed a note."""
    text, lines = note_parts(note)
    return [name for name, key in keys.items() if any(_signed(line, text, name, key) for line in lines)]


def note_key_id(name: str, key: PublicKey) -> bytes:
    """Return the four bytes that name an Ed25519 key in a signed note (C2SP signed-note)."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(name.encode() + b"\n\x01" + raw).digest()[:4]


def _signed(line: str, text: str, name: str, key: PublicKey) -> bool:
    if not line.startswith(f"— {name} ") or not isinstance(key, ed25519.Ed25519PublicKey):
        return False
    with contextlib.suppress(ValueError):
        raw = base64.b64decode(line[len(name) + 3 :], validate=True)
        return raw[:4] == note_key_id(name, key) and verifies(key, raw[4:], text.encode())
    return False
