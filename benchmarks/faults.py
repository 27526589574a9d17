"""Hurt a training run of two processes in every way a machine can, and see whether it ends with the same bits.

One run is left alone. Each seed then picks a fault, a victim and a moment, hurts a run of the same recipe there, and
lets the supervisor handle it. A fault is survived when the run ends well by itself and the last checkpoint has, bit
for bit, every tensor of the undisturbed run; a slow rank and the documents of a poisoned batch must be named too. Steps
repeated are read from the supervisor's own log.

    kill      SIGKILL of a rank at a random moment of a random step
    store     SIGKILL of rank 0, which holds the store all meet at, while they are still meeting
    stop      SIGSTOP of a rank: nothing fails, nothing moves
    disk      the file system is full during at least one save, then has room again
    truncate  the newest checkpoint loses the end of a file, and a rank is killed
    flip      one bit of the newest checkpoint flips, and a rank is killed
    poison    the data holds batches that no text is like: they must be named and skipped; and a rank is killed
    slow      a rank is held up again and again for some seconds: it must be named, and nothing else done

Results are added to the file as they come; seeds that are in it are not done again.

    python benchmarks/faults.py --untimed
    python benchmarks/faults.py --seeds 8 --json benchmarks/results/faults_seconds.json     on a quiet machine
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import environment, write

from freehold.core.artifact import read_json, read_manifest, write_manifest
from freehold.core.config import fill, load_yaml
from freehold.data.buffer import text_order
from freehold.data.loader import PhaseRows
from freehold.data.shards import ShardSet
from freehold.parallel.heartbeat import read_beat
from freehold.run import verify
from freehold.stages.pretrain.config import PretrainConfig
from freehold.tokenizer.bpe import BOS, END_OF_TEXT

RECIPE = Path("recipes/tiny.yaml")
STEPS = 36
FAULTS = ("kill", "store", "stop", "disk", "truncate", "flip", "poison", "slow")
PATIENCE_S = 3600.0
POISONED = (14, 33)
"""Steps whose batches are poisoned; none of the first of a phase, which judge nothing."""
FULL_S = 20.0
"""How long a disk stays full at most: the run waits for room at the end of a phase."""
TRAINING = [
    "pretrain.parallel.nproc=2",
    "pretrain.parallel.shard=2",
    "pretrain.trainer.checkpoint_every_steps=5",
    "pretrain.trainer.keep_last=3",
    "pretrain.trainer.validate_every_steps=0",
    "pretrain.trainer.log_every_steps=1",
    "pretrain.trainer.spike.action=skip",
    "pretrain.trainer.spike.warmup_steps=8",
    "pretrain.trainer.spike.window_steps=8",
    "pretrain.trainer.spike.rise_nats=1.0",
    "pretrain.trainer.spike.sigmas=6",
    "pretrain.parallel.supervise.hang_s=60",
    "pretrain.parallel.supervise.slow_s=4",
]


class Run:
    """One training run in a folder of its own, started and watched from outside."""

    def __init__(self, runs: Path, name: str, inputs: Path) -> None:
        self.folder, self.stage = runs / name, runs / name / "pretrain"
        shutil.rmtree(self.folder, ignore_errors=True)
        for stage in ("gather", "curate", "tokenize"):
            shutil.copytree(inputs / stage, self.folder / stage)
        command = ["pretrain", str(RECIPE), *TRAINING, f"runs_dir={runs}", f"name={name}"]
        self.started = time.monotonic()
        # In no folder of the run: a disk that is filled would not keep it.
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen([sys.executable, "-m", "freehold.cli", *command], stderr=self.said)

    def beats(self) -> dict[int, dict[str, Any]]:
        """Return the last beat of each rank of the newest world."""
        worlds = sorted((self.stage / "log").glob("world_*"))
        return {rank: beat for rank in range(2) if worlds and (beat := read_beat(worlds[-1] / f"rank_{rank}.json"))}

    def wait_for(self, step: int) -> dict[int, int]:
        """Wait until both ranks have done that many steps; return their process ids."""
        while self.process.poll() is None:
            beats = self.beats()
            if len(beats) == 2 and all(b["step"] >= step for b in beats.values()):
                return {rank: beat["pid"] for rank, beat in beats.items()}
            time.sleep(0.005)
        raise RuntimeError(f"over before step {step}: {self.tail()}")

    def newest(self) -> Path:
        """Return the newest finished checkpoint."""
        return max(p.parent for p in self.stage.glob("checkpoints/step_????????/manifest.json"))

    def finish(self) -> int:
        """Wait for the end; return the exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()
            return -1

    def events(self) -> list[dict[str, Any]]:
        """Return the supervisor's log."""
        path = self.stage / "log" / "supervisor.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def tail(self) -> str:
        """Return the end of what the run said."""
        self.said.flush()
        self.said.seek(0)
        return "\n".join(self.said.read().splitlines()[-8:])


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def damage(path: Path, fault: str, rng: random.Random) -> str:
    """Cut off the end of a file of a checkpoint, or flip one of its bits; return what was done."""
    file = rng.choice(sorted((path / "state").glob("*.distcp")))
    data = bytearray(file.read_bytes())
    if fault == "truncate":
        cut = rng.randrange(1, len(data))
        file.write_bytes(data[:cut])
        return f"{path.name}/{file.name} cut at {cut:,} of {len(data):,} bytes"
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"{path.name}/{file.name} byte {place:,}"


def fill_disk(run: Run, folder: Path, step: int) -> dict[str, Any]:
    """Fill the file system from `step` on until a checkpoint should have been written or FULL_S, then make room."""
    run.wait_for(step)
    ballast, until = folder / "ballast", min(step + 6, STEPS)
    deadline = time.monotonic() + FULL_S
    size = 1 << 16
    with ballast.open("ab", buffering=0) as file:
        while run.process.poll() is None and time.monotonic() < deadline:
            if min((b["step"] for b in run.beats().values()), default=0) >= until:
                break
            try:
                file.write(bytes(size))
            except OSError:
                size = max(size // 2, 1)
                time.sleep(0.002)
    expected = [s for s in range(5, STEPS, 5) if step < s < until]
    missed = [s for s in expected if not (run.stage / "checkpoints" / f"step_{s:08d}").exists()]
    ballast.unlink()
    return {"step": step, "saves_prevented_or_pruned": missed}


def poison(inputs: Path, undisturbed: Path) -> None:
    """Overwrite all that two steps read with tokens no text has, and sign the shards again: they are what they are."""
    config = fill(PretrainConfig, load_yaml(undisturbed / "resolved.yaml"), "pretrain")
    shards = ShardSet.load(inputs / "tokenize" / "tokens")
    order = text_order(
        config.batch,
        shards.sources("train"),
        [PhaseRows(name, phase.steps, phase.mixture) for name, phase in config.phases.items()],
        seed=read_manifest(undisturbed)["seed"],
        separator=END_OF_TEXT,
        begin=BOS,
    )
    dice = np.random.default_rng(0)
    for path in sorted((inputs / "tokenize" / "tokens").glob("*.train.bin")):
        data = path.read_bytes()
        for row in (row for step in POISONED for row in order.batch(step).targets):
            for piece in np.split(row.astype("<u2"), np.flatnonzero(row == END_OF_TEXT) + 1):
                at = data.find(piece.tobytes()) if len(piece) > 8 else -1
                if at >= 0:
                    noise = dice.integers(14, 32, len(piece) - 1).astype("<u2").tobytes()
                    data = data[:at] + noise + data[at + len(noise) :]
        path.write_bytes(data)
    manifest = read_manifest(inputs / "tokenize")
    record = {
        k: manifest[k] for k in ("config", "config_sha256", "contract", "code", "inputs", "seed", "run", "seconds")
    }
    write_manifest(inputs / "tokenize", kind="tokenize", counts=manifest["counts"], **record)


def hurt(run: Run, fault: str, rng: random.Random, disk: Path) -> dict[str, Any]:
    """Do what the seed says to a run; return what it was."""
    step, victim = rng.randrange(6, STEPS - 4), rng.randrange(2)
    if fault == "store":
        while not (run.stage / "log" / "world_001").exists():
            time.sleep(0.005)
        after = rng.uniform(0.0, 4.0)
        time.sleep(after)
        children = [c for c in psutil.Process(run.process.pid).children() if "cli" in " ".join(c.cmdline())]
        first = min(children, key=lambda c: c.pid)
        kill(first.pid)
        return {"victim": 0, "after_s": round(after, 2)}
    if fault == "disk":
        return fill_disk(run, disk, step)
    pids = run.wait_for(step)
    if fault == "slow":
        until = time.monotonic() + 60
        while time.monotonic() < until and run.process.poll() is None:
            kill(pids[victim], signal.SIGSTOP)
            time.sleep(0.15)
            kill(pids[victim], signal.SIGCONT)
            time.sleep(0.02)
            if any(e["event"] == "slow" for e in run.events()):
                break
        return {"step": step, "victim": victim}
    time.sleep(rng.uniform(0, 0.1))
    if fault == "stop":
        kill(pids[victim], signal.SIGSTOP)
        return {"step": step, "victim": victim}
    done = damage(run.newest(), fault, rng) if fault in ("truncate", "flip") else None
    kill(pids[victim])
    return {"step": step, "victim": victim} | ({"done": done} if done else {})


def one(seed: int, work: Path, references: dict[str, Any]) -> dict[str, Any]:
    """Run one seed; return its record."""
    rng = random.Random(seed)
    fault = FAULTS[seed % len(FAULTS)]
    kind = "poisoned" if fault == "poison" else "clean"
    runs = work / "hurt"
    if fault == "disk":
        runs = work / "disk"
        runs.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(runs)], check=True)
    try:
        run = Run(runs, f"seed_{seed}", work / f"{kind}_inputs")
        done_to: dict[str, Any] = {}
        with contextlib.suppress(RuntimeError):
            done_to = hurt(run, fault, rng, runs)
        code = run.finish()
        seconds = time.monotonic() - run.started
        events = run.events()
        failed = [e for e in events if e["event"] == "failed"]
        reference = references[kind]
        equal, skipped, named = False, None, fault not in ("slow", "poison")
        if code == 0:
            found = verify.compare(Path(reference["stage"]), run.stage, STEPS)
            equal = not found["facts"] and not any(p["differing"] for p in found["parts"].values())
            skipped = read_json(run.stage / "base" / "trainer.json")["skipped_steps"]
        if fault == "slow":
            named = any(e["event"] == "slow" and e["rank"] == done_to.get("victim") for e in events)
        quarantine = run.stage / "log" / "quarantine.jsonl"
        if fault == "poison" and quarantine.exists():
            rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
            named = {row["step"] for row in rows if row["source"] and row["licence"]} == set(POISONED)
        record = {
            "seed": seed,
            "fault": fault,
            **done_to,
            "hurt": bool(done_to),
            "survived": bool(done_to) and code == 0 and equal and named,
            "exit_code": code,
            "same_bits": equal,
            "relaunches": len(failed),
            "blamed": [e["blamed"] for e in failed],
            "what": [e["what"] for e in failed],
            "slow_rank_named": [e["rank"] for e in events if e["event"] == "slow"],
            "steps_repeated": sum(max((e["step"] or 0) - max(e["newest"], 0), 0) for e in failed),
            "seconds": round(seconds, 1),
            "seconds_lost": round(seconds - reference["seconds"], 1),
            "skipped_steps": skipped,
        }
        if not record["survived"]:
            record["said"] = run.tail()
        shutil.rmtree(run.folder, ignore_errors=True)
        return record
    finally:
        if fault == "disk":
            subprocess.run(["umount", str(runs)], check=True)


def prepare(work: Path) -> dict[str, Any]:
    """Make the inputs and the undisturbed runs, once; return where they are and how long they took."""
    known = work / "references.json"
    if known.exists():
        return read_json(known)
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "freehold.cli", "run", str(RECIPE), f"runs_dir={work}", "name=clean_inputs"]
    subprocess.run([*command, "until=tokenize", "--quiet"], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(work / "poisoned_inputs", ignore_errors=True)
    shutil.copytree(work / "clean_inputs", work / "poisoned_inputs")
    references: dict[str, Any] = {}
    for kind in ("clean", "poisoned"):
        if kind == "poisoned":
            poison(work / "poisoned_inputs", Path(references["clean"]["stage"]))
        run = Run(work / "undisturbed", kind, work / f"{kind}_inputs")
        if run.finish() != 0:
            raise SystemExit(f"the undisturbed run failed:\n{run.tail()}")
        facts = read_json(run.stage / "base" / "trainer.json")
        references[kind] = {
            "stage": str(run.stage),
            "seconds": round(time.monotonic() - run.started, 1),
            "skipped_steps": facts["skipped_steps"],
        }
    if [references[kind]["skipped_steps"] for kind in ("clean", "poisoned")] != [[], list(POISONED)]:
        raise SystemExit(f"not the poisoned steps alone were skipped: {references}")
    known.write_text(json.dumps(references))
    return references


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path("/tmp/freehold-faults"), help="kept, so that it can resume")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/faults.json"))
    parser.add_argument("--untimed", action="store_true", help="report no seconds: the machine is shared")
    args = parser.parse_args()
    records = {r["seed"]: r for r in read_json(args.json)["runs"]} if args.json.exists() else {}
    references, here = prepare(args.work), environment()
    undisturbed = {kind: {k: v for k, v in r.items() if k != "stage"} for kind, r in references.items()}
    for seed in range(args.seeds):
        if seed in records:
            continue
        records[seed] = {**one(seed, args.work, references), "commit": here["commit"]}
        if args.untimed:
            records[seed] = {k: v for k, v in records[seed].items() if not k.startswith("seconds")}
        shown = {k: v for k, v in records[seed].items() if k not in ("said", "what")}
        print(json.dumps(shown), flush=True)
        runs = [records[s] for s in sorted(records)]
        write(args.json, {**summary(runs), "undisturbed": undisturbed, "environment": here, "runs": runs})
    runs = [records[s] for s in sorted(records)]
    print(json.dumps(summary(runs), indent=1))
    return 0 if all(r["survived"] for r in runs) else 1


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures over all seeds, and by fault."""
    by = {fault: [r for r in runs if r["fault"] == fault] for fault in FAULTS}
    return {
        "seeds": len(runs),
        "survived": sum(r["survived"] for r in runs),
        "steps": STEPS,
        "checkpoint_every_steps": 5,
        "steps_repeated": sum(r["steps_repeated"] for r in runs),
        "slow_named_though_not_slowed": sum(
            bool(r["slow_rank_named"]) for r in runs if r["fault"] not in ("slow", "stop")
        ),
        "by_fault": {
            fault: {
                "seeds": len(found),
                "survived": sum(r["survived"] for r in found),
                "relaunches": sum(r["relaunches"] for r in found),
                "steps_repeated": sum(r["steps_repeated"] for r in found),
                **({"seconds_lost_median": round(float(np.median(lost)), 1)} if lost else {}),
            }
            for fault, found in by.items()
            if found
            for lost in [[r["seconds_lost"] for r in found if "seconds_lost" in r]]
        },
    }


if __name__ == "__main__":
    sys.exit(main())
