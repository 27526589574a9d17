"""Signing a folder: OpenSSF model signing 1.0 (OMS), written and verified with `cryptography` alone.

The bundle is a sigstore bundle v0.3 around a DSSE envelope around an in-toto statement that lists every file with its
SHA-256; `model-signing verify key` accepts it. Sources: sigstore/model-transparency, secure-systems-lab/dsse,
in-toto/attestation on GitHub. Unlike that tool, verification here also refuses links, special files, empty folders and
names that differ only by case: each of them can hold something that the signature does not cover.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from freehold.proof.keys import SigningKey
from freehold.proof.trust import canonical, pae
from freehold.proof.verify import PREDICATE_TYPE, STATEMENT_TYPE, files_root, hash_files, write_bundle


def sign_folder(folder: Path, key: SigningKey, *, name: str, ignored: frozenset[str]) -> bytes:
    """Return the OMS bundle over every file below `folder` but the `ignored` ones; the same bytes each time."""
    digests = hash_files(folder, ignored)
    payload = canonical(_statement(name, digests, ignored))
    return write_bundle(payload, key.sign(pae(payload)), key.public)


def _statement(name: str, digests: dict[str, str], ignored: frozenset[str]) -> dict[str, Any]:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": files_root(digests)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": sorted(ignored),
            },
            "resources": [{"name": n, "algorithm": "sha256", "digest": d} for n, d in sorted(digests.items())],
        },
    }
