"""Signing a folder: OpenSSF model signing 1.0 (OMS), written and verified with `cryptography` alone.

The bundle is a sigstore bundle v0.3 around a DSSE envelope around an in-toto statement that lists every file with its
SHA-256; `model-signing verify key` accepts it. Sources: sigstore/model-transparency, secure-systems-lab/dsse,
in-toto/attestation on GitHub. Unlike that tool, verification here also refuses links, special files, empty folders and
names that differ only by case: each of them can hold something that the signature does not cover.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from freehold.core.errors import ProofError
from freehold.proof.keys import PublicKey, SigningKey, fingerprint, public_pem, verifies

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
# 100,000 files with names of 200 characters: more than any release, less than a machine's memory.
MAX_BUNDLE_BYTES = 64 * 2**20
MAX_FILES = 100_000


@dataclass(frozen=True)
class Signed:
    """What a verified bundle says."""

    name: str
    root_sha256: str
    """SHA-256 over the digests of all files, in the order of their names."""
    files: dict[str, str]
    """Hex SHA-256 by POSIX path relative to the folder."""
    key: str
    """Fingerprint of the key that signed."""


def pae(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """Return what DSSE signs: type and payload with their lengths (DSSE 1.0, pre-authentication encoding)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def list_files(folder: Path, ignored: frozenset[str] = frozenset()) -> dict[str, Path]:
    """Return every file below `folder` by its POSIX path, sorted; dot-files included.

    `ignored` are paths that the signature cannot cover (its own file). Raises ProofError for what a list of files
    cannot vouch for: links, special files, empty folders, names that are not UTF-8 or differ only by case.
    """
    found: dict[str, Path] = {}
    folded: dict[str, str] = {}
    for parent, folders, names in os.walk(folder, followlinks=False, onerror=_raise):
        here = Path(parent)
        if not folders and not names:
            raise ProofError("an empty folder cannot be signed", where=here, todo="remove it")
        for name in (*folders, *names):
            path = here / name
            relative = path.relative_to(folder).as_posix()
            _check_entry(path, relative, is_folder=name in folders)
            if (other := folded.setdefault(relative.casefold(), relative)) != relative:
                raise ProofError("two names differ only by case", where=folder, found=f"{other} and {relative}")
            if name not in folders and relative not in ignored:
                found[relative] = path
        if len(found) > MAX_FILES:
            raise ProofError("too many files to sign", where=folder, expected=f"at most {MAX_FILES:,}")
    return dict(sorted(found.items()))


def hash_files(folder: Path, ignored: frozenset[str] = frozenset()) -> dict[str, str]:
    """Return the hex SHA-256 of every file that `list_files` names."""
    digests = {}
    for relative, path in list_files(folder, ignored).items():
        # O_NOFOLLOW: between the listing and this open, no one can put a link in the file's place.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            digests[relative] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def sign_folder(folder: Path, key: SigningKey, *, name: str, ignored: frozenset[str]) -> bytes:
    """Return the OMS bundle over every file below `folder` but the `ignored` ones; the same bytes each time."""
    digests = hash_files(folder, ignored)
    payload = _json(_statement(name, digests, ignored))
    return _bundle(payload, key.sign(pae(payload)), key.public)


def read_bundle(data: bytes, keys: list[PublicKey], where: object) -> Signed:
    """Verify a bundle's signature by one of `keys` and return what it lists; files are not looked at.

    Raises ProofError when the bundle is malformed, signed by no trusted key, or inconsistent in itself.
    """
    payload, signature = _open_envelope(data, where)
    signer = next((key for key in keys if verifies(key, signature, pae(payload))), None)
    if signer is None:
        raise ProofError(
            "the signature is by no trusted key",
            where=where,
            expected=", ".join(fingerprint(key)[:16] for key in keys) or "a trusted key",
            todo="get the release again from its maker, or check the root fingerprint you were given",
        )
    if _bundle(payload, signature, signer) != data:
        # JSON and base64 can say the same in many ways; one form only leaves no byte that anyone may change.
        raise ProofError("a signature bundle is not in its one form", where=where, expected="JSON with sorted keys")
    name, root, files = _parse_statement(payload, where)
    return Signed(name, root, files, fingerprint(signer))


def verify_folder(folder: Path, data: bytes, keys: list[PublicKey], ignored: frozenset[str], where: object) -> Signed:
    """Verify that `folder` holds exactly the files that a trusted key signed, and nothing else.

    Raises ProofError naming the files that are missing, added or changed.
    """
    signed = read_bundle(data, keys, where)
    here = hash_files(folder, ignored)
    problems = [f"missing: {name}" for name in sorted(signed.files.keys() - here.keys())]
    problems += [f"added: {name}" for name in sorted(here.keys() - signed.files.keys())]
    problems += [f"changed: {name}" for name in sorted(here) if signed.files.get(name, here[name]) != here[name]]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ProofError("the files are not those that were signed", where=folder, found="; ".join(shown))
    return signed


def _bundle(payload: bytes, signature: bytes, key: PublicKey) -> bytes:
    """Return the bundle in its one form: sorted keys, no white space, a newline at the end."""
    bundle = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": hashlib.sha256(public_pem(key)).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return _json(bundle) + b"\n"


def _statement(name: str, digests: dict[str, str], ignored: frozenset[str]) -> dict[str, Any]:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root(digests)}}],
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


def _root(digests: dict[str, str]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in sorted(digests.items()))).hexdigest()


def _open_envelope(data: bytes, where: object) -> tuple[bytes, bytes]:
    """Return payload and signature of a bundle with exactly one signature."""
    if len(data) > MAX_BUNDLE_BYTES:
        raise ProofError("a signature file is too large", where=where, found=f"{len(data):,} bytes")
    try:
        bundle = json.loads(data)
        envelope = bundle["dsseEnvelope"]
        (signature,) = envelope["signatures"]
        kinds = (bundle["mediaType"], envelope["payloadType"])
        payload = base64.b64decode(envelope["payload"], validate=True)
        raw = base64.b64decode(signature["sig"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise ProofError("not a signature bundle", where=where, found=repr(error), expected=MEDIA_TYPE) from error
    if kinds != (MEDIA_TYPE, PAYLOAD_TYPE):
        raise ProofError("a bundle of another kind", where=where, found=kinds, expected=(MEDIA_TYPE, PAYLOAD_TYPE))
    return payload, raw


def _parse_statement(payload: bytes, where: object) -> tuple[str, str, dict[str, str]]:
    try:
        statement = json.loads(payload)
        (subject,) = statement["subject"]
        name, root = str(subject["name"]), str(subject["digest"]["sha256"])
        resources = statement["predicate"]["resources"]
        files = {str(r["name"]): str(r["digest"]) for r in resources if r["algorithm"] == "sha256"}
        consistent = len(files) == len(resources) and _root(files) == root
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProofError("a signed statement cannot be read", where=where, found=repr(error)) from error
    if statement.get("_type") != STATEMENT_TYPE or statement.get("predicateType") != PREDICATE_TYPE:
        raise ProofError("a statement of another kind", where=where, found=statement.get("predicateType"))
    if not consistent:
        raise ProofError("the signed list contradicts its own root hash", where=where)
    for each in files:
        if each != PurePosixPath(each).as_posix() or each.startswith("/") or ".." in PurePosixPath(each).parts:
            raise ProofError("a signed name leaves its folder", where=where, found=each)
    return name, root, files


def _check_entry(path: Path, relative: str, *, is_folder: bool) -> None:
    """Refuse what is neither a plain file nor a folder, and names that are not UTF-8."""
    try:
        relative.encode("utf-8")
    except UnicodeEncodeError:
        raise ProofError("a file name is not UTF-8", where=path.parent, found=repr(relative)) from None
    mode = path.lstat().st_mode
    if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
        raise ProofError(
            "not a plain file", where=path, found="a link" if stat.S_ISLNK(mode) else "a special file", todo="remove it"
        )


def _raise(error: OSError) -> None:
    raise ProofError("a folder cannot be read", where=error.filename, found=error.strerror) from error


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
