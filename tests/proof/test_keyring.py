"""Keyrings: a chain of versions that only enough of the old and of the new roots can continue."""

from dataclasses import replace

import pytest

from freehold.core.errors import ProofError
from freehold.proof import keys, trust
from freehold.proof.keyring import entry_for, sign_keyring
from freehold.proof.trust import Keyring, read_chain

OLD, NEW, OTHER = (keys.new_key("root") for _ in range(3))
RELEASE, LOG = keys.new_key("release"), keys.new_key("log")


def pem(key):
    return trust.public_pem(key.public).decode()


def first(**changes):
    fields = {"version": 1, "roots": [pem(OLD)], "keys": [entry_for("release", "r1", RELEASE.public)]}
    return Keyring(**(fields | changes))


def second(**changes):
    fields = {"version": 2, "previous_sha256": first().sha256(), "roots": [pem(NEW)], "keys": []}
    return Keyring(**(fields | changes))


def chain(*steps):
    return [sign_keyring(keyring, signers) for keyring, signers in steps]


def read(envelopes, **options):
    return read_chain(envelopes, trust.fingerprint(OLD.public), **options)


def test_roots_rotate_with_both_signatures():
    assert read(chain((first(), [OLD]), (second(), [OLD, NEW]))).version == 2


@pytest.mark.parametrize("signers", [[OLD], [NEW], [OTHER, NEW], []])
def test_a_rotation_needs_both_roots(signers):
    with pytest.raises(ProofError, match="too few roots"):
        read(chain((first(), [OLD]), (second(), signers)))


def test_a_threshold_counts_different_roots():
    ring = first(roots=[pem(OLD), pem(NEW)], threshold=2)
    assert read(chain((ring, [OLD, NEW]))) == ring
    with pytest.raises(ProofError, match="too few roots"):
        read(chain((ring, [OLD, OLD])))


def test_the_first_keyring_needs_the_trusted_root():
    with pytest.raises(ProofError, match="root you trust"):
        read(chain((first(roots=[pem(NEW)]), [NEW])))
    with pytest.raises(ProofError, match="root you trust"):
        read(chain((first(roots=[pem(OLD), pem(NEW)]), [NEW])))


def test_a_chain_is_neither_cut_nor_reordered():
    both = chain((first(), [OLD]), (second(), [OLD, NEW]))
    with pytest.raises(ProofError, match="does not follow"):
        read(both[1:])
    with pytest.raises(ProofError, match="does not follow"):
        read([both[0], both[0]])
    with pytest.raises(ProofError, match="does not follow"):
        read(chain((first(), [OLD]), (second(previous_sha256="00"), [OLD, NEW])))
    with pytest.raises(ProofError, match="older keyring"):
        read(both[:1], seen_version=2)
    with pytest.raises(ProofError, match="no keyring"):
        read([])


def test_keys_count_between_their_indices():
    revoked = replace(entry_for("release", "r1", RELEASE.public, 3), until_index=9)
    ring = first(keys=[revoked, entry_for("log", "log", LOG.public)])
    assert [bool(ring.trusted("release", index)) for index in (2, 3, 8, 9)] == [False, True, True, False]
    assert not ring.trusted("release")
    assert list(ring.trusted("log")) == ["log"]


def test_damaged_keyrings_are_refused():
    good = sign_keyring(first(), [OLD])
    for damage in ({"payload": "!"}, {"payloadType": "other"}, {"signatures": 3}, {"payload": "e30="}):
        with pytest.raises(ProofError, match="cannot be read"):
            read([good | damage])
    with pytest.raises(ProofError, match="listed twice"):
        read(chain((first(roots=[pem(OLD), pem(OLD)]), [OLD])))
