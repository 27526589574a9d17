"""How fast text becomes tokens, compared with Hugging Face's tokenizers on the same cores, and tokens become batches.

Both encoders read the same `tokenizer.json` and the same documents of a finished run, in turn, round by round; ids are
compared, all of them. Ours is the path of the stage (`encode_array` in threads), theirs `encode_batch_fast` with as
many threads. The loader is timed next to a training step, as the run itself measured that.

    python benchmarks/tokenization.py --run runs/laptop
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import environment, write

from freehold.core.config import load_yaml
from freehold.core.document import Document, read_rows
from freehold.core.log import read_metrics
from freehold.data.buffer import BufferOrder
from freehold.data.loader import PhaseRows, TextOrder
from freehold.data.shards import ShardSet
from freehold.tokenizer.bpe import BOS, END_OF_TEXT, Tokenizer

BATCH = 64
STEPS = 200


def documents(run: Path, most_bytes: int) -> dict[str, list[str]]:
    """Return texts by source, from each the same share."""
    texts = {p.stem: [r.text for r in read_rows(p, Document)] for p in sorted(run.glob("curate/documents/*.parquet"))}
    total = sum(len(t.encode()) for rows in texts.values() for t in rows)
    every = max(1, round(total / most_bytes))
    return {name: rows[::every] for name, rows in texts.items()}


def encoding(run: Path, texts: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Return MB/s of both, round by round in turn, and their ratio; fails when an id differs."""
    import tokenizers

    ours = Tokenizer.load(run / "tokenize" / "tokenizer")
    file = json.loads(ours.text)
    theirs = tokenizers.Tokenizer.from_str(json.dumps({**file, "added_tokens": [], "post_processor": None}))
    pool = ThreadPoolExecutor(threads)

    def us() -> list[Any]:
        return list(pool.map(lambda batch: [ours.encode_array(t) for t in batch], batches))

    def them() -> list[Any]:
        return [theirs.encode_batch_fast(batch, add_special_tokens=False) for batch in batches]

    batches = [texts[at : at + BATCH] for at in range(0, len(texts), BATCH)]
    size = sum(len(t.encode()) for t in texts)
    seconds: dict[str, list[float]] = {"freehold": [], "tokenizers": []}
    cpu: dict[str, list[float]] = {"freehold": [], "tokenizers": []}
    for _ in range(rounds):
        found = {}
        for name, run_one in (("freehold", us), ("tokenizers", them)):
            started, busy = time.perf_counter(), time.process_time()
            found[name] = run_one()
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - busy)
        for mine, other in zip(found["freehold"], found["tokenizers"], strict=True):
            if any(a.tolist() != b.ids for a, b in zip(mine, other, strict=True)):
                raise SystemExit("FAILED: ids differ")
    tokens = sum(len(ids) for batch in found["freehold"] for ids in batch)
    ratios = [b / a for a, b in zip(seconds["freehold"], seconds["tokenizers"], strict=True)]
    return {
        "bytes": size,
        "documents": len(texts),
        "tokens": tokens,
        "threads": threads,
        "rounds": rounds,
        "mb_per_s": {name: spread([size / 1e6 / s for s in many]) for name, many in seconds.items()},
        "ratio": spread(ratios),
        # Of all threads together: what other processes do on the machine hardly moves it.
        "mb_per_core_s": {name: spread([size / 1e6 / s for s in many]) for name, many in cpu.items()},
        "core_s_ratio": spread([b / a for a, b in zip(cpu["freehold"], cpu["tokenizers"], strict=True)]),
        "ids_equal": True,
    }


def by_source(run: Path, texts: dict[str, list[str]]) -> dict[str, float]:
    """Return MB/s of one thread for each source."""
    ours = Tokenizer.load(run / "tokenize" / "tokenizer")
    found = {}
    for name, rows in texts.items():
        started = time.thread_time()
        for text in rows:
            ours.encode_array(text)
        found[name] = round(sum(len(t.encode()) for t in rows) / 1e6 / max(time.thread_time() - started, 1e-9), 2)
    return found


def loading(run: Path) -> dict[str, Any]:
    """Return tokens/s of one core that makes batches in each order, and its share of a step of the run's training."""
    config = load_yaml(run / "pretrain" / "resolved.yaml")
    speed = statistics.median(
        row["perf/tokens_per_s"]
        for row in read_metrics(run / "pretrain" / "metrics.jsonl")
        if row.get("perf/tokens_per_s")
    )
    sources = ShardSet.load(run / "tokenize" / "tokens", verify=True).sources("train")
    shape = {
        "context_tokens": config["batch"]["context_tokens"],
        "sequences": config["batch"]["sequences"],
        "seed": 0,
        "separator": END_OF_TEXT,
        "begin": BOS,
    }
    phases = [PhaseRows("benchmark", STEPS, {})]
    made: dict[str, Callable[[], TextOrder]] = {
        "stream": lambda: TextOrder(sources, phases, **shape),
        "buffer": lambda: BufferOrder(sources, phases, **shape, documents=8),
    }
    step_tokens = shape["context_tokens"] * shape["sequences"]
    found: dict[str, Any] = {"trainer_tokens_per_s": speed, "step_tokens": step_tokens}
    for name, make in made.items():
        rates = []
        for _ in range(5):
            order = make()
            started = time.process_time()
            for step in range(STEPS):
                order.batch(step)
            rates.append(STEPS * step_tokens / (time.process_time() - started))
        found[name] = {"tokens_per_s": spread(rates), "share_of_step": round(speed / statistics.median(rates), 5)}
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/laptop"), help="a run finished as far as pretrain")
    parser.add_argument("--mb", type=float, default=8.0, help="megabytes of text encoded a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tokenization.json"), help="the result")
    args = parser.parse_args(arguments)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = documents(args.run, int(args.mb * 1e6))
    load_before = os.getloadavg()
    result = {
        "encoding": encoding(args.run, [t for rows in texts.values() for t in rows], args.rounds, args.threads),
        "one_thread_mb_per_s": by_source(args.run, texts),
        "loading": loading(args.run),
        "load_before_after": [load_before, os.getloadavg()],
        "environment": environment("tokenizers", "tiktoken"),
    }
    write(args.json, result)
    shown = result["encoding"]
    print(f"MB/s: {shown['mb_per_s']}; ratio {shown['ratio']}, of core-seconds {shown['core_s_ratio']}")
    print(f"ids equal over {shown['tokens']:,} tokens")
    print(f"loader: {result['loading']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
