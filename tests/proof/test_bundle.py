"""Signed folders: exactly the signed files verify; every change of them is caught."""

import base64
import hashlib
import json
import os
import random
import shutil

import pytest

from freehold.core.errors import ProofError
from freehold.proof import bundle, keys, trust, verify

IGNORED = frozenset({"pack.sig"})
KEY = keys.new_key("release")


@pytest.fixture
def pack(tmp_path):
    folder = tmp_path / "pack"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "model" / "config.json").write_text('{"model_type": "afmoe"}')
    (folder / ".hidden").write_text("also signed")
    (folder / "Überblick.md").write_text("# Card\n")
    (folder / "pack.sig").write_bytes(bundle.sign_folder(folder, KEY, name="pack", ignored=IGNORED))
    return folder


def check(folder, trusted=(KEY,)):
    data = (folder / "pack.sig").read_bytes()
    return verify.verify_folder(folder, data, [key.public for key in trusted], IGNORED, folder / "pack.sig")


def test_a_signed_folder_verifies(pack):
    signed = check(pack)
    assert set(signed.files) == {".hidden", "model/config.json", "model/weights.safetensors", "Überblick.md"}
    assert signed.key == trust.fingerprint(KEY.public)


def test_the_bundle_is_the_same_bytes_elsewhere(pack, tmp_path):
    other = tmp_path / "elsewhere"
    shutil.copytree(pack, other)
    assert bundle.sign_folder(other, KEY, name="pack", ignored=IGNORED) == (pack / "pack.sig").read_bytes()


def test_another_key_is_refused(pack):
    with pytest.raises(ProofError, match="no trusted key"):
        check(pack, [keys.new_key("release")])
    assert check(pack, [keys.new_key("release"), KEY]).key == trust.fingerprint(KEY.public)


def change(folder, rng):
    """Change one thing of a folder: a byte, a name, a size, a type or the signature."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, kind = rng.choice(files), rng.choice(["byte", "cut", "append", "remove", "rename", "add", "link", "swap"])
    data = path.read_bytes()
    if kind == "byte":
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "append":
        path.write_bytes(data + b" ")
    elif kind == "remove":
        path.unlink()
    elif kind == "rename":
        path.rename(path.with_name(path.name + "x"))
    elif kind == "add":
        (folder / rng.choice(["extra", ".extra", "model/extra"])).write_bytes(b"new")
    elif kind == "link":
        path.rename(folder.parent / "target")
        path.symlink_to(folder.parent / "target")
    else:
        other = rng.choice([each for each in files if each != path])
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    return kind, path.name


@pytest.mark.parametrize("block", range(4))
def test_every_mutation_is_caught(pack, tmp_path, block):
    """2,000 seeded mutations of bytes, names, sizes, types and of the signature itself."""
    for seed in range(500 * block, 500 * block + 500):
        folder = tmp_path / "copy" / "pack"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(pack, folder)
        what = change(folder, random.Random(seed))
        try:
            check(folder)
        except ProofError:
            continue
        except FileNotFoundError:  # the signature itself is gone: nothing can verify
            continue
        raise AssertionError((seed, what))


def test_what_a_list_cannot_vouch_for_is_refused(pack):
    for make, message in {
        lambda: (pack / "empty").mkdir(): "empty folder",
        lambda: os.mkfifo(pack / "pipe"): "special file",
        lambda: (pack / "MODEL").write_text("x"): "only by case",
        lambda: (pack / "linked").symlink_to(pack / "model"): "a link",
        lambda: os.fsencode(pack) and open(os.fsencode(pack) + b"/\xff", "wb").close(): "not UTF-8",
    }.items():
        before = set(os.listdir(os.fsencode(pack)))
        make()
        with pytest.raises(ProofError, match=message):
            check(pack)
        for name in set(os.listdir(os.fsencode(pack))) - before:
            path = os.fsencode(pack) + b"/" + name
            os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    check(pack)


def forged(pack, **statement):
    """Return a validly signed bundle with another statement."""
    old = json.loads((pack / "pack.sig").read_bytes())
    payload = json.loads(base64.b64decode(old["dsseEnvelope"]["payload"])) | statement
    raw = json.dumps(payload).encode()
    old["dsseEnvelope"]["payload"] = base64.b64encode(raw).decode()
    old["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(KEY.sign(trust.pae(raw))).decode()
    return json.dumps(old, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def listing(*names):
    digest = "00" * 32
    resources = [{"name": name, "algorithm": "sha256", "digest": digest} for name in names]
    return {"predicate": {"resources": resources}}


def test_a_signed_statement_must_make_sense(pack):
    public = [KEY.public]
    for statement, message in [
        (listing("a"), "contradicts"),
        ({"predicateType": "other"}, "another kind"),
        ({"predicate": 3}, "cannot be read"),
    ]:
        with pytest.raises(ProofError, match=message):
            verify.read_bundle(forged(pack, **statement), public, "here")
    for name in ("../x", "/etc/passwd", "a/../b", "a//b"):
        digest = {"sha256": hashlib.sha256(bytes(32)).hexdigest()}
        with pytest.raises(ProofError, match="leaves its folder"):
            verify.read_bundle(forged(pack, **listing(name), subject=[{"name": "p", "digest": digest}]), public, "here")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"[" * 100_000, b'{"dsseEnvelope": 3}'])
def test_what_is_no_bundle_is_refused(data):
    with pytest.raises(ProofError, match="not a signature bundle"):
        verify.read_bundle(data, [KEY.public], "here")
