"""Change a release in seeded ways and verify it again: every change must be caught. Also how long verifying takes.

    python benchmarks/attack_release.py runs/short

A release of the run is made with fresh keys, once with the model's files (timed) and once with their hashes (attacked).
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import common

from freehold.core.errors import FreeholdError
from freehold.proof import folder, verify
from freehold.run import card, check_release, release


def mutate(pack: Path, dice: random.Random) -> tuple[str, str]:
    """Change one thing in a release; return what."""
    files = sorted(path for path in pack.rglob("*") if path.is_file())
    path = dice.choice(files)
    kind = dice.choice(["byte", "cut", "grow", "rename", "remove", "add", "swap", "mode", "link"])
    data = path.read_bytes()
    if kind == "byte":
        place = dice.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :])
    elif kind == "cut":
        path.write_bytes(data[: dice.randrange(len(data))])
    elif kind == "grow":
        path.write_bytes(data + b"\n")
    elif kind == "rename":
        path.rename(path.with_name(path.name + "x"))
    elif kind == "remove":
        path.unlink()
    elif kind == "add":
        (path.parent / "extra").write_bytes(b"x")
    elif kind == "swap":
        other = dice.choice([each for each in files if each.read_bytes() != data])
        path.write_bytes(other.read_bytes())
    elif kind == "mode":
        path.chmod(0o755)
    else:
        path.unlink()
        path.symlink_to(dice.choice([each for each in files if each != path]))
    return kind, path.relative_to(pack).as_posix()


def attack(pack: Path, root: str, number: int) -> tuple[Counter[str], list[tuple[int, tuple[str, str]]]]:
    """Return how many mutations of each kind were caught, and those that were not."""
    caught: Counter[str] = Counter()
    missed = []
    for seed in range(number):
        copy = pack.with_name("copy")
        shutil.copytree(pack, copy)
        what = mutate(copy, random.Random(seed))
        try:
            verify.verify_pack(copy, root)
            missed.append((seed, what))
        except FreeholdError:
            caught[what[0]] += 1
        shutil.rmtree(copy)
    return caught, missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--mutations", type=int, default=2_000)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/attack_release.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        keys = folder.create(base / "keys")
        contents = release.gather_contents(args.run, card.Statements())
        start = time.perf_counter()
        release.build(contents, keys, base / "pack")
        build_s = time.perf_counter() - start
        levels: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(5):
            start = time.perf_counter()
            verified = verify.verify_pack(base / "pack", keys.root_fingerprint)
            levels[1].append(time.perf_counter() - start)
            check_release.check(base / "pack", verified, keys.root_fingerprint)
            levels[2].append(time.perf_counter() - start)
        detached = release.gather_contents(args.run, card.Statements(), "Detached", detached=True)
        release.build(detached, keys, base / "detached")
        caught, missed = attack(base / "detached", keys.root_fingerprint, args.mutations)
    common.write(
        args.output,
        {
            "mutations": args.mutations,
            "caught": dict(sorted(caught.items())),
            "missed": missed,
            "build_s": round(build_s, 2),
            "bytes": sum(f["bytes"] for f in contents.model_files().values()),
            "verify_s": {level: round(statistics.median(seconds), 3) for level, seconds in levels.items()},
            "environment": common.environment(),
        },
    )
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
