"""The log: proofs hold for every size, and nothing else passes for one."""

import itertools

import pytest

from freehold.core.errors import ProofError
from freehold.proof import keys, log, trust

LEAVES = [trust.leaf_hash(bytes([number])) for number in range(20)]


def test_roots_of_rfc_6962():
    """The test vectors of certificate-transparency's reference implementation."""
    entries = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    leaves = [trust.leaf_hash(bytes.fromhex(entry)) for entry in entries]
    assert trust.tree_root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert trust.tree_root(leaves[:1]).hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert trust.tree_root(leaves[:2]).hex() == "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"
    assert trust.tree_root(leaves).hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


def test_inclusion_holds_for_its_leaf_only():
    for size in range(1, len(LEAVES) + 1):
        top = trust.tree_root(LEAVES[:size])
        for index in range(size):
            proof = log.inclusion_proof(LEAVES[:size], index)
            for leaf, place in itertools.product(range(size), repeat=2):
                holds = log.check_inclusion(LEAVES[leaf], place, size, proof, top)
                assert holds == (leaf == place == index), (size, index, leaf, place)
            assert not log.check_inclusion(LEAVES[index], index, size, [*proof, LEAVES[0]], top)


def test_consistency_holds_for_prefixes_only():
    other = [trust.leaf_hash(b"other"), *LEAVES[1:]]
    for old in range(1, len(LEAVES) + 1):
        for new in range(old, len(LEAVES) + 1):
            proof = log.consistency_proof(LEAVES[:new], old)
            top = (new, trust.tree_root(LEAVES[:new]))
            assert log.check_consistency((old, trust.tree_root(LEAVES[:old])), top, proof)
            assert not log.check_consistency((old, trust.tree_root(other[:old])), top, proof)
            if old < new:
                assert not log.check_consistency((old, trust.tree_root(LEAVES[:old])), top, proof[:-1])


def test_a_log_survives_a_torn_write(tmp_path):
    path = tmp_path / "log.jsonl"
    first = log.Log(path, "example.org/freehold")
    for step in range(5):
        assert first.append({"kind": "checkpoint", "step": step}) == step
    with path.open("ab") as file:
        file.write(b'{"kind": "half')
    again = log.Log(path, "example.org/freehold")
    assert again.checkpoint() == first.checkpoint()
    again.append({"kind": "release"})
    assert len(log.Log(path, "example.org/freehold").entries) == 6


def test_notes_count_each_trusted_signer_once():
    maker, witness, stranger = (keys.new_key(role) for role in ("log", "witness", "witness"))
    point = trust.LogCheckpoint("example.org/log", 7, b"r" * 32)
    note = log.cosign(log.cosign(log.sign_note(point, maker), witness, "alice"), stranger, "mallory")
    trusted = {"example.org/log": maker.public, "alice": witness.public}
    assert trust.read_note(note, trusted) == (point, ["example.org/log", "alice"])
    assert trust.read_note(note + note.splitlines(True)[-1], trusted)[1] == ["example.org/log", "alice"]
    with pytest.raises(ProofError, match="no trusted key"):
        trust.read_note(note, {"mallory": maker.public})
    with pytest.raises(ProofError, match="no trusted key"):
        trust.read_note(note.replace("\n7\n", "\n8\n"), trusted)
    for damaged in ("", "x", note.replace("\n\n", "\n"), note.replace("\n7\n", "\nseven\n"), note[:-1]):
        with pytest.raises(ProofError):
            trust.read_note(damaged, trusted)


def test_bad_requests_of_a_log(tmp_path):
    with pytest.raises(ProofError, match="no such entry"):
        log.inclusion_proof(LEAVES, 20)
    with pytest.raises(ProofError, match="no such earlier log"):
        log.consistency_proof(LEAVES, 0)
    with pytest.raises(ProofError, match="too large"):
        log.Log(tmp_path / "l", "o").append({"text": "x" * 70_000})
    with pytest.raises(ProofError, match="Ed25519"):
        log.sign_note(trust.LogCheckpoint("o", 0, b""), keys.new_key("release"))
    with pytest.raises(ProofError, match="spaces"):
        log.sign_note(trust.LogCheckpoint("o", 0, b""), keys.new_key("log"), "two words")
