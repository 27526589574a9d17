"""Kill the walk with `kill -9` at random moments in every stage, run it again, and compare the bits.

One run is never killed. Others are killed again and again: each kill waits until a given stage is at work, then a
random part of that stage's own time, and hits either all its processes or the walk alone (its stage must then end by
itself). When its kills are used up the run is left to finish, and every stage's content hash must equal the
undisturbed run's.

With `--cuts`, every second kill is followed by a cut of the file that was written last, to half or to nothing, as a
power cut may leave it. No one types anything: what is damaged must be made again by itself.

    python benchmarks/kills.py --kills 50 --runs 2 --cuts --recipe tiny --json benchmarks/results/kills.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from freehold.core.artifact import KEY, package_versions
from freehold.core.machine import cpu_name
from freehold.run.layout import WALK


def command(recipe: Path, runs: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "freehold.cli", "run", str(recipe), f"name={name}", f"runs_dir={runs}", "--quiet"]


def hashes(run: Path) -> dict[str, str]:
    """Return the content hash of each stage."""
    return {s: json.loads((run / s / "manifest.json").read_text())["content_sha256"] for s in WALK}


def begun(run: Path, stage: str) -> bool:
    return (run / stage / KEY).exists()


def finished(run: Path, stage: str) -> bool:
    return (run / stage / "manifest.json").exists()


def kill_in(stage: str, seconds: float, run: Path, start: list[str], rng: random.Random) -> dict[str, Any] | None:
    """Start the walk, kill it somewhere in `stage`; None when the stage was over before."""
    process = subprocess.Popen(start)
    while process.poll() is None and not begun(run, stage):
        time.sleep(0.02)
    time.sleep(rng.uniform(0, seconds))
    all_of_it = rng.random() < 0.5
    was_running = process.poll() is None and not finished(run, stage)
    if process.poll() is None:
        victims = [psutil.Process(process.pid)]
        for victim in [*victims, *(victims[0].children(recursive=True) if all_of_it else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
    process.wait()
    return {"stage": stage, "target": "all processes" if all_of_it else "walk alone"} if was_running else None


def cut_last(run: Path, rng: random.Random) -> str:
    """Cut the file of a run that was written last; return which, and to what."""
    files = [p for p in run.rglob("*") if p.is_file() and not p.is_symlink() and p.name != ".lock" and p.stat().st_size]
    if not files:
        return ""
    last = max(files, key=lambda path: (path.stat().st_mtime_ns, str(path)))
    size = last.stat().st_size
    left = rng.choice((0, size // 2))
    with last.open("r+b") as file:
        file.truncate(left)
    return f"{last.relative_to(run)}: {size:,} to {left:,} bytes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/short.yaml"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", type=int, default=2, help="runs among which the kills are divided")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuts", action="store_true", help="cut the file written last after every second kill")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    work = Path(tempfile.mkdtemp(prefix="freehold-kills-"))
    started = time.monotonic()
    subprocess.run(command(args.recipe, work, "whole"), check=True)
    whole_s = time.monotonic() - started
    expected = hashes(work / "whole")
    seconds = {s: json.loads((work / "whole" / s / "manifest.json").read_text())["seconds"] for s in WALK}
    print(f"undisturbed: {whole_s:.0f} s, {seconds}", flush=True)
    stages = list(WALK)
    plan = [stages[i % len(stages)] for i in range(args.kills)]
    kills: list[dict[str, Any]] = []
    differing: list[str] = []
    for number in range(args.runs):
        run = work / f"killed{number}"
        start = command(args.recipe, work, run.name)
        for stage in sorted(plan[number :: args.runs], key=stages.index):
            for _ in range(8):
                done = kill_in(stage, seconds[stage] + 2, run, start, rng)
                if done is not None:
                    cut = cut_last(run, rng) if args.cuts and len(kills) % 2 else ""
                    kills.append({"run": number, **done, "cut": cut})
                    print(f"killed in {stage} ({done['target']}) {cut}", flush=True)
                    break
                shutil.rmtree(run / stage, ignore_errors=True)  # it got through: make it again
        subprocess.run(start, check=True)
        found = hashes(run)
        differing += [f"{run.name}/{s}" for s in stages if found[s] != expected[s]]
        print(f"{run.name}: {'DIFFERS' if differing else 'same bits'}", flush=True)
    result = {
        "kills": len(kills),
        "by_stage": {s: sum(k["stage"] == s for k in kills) for s in stages},
        "cuts": [k["cut"] for k in kills if k["cut"]],
        "walk_alone": sum(k["target"] == "walk alone" for k in kills),
        "runs": args.runs,
        "differing": differing,
        "undisturbed_s": round(whole_s, 1),
        "cpu": cpu_name(),
        "versions": package_versions(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    print(json.dumps(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(work)
    return 1 if differing or len(kills) < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
