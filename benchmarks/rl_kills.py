"""Kills a run of reinforcement learning with several turns again and again, and compares every byte it leaves.

    python benchmarks/rl_kills.py [--kills 20] [--steps 40] [--json FILE]

A run is killed at random moments (while it draws, judges, updates or writes), started again, killed again, and in the
end allowed to finish. Ledger and weights must be those of a run that no one disturbed; then once more with answers
drawn five at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rl
import torch

from freehold.checkpoint import dcp
from freehold.core.log import Log
from freehold.environments.protocol import Message, Reply, Split, Task, text_of
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.stages.align.learn_rl import policy_loss
from freehold.stages.align.rl_config import EnvironmentConfig, RlConfig
from freehold.stages.align.rollouts import RolloutOrder, Tasks
from freehold.tokenizer.bpe import train
from freehold.trainer.loop import Trainer

TURNS = 3


class Halves:
    """Right is a last word in the lower half of all bytes: a model that knows nothing is right half of the time."""

    name, version = "halves", "1"

    def task(self, split: Split, number: int) -> Task:
        return Task(f"halves/{split}/{number}", ({"role": "user", "content": str(number * 7919 % 1000)},), 0)

    def start(self, task: Task) -> int:
        return 0

    def step(self, task: Task, state: int, turn: Message) -> Reply:
        return Reply(state + 1, ({"role": "tool", "content": str(state)},), state + 1 >= TURNS)

    def reward(self, task: Task, state: int, turns: Sequence[Message]) -> Mapping[str, float]:
        text = text_of(turns).encode()
        return {"correct": float(bool(text) and text[0] < 96)}

    def gold(self, task: Task) -> list[list[Message]]:
        return []

    def wrong(self, task: Task) -> list[list[Message]]:
        return []


def run(folder: Path, steps: int, together: int) -> None:
    """Run to the end, from where an earlier process was killed."""
    torch.set_num_threads(1)
    tokenizer = train(["the cat sat on the mat 0123456789"] * 9, 304, Log(quiet=True))
    config = RlConfig(
        environments={"halves": EnvironmentConfig()}, prompts=4, group=4, max_tokens=8, min_reward=0.0, held_out=0,
        max_turns=TURNS,
    )  # fmt: skip
    tasks = Tasks({"halves": Halves()}, {"halves": 1.0}, 0)
    order = rl.rows(RolloutOrder, folder, tokenizer, tasks, config, 0, steps)
    model = Afmoe(ModelConfig(vocab_size=tokenizer.vocab_size, **rl.SHAPE))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.specials["<|im_end|>"]] *= 60  # so that turns end
    job = rl.job(folder, tokenizer, order, steps, 0, 1e-4, every=5, loss=policy_loss(config, 512))
    trainer = Trainer(job, Log(folder, quiet=True), seed=0, weights=model.state_dict())

    def ready(loop: Trainer) -> None:
        order.attach(loop)
        order.policy.engine.queue.max_batch = together

    trainer.run(None, ready)


def digest(folder: Path, steps: int) -> dict[str, str]:
    """Return the hash of each file of the ledger, and of the weights at the end."""
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "rollouts").iterdir())}
    state = dcp.load(folder / f"checkpoints/step_{steps:08}")
    for part in ("model", "optimizer"):
        both = hashlib.sha256()
        for name, tensor in sorted(state[part].items()):
            both.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        found[part] = both.hexdigest()
    return found


def started(folder: Path, steps: int, together: int) -> subprocess.Popen[bytes]:
    """Start a process of a run."""
    arguments = ["--run", str(folder), "--steps", str(steps), "--at-a-time", str(together)]
    return subprocess.Popen([sys.executable, __file__, *arguments], stderr=subprocess.PIPE)


def killed(folder: Path, steps: int, kills: int, seconds: float) -> int:
    """Run with kills at random moments; return how many there were."""
    draw, done = random.Random(0), 0
    while True:
        process = started(folder, steps, 256)
        if done < kills:
            before = len(list(folder.glob("rollouts/*")))
            while process.poll() is None and len(list(folder.glob("rollouts/*"))) <= before:
                time.sleep(0.05)  # the import of PyTorch is no moment of the run
            time.sleep(draw.random() * 2 * seconds)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                continue
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(errors.decode())
        return done


def main() -> int:
    """Compare, print one JSON object, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--at-a-time", type=int, default=256)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.run:
        run(args.run, args.steps, args.at_a_time)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folders = {key: Path(name) / key for key in ("whole", "five", "killed")}
        for folder in folders.values():
            folder.mkdir()
        began = time.monotonic()
        for key, together in (("whole", 256), ("five", 5)):
            process = started(folders[key], args.steps, together)
            if process.wait():
                raise SystemExit(process.communicate()[1].decode())
            print(f"{key} done", file=sys.stderr, flush=True)
        step_s = (time.monotonic() - began) / 2 / args.steps
        done = killed(folders["killed"], args.steps, args.kills, step_s)
        found = {key: digest(folder, args.steps) for key, folder in folders.items()}
    same = {key: found[key] == found["whole"] for key in ("five", "killed")}
    answer: dict[str, Any] = {"kills": done, "steps": args.steps, "files": len(found["whole"]), "equal": same}
    print(json.dumps(answer, indent=1))
    if args.json:
        args.json.write_text(json.dumps(answer, indent=1) + "\n")
    return 0 if all(same.values()) and done == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
