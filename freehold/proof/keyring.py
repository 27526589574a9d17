"""Signing keyrings: what root keys do; `trust.py` reads and verifies them."""

from __future__ import annotations

import base64
from typing import Any

from freehold.proof.keys import SigningKey
from freehold.proof.trust import KEYRING_TYPE, Entry, Keyring, PublicKey, fingerprint, pae, public_pem


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
