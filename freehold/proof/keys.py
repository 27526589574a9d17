"""Key pairs: ECDSA P-256 for roots and releases, Ed25519 for logs and witnesses.

ECDSA signatures are deterministic (RFC 6979), so that signing the same bytes twice gives the same file. Private keys
are PKCS#8 PEM files that only their owner can read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from freehold.core.errors import ProofError
from freehold.proof.trust import MAX_PEM_BYTES, PublicKey, parse_public

Role = Literal["root", "release", "log", "witness"]
ECDSA = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


@dataclass(frozen=True)
class SigningKey:
    """A private key that can sign; `public` is the half that others verify with."""

    private: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

    @property
    def public(self) -> PublicKey:
        """Return the public half."""
        return self.private.public_key()

    def sign(self, message: bytes) -> bytes:
        """Return a signature of `message`: DER ECDSA over SHA-256, or the 64 bytes of Ed25519."""
        if isinstance(self.private, ed25519.Ed25519PrivateKey):
            return self.private.sign(message)
        return self.private.sign(message, ECDSA)


def new_key(role: Role) -> SigningKey:
    """Return a fresh key of the kind that the role needs."""
    if role in ("log", "witness"):  # C2SP checkpoints are signed with Ed25519
        return SigningKey(ed25519.Ed25519PrivateKey.generate())
    return SigningKey(ec.generate_private_key(ec.SECP256R1()))  # model-signing accepts EC keys only


def write_private(path: Path, key: SigningKey, password: bytes | None = None) -> None:
    """Write a private key as PKCS#8 PEM with mode 600.

    Raises ProofError when the file exists: a key is never overwritten.
    """
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = key.private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )  # fmt: skip
    try:
        # O_EXCL with the mode: there is no moment in which others could read or replace it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ProofError(
            "a key file exists already", where=path, todo="choose another name, or move the old key away first"
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())


def read_private(path: Path, password: bytes | None = None) -> SigningKey:
    """Read a private key of PKCS#8 PEM; ProofError when it is none, or of a kind we do not use."""
    try:
        key = serialization.load_pem_private_key(_read(path), password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ProofError(
            "not a private key that can be read", where=path, found=error, expected="PKCS#8 PEM, with its password"
        ) from error
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return SigningKey(key)
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
        return SigningKey(key)
    raise ProofError("a key of another kind", where=path, found=type(key).__name__, expected="ECDSA P-256 or Ed25519")


def read_public(path: Path) -> PublicKey:
    """Read a public key; ProofError when the file is missing or is none."""
    return parse_public(_read(path), path)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise ProofError("a key file cannot be read", where=path, found=error.strerror) from error
