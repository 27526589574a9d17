"""What the Random Sequential Document Buffer does to the losses of neighbouring batches, against plain packing.

Every order reads the same corpus in rows of the same length; a step is 8 micro-batches of M rows.

- plain packing: the documents of all sources in one random order, assigned to 8 workers, each packing its own one after
  another; a micro-batch is M neighbouring rows of one worker. (The buffer with one document for each worker.)
- one buffer: the published buffer, all sources in one, split over 8 workers.
- buffer: `batch.order: {kind: buffer}`, one buffer for each source, rows of sources in exact proportion, shuffled.
- stream: `batch.order: {kind: stream}`, the default, rows of sources in exact proportion, all rows of a phase shuffled.

BatchHet = max over the micro-batches of a step of their mean loss, minus the mean over them; a mean over steps.

1. With the weights held fixed (a run's TrueBase), so that only the data differ: BatchHet and the variance of the step
   loss over M, with 95 % bootstrap intervals over steps.
2. Without a model: what a buffer of a size does to a run that reads less than an epoch. It reads more from the fore
   part of documents; and one buffer of all sources begins with the mixture of documents, not of tokens.
3. Training on from TrueBase at its constant rate, once in each order from the same state: variance of the step loss
   around its straight line, kurtosis of the gradient norm, validation at the end.
4. What it costs: documents played a second (what a resumed run repeats), and seconds for a batch of the laptop recipe.

It needs a run of the laptop recipe as far as pretrain, and about half an hour of one core. Parts that are not measured
again are kept as they stand in the result.

    freehold run recipes/laptop.yaml until=pretrain
    python benchmarks/data_order.py
    python benchmarks/data_order.py --parts training cost --steps 200
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import psutil
import torch
from matplotlib.figure import Figure

from freehold.checkpoint import dcp
from freehold.core.artifact import package_versions
from freehold.core.config import fill, load_yaml
from freehold.core.log import Log
from freehold.core.machine import cpu_name
from freehold.data.buffer import BufferOrder, DocumentBuffer
from freehold.data.loader import PhaseRows, Source, TextOrder, generator
from freehold.data.shards import ShardSet
from freehold.losses.cross_entropy import summed_nll
from freehold.model.afmoe import Afmoe
from freehold.optim.config import PhaseConfig
from freehold.optim.schedule import Schedule
from freehold.run.figure import BLUE, GREEN, MUTED, ORANGE, STYLE
from freehold.stages.pretrain.config import PretrainConfig
from freehold.tokenizer.bpe import BOS, END_OF_TEXT
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer
from freehold.trainer.validate import bits_per_byte, held_out

WORKERS = 8
ROWS = (1, 2, 4, 8)
"""Rows of a micro-batch."""
ONE_BUFFER, BUFFER = 32, 8
"""Documents at which the one buffer (over all workers) and the buffer of each source are filled up again."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Documents of a buffer for each source; one for all is given WORKERS times as many."""
PARTS = ("fixed_model", "bias", "training", "cost")
TRAIN_ROWS = 2
"""Rows of a micro-batch while training."""
COLOURS = {"plain packing": MUTED, "one buffer": GREEN, "buffer": BLUE, "stream": ORANGE}
Sources = dict[str, Source]
Makers = dict[str, Callable[[int, int], Any]]
"""What makes each order, given steps and rows of a step."""


def merged(sources: Sources) -> Sources:
    """Return all sources as one; a document keeps its source's name in its id."""
    shift = np.cumsum([0, *(len(s.tokens) for s in sources.values())])
    return {
        "all": Source(
            "all",
            np.concatenate([s.tokens for s in sources.values()]),
            np.concatenate([s.starts + by for s, by in zip(sources.values(), shift, strict=False)]),
            np.concatenate([s.lengths for s in sources.values()]),
            [f"{name}:{document}" for name, s in sources.items() for document in s.ids],
        )
    }


def orders(sources: Sources, context_tokens: int, seed: int) -> Makers:
    """Return what makes each order."""
    shape: dict[str, Any] = {"context_tokens": context_tokens, "seed": seed, "separator": END_OF_TEXT, "begin": BOS}
    whole = merged(sources)

    def rows(steps: int) -> list[PhaseRows]:
        return [PhaseRows("benchmark", steps, {})]

    return {
        "plain packing": lambda steps, n: BufferOrder(
            whole, rows(steps), sequences=n, **shape, documents=WORKERS, refill=1.0, workers=WORKERS
        ),
        "one buffer": lambda steps, n: BufferOrder(
            whole, rows(steps), sequences=n, **shape, documents=ONE_BUFFER, workers=WORKERS
        ),
        "buffer": lambda steps, n: BufferOrder(sources, rows(steps), sequences=n, **shape, documents=BUFFER),
        "stream": lambda steps, n: TextOrder(sources, rows(steps), sequences=n, **shape),
    }


def same_pairs(sources: Sources, seed: int) -> bool:
    """Return whether an epoch of the smallest source has the same (input, target) pairs packed plainly and buffered."""
    name = min(sources, key=lambda n: sources[n].total_tokens)
    source = sources[name]
    found = []
    for documents, refill in ((1, 1.0), (BUFFER, 2.0)):
        order = BufferOrder(
            {name: source}, [PhaseRows("epoch", 1, {})], context_tokens=1, sequences=source.total_tokens, seed=seed,
            separator=END_OF_TEXT, begin=BOS, documents=documents, refill=refill,
        )  # fmt: skip
        batch = order.batch(0)
        found.append(np.sort(batch.input_ids[:, 0] << 32 | batch.targets[:, 0]))
    return np.array_equal(*found) and np.array_equal(np.sort(found[0] & (1 << 32) - 1), np.sort(source.tokens))


def row_losses(model: Afmoe, order: TextOrder, steps: int) -> np.ndarray:
    """Return the mean loss of each row, nats a token: [steps, rows of a step]."""
    losses = []
    with torch.no_grad():
        for step in range(steps):
            batch = order.batch(step)
            ids, documents = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.document_ids)
            hidden = model.hidden(ids, document_ids=documents)
            losses.append(summed_nll(hidden, model.lm_head.weight, torch.from_numpy(batch.targets)).mean(1).numpy())
    return np.array(losses)


def spread(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """Return a statistic over steps [S, ...] with its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    drawn = [float(statistic(values[rng.integers(0, len(values), len(values))])) for _ in range(2000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(statistic(values)), "low": float(low), "high": float(high)}


def heterogeneity(losses: np.ndarray) -> dict[str, Any]:
    """Return BatchHet and the variance of the step loss for micro-batches of each number of rows."""
    found = {}
    for rows in ROWS:
        steps = len(losses) // rows
        micro = losses[: steps * rows].reshape(steps, rows, WORKERS).mean(1)
        found[str(rows)] = {
            "steps": steps,
            "batch_het": spread(micro, lambda m: (m.max(1) - m.mean(1)).mean()),
            "step_variance": spread(micro.mean(1), lambda m: m.var(ddof=1)),
        }
    return found


def fixed_model(run: Path, makers: Makers, steps: int) -> dict[str, Any]:
    """Return the heterogeneity of every order under the weights of TrueBase."""
    shape, weights = dcp.read_model(run / "pretrain" / "truebase")
    model = Afmoe(shape)
    model.load_state_dict(weights)
    model.to_compute(torch.bfloat16)
    model.eval()
    found = {}
    for name, make in makers.items():
        found[name] = heterogeneity(row_losses(model, make(steps, WORKERS), steps))
        measured = [(m, f["batch_het"]["value"], f["step_variance"]["value"]) for m, f in found[name].items()]
        print(f"{name}: " + ", ".join(f"{m} rows: {het:.3f} {v:.4f}" for m, het, v in measured), flush=True)
    return {"steps": steps, "orders": found}


def bias(order: BufferOrder, sources: Sources, steps: int) -> dict[str, float]:
    """Return where in its document a token read is, in the mean (0.5 when unbiased), and how far shares are off.

    `share_off` is the largest difference between a source's share of the tokens read and its share of the corpus;
    `share_off_at_first` is that of the first tenth of the steps.
    """
    place, share = 0.0, np.zeros((steps, len(sources)))
    number = {name: i for i, name in enumerate(sources)}
    for step in range(steps):
        for lane, row in order.rows(step):
            source = order.sources[order.lanes[lane]]
            for document, first, n in order.spans(lane, row):
                place += n * (first + n / 2) / int(source.lengths[document])
                of = source.ids[document].partition(":")[0] if source.name == "all" else source.name
                share[step, number[of]] += n
    nominal = np.array([source.total_tokens for source in sources.values()], dtype=float)

    def off(read: np.ndarray) -> float:
        return float(abs(read.sum(0) / read.sum() - nominal / nominal.sum()).max())

    found = {"share_off": off(share), "share_off_at_first": off(share[: steps // 10])}
    return {"place_in_document": place / share.sum(), **found}


def biases(sources: Sources, context_tokens: int, seed: int, makers: Makers, steps: int) -> dict[str, Any]:
    """Return the bias of plain packing, and of buffers of all sizes."""

    def of(sizes: Sequence[int], read: Sources, **more: Any) -> dict[str, Any]:
        shape = {
            "context_tokens": context_tokens,
            "sequences": WORKERS,
            "seed": seed,
            "separator": END_OF_TEXT,
            "begin": BOS,
        }
        rows = [PhaseRows("benchmark", steps, {})]
        return {str(n): bias(BufferOrder(read, rows, **shape, documents=n, **more), sources, steps) for n in sizes}

    return {
        "steps": steps,
        "plain packing": bias(makers["plain packing"](steps, WORKERS), sources, steps),
        "one buffer": of([n * WORKERS for n in SIZES], merged(sources), workers=WORKERS),
        "buffer": of(SIZES, sources),
    }


def train(order: TextOrder, run: Path, validation: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train on from TrueBase at its constant rate in an order; return its curves and what they come to."""
    parent = run / "pretrain" / "truebase"
    said = load_yaml(run / "pretrain" / "resolved.yaml")
    config = fill(PretrainConfig, {key: said[key] for key in ("model", "optim", "balance", "trainer")}, "pretrain")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            folder=Path(folder),
            model=config.model,
            trainer=config.trainer.model_copy(update={"threads": torch.get_num_threads()}),
            optim=config.optim,
            balance=config.balance,
            schedule=Schedule({"on": PhaseConfig(steps=steps)}),
            order=order,
            micro_sequences=WORKERS,
            stage="pretrain",
            parent="",
        )
        trainer = Trainer(job, Log(None, quiet=True), seed=0)
        trainer.checkpoints.adopt(dcp.load(parent, verify=False), parent)
        metrics = [trainer.train_step(order.batch(step)) for step in range(steps)]
        bits = bits_per_byte(trainer.model, validation)["val/bpb"]
    loss, norm = (np.array([values[key] for values in metrics]) for key in ("loss/mean", "optim/grad_norm"))
    line = np.polynomial.Polynomial.fit(np.arange(steps), loss, 1)(np.arange(steps))
    return {
        "loss": loss.tolist(),
        "grad_norm": norm.tolist(),
        "step_variance": spread(loss - line, lambda m: m.var(ddof=2)),
        "grad_norm_kurtosis": spread(norm, lambda m: ((m - m.mean()) ** 4).mean() / m.var() ** 2),
        "validation_bits_per_byte": bits,
    }


def training(run: Path, shards: ShardSet, context_tokens: int, makers: Makers, steps: int) -> dict[str, Any]:
    """Return what training on gives in each order that is worth the time."""
    validation = {
        name: held_out(source, shards.document_bytes("validation", name), context_tokens, 8192, BOS)
        for name, source in shards.sources("validation").items()
    }
    found = {}
    for name in ("plain packing", "buffer", "stream"):
        found[name] = train(makers[name](steps, WORKERS * TRAIN_ROWS), run, validation, steps)
        print(f"{name}: { ({k: v for k, v in found[name].items() if k not in ('loss', 'grad_norm')}) }", flush=True)
    return {"steps": steps, "rows": WORKERS * TRAIN_ROWS, "orders": found}


def cost(makers: Makers) -> dict[str, Any]:
    """Return how fast a large buffer is played, the size of its state, and what a batch costs: processor seconds."""
    lengths = np.random.default_rng(0).integers(1, 800, 1_000_000)
    rows = int(lengths.sum()) // 8192 - 1
    buffer = DocumentBuffer(
        lengths,
        functools.cache(lambda epoch: generator("order", epoch).permutation(len(lengths))),
        generator,
        row_tokens=8192,
        low=4096,
        full=8192,
    )
    buffer.order(0)
    started = time.process_time()
    buffer.row(rows)
    seconds = time.process_time() - started
    state = buffer.state(rows // 2)
    batch_s: dict[str, list[float]] = {"buffer": [], "stream": []}
    made = {name: makers[name](60, WORKERS) for name in batch_s}
    for step in range(60):
        for name, order in made.items():
            started = time.process_time()
            order.batch(step)
            batch_s[name].append(time.process_time() - started)
    return {
        "documents_per_s": len(lengths) / seconds,
        "tokens_per_s": rows * 8192 / seconds,
        "state_integers": 3 + 3 * len(state.queue),
        "batch_s": {
            name: {"median": float(np.median(s)), "least": min(s), "most": max(s)} for name, s in batch_s.items()
        },
    }


def picture(result: dict[str, Any]) -> Figure:
    """Draw BatchHet and step variance over the rows of a micro-batch, and what a large buffer does to a short run."""
    figure = Figure(figsize=(13, 4), dpi=130, layout="constrained")
    het, variance, place = figure.subplots(1, 3)
    for name, found in result["fixed_model"]["orders"].items():
        for axes, key in ((het, "batch_het"), (variance, "step_variance")):
            points = [found[str(rows)][key] for rows in ROWS]
            values = np.array([[p["value"], p["value"] - p["low"], p["high"] - p["value"]] for p in points]).T
            axes.errorbar(ROWS, values[0], values[1:], color=COLOURS[name], marker="o", ms=4, capsize=2, label=name)
    for axes, ticks in ((het, (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)), (variance, (0.02, 0.05, 0.1, 0.2))):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ROWS, [str(rows) for rows in ROWS])
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"rows of a micro-batch ({WORKERS} micro-batches a step)")
    het.set_title("BatchHet (nats)")
    variance.set_title("variance of the step loss (nats²)")
    het.legend()
    for name in ("one buffer", "buffer"):
        sizes = result["bias"][name]
        values = [size["place_in_document"] for size in sizes.values()]
        place.plot([int(n) for n in sizes], values, color=COLOURS[name], marker="o", ms=4, label=name)
    place.axhline(0.5, color=MUTED, lw=1)
    place.set_xscale("log", base=2)
    place.set_xlabel("documents at which the buffer is filled up again")
    place.set_title("place in its document of a token read")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/laptop"), help="a run finished as far as pretrain")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (again)")
    parser.add_argument("--rows", type=int, default=640 * WORKERS, help="rows read by the fixed model in each order")
    parser.add_argument("--steps", type=int, default=100, help="training steps in each order")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/data_order.json"), help="the result")
    parser.add_argument("--image", type=Path, default=Path("docs/images/data_order.png"), help="where the picture goes")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    shards = ShardSet.load(args.run / "tokenize" / "tokens", verify=True)
    sources = shards.sources("train")
    if not same_pairs(sources, args.seed):
        print("FAILED: the buffer does not give the pairs that plain packing gives")
        return 1
    context_tokens = dcp.check(args.run / "pretrain" / "truebase")["context_tokens"]
    makers = orders(sources, context_tokens, args.seed)
    result = {
        "workers": WORKERS,
        "context_tokens": context_tokens,
        "corpus_tokens": sum(s.total_tokens for s in sources.values()),
        "corpus_documents": sum(len(s.ids) for s in sources.values()),
        "tokenizer_sha256": shards.tokenizer_sha256,
        "documents": {"one buffer": ONE_BUFFER, "buffer": BUFFER},
        "seed": args.seed,
    }
    before = json.loads(args.json.read_text()) if args.json.exists() else {}
    if all(before.get(key) == value for key, value in result.items()):
        result = before
    measure = {
        "fixed_model": lambda: fixed_model(args.run, makers, args.rows // WORKERS),
        "bias": lambda: biases(sources, context_tokens, args.seed, makers, args.rows // WORKERS),
        "training": lambda: training(args.run, shards, context_tokens, makers, args.steps),
        "cost": lambda: cost(makers),
    }
    for part in args.parts:
        started, load_before = time.monotonic(), os.getloadavg()
        result[part] = measure[part]()
        result[part]["measured"] = {
            "seconds": round(time.monotonic() - started, 1),
            "load_before_after": [load_before, os.getloadavg()],
            "threads": args.threads,
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "versions": package_versions(),
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if {"fixed_model", "bias"} <= result.keys():
        for rows in ROWS:
            plain, buffer = (result["fixed_model"]["orders"][name][str(rows)] for name in ("plain packing", "buffer"))
            het, variance = (buffer[key]["value"] / plain[key]["value"] for key in ("batch_het", "step_variance"))
            print(f"{rows} rows: BatchHet {het - 1:+.0%}, step variance x{variance:.2f}, buffer against plain packing")
        with matplotlib.rc_context(STYLE):
            picture(result).savefig(args.image, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
