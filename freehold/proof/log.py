"""An append-only log: a Merkle tree after RFC 6962, with checkpoints in C2SP's signed-note form.

Training anchors its checkpoints here and releases their signatures, so that published history cannot be rewritten:
a later log must contain an earlier one (`check_consistency`), and an entry is proven to be in it (`check_inclusion`)
without the rest. Offline there is no trusted clock, so order in the log is the only time.

Worked example: leaves a, b, c. The root is H(1, H(1, H(0, a), H(0, b)), H(0, c)), where H(0, ...) marks a leaf
and H(1, ...) a node, so that no leaf can pass for a node. The proof that b is in it is [H(0, a), H(0, c)].
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519

from freehold.core.artifact import write_atomic
from freehold.core.errors import ProofError
from freehold.proof.keys import SigningKey
from freehold.proof.trust import LogCheckpoint, leaf_hash, node_hash, note_key_id, note_parts, tree_root

MAX_ENTRY_BYTES = 65_536
MAX_ENTRIES = 10_000_000


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Return the hashes that prove leaf `index` to be in the tree, from the leaf upwards (RFC 6962, 2.1.1)."""
    if not 0 <= index < len(leaves):
        raise ProofError("no such entry in the log", found=index, expected=f"0 to {len(leaves) - 1}")
    if len(leaves) == 1:
        return []
    half = _split(len(leaves))
    if index < half:
        return [*inclusion_proof(leaves[:half], index), tree_root(leaves[half:])]
    return [*inclusion_proof(leaves[half:], index - half), tree_root(leaves[:half])]


def check_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], expected: bytes) -> bool:
    """Return whether `leaf` is entry `index` of the tree with that size and root (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    node, place, last = leaf, index, size - 1
    for sibling in proof:
        if last == 0:
            return False
        if place & 1 or place == last:
            node = node_hash(sibling, node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and node == expected


def consistency_proof(leaves: Sequence[bytes], old_size: int) -> list[bytes]:
    """Return the hashes that prove the first `old_size` leaves to be unchanged (RFC 6962, 2.1.2)."""
    if not 0 < old_size <= len(leaves):
        raise ProofError("no such earlier log", found=old_size, expected=f"1 to {len(leaves)}")
    return _subproof(leaves, old_size, complete=True)


def check_consistency(old: tuple[int, bytes], new: tuple[int, bytes], proof: Sequence[bytes]) -> bool:
    """Return whether the log (size, root) `new` contains `old` as its beginning (RFC 9162, 2.1.4.2)."""
    (old_size, old_root), (new_size, new_root) = old, new
    if old_size == new_size:
        return not proof and old_root == new_root
    if not 0 < old_size < new_size:
        return False
    path = list(proof)
    if old_size & (old_size - 1) == 0:  # a complete subtree is its own first proof element
        path.insert(0, old_root)
    if not path:
        return False
    place, last = old_size - 1, new_size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    first = second = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            first, second = node_hash(sibling, first), node_hash(sibling, second)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            second = node_hash(second, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and first == old_root and second == new_root


def sign_note(checkpoint: LogCheckpoint, key: SigningKey, name: str | None = None) -> str:
    """Return the checkpoint as a signed note; a witness appends its own line with `cosign`."""
    text = checkpoint.text()
    return f"{text}\n{_signature_line(text, key, name or checkpoint.origin)}"


def cosign(note: str, key: SigningKey, name: str) -> str:
    """Return the note with one more signature: a witness saw this checkpoint."""
    text, _ = note_parts(note)
    return note + _signature_line(text, key, name)


class Log:
    """A log in a file: one JSON object a line, appended and flushed, never rewritten."""

    def __init__(self, path: Path, origin: str) -> None:
        self.path, self.origin = path, origin
        self.entries = self._read()
        self.leaves = [leaf_hash(entry) for entry in self.entries]

    def append(self, entry: dict[str, Any]) -> int:
        """Append an entry and return its index; ProofError when it is too large."""
        line = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        if len(line) > MAX_ENTRY_BYTES:
            raise ProofError("a log entry is too large", where=self.path, found=f"{len(line):,} bytes")
        with self.path.open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(line)
        self.leaves.append(leaf_hash(line))
        return len(self.leaves) - 1

    def checkpoint(self, size: int | None = None) -> LogCheckpoint:
        """Return the state of the log when it had `size` entries (None: now)."""
        leaves = self.leaves[:size]
        return LogCheckpoint(self.origin, len(leaves), tree_root(leaves))

    def _read(self) -> list[bytes]:
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            # A kill between write and flush leaves half a line: it was never acknowledged, so it is dropped.
            data = data[: data.rfind(b"\n") + 1]
            write_atomic(self.path, data)
        entries = data.splitlines()
        if len(entries) > MAX_ENTRIES or any(len(entry) > MAX_ENTRY_BYTES for entry in entries):
            raise ProofError("a log is larger than it may be", where=self.path)
        return entries


def _split(size: int) -> int:
    """Return the largest power of two below `size`: the leaves of the left subtree."""
    return 1 << ((size - 1).bit_length() - 1)


def _subproof(leaves: Sequence[bytes], old_size: int, *, complete: bool) -> list[bytes]:
    if old_size == len(leaves):
        return [] if complete else [tree_root(leaves)]
    half = _split(len(leaves))
    if old_size <= half:
        return [*_subproof(leaves[:half], old_size, complete=complete), tree_root(leaves[half:])]
    return [*_subproof(leaves[half:], old_size - half, complete=False), tree_root(leaves[:half])]


def _signature_line(text: str, key: SigningKey, name: str) -> str:
    if not isinstance(key.public, ed25519.Ed25519PublicKey):
        raise ProofError("a log needs an Ed25519 key", where=name, todo="make one: freehold keys new --role log")
    if not name or any(c.isspace() or c == "+" for c in name):
        raise ProofError("a signer's name may have neither spaces nor +", found=repr(name))
    signature = note_key_id(name, key.public) + key.sign(text.encode())
    return f"— {name} {base64.b64encode(signature).decode()}\n"
