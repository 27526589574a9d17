"""The verbs of proof: keys, the log, releases and their verification."""

from __future__ import annotations

import argparse
import json
import secrets
from pathlib import Path
from typing import Any

from freehold.cli.make import make_stage
from freehold.cli.parser import run_folder, verb, walk_flags
from freehold.core.errors import ConfigError, ProofError
from freehold.run.layout import AUDIT, RELEASE, WALK

KEYS = Path("keys")
RELEASE_KEY, LOG_KEY = RELEASE, "log"
SEEN = Path.home() / ".local/state/freehold/verified.json" if Path.home().is_dir() else Path()


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this module to the parser."""
    for add in (_add_audit, _add_compare, _add_promote, _add_release, _add_verify, _add_reproduce, _add_keys, _add_log):
        add(verbs)


def _add_audit(verbs: Any) -> None:
    audit = verb(verbs, AUDIT, WALK[AUDIT].summary, _audit)
    audit.add_argument("path", type=Path, help="a recipe, a run folder, one of its checkpoints, or a model folder")
    audit.add_argument("overrides", nargs="*", metavar="key=value", help="settings; see `freehold schema audit`")
    audit.add_argument("--text", default="", help="instead: where the training text says this, with steps and licence")
    audit.add_argument("--output", type=Path, default=Path(AUDIT), help="folder to write, where it is not a recipe")
    walk_flags(audit)


def _add_compare(verbs: Any) -> None:
    text = "the same items and text for several models, with intervals and what a difference can show"
    compare = verb(verbs, "compare", text, _compare)
    compare.add_argument(
        "models", nargs="+", type=Path, help="checkpoints, runs or model folders; the first is the base"
    )
    compare.add_argument(
        "--run", type=Path, help="run whose items and held-out text are used (default: around the first)"
    )
    compare.add_argument("--set", action="append", default=[], metavar="key=value", help="of evaluate, e.g. a limit")
    compare.add_argument("--output", type=Path, default=Path("compare"), help="folder for table and picture")
    compare.add_argument("--json", action="store_true", help="machine-readable answer")


def _add_promote(verbs: Any) -> None:
    promote = verb(verbs, "promote", "decide the gates of a run's model and sign the decision", _promote)
    promote.add_argument("run", nargs="?", type=Path, help="run folder (default: the newest below runs/)")
    promote.add_argument("--gates", type=Path, required=True, help="YAML file of limits by figure (docs/releases.md)")
    promote.add_argument("--keys", type=Path, default=KEYS, help="folder of keys (default: keys/)")
    promote.add_argument("--by", required=True, help="who decides, as the statement will say")
    promote.add_argument("--waive", action="append", default=[], metavar="METRIC=REASON", help="a gate that may fail")
    promote.add_argument("--json", action="store_true", help="machine-readable answer")
    promote.epilog = "exit codes: 0 promoted, 7 a gate fails, 2 a mistake"


def _add_release(verbs: Any) -> None:
    release = verb(verbs, RELEASE, "write a signed release of a run: model, cards, bill of materials, proofs", _release)
    release.add_argument("run", nargs="?", type=Path, help="run folder (default: the newest below runs/), or a recipe")
    release.add_argument("overrides", nargs="*", metavar="key=value", help="of a recipe; see `freehold schema release`")
    release.add_argument("--keys", type=Path, default=KEYS, help="folder of keys (default: keys/); see `freehold keys`")
    release.add_argument("--output", type=Path, help="folder to write (default: release/pack in the run folder)")
    release.add_argument("--name", default="", help="versioned name of the model (default: that of the export)")
    release.add_argument("--statements", type=Path, metavar="FILE", help="YAML of what no ledger can know")
    release.add_argument("--detached", action="store_true", help="only the hashes of the model's files, not the files")
    walk_flags(release)


def _add_verify(verbs: Any) -> None:
    verify = verb(verbs, "verify", "is this release what a trusted root signed, and is it consistent? offline", _verify)
    verify.add_argument("pack", type=Path, help="folder of a release")
    verify.add_argument(
        "--root", required=True, help="fingerprint of the root key, or a file with it, from someone you trust"
    )
    verify.add_argument(
        "--level", type=int, choices=[1, 2, 3], default=2, help="1: files; 2: and consistency; 3: and behaviour"
    )
    verify.add_argument("--seen", type=Path, default=SEEN, help="file that remembers the newest log seen of each root")
    verify.add_argument("--json", action="store_true", help="machine-readable answer")
    verify.add_argument("--samples", type=int, default=40, help="level 3: answers made again (default 40)")
    verify.add_argument(
        "--nonce", default="", help="level 3: your own text, which decides the answers; default: random"
    )
    verify.epilog = (
        "exit codes: 0 verified, 3 other files than were signed, 4 inconsistent, 5 answers differ, 2 a mistake"
    )


def _add_reproduce(verbs: Any) -> None:
    text = "make a release again from its own recipe and compare the content of each stage"
    reproduce = verb(verbs, "reproduce", text, _reproduce)
    reproduce.add_argument("pack", type=Path, help="folder of a release")
    reproduce.add_argument("--root", required=True, help="fingerprint of the root key, or a file with it")
    much = reproduce.add_mutually_exclusive_group()
    much.add_argument("--data-only", action="store_true", help="gather to token shards, minutes (default)")
    much.add_argument("--all", action="store_true", help="training and export too")
    much.add_argument("--segments", type=int, default=0, metavar="K", help="K intervals of the training, from the log")
    reproduce.add_argument("--nonce", default="", help="with --segments: your own text, which decides the intervals")
    reproduce.add_argument("--run", type=Path, help="with --segments: the run folder that holds the checkpoints")
    reproduce.add_argument("--work", type=Path, default=Path("reproduced"), help="folder of the new run")
    reproduce.add_argument("--dry-run", action="store_true", help="verify, write the recipe, start nothing")
    reproduce.add_argument("--json", action="store_true", help="machine-readable answer")
    reproduce.epilog = "exit codes: 0 equal or not comparable, 6 different, 3 not the files that were signed"


def _add_keys(verbs: Any) -> None:
    keys = verb(verbs, "keys", "make, show, rotate and revoke the keys that sign releases", _keys)
    keys.add_argument(
        "do_what", choices=["new", "show", "rotate", "revoke", "witness"], metavar="new|show|rotate|revoke|witness"
    )
    keys.add_argument("folder", nargs="?", type=Path, default=KEYS, help="folder of keys (default: keys/)")
    keys.add_argument("--role", choices=[RELEASE_KEY, LOG_KEY], default=RELEASE_KEY, help="of the key to rotate")
    keys.add_argument("--name", default="", help="of the key to revoke, or of the witness to add")
    keys.add_argument("--public", type=Path, help="PEM file of the witness's public key")
    keys.add_argument("--json", action="store_true", help="machine-readable answer")
    keys.epilog = "a password for private keys is read from FREEHOLD_KEY_PASSWORD; keep root.pem off line"


def _add_log(verbs: Any) -> None:
    log = verb(verbs, "log", "show, anchor and cosign the append-only log of checkpoints and releases", _log)
    log.add_argument("do_what", choices=["show", "anchor", "cosign"], metavar="show|anchor|cosign")
    log.add_argument("target", nargs="?", type=Path, help="anchor: a run folder; cosign: the pack.log of a release")
    log.add_argument("--keys", type=Path, default=KEYS, help="folder of keys (default: keys/)")
    log.add_argument("--key", type=Path, help="cosign: the witness's private key (Ed25519 PEM)")
    log.add_argument("--name", default="", help="cosign: the witness's name")
    log.add_argument("--json", action="store_true", help="machine-readable answer")


def _audit(args: argparse.Namespace) -> int:
    if args.path.suffix in (".yaml", ".yml"):
        args.recipe, args.stage = args.path, AUDIT
        return make_stage(args)
    from freehold.core.config import fill, override
    from freehold.core.log import Log
    from freehold.stages.audit.config import AuditConfig
    from freehold.stages.audit.run import audit_path, find_text

    config = fill(AuditConfig, override({}, args.overrides), AUDIT)
    if args.text:
        spans = find_text(args.path, args.text, config, Log(quiet=True))
        _answer(args, {"spans": [span.to_dict() for span in spans]})
        return 0
    report = audit_path(args.path, config, args.output, Log(quiet=args.quiet or args.json))
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        print("\n".join(table.text() for table in report.tables()))
        print("\n".join(f"not answered: {name}: {why}" for name, why in report.unanswered.items()))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from freehold.core.config import fill, override
    from freehold.core.log import Log
    from freehold.run import compare
    from freehold.run.layout import CURATE, EVALUATE, RunFolder
    from freehold.stages.evaluate.config import EvaluateConfig

    first = args.models[0]
    around = [args.run] if args.run else [first, *first.resolve().parents[:3]]
    run = next((RunFolder(folder) for folder in around if RunFolder(folder).finished(CURATE)), None)
    if run is None:
        raise ConfigError("no run with items and held-out text", where=around[0], todo="name one with --run")
    limits = fill(EvaluateConfig, override({}, args.set), EVALUATE)
    log = Log(quiet=args.json)
    models = [compare.measure(path, run, limits, log) for path in args.models]
    found = compare.write(models, args.output)
    print(json.dumps(found) if args.json else "\n".join(table.text() for table in compare.tables(models)))
    return 0


def _promote(args: argparse.Namespace) -> int:
    from freehold.proof import folder
    from freehold.run import promotion
    from freehold.run.layout import RunFolder

    run = run_folder(args.run)
    waived = dict(item.split("=", 1) if "=" in item else (item, "") for item in args.waive)
    if missing := [metric for metric, reason in waived.items() if not reason.strip()]:
        raise ConfigError("a waiver needs a reason", found=", ".join(missing), expected="--waive METRIC=REASON")
    done = promotion.promote(run, args.gates, folder.load(args.keys), args.by, waived)
    said = done.predicate
    state = promotion.state(RunFolder(run))
    _answer(args, {"state": state, "by": said["by"], "verdicts": said["verdicts"], "waivers": said["waivers"]})
    return 0


def _release(args: argparse.Namespace) -> int:
    if args.run is not None and args.run.suffix in (".yaml", ".yml"):
        args.recipe, args.stage = args.run, RELEASE
        return make_stage(args)
    from freehold.proof import folder
    from freehold.run import card, release
    from freehold.run.layout import RunFolder

    run = run_folder(args.run)
    keys = folder.load(args.keys)
    contents = release.gather_contents(run, card.read_statements(args.statements), args.name, args.detached)
    output = args.output or RunFolder(run).release
    if args.dry_run:
        say = {"would write": str(output), "name": contents.name, "files of the model": len(contents.model_files())}
        _answer(args, say)
        return 0
    digest = release.build(contents, keys, output)
    answer = {RELEASE: str(output), "name": contents.name, "files_sha256": digest, "root": keys.root_fingerprint}
    _answer(args, answer)
    if not args.json:
        print(f"\nto check it: freehold verify {output} --root {keys.root_fingerprint}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    root, seen = _root(args.root), _read_seen(args.seen)
    version, size = seen.get(root, [0, 0])
    verified = _level_1(args.pack, root, version, size)
    answer: dict[str, Any] = {
        RELEASE: verified.name,
        "files": len(verified.files),
        "signed_by": verified.signed_by,
        "keyring_version": verified.keyring_version,
        "log": {"origin": verified.log.origin, "entry": verified.index, "witnesses": verified.witnesses},
        "level": args.level,
        "not_checked": ["what the files say", "how the model behaves"],
    }
    if args.level >= 2:
        from freehold.run import check_release

        report = check_release.check(args.pack, verified, root)
        answer |= {"checked": report.checked, "not_checked": report.not_checked}
    if args.level >= 3:
        from freehold.run import check_behaviour

        nonce = args.nonce or secrets.token_hex(8)
        found = check_behaviour.check(args.pack, args.samples, nonce)
        kept = [line for line in answer["not_checked"] if "nothing was run" not in line]
        behaviour = {"nonce": nonce, "answers": found.items, "same": found.same, **found.interval.to_dict()}
        answer |= {"behaviour": behaviour, "not_checked": kept}
    _write_seen(args.seen, seen | {root: [verified.keyring_version, max(size, verified.log.size)]})
    _answer(args, {"verified": True, **answer})
    return 0


def _root(given: str) -> str:
    from freehold.proof.folder import read_fingerprint

    return read_fingerprint(Path(given)) if Path(given).is_file() else given.lower()


def _level_1(pack: Path, root: str, version: int = 0, size: int = 0) -> Any:
    """Verify signatures and files; a ProofError from here ends with exit code 3."""
    from freehold.proof import verify

    if not pack.is_dir():
        raise ConfigError("no such folder", where=pack, expected="the folder of a release")
    try:
        return verify.verify_pack(pack, root, version, size)
    except ProofError as error:
        error.code = 3  # type: ignore[attr-defined]
        raise


def _reproduce(args: argparse.Namespace) -> int:
    from freehold.run import reproduce

    verified = _level_1(args.pack, _root(args.root))
    if args.dry_run:
        plan = reproduce.write_recipe(args.pack, args.work)
        _answer(args, {RELEASE: verified.name, "recipe": str(plan.path), "run": str(plan.run_folder)})
        return 0
    if args.segments:
        if args.run is None or not args.nonce:
            raise ConfigError("intervals need a run and a nonce", expected="--segments K --nonce TEXT --run RUN")
        from freehold.run import segments

        found = segments.replay(args.pack, args.run, args.work, args.segments, args.nonce)
        answer = {RELEASE: verified.name, "anchored": len(segments.intervals(args.pack))}
        _answer(args, answer | {"intervals": [vars(outcome) for outcome in found]})
        return 0
    outcomes = reproduce.reproduce(args.pack, args.work, everything=args.all, quiet=args.json)
    _answer(args, {RELEASE: verified.name, "stages": [vars(outcome) for outcome in outcomes]})
    return 0


def _keys(args: argparse.Namespace) -> int:
    from freehold.proof import folder

    keys = folder.create(args.folder) if args.do_what == "new" else folder.load(args.folder)
    if args.do_what == "rotate":
        keys = keys.rotate(args.role)
    elif args.do_what == "revoke":
        keys = keys.revoke(args.name)
    elif args.do_what == "witness":
        if args.public is None or not args.name:
            raise ConfigError("a witness needs a name and a public key", expected="--name NAME --public FILE")
        keys = keys.add_witness(args.name, args.public.read_bytes())
    entries = [
        {"name": e.name, "role": e.role, "from": e.from_index, "until": e.until_index} for e in keys.keyring.keys
    ]
    _answer(args, {"root": keys.root_fingerprint, "keyring_version": keys.keyring.version, "keys": entries})
    return 0


def _log(args: argparse.Namespace) -> int:
    from freehold.proof import folder, log
    from freehold.proof.keys import read_private

    if args.do_what == "cosign":
        if args.target is None or args.key is None or not args.name:
            raise ConfigError("a cosignature needs a note, a key and a name", expected="NOTE --key FILE --name NAME")
        note = log.cosign(args.target.read_text(encoding="utf-8"), read_private(args.key, folder.password()), args.name)
        args.target.write_text(note, encoding="utf-8")
        _answer(args, {"cosigned": str(args.target), "by": args.name})
        return 0
    keys = folder.load(args.keys)
    answer: dict[str, Any] = {}
    if args.do_what == "anchor":
        from freehold.run.anchoring import anchor
        from freehold.run.layout import RunFolder

        answer["anchored"] = anchor(RunFolder(run_folder(args.target)), keys.log)
    checkpoint = keys.log.checkpoint()
    entries = [json.loads(entry) for entry in keys.log.entries]
    _answer(
        args,
        answer
        | {"origin": checkpoint.origin, "size": checkpoint.size, "root": checkpoint.root.hex(), "entries": entries},
    )
    return 0


def _answer(args: argparse.Namespace, answer: dict[str, Any]) -> None:
    """Print an answer as JSON, or a line for each fact."""
    if args.json:
        print(json.dumps(answer, default=str))
        return
    for name, value in answer.items():
        if isinstance(value, list) and value:
            print(f"{name.replace('_', ' ')}:")
            for item in value:
                print("  " + (", ".join(f"{k} {v}" for k, v in item.items()) if isinstance(item, dict) else str(item)))
        elif isinstance(value, dict):
            print(f"{name.replace('_', ' ')}: " + ", ".join(f"{k} {v}" for k, v in value.items()))
        else:
            print(f"{name.replace('_', ' ')}: {value}")


def _read_seen(path: Path) -> dict[str, list[int]]:
    """Return the newest keyring version and longest log seen of each root; empty without the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return {str(root): [int(pair[0]), int(pair[1])] for root, pair in value.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ProofError(
            "the record of logs seen before is damaged", where=path, found=error, todo="look why, then remove it"
        ) from error


def _write_seen(path: Path, seen: dict[str, list[int]]) -> None:
    from freehold.core.artifact import write_json

    write_json(path, seen)
