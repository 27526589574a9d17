"""A folder of keys: a root, release and log keys, the keyring they are named in, and the log.

    keys/
      root.pem            signs keyrings only; move it off this machine once the keyring is made
      release-1.pem ...   signs releases; `rotate` makes the next one
      log-1.pem           signs the log's checkpoints
      root.txt            the root's fingerprint: what others must get from you, by another way than the release
      keyring.json        every version of the keyring, each signed by the root
      log.jsonl           the log: keyrings, checkpoints of runs, releases
      label.txt           what the keys are, where they are not an owner's own (`made on the spot`)

A password, where one is wanted, comes from the environment variable FREEHOLD_KEY_PASSWORD.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from freehold.core.artifact import write_atomic
from freehold.core.errors import ProofError
from freehold.proof.keyring import entry_for, sign_keyring
from freehold.proof.keys import Role, SigningKey, new_key, parse_public, read_private, write_private
from freehold.proof.log import Log
from freehold.proof.trust import Entry, Keyring, fingerprint, public_pem, read_chain
from freehold.proof.verify import json_list

PASSWORD = "FREEHOLD_KEY_PASSWORD"
ROOT, KEYRING, LOG = "root.pem", "keyring.json", "log.jsonl"
FINGERPRINT = "root.txt"
LABEL = "label.txt"
RELEASE_KEY: Role = "release"
LOG_KEY: Role = "log"


@dataclass(frozen=True)
class KeyFolder:
    """The keys of one owner."""

    path: Path
    root_fingerprint: str
    keyring: Keyring
    chain: tuple[dict[str, Any], ...]

    @property
    def log(self) -> Log:
        """Return the log; its origin is the owner's root, so that no two owners' logs can be mixed up."""
        return Log(self.path / LOG, f"freehold/{self.root_fingerprint[:16]}")

    @property
    def label(self) -> str:
        """Return what the keys are, as a release says it; empty for an owner's own."""
        path = self.path / LABEL
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def newest(self, role: str) -> Entry:
        """Return the newest entry of a role that has not been revoked; ProofError when there is none."""
        entries = [entry for entry in self.keyring.keys if entry.role == role and entry.until_index is None]
        if not entries:
            raise ProofError(
                f"no {role} key counts any more", where=self.path, todo=f"freehold keys rotate {self.path}"
            )
        return entries[-1]

    def signing(self, role: str) -> tuple[str, SigningKey]:
        """Return the name and private key of the newest entry of a role; ProofError when its file is not that key."""
        entry = self.newest(role)
        key = read_private(self.path / f"{entry.name}.pem", password())
        if public_pem(key.public).decode() != entry.pem:
            raise ProofError("a private key is not the one in the keyring", where=self.path / f"{entry.name}.pem")
        return entry.name, key

    def chain_bytes(self) -> bytes:
        """Return every keyring version with its signatures, as a release carries them."""
        return json.dumps(list(self.chain), sort_keys=True, indent=1).encode() + b"\n"

    def rotate(self, role: Role) -> KeyFolder:
        """Make the next key of a role; the one before counts up to now. Needs the root key."""
        if role not in (RELEASE_KEY, LOG_KEY):
            raise ProofError("only release and log keys rotate", found=role)
        now = len(self.log.leaves)
        number = 1 + sum(entry.role == role for entry in self.keyring.keys)
        kept = [_ended(entry, now) if entry.role == role else entry for entry in self.keyring.keys]
        name, key = f"{role}-{number}", new_key(role)
        write_private(self.path / f"{name}.pem", key, password())
        # The log entry of the new keyring is the last that the old log key may sign for.
        return self._next([*kept, entry_for(role, name, key.public, now)])

    def revoke(self, name: str) -> KeyFolder:
        """End a key's validity at the present end of the log. Needs the root key."""
        if all(entry.name != name for entry in self.keyring.keys):
            known = ", ".join(entry.name for entry in self.keyring.keys)
            raise ProofError("no such key in the keyring", found=name, expected=known)
        now = len(self.log.leaves)
        return self._next([_ended(entry, now) if entry.name == name else entry for entry in self.keyring.keys])

    def add_witness(self, name: str, pem: bytes) -> KeyFolder:
        """Add the public key of someone who cosigns the log. Needs the root key."""
        if any(entry.name == name for entry in self.keyring.keys):
            raise ProofError("a key of that name is in the keyring already", found=name)
        entry = entry_for("witness", name, parse_public(pem, name), len(self.log.leaves))
        return self._next([*self.keyring.keys, entry])

    def _next(self, keys: list[Entry]) -> KeyFolder:
        keyring = replace(
            self.keyring, version=self.keyring.version + 1, previous_sha256=self.keyring.sha256(), keys=tuple(keys)
        )
        root = read_private(self.path / ROOT, password())
        chain = (*self.chain, sign_keyring(keyring, [root]))
        read_chain(chain, self.root_fingerprint)  # a root that does not fit is found before anything is written
        return _write(self.path, self.root_fingerprint, keyring, chain)


def create(path: Path, label: str = "") -> KeyFolder:
    """Make a folder of keys with a root, a release key and a log key; ProofError when it holds keys already.

    `label` is printed in every release that they sign.
    """
    if (path / KEYRING).exists():
        raise ProofError("the folder holds keys already", where=path, todo="name another folder")
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    root = new_key("root")
    write_private(path / ROOT, root, password())
    write_atomic(path / FINGERPRINT, fingerprint(root.public) + "\n")
    if label:
        write_atomic(path / LABEL, label + "\n")
    entries = []
    roles: tuple[Role, Role] = (RELEASE_KEY, LOG_KEY)
    for role in roles:
        key = new_key(role)
        write_private(path / f"{role}-1.pem", key, password())
        entries.append(entry_for(role, f"{role}-1", key.public))
    keyring = Keyring(1, [public_pem(root.public).decode()], entries)
    return _write(path, fingerprint(root.public), keyring, (sign_keyring(keyring, [root]),))


def load(path: Path) -> KeyFolder:
    """Read a folder of keys; ProofError when it holds none, or a chain that does not verify."""
    if not (path / KEYRING).is_file():
        raise ProofError("no keys here", where=path, expected=KEYRING, todo=f"freehold keys new {path}")
    chain = json_list(path / KEYRING)
    root = read_fingerprint(path / FINGERPRINT)
    return KeyFolder(path, root, read_chain(chain, root), tuple(chain))


def read_fingerprint(path: Path) -> str:
    """Return the fingerprint in a text file; ProofError when there is none."""
    try:
        text = path.read_bytes()[:200].decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ProofError("a fingerprint cannot be read", where=path, found=error) from error
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ProofError("not a fingerprint", where=path, found=text[:80], expected="64 hexadecimal digits")
    return text


def password() -> bytes | None:
    """Return the password of the private keys, from the environment; None without one."""
    value = os.environ.get(PASSWORD, "")
    return value.encode() if value else None


def _ended(entry: Entry, now: int) -> Entry:
    return entry if entry.until_index is not None else replace(entry, until_index=now)


def _write(path: Path, root: str, keyring: Keyring, chain: tuple[dict[str, Any], ...]) -> KeyFolder:
    folder = KeyFolder(path, root, keyring, chain)
    write_atomic(path / KEYRING, folder.chain_bytes())
    folder.log.append({"kind": "keyring", "version": keyring.version, "sha256": keyring.sha256()})
    return folder
