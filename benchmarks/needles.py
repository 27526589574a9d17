"""How far a small model finds facts: 1x to 32x the length it was trained on, before and after a longer context.

The model has AFMoE's pattern in small: three sliding layers (window 16, RoPE), one global layer without positions, four
experts in the last. It learns needle tasks in rows of 64 tokens (text: a Markov chain of 200 words), then continues in
rows of 256: the same order of data, loss and loop as the product's (`freehold/data/long.py`). Pairs of key and value in
the questions never occurred in training. Next to it: gains on the query norm of the global layer, bits per word by
position, and the same answers from the Hugging Face form through transformers.

    python benchmarks/needles.py --json benchmarks/results/needles.json --picture docs/images/needles.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
from common import environment, write

from freehold.checkpoint.hf import save_hf
from freehold.core.log import Log
from freehold.data.config import LongConfig
from freehold.data.loader import PhaseRows, Source
from freehold.data.long import LongOrder
from freehold.data.needles import KEYS, VALUES, WORDINGS, Question
from freehold.infer.engine import Engine
from freehold.infer.sampler import Sampling
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.stages.evaluate.needles import accuracy, questions
from freehold.stages.pretrain.extend import sharpen
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer

TEXT_WORDS, FIRST_WORD = 200, 32
STEP_TOKENS = 4096
TRAINED, LONGER = 64, 256
MULTIPLES = (1, 2, 4, 8, 16, 32)
SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "moe_intermediate_size": 64,
    "num_hidden_layers": 4, "num_dense_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "max_position_embeddings": 8192,
}  # fmt: skip


class Words:
    """A word is a token: ids from FIRST_WORD on are the text's, then those of needles."""

    def __init__(self) -> None:
        said = " ".join([*(part for wording in WORDINGS for part in wording), *KEYS, *VALUES])
        names = sorted({word.strip(".:?") for word in [*said.split(), "."]})
        self.ids = {word: FIRST_WORD + TEXT_WORDS + number for number, word in enumerate(names)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words."""
        return [self.ids[word.strip(".:?")] for word in text.split()]


def markov(tokens: int, seed: int) -> np.ndarray:
    """Return a text of a chain in which each word has four successors."""
    rng = np.random.default_rng(0)
    successors = rng.integers(0, TEXT_WORDS, (TEXT_WORDS, 4))
    draws, text, word = np.random.default_rng(seed).integers(0, 4, tokens), np.empty(tokens, np.int64), 0
    for place, draw in enumerate(draws):
        word = successors[word, draw]
        text[place] = FIRST_WORD + word
    return text


def train(context: int, steps: int, seed: int, weights: dict[str, torch.Tensor] | None, rate: float) -> Trainer:
    """Return the loop after some steps of 4,096 tokens."""
    text = markov(2_000_000, seed + 1)
    lengths = np.full(len(text) // 1000, 1000)
    source = Source("text", text, np.arange(len(lengths)) * 1000, lengths, [str(i) for i in range(len(lengths))])
    settings = LongConfig(keep_short=1.0, keep_long=1.0, needles=0.9, keys=4, wordings=1)
    sequences = STEP_TOKENS // context
    order = LongOrder(
        {"text": source}, [PhaseRows("all", steps, {})], settings=settings, encode=Words().encode,
        context_tokens=context, sequences=sequences, seed=seed, separator=1, begin=0, documents=8,
    )  # fmt: skip
    phase = PhaseConfig(steps=steps, warmup_steps=min(20, steps // 4), shape="linear", start=rate, end=0.1 * rate)
    job = Job(
        folder=Path(), model=ModelConfig(**SHAPE), trainer=TrainerConfig(threads=1, dtype="float32"),
        optim=OptimConfig(lr=3e-3, muon_lr=0.02), balance=SmebuConfig(), schedule=Schedule({"all": phase}),
        order=order, micro_sequences=sequences, stage="pretrain", parent="",
    )  # fmt: skip
    trainer = Trainer(job, Log(quiet=True), seed=seed, weights=weights)
    for step in range(steps):
        result = trainer.train_step(trainer.next_batch())
        if step % 100 == 0 or step == steps - 1:
            print(f"  rows of {context}, step {step}: loss {result.loss:.3f}", flush=True)
    return trainer


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return a copy of a model's tensors."""
    return {name: tensor.detach().clone() for name, tensor in trainer.state.named().items()}


def engine_of(weights: dict[str, torch.Tensor], gain: float = 1.0) -> Engine:
    """Return an engine over a copy of the weights, the global layer's query norm times a gain."""
    model = Afmoe(ModelConfig(**SHAPE))
    tensors = {name: tensor.clone() for name, tensor in weights.items()}
    sharpen(tensors, model.config, gain)
    model.load_state_dict(tensors)
    return Engine(model, max_batch=8)


def asked_of(length: int, keys: int, items: int) -> list[Question]:
    """Return the questions of a cell."""
    return questions(Words().encode, markov(60_000, 10_001), length, keys, items, seed=0, wordings=1)


@torch.no_grad()
def answers(engine: Engine, asked: Sequence[Question]) -> list[list[int]]:
    """Return greedy answers."""
    prompts = [[0, *q.prompt] for q in asked]
    return [made.ids for made in engine.generate(prompts, Sampling(temperature=0.0, max_tokens=1))]


def table(weights: dict[str, torch.Tensor], items: int, gains: dict[str, Any]) -> dict[str, Any]:
    """Return accuracy by gain, keys and multiple of the trained length."""
    found: dict[str, Any] = {}
    for name, gain in gains.items():
        for keys in (1, 4):
            for multiple in MULTIPLES:
                asked = asked_of(multiple * TRAINED, keys, items)
                engine = engine_of(weights, gain(multiple))
                cell = accuracy(asked, answers(engine, asked))
                found.setdefault(name, {}).setdefault(str(keys), {})[str(multiple)] = cell
        print(name, {k: [c["accuracy"] for c in row.values()] for k, row in found[name].items()}, flush=True)
    return found


def bits_by_position(weights: dict[str, torch.Tensor], gain: float = 1.0) -> dict[str, float]:
    """Return bits per word of plain text by position, in octaves; the chain's entropy is 2 bits at most."""
    engine, text, size = engine_of(weights, gain), markov(40_000, 10_002), 32 * TRAINED
    rows = [[0, *text[at : at + size].tolist()] for at in range(0, 8 * size, size)]
    bits = -np.array([values[1:] for values in engine.score(rows)]) / math.log(2)
    edges = [0, *(1 << n for n in range(5, 12))]
    return {f"{a}-{b}": round(float(bits[:, a:b].mean()), 4) for a, b in zip(edges, edges[1:], strict=False)}


def from_hf(weights: dict[str, torch.Tensor], items: int) -> dict[str, Any]:
    """Return how many answers at 8x transformers gives as we do, from the exported folder."""
    from transformers import AutoModelForCausalLM

    asked = asked_of(8 * TRAINED, 4, items)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "hf", ModelConfig(**SHAPE), weights, dtype=torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.float32)
        with torch.no_grad():
            made = [[int(theirs(torch.tensor([[0, *q.prompt]])).logits[0, -1].argmax())] for q in asked]
    ours = answers(engine_of(weights), asked)
    same = sum(a == b for a, b in zip(made, ours, strict=True))
    return {"same_answers": same, **accuracy(asked, made)}


def draw(result: dict[str, Any]) -> bytes:
    """Return the picture: accuracy over multiples before and after, and bits by position."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    run = result["seeds"][0]
    for state, style in (("before", "--"), ("after", "-")):
        for name, colour in (("as trained", "C0"), ("log gain", "C1")):
            cells = run[state]["accuracy"][name]["4"]
            xs = [TRAINED * int(multiple) for multiple in cells]
            left.plot(
                xs, [c["accuracy"] for c in cells.values()], style, color=colour, marker="o", label=f"{state}, {name}"
            )
        places = run[state]["bits"]
        right.plot([int(p.partition("-")[2]) for p in places], list(places.values()), style, marker="o", label=state)
    left.axvline(TRAINED, color="grey", lw=0.5)
    left.set(xscale="log", xlabel="context, tokens", ylabel="values found, 4 keys", ylim=(0, 1.02), title="Needles")
    right.set(xscale="log", xlabel="position", ylabel="bits per word", title="Plain text by position")
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def one_seed(seed: int, steps: int, more: int, items: int) -> dict[str, Any]:
    """Train, measure, extend, measure again."""
    gains = {"as trained": lambda m: 1.0, "gain 1.5": lambda m: 1.5,
             "log gain": lambda m: 1 + math.log(m) / math.log(TRAINED)}  # fmt: skip
    started = time.perf_counter()
    weights = weights_of(train(TRAINED, steps, seed, None, 1.0))
    trained_s = time.perf_counter() - started
    before = {"accuracy": table(weights, items, gains), "bits": bits_by_position(weights)}
    started = time.perf_counter()
    longer = weights_of(train(LONGER, more, seed, weights, 0.5))
    extended_s = time.perf_counter() - started
    after = {"accuracy": table(longer, items, gains), "bits": bits_by_position(longer)}
    return {
        "seed": seed, "trained_s": trained_s, "extended_s": extended_s, "before": before, "after": after,
        "transformers": from_hf(longer, items),
    }  # fmt: skip


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--more", type=int, default=100)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {"environment": environment("transformers"), "seeds": []}
    for seed in range(args.seeds):
        result["seeds"].append(one_seed(seed, args.steps, args.more, args.items))
        write(args.json, result)
    if args.picture:
        args.picture.write_bytes(draw(result))
    print(json.dumps([{k: v for k, v in run.items() if k.endswith("_s")} for run in result["seeds"]]))


if __name__ == "__main__":
    main()
