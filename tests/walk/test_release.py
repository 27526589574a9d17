"""A release of a real run: the same bytes twice, verified without us, and caught when anything in it was changed."""

import base64
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from attack_release import mutate
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from freehold.cli.main import main
from freehold.core.errors import FreeholdError, LicenceError, ProofError
from freehold.proof import folder, keys, log, trust, verify
from freehold.proof.bundle import sign_folder
from freehold.run import ancestry, card, check_release, pending, release, reproduce

ROOT = Path(__file__).resolve().parent.parent.parent
MUTATIONS = 150


@pytest.fixture(scope="module")
def made(walked, tmp_path_factory):
    """Return (run, keys, pack): a copy of the walked run, released with keys made on the spot."""
    base = tmp_path_factory.mktemp("release")
    run = Path(shutil.copytree(walked / "tiny", base / "tiny"))
    owner = folder.create(base / "keys")
    contents = release.gather_contents(run, card.Statements(provider="Acme"))
    release.build(contents, owner, base / "pack")
    release.build(replace(contents, name="Detached", detached=True), owner, base / "detached")
    return run, owner, base / "pack"


@pytest.fixture
def pack(made, tmp_path):
    return Path(shutil.copytree(made[2], tmp_path / "pack"))


def verified(pack, made, level=2, **options):
    done = verify.verify_pack(pack, made[1].root_fingerprint, **options)
    return check_release.check(pack, done, made[1].root_fingerprint) if level == 2 else done


def signed_name(pack):
    envelope = json.loads((pack / verify.SIGNATURE).read_text())["dsseEnvelope"]
    return json.loads(base64.b64decode(envelope["payload"]))["subject"][0]["name"]


def sign_again(pack, owner):
    """Sign a changed release as its maker could: level 1 then holds."""
    name = signed_name(pack)
    digest = verify.files_root(verify.hash_files(pack, verify.UNSIGNED))
    entries = (pack / verify.LOG_ENTRIES).read_bytes().splitlines()
    leaves = [trust.leaf_hash(line) for line in [*entries, verify.pack_entry(name, digest)]]
    checkpoint = trust.LogCheckpoint(owner.log.origin, len(leaves), trust.tree_root(leaves))
    signer, key = owner.signing("log")
    (pack / verify.LOG_NOTE).write_text(log.sign_note(checkpoint, key, signer))
    data = sign_folder(pack, owner.signing("release")[1], name=name, ignored=verify.UNSIGNED)
    (pack / verify.SIGNATURE).write_bytes(data)


def test_walk_ends_in_a_verified_release(walked, capsys, tmp_path):
    run, seen = walked / "tiny", str(tmp_path / "seen.json")
    command = ["verify", str(run / "release/pack"), "--root", str(run / "release/root.txt"), "--seen", seen]
    assert main(command) == 0
    assert "made on the spot" in (run / "release/pack/README.md").read_text()
    assert "made on the spot" in json.loads((run / "release/pack/release.json").read_text())["keys"]
    assert stat.S_IMODE((run / "keys/root.pem").stat().st_mode) == 0o600
    assert main(["release", "recipes/tiny.yaml", f"runs_dir={walked}", "--dry-run"]) == 0
    assert "keys made on the spot" in capsys.readouterr().out


def test_pending_takedown_refuses_the_release(walked, tmp_path, capsys):
    run = Path(shutil.copytree(walked / "tiny", tmp_path / "tiny"))
    for _ in range(2):
        assert main(["takedown", "generated", str(run), "--apply", "--out", str(tmp_path)]) == 0
    assert json.loads((run / "takedowns.json").read_text())["asked"] == [{"query": "generated", "widen": False}]
    with pytest.raises(ProofError, match="a take-down is pending"):
        release.gather_contents(run, card.Statements())
    pending.refuse(run, "pretrain/none")
    (run / "takedowns.json").write_text('{"asked": [{"query": "a source that was never here", "widen": false}]}')
    release.gather_contents(run, card.Statements())


def test_unknown_parent_refuses_the_release(walked, tmp_path):
    run = Path(shutil.copytree(walked / "tiny", tmp_path / "tiny"))
    lost = ancestry.unknown("the folder of the parent is gone", "0" * 64, "old/base")
    record = {"format_version": 1, "parents": [lost.to_dict()]}
    (run / "pretrain/ancestry.json").write_text(json.dumps(record))
    with pytest.raises(LicenceError, match="the folder of the parent is gone"):
        release.gather_contents(run, card.Statements())


def test_release_is_verified_and_says_what_was_not_checked(made):
    report = verified(made[2], made)
    assert set(report.checked) == set(check_release.CHECKS)
    assert any("nothing was run" in line for line in report.not_checked)
    assert any("witness" in line for line in report.not_checked)


def test_release_is_the_same_bytes_twice(made, tmp_path, monkeypatch):
    run, owner, pack = made
    elsewhere = Path(shutil.copytree(run, tmp_path / "moved" / "tiny"))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    os.umask(os.umask(0o077))
    before = owner.log.entries
    contents = release.gather_contents(elsewhere, card.Statements(provider="Acme"))
    release.build(contents, owner, tmp_path / "again")
    assert verify.hash_files(tmp_path / "again") == verify.hash_files(pack)
    assert owner.log.entries == before, "the same release is not entered twice"
    with pytest.raises(ProofError, match="exists already"):
        release.build(contents, owner, tmp_path / "again")


def test_two_files_verify_without_freehold(made, tmp_path):
    for name in ("trust.py", "verify.py"):
        shutil.copy(ROOT / "freehold/proof" / name, tmp_path)
    site = Path(trust.hashes.__file__).parents[3]  # where `cryptography` is; the house itself is not on the path
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.path.append({str(site)!r}); "
    code += "sys.modules['freehold'] = None; import runpy; runpy.run_module('verify', run_name='__main__')"
    command = [sys.executable, "-S", "-c", code, str(made[2]), "--root", made[1].root_fingerprint]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("verified: ")
    other = subprocess.run([*command[:-1], "0" * 64], capture_output=True, text=True, cwd=tmp_path)
    assert other.returncode == 3
    assert "NOT VERIFIED" in other.stderr


def test_every_mutation_is_caught(made, tmp_path):
    """`benchmarks/attack_release.py` makes 2,000."""
    missed = []
    for seed in range(MUTATIONS):
        copy = tmp_path / "copy"
        shutil.copytree(made[2].with_name("detached"), copy)
        what = mutate(copy, random.Random(seed))
        try:
            verify.verify_pack(copy, made[1].root_fingerprint)
            missed.append((seed, what))
        except FreeholdError:
            shutil.rmtree(copy)
    assert not missed


@pytest.mark.parametrize(
    ("path", "change", "problem"),
    [
        ("evaluation/results.json", lambda t: t.replace('"correct": ', '"correct": 9'), "results"),
        ("audits/results.json", lambda t: t.replace('"passed": true', '"passed": false', 1), "audits"),
        ("card/data.md", lambda t: t + "Everything is ours.\n", "documents"),
        ("card/facts.json", lambda t: t.replace('"documents": ', '"documents": 1'), "documents"),
        ("ledger/rights.json", lambda t: t.replace('"allow"', '"review"', 1), "rights"),
        ("bom.cdx.json", lambda t: t.replace("data:code", "data:none"), "bill"),
        ("manifests/curate.json", lambda t: t.replace('"seed": 0', '"seed": 1'), "statements"),
        ("manifests/tokenize.json", lambda t: t.replace('"curate": "', '"curate": "0'), "chain"),
        ("parity.json", lambda t: t.replace("true", "false"), "proof"),
        ("manifests/align/preview.json", lambda t: t.replace('"sha256": "', '"sha256": "0', 1), "manifests"),
    ],
)
def test_a_maker_who_edits_and_signs_again_is_caught(pack, made, path, change, problem):
    text = (pack / path).read_text(encoding="utf-8")
    assert change(text) != text
    (pack / path).write_text(change(text), encoding="utf-8")
    sign_again(pack, made[1])
    verify.verify_pack(pack, made[1].root_fingerprint)
    with pytest.raises(check_release.Inconsistent, match=problem):
        verified(pack, made)


def test_untouched_release_signed_again_is_consistent(pack, made):
    sign_again(pack, made[1])
    verified(pack, made)


def test_valid_signature_by_another_key_is_refused(pack, made):
    (pack / verify.SIGNATURE).write_bytes(
        sign_folder(pack, keys.new_key("release"), name=signed_name(pack), ignored=verify.UNSIGNED)
    )
    with pytest.raises(ProofError, match="no trusted key"):
        verified(pack, made, level=1)


def test_other_root_and_older_logs_are_refused(made):
    with pytest.raises(ProofError, match="root you trust"):
        verify.verify_pack(made[2], "0" * 64)
    with pytest.raises(ProofError, match="not a root fingerprint"):
        verify.verify_pack(made[2], "abc")
    with pytest.raises(ProofError, match="shorter log"):
        verified(made[2], made, level=1, seen_size=10_000)
    with pytest.raises(ProofError, match="older keyring"):
        verified(made[2], made, level=1, seen_version=2)


def test_log_that_was_cut_or_edited_is_refused(pack, made):
    entries = (pack / verify.LOG_ENTRIES).read_bytes().splitlines(keepends=True)
    for changed in (entries[:-1], entries[1:], [*entries, entries[0]]):
        (pack / verify.LOG_ENTRIES).write_bytes(b"".join(changed))
        with pytest.raises(ProofError):
            verified(pack, made, level=1)


def test_revoked_key_signs_no_later_release(walked, tmp_path):
    run = Path(shutil.copytree(walked / "tiny", tmp_path / "tiny"))
    owner = folder.create(tmp_path / "keys")
    old = release.gather_contents(run, card.Statements(), detached=True)
    release.build(old, owner, tmp_path / "first")
    stolen = owner.signing("release")[1]
    owner = owner.rotate("release")
    later = release.gather_contents(run, card.Statements(), "Later", detached=True)
    release.build(later, owner, tmp_path / "second")
    for name in ("first", "second"):
        report = check_release.check(
            tmp_path / name, verify.verify_pack(tmp_path / name, owner.root_fingerprint), owner.root_fingerprint
        )
        assert any("only their hashes" in line for line in report.not_checked)
    second = tmp_path / "second"
    (second / verify.SIGNATURE).write_bytes(sign_folder(second, stolen, name="Later", ignored=verify.UNSIGNED))
    with pytest.raises(ProofError, match="no trusted key"):
        verify.verify_pack(second, owner.root_fingerprint)
    with pytest.raises(ProofError, match="no release key"):
        owner.revoke("release-2").signing("release")


def test_witness_cosigns_and_is_named(walked, tmp_path, capsys):
    run = Path(shutil.copytree(walked / "tiny", tmp_path / "tiny"))
    witness = keys.new_key("witness")
    keys.write_private(tmp_path / "witness.pem", witness)
    owner = folder.create(tmp_path / "keys").add_witness("observer", trust.public_pem(witness.public))
    release.build(release.gather_contents(run, card.Statements(), detached=True), owner, tmp_path / "pack")
    note = str(tmp_path / "pack" / verify.LOG_NOTE)
    assert main(["log", "cosign", note, "--key", str(tmp_path / "witness.pem"), "--name", "observer"]) == 0
    assert verify.verify_pack(tmp_path / "pack", owner.root_fingerprint).witnesses == ["observer"]


def test_commands_sign_and_verify(walked, tmp_path, capsys):
    run = Path(shutil.copytree(walked / "tiny", tmp_path / "tiny"))
    home, pack = str(tmp_path / "keys"), str(tmp_path / "pack")
    assert main(["keys", "new", home, "--json"]) == 0
    root = json.loads(capsys.readouterr().out)["root"]
    assert main(["release", str(run), "--keys", home, "--output", pack, "--dry-run"]) == 0
    assert not Path(pack).exists()
    assert main(["release", str(run), "--keys", home, "--output", pack, "--detached", "--json"]) == 0
    seen = str(tmp_path / "seen.json")
    assert main(["verify", pack, "--root", f"{home}/root.txt", "--seen", seen]) == 0
    assert list(json.loads(Path(seen).read_text())) == [root]
    assert main(["log", "show", "--keys", home]) == 0
    assert main(["keys", "rotate", home]) == 0
    (Path(pack) / "README.md").write_text("other")
    capsys.readouterr()
    assert main(["verify", pack, "--root", root, "--seen", seen]) == 3
    assert "changed: README.md" in capsys.readouterr().err
    assert main(["keys", "new", home]) == 2
    assert main(["verify", str(tmp_path / "none"), "--root", root, "--seen", seen]) == 2


def test_rows_that_may_not_be_redistributed_stop_the_release(walked, tmp_path):
    run = Path(shutil.copytree(walked / "tiny", tmp_path / "tiny"))
    manifest = json.loads((run / "gather/manifest.json").read_text())
    manifest["config"]["policy"]["allow"] = ["MIT"]
    (run / "gather/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LicenceError, match="the release"):
        release.gather_contents(run, card.Statements())


def test_bill_of_materials_follows_the_schema(made):
    text = (made[2] / "bom.cdx.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_7).validate_str(text) is None


def test_newer_format_and_unfinished_runs_are_named(pack, made, tmp_path):
    (pack / "release.json").write_text('{"format_version": 9}')
    sign_again(pack, made[1])
    with pytest.raises(ProofError, match="another format version"):
        verified(pack, made)
    shutil.rmtree(Path(shutil.copytree(made[0], tmp_path / "tiny")) / "export")
    with pytest.raises(FreeholdError, match="no manifest"):
        release.gather_contents(tmp_path / "tiny", card.Statements())


def test_data_stages_are_reproduced_and_judged(made, pack, tmp_path, capsys):
    """Equal; other packages are not comparable; other bytes without a reason are different."""
    root, work = made[1].root_fingerprint, tmp_path / "again"
    command = ["reproduce", str(pack), "--root", root, "--work", str(work), "--json"]
    assert main([*command, "--dry-run"]) == 0
    assert main(command) == 0
    stages = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]
    assert [stage["stage"] for stage in stages] == ["gather", "curate", "rephrase", "tokenize"]
    assert {stage["verdict"] for stage in stages} == {"equal"}
    path = pack / "manifests/tokenize.json"
    released = json.loads(path.read_text()) | {"content_sha256": "0" * 64}
    path.write_text(json.dumps(released))
    with pytest.raises(reproduce.NotReproduced, match="other content"):
        reproduce.reproduce(pack, work, everything=False, quiet=True)
    released["versions"]["tokenizers"] = "0.1"
    path.write_text(json.dumps(released))
    last = reproduce.reproduce(pack, work, everything=False, quiet=True)[-1]
    assert last.verdict == "not comparable bitwise"
    assert "tokenizers 0.1" in last.why
