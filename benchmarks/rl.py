"""Reinforcement learning raises greedy accuracy where fine-tuning has stopped, and random credit does not.

    python benchmarks/rl.py [--seeds 3] [--json FILE]

A small model is fine-tuned on two-digit sums with written steps, of which more than half forget the carry: more steps
of that teach no more. Then the same checkpoint learns from its own answers, judged by the sum alone. The control has
the same rewards, given to other answers of the batch at random. Prints greedy accuracy on 256 held-out sums.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from freehold.core.log import Log
from freehold.data.loader import ConversationOrder, generator
from freehold.data.packing import Example
from freehold.data.rollouts import Rollout, RolloutLedger, with_values
from freehold.environments.single import Item, Single
from freehold.environments.verifiers import same_number
from freehold.model.config import ModelConfig
from freehold.optim.config import NoBalanceConfig, OptimConfig, PhaseConfig
from freehold.optim.schedule import Schedule
from freehold.stages.align.held_out import HeldOut
from freehold.stages.align.learn_rl import policy_loss
from freehold.stages.align.rl_config import EnvironmentConfig, RlConfig
from freehold.stages.align.rollouts import RolloutOrder, Tasks
from freehold.tokenizer.bpe import Tokenizer, train
from freehold.tokenizer.chat import render_ids
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer

SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "num_hidden_layers": 4,
    "num_dense_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "num_experts": 8,
    "num_experts_per_tok": 2, "sliding_window": 64, "max_position_embeddings": 128,
}  # fmt: skip
CONTEXT = 128
FORGETS = 0.55
"""Share of the fine-tuning answers that forget the carry."""
RATE = 2e-3


def addition(draw: random.Random) -> Item:
    """Return a sum of two numbers of two digits, with its steps."""
    a, b = draw.randrange(10, 100), draw.randrange(10, 100)
    return Item(f"{a} + {b}", str(a + b), answer(a, b, carries=True), (str(a + b + 1),))


def answer(a: int, b: int, *, carries: bool) -> str:
    """Return a sum digit by digit; without carries it is wrong whenever there is one."""
    ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10 if carries else 0
    tens = a // 10 + b // 10 + carry
    return f"{a % 10}+{b % 10}={ones} {a // 10}+{b // 10}+{carry}={tens}\n{tens}{ones % 10}"


class Shuffled(RolloutOrder):
    """The control: rewards of a batch are given to other answers."""

    def _play(self, first: int, turn: int, drawn_at: int) -> list[Rollout]:
        rollouts = super()._play(first, turn, drawn_at)
        places = generator(self.tasks.seed, "shuffled", first, turn).permutation(len(rollouts))
        return [with_values(one, parts=rollouts[int(at)].parts) for one, at in zip(rollouts, places, strict=True)]


def job(
    folder: Path,
    tokenizer: Tokenizer,
    order: Any,
    steps: int,
    first: int,
    rate: float,
    every: int = 10_000,
    **more: Any,
) -> Job:
    """Return a run of some steps, with a checkpoint after each `every` steps."""
    return Job(
        folder=folder,
        model=ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE),
        trainer=TrainerConfig(dtype="float32", threads=1, checkpoint_every_steps=every, log_every_steps=10),
        optim=OptimConfig(matrices="adamw", lr=rate),
        balance=NoBalanceConfig(),
        schedule=Schedule({"phase": PhaseConfig(steps=steps, warmup_steps=5)}, first_step=first),
        order=order,
        micro_sequences=32,
        stage="align",
        parent="",
        facts={"tokenizer_sha256": tokenizer.sha256},
        **more,
    )


def fine_tuned(
    folder: Path, tokenizer: Tokenizer, tasks: Tasks, steps: int, seed: int
) -> tuple[dict[str, Any], list[float]]:
    """Return weights after fine-tuning, and the accuracy after each fifth of the steps."""
    draw, examples = random.Random(f"{seed} talk"), []
    for number in range(8000):
        _, task = tasks.task("train", number)
        a, b = (int(part) for part in task.messages[0]["content"].split(" + "))
        said = answer(a, b, carries=draw.random() >= FORGETS)
        ids, mask = render_ids(tokenizer, [*task.messages, {"role": "assistant", "content": said}])
        examples.append(Example(task.id, "talk", ids, mask))
    order = ConversationOrder(examples, context_tokens=CONTEXT, sequences=32, steps=steps, seed=seed, pad=tokenizer.pad)
    trainer = Trainer(job(folder, tokenizer, order, steps, 0, RATE), Log(folder, quiet=True), seed=seed)
    curve = []
    for step in range(steps):
        trainer.train_step(trainer.next_batch())
        if (step + 1) % (steps // 5) == 0:
            curve.append(measured(folder / f"at{step}", tokenizer, tasks, trainer))
    return {name: tensor.clone() for name, tensor in trainer.state.named().items()}, curve


def settings(**changes: Any) -> RlConfig:
    """Return the settings of the phase: the defaults, for short answers."""
    environments = {"addition": EnvironmentConfig()}
    return RlConfig(environments=environments, max_tokens=28, held_out=256, held_out_every_steps=10**6, **changes)


def measured(folder: Path, tokenizer: Tokenizer, tasks: Tasks, trainer: Trainer) -> float:
    """Return the greedy accuracy on held-out sums."""
    folder.mkdir(parents=True)
    order = rows(RolloutOrder, folder, tokenizer, tasks, settings(), 0, 1)
    order.attach(trainer)
    watch = HeldOut(order, folder, Log(quiet=True))
    watch.attach(trainer)
    return watch.known["start"]


def rows(kind: type, folder: Path, tokenizer: Tokenizer, tasks: Tasks, config: RlConfig, first: int, steps: int) -> Any:
    """Return the order of a phase of kind rl."""
    return kind(
        config, tasks, tokenizer, RolloutLedger(folder / "rollouts"), context_tokens=CONTEXT, first_step=first,
        total_steps=first + steps, reference=None,
    )  # fmt: skip


def reinforced(
    kind: type, folder: Path, tokenizer: Tokenizer, tasks: Tasks, start: dict[str, Any], steps: int, seed: int
) -> dict[str, float]:
    """Return what a phase of kind rl made of a checkpoint."""
    folder.mkdir()
    config = settings(rate=1 / 30)
    order = rows(kind, folder, tokenizer, tasks, config, 0, steps)
    loss = policy_loss(config, 512)
    run = job(folder, tokenizer, order, steps, 0, RATE * config.rate, loss=loss)
    trainer = Trainer(run, Log(folder, quiet=True), seed=seed, weights=start)
    began = time.process_time()
    trainer.run(None, order.attach)
    seconds = time.process_time() - began
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sampled = [line["rl/correct"] for line in lines if "rl/correct" in line]
    return {
        "greedy": measured(folder / "end", tokenizer, tasks, trainer),
        "sampled_first": statistics.mean(sampled[:3]),
        "sampled_last": statistics.mean(sampled[-3:]),
        "largest_gap": max(line.get("policy/gap", 0.0) for line in lines),
        "cpu_s": round(seconds, 1),
    }


def one_seed(seed: int, sft_steps: int, rl_steps: int) -> dict[str, Any]:
    """Return the figures of one seed."""
    some = range(10, 100, 7)
    text = [f"user\n{a} + {b} assistant\n{answer(a, b, carries=True)}" for a in some for b in some]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train(text, 304, Log(quiet=True))
        tasks = Tasks({"addition": Single("addition", "1", addition, same_number, seed)}, {"addition": 1.0}, seed)
        start, curve = fine_tuned(folder / "sft", tokenizer, tasks, sft_steps, seed)
        found: dict[str, Any] = {"seed": seed, "sft": curve}
        for label, kind in (("rl", RolloutOrder), ("shuffled", Shuffled)):
            found[label] = reinforced(kind, folder / label, tokenizer, tasks, start, rl_steps, seed)
            print(json.dumps({label: found[label], "sft": curve}), file=sys.stderr, flush=True)
    found["gain"] = round(100 * (found["rl"]["greedy"] - curve[-1]), 1)
    found["control"] = round(100 * (found["shuffled"]["greedy"] - curve[-1]), 1)
    return found


def main() -> int:
    """Run all seeds, print the medians, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sft-steps", type=int, default=200)
    parser.add_argument("--rl-steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [one_seed(seed, args.sft_steps, args.rl_steps) for seed in range(args.seeds)]
    gain, control = (statistics.median(one[key] for one in seeds) for key in ("gain", "control"))
    answer = {"seeds": seeds, "gain_points": gain, "control_points": control}
    print(json.dumps(answer, indent=1))
    if args.json:
        args.json.write_text(json.dumps(answer, indent=1) + "\n")
    return 0 if gain >= 15 and control < 3 else 1


if __name__ == "__main__":
    sys.exit(main())
