"""Keys: written once, readable by their owner only, of the two kinds we use."""

import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from freehold.core.errors import ProofError
from freehold.proof import keys, trust


@pytest.mark.parametrize("role", ["root", "release", "log", "witness"])
@pytest.mark.parametrize("password", [None, b"correct horse"])
def test_key_survives_its_file(tmp_path, role, password):
    key = keys.new_key(role)
    keys.write_private(tmp_path / "k.pem", key, password)
    assert stat.S_IMODE((tmp_path / "k.pem").stat().st_mode) == 0o600
    read = keys.read_private(tmp_path / "k.pem", password)
    assert trust.fingerprint(read.public) == trust.fingerprint(key.public)
    assert trust.verifies(key.public, read.sign(b"text"), b"text")
    assert not trust.verifies(key.public, read.sign(b"text"), b"other text")


@pytest.mark.parametrize("role", ["release", "log"])
def test_signatures_are_deterministic(role):
    key = keys.new_key(role)
    assert key.sign(b"text") == key.sign(b"text")


def test_a_key_file_is_never_overwritten(tmp_path):
    keys.write_private(tmp_path / "k.pem", keys.new_key("root"))
    before = (tmp_path / "k.pem").read_bytes()
    with pytest.raises(ProofError, match="exists already"):
        keys.write_private(tmp_path / "k.pem", keys.new_key("root"))
    assert (tmp_path / "k.pem").read_bytes() == before


def private_pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def test_unusable_private_keys_are_refused(tmp_path):
    cases = {
        "not a private key": b"hello",
        "of another kind": private_pem(rsa.generate_private_key(65537, 2048)),
        "another kind": private_pem(ec.generate_private_key(ec.SECP384R1())),
    }
    for message, pem in cases.items():
        (tmp_path / "k.pem").write_bytes(pem)
        with pytest.raises(ProofError, match=message):
            keys.read_private(tmp_path / "k.pem")
    keys.write_private(tmp_path / "locked.pem", keys.new_key("root"), b"secret")
    for password in (None, b"wrong"):
        with pytest.raises(ProofError, match="password"):
            keys.read_private(tmp_path / "locked.pem", password)


def test_unusable_public_keys_are_refused(tmp_path):
    rsa_key = rsa.generate_private_key(65537, 2048).public_key()
    other = rsa_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for message, pem in {"not a public key": b"hello", "another kind": other, "too large": b"x" * 20_000}.items():
        (tmp_path / "k.pub").write_bytes(pem)
        with pytest.raises(ProofError, match=message):
            keys.read_public(tmp_path / "k.pub")
    with pytest.raises(ProofError, match="cannot be read"):
        keys.read_public(tmp_path / "absent.pub")
