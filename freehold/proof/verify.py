#!/usr/bin/env python3
"""Verify a release offline: keyring chain, signature, place in the log, and every file. For auditors to read.

This file and `trust.py` next to it need Python 3.11 and the package `cryptography`, nothing else and no network:

    python verify.py PACK --root FINGERPRINT

Get them, and the root's fingerprint, from someone you trust; never from the pack that it judges. It checks, in order:

1. `keys/keyring.json`: a chain of keyrings, the first signed by the root you name, each later one by the threshold of
   the old and of the new roots.
2. `pack.log`: the log's checkpoint, signed by a log key; `log/entries.jsonl` and the release's own entry make its root.
3. `pack.sig`: an OpenSSF model signing bundle, by a release key that the keyring trusts at that index.
4. The folder holds exactly the files that were signed: none missing, added, changed, linked or special.

It does not check what the files say; `freehold verify` re-derives that.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

try:
    from freehold.proof import trust
except ImportError:  # the two files on their own
    import trust  # type: ignore[import-not-found, no-redef]

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

# Bounds on what is read before anything in it is trusted.
MAX_KEYRING_FILE_BYTES = 1 << 20
MAX_BUNDLE_BYTES = 64 * 2**20
MAX_FILES = 100_000
MAX_NOTE_BYTES = 1 << 16
MAX_LOG_BYTES = 256 * 2**20

SIGNATURE, LOG_NOTE = "pack.sig", "pack.log"
UNSIGNED = frozenset({SIGNATURE, LOG_NOTE})
"""The only names that the signature does not cover: itself, and the log's checkpoint, whose last entry is the pack."""
KEYRING, LOG_ENTRIES = "keys/keyring.json", "log/entries.jsonl"


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
            raise trust.ProofError("an empty folder cannot be signed", where=here, todo="remove it")
        for name in (*folders, *names):
            path = here / name
            relative = path.relative_to(folder).as_posix()
            _check_entry(path, relative, is_folder=name in folders)
            if (other := folded.setdefault(relative.casefold(), relative)) != relative:
                raise trust.ProofError("two names differ only by case", where=folder, found=f"{other} and {relative}")
            if name not in folders and relative not in ignored:
                found[relative] = path
        if len(found) > MAX_FILES:
            raise trust.ProofError("too many files to sign", where=folder, expected=f"at most {MAX_FILES:,}")
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


def files_root(digests: dict[str, str]) -> str:
    """Return the SHA-256 over the digests of all files, in the order of their names (OMS)."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in sorted(digests.items()))).hexdigest()


def write_bundle(payload: bytes, signature: bytes, key: trust.PublicKey) -> bytes:
    """Return the bundle in its one form: sorted keys, no white space, a newline at the end."""
    bundle = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": hashlib.sha256(trust.public_pem(key)).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": trust.PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return trust.canonical(bundle) + b"\n"


def read_bundle(data: bytes, keys: list[trust.PublicKey], where: object) -> Signed:
    """Verify a bundle's signature by one of `keys` and return what it lists; files are not looked at.

    Raises ProofError when the bundle is malformed, signed by no trusted key, or inconsistent in itself.
    """
    payload, signature = _open_envelope(data, where)
    signer = next((key for key in keys if trust.verifies(key, signature, trust.pae(payload))), None)
    if signer is None:
        raise trust.ProofError(
            "the signature is by no trusted key",
            where=where,
            expected=", ".join(trust.fingerprint(key)[:16] for key in keys) or "a trusted key",
            todo="get the release again from its maker, or check the root fingerprint you were given",
        )
    if write_bundle(payload, signature, signer) != data:
        # JSON and base64 can say the same in many ways; one form only leaves no byte that anyone may change.
        raise trust.ProofError(
            "a signature bundle is not in its one form", where=where, expected="JSON with sorted keys"
        )
    name, root, files = _parse_statement(payload, where)
    return Signed(name, root, files, trust.fingerprint(signer))


def verify_folder(
    folder: Path, data: bytes, keys: list[trust.PublicKey], ignored: frozenset[str], where: object
) -> Signed:
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
        raise trust.ProofError("the files are not those that were signed", where=folder, found="; ".join(shown))
    return signed


def _open_envelope(data: bytes, where: object) -> tuple[bytes, bytes]:
    """Return payload and signature of a bundle with exactly one signature."""
    if len(data) > MAX_BUNDLE_BYTES:
        raise trust.ProofError("a signature file is too large", where=where, found=f"{len(data):,} bytes")
    with trust.parsing("not a signature bundle", where, MEDIA_TYPE):
        bundle = json.loads(data)
        envelope = bundle["dsseEnvelope"]
        (signature,) = envelope["signatures"]
        kinds = (bundle["mediaType"], envelope["payloadType"])
        payload = base64.b64decode(envelope["payload"], validate=True)
        raw = base64.b64decode(signature["sig"], validate=True)
    if kinds != (MEDIA_TYPE, trust.PAYLOAD_TYPE):
        raise trust.ProofError(
            "a bundle of another kind", where=where, found=kinds, expected=(MEDIA_TYPE, trust.PAYLOAD_TYPE)
        )
    return payload, raw


def _parse_statement(payload: bytes, where: object) -> tuple[str, str, dict[str, str]]:
    with trust.parsing("a signed statement cannot be read", where):
        statement = json.loads(payload)
        (subject,) = statement["subject"]
        name, root = str(subject["name"]), str(subject["digest"]["sha256"])
        resources = statement["predicate"]["resources"]
        files = {str(r["name"]): str(r["digest"]) for r in resources if r["algorithm"] == "sha256"}
        consistent = len(files) == len(resources) and files_root(files) == root
        kinds = (statement["_type"], statement["predicateType"])
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise trust.ProofError("a statement of another kind", where=where, found=kinds)
    if not consistent:
        raise trust.ProofError("the signed list contradicts its own root hash", where=where)
    for each in files:
        if each != PurePosixPath(each).as_posix() or each.startswith("/") or ".." in PurePosixPath(each).parts:
            raise trust.ProofError("a signed name leaves its folder", where=where, found=each)
    return name, root, files


def _check_entry(path: Path, relative: str, *, is_folder: bool) -> None:
    """Refuse what is neither a plain file nor a folder, and names that are not UTF-8."""
    if any("\udc80" <= character <= "\udcff" for character in relative):  # how Python shows bytes that are no UTF-8
        raise trust.ProofError("a file name is not UTF-8", where=path.parent, found=repr(relative))
    mode = path.lstat().st_mode
    if not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
        raise trust.ProofError(
            "not a plain file", where=path, found="a link" if stat.S_ISLNK(mode) else "a special file", todo="remove it"
        )
    if not is_folder and mode & 0o7133:  # set-id, sticky, executable, or writable by others
        raise trust.ProofError(
            "a file's mode is not that of a release", where=path, found=oct(mode & 0o7777), expected="0o644"
        )


def _raise(error: OSError) -> None:
    raise trust.ProofError("a folder cannot be read", where=error.filename, found=error.strerror) from error


@dataclass(frozen=True)
class Verified:
    """What level 1 established of a release."""

    name: str
    signed_by: str
    keyring_version: int
    log: trust.LogCheckpoint
    index: int
    """Place of the release in the log."""
    witnesses: list[str]
    files: dict[str, str]


def verify_pack(pack: Path, root_fingerprint: str, seen_version: int = 0, seen_size: int = 0) -> Verified:
    """Verify a release folder at level 1; ProofError at the first thing that does not hold.

    `seen_version` and `seen_size` are the newest keyring and the longest log of this root that the verifier has met:
    anything older is a rollback.
    """
    if not re.fullmatch(r"[0-9a-fA-F]{64}", root_fingerprint):
        raise trust.ProofError("not a root fingerprint", found=root_fingerprint, expected="64 hexadecimal digits")
    list_files(pack)  # links and special files are refused before any file is opened
    keyring = trust.read_chain(json_list(pack / KEYRING), root_fingerprint, seen_version)
    entries = [line for line in _read(pack / LOG_ENTRIES, MAX_LOG_BYTES).split(b"\n") if line]
    index = len(entries)
    note = _read(pack / LOG_NOTE, MAX_NOTE_BYTES).decode("utf-8", "replace")
    checkpoint, _ = trust.read_note(note, keyring.trusted("log", index))
    if checkpoint.size < seen_size:
        raise trust.ProofError("a shorter log than one seen before", found=checkpoint.size, expected=f">= {seen_size}")
    releasers = list(keyring.trusted("release", index).values())
    data = _read(pack / SIGNATURE, MAX_BUNDLE_BYTES)
    signed = verify_folder(pack, data, releasers, UNSIGNED, pack / SIGNATURE)
    leaves = [trust.leaf_hash(line) for line in [*entries, pack_entry(signed.name, signed.root_sha256)]]
    if (checkpoint.size, checkpoint.root) != (len(leaves), trust.tree_root(leaves)):
        raise trust.ProofError("the release is not the last entry of the signed log", where=pack / LOG_NOTE)
    witnesses = trust.note_signers(note, keyring.trusted("witness", index))
    if len(trust.note_parts(note)[1]) != 1 + len(witnesses):
        raise trust.ProofError(
            "a log checkpoint has a signature that no key of the keyring made", where=pack / LOG_NOTE
        )
    return Verified(signed.name, signed.key, keyring.version, checkpoint, index, witnesses, signed.files)


def pack_entry(name: str, root_sha256: str) -> bytes:
    """Return the log entry of a release."""
    return trust.canonical({"kind": "release", "name": name, "root_sha256": root_sha256})


def _read(path: Path, most: int) -> bytes:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise trust.ProofError("a file of the release cannot be read", where=path, found=error.strerror) from error
    if len(data) > most:
        raise trust.ProofError("a file of the release is too large", where=path, expected=f"at most {most:,} bytes")
    return data


def json_list(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSON file that holds a list of them; ProofError otherwise."""
    with trust.parsing("a keyring cannot be read", path):
        value = json.loads(_read(path, MAX_KEYRING_FILE_BYTES))
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise ValueError("not a list of objects")
    return value


def main() -> int:
    """Verify a release from the command line: 0 when it holds, 3 when it does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--root", required=True, help="SHA-256 fingerprint of the root key, from someone you trust")
    args = parser.parse_args()
    try:
        done = verify_pack(args.pack, args.root)
    except trust.ProofError as error:
        print(f"NOT VERIFIED: {error}", file=sys.stderr)
        return 3
    print(f"verified: {done.name}, {len(done.files):,} files, signed by {done.signed_by}")
    print(f"log {done.log.origin}: entry {done.index}, witnesses: {', '.join(done.witnesses) or 'none'}")
    print("not checked: what the files say (freehold verify does), and how the model behaves")
    return 0


if __name__ == "__main__":
    sys.exit(main())
