"""Seconds of a take-down answer on a synthetic ledger of a million documents, as parquet files of our own schema.

The ledger is one run with 20 sources, four licences, 5 % drops, 3 % validation, two epochs of steps, 11 checkpoints and
a fork next to it. Asked for are one document, one source (5 % of all), and one licence (25 %); each answer is checked
against the ledger's own arrays. Every repetition is a new process: what the command line costs is in it.

    python benchmarks/takedown.py --output benchmarks/results/takedown.json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from common import environment, machine_busy_s, write

from freehold.core.artifact import write_json, write_manifest
from freehold.core.document import Document, document_id, write_table
from freehold.data.exposure import write_trace
from freehold.data.shards import _SCHEMA as SHARD

LICENCES = ("MIT", "Apache-2.0", "CC-BY-4.0", "LicenseRef-PD-USGov")
SOURCES = 20
STEPS = 10_000
EVERY = 1_000


def build(folder: Path, documents: int) -> dict[str, Any]:
    """Write the ledger of a run; returns the arrays that the answers are checked against."""
    dice = np.random.default_rng(0)
    source = np.sort(dice.integers(0, SOURCES, documents))
    ids = np.array([document_id(f"source{s:02d}", f"part/{n:07d}.txt") for n, s in enumerate(source)])
    fate = dice.choice(["train", "dropped", "validation"], documents, p=[0.92, 0.05, 0.03])
    tokens = dice.integers(50, 2_000, documents)
    # A document is read once in each half of the run.
    first = np.stack([dice.integers(0, STEPS // 2, documents), dice.integers(STEPS // 2, STEPS, documents)], axis=1)
    for number in range(SOURCES):
        here = np.flatnonzero(source == number)
        name = f"source{number:02d}"
        table = _rights(name, here, ids, LICENCES[number % 4])
        write_table(folder / f"gather/documents/{name}.parquet", table)
        kept = here[fate[here] != "dropped"]
        split = pa.array(fate[kept])
        table = _rights(name, kept, ids, LICENCES[number % 4]).set_column(13, "split", split)
        write_table(folder / f"curate/documents/{name}.parquet", table)
        for part in ("train", "validation"):
            rows = kept[fate[kept] == part]
            rows = rows[np.argsort(ids[rows])]
            ends = np.cumsum(tokens[rows])
            columns = [
                ids[rows],
                ends - tokens[rows],
                tokens[rows].astype(np.int32),
                (4 * tokens[rows]).astype(np.int32),
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SHARD, strict=True)]
            write_table(folder / f"tokenize/tokens/{name}.{part}.parquet", pa.table(arrays, schema=SHARD))
    gone = np.flatnonzero(fate == "dropped")
    drops = {
        "id": ids[gone],
        "source": [f"source{s:02d}" for s in source[gone]],
        "path": [f"part/{n:07d}.txt" for n in gone],
        "reason": ["few_words"] * len(gone),
        "detail": ["12, at least 20"] * len(gone),
        "chars": np.full(len(gone), 60),
    }
    write_table(folder / "curate/drops.parquet", pa.table(drops))
    write_trace(folder / "pretrain/trace.parquet", [])
    schema = pa.parquet.read_schema(folder / "pretrain/trace.parquet")
    trained = np.flatnonzero(fate == "train")
    trained = trained[np.lexsort((ids[trained], source[trained]))]
    n = 2 * len(trained)
    steps = first[trained].ravel().astype(np.int32)
    offsets = pa.array(np.arange(n + 1), pa.int32())
    half = np.repeat(tokens[trained], 2).astype(np.int32)
    columns = [
        pa.array(np.repeat(ids[trained], 2)),
        pa.array([f"source{s:02d}" for s in np.repeat(source[trained], 2)]),
        pa.array(["stable", "anneal"] * len(trained)),
        pa.array(steps),
        pa.array(steps),
        pa.ListArray.from_arrays(offsets, pa.array(steps)),
        pa.ListArray.from_arrays(offsets, pa.array(half)),
        pa.array(half.astype(np.int64)),
    ]
    write_table(folder / "pretrain/trace.parquet", pa.table(columns, schema=schema))
    for step in range(0, STEPS + 1, EVERY):
        place = folder / f"pretrain/checkpoints/step_{step:08d}"
        place.mkdir(parents=True)
        write_json(place / "trainer.json", {"stage": "pretrain", "stage_type": "step", "step": step, "phase": "stable"})
        write_manifest(place, kind="checkpoint")
    for stage in ("gather", "curate", "tokenize", "pretrain"):
        write_json(folder / stage / "manifest.json", {"kind": stage, "format_version": 1, "files": {}, "counts": {}})
    return {"ids": ids, "source": source, "fate": fate, "first": first.min(axis=1)}


def _rights(name: str, rows: np.ndarray, ids: np.ndarray, licence: str) -> pa.Table:
    n = len(rows)
    columns = {
        "id": pa.array(ids[rows]),
        "text": pa.array(
            [f"{ids[row]} says a few words of its own, and then some more of the same kind" for row in rows]
        ),
        "source": [name] * n,
        "source_version": [f"{name}==1.0"] * n,
        "path": [f"part/{row:07d}.txt" for row in rows],
        "sha256": [f"{ids[row]}{ids[row][::-1]}" * 2 for row in rows],
        "wrapper_licence": ["MIT"] * n,
        "licence": [licence] * n,
        "licence_evidence": ['LICENSE: "Permission is hereby granted"'] * n,
        "acquired": ["2026-01-02"] * n,
        "kind": ["prose"] * n,
    }
    columns |= {key: [""] * n for key in ("synthetic_from", "teacher", "split")}
    columns["licence_confidence"] = ["high"] * n
    return pa.table(columns, schema=Document.SCHEMA)


def expected(ledger: dict[str, Any], chosen: np.ndarray) -> tuple[int, dict[int, int]]:
    """Return what is true of the chosen documents: rows, and by checkpoint step how many it learned from."""
    trained = chosen & (ledger["fate"] == "train")
    reached = {s: int((ledger["first"][trained] < s).sum()) for s in range(0, STEPS + 1, EVERY)}
    return int(chosen.sum()), {step: count for step, count in reached.items() if count}


def _children_s() -> float:
    """Return the core-seconds of the processes started and ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Build, ask, check and time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "runs" / "million"
        ledger = build(run, args.documents)
        one = int(np.flatnonzero(ledger["fate"] == "train")[args.documents // 3])
        questions = {
            "document": (ledger["ids"][one], np.arange(args.documents) == one),
            "source": ("source07", ledger["source"] == 7),
            "licence": ("CC-BY-4.0", ledger["source"] % 4 == 2),
        }
        seconds: dict[str, list[float]] = {name: [] for name in questions}
        cpu: dict[str, list[float]] = {name: [] for name in questions}
        busy = machine_busy_s()
        for _ in range(args.repetitions):
            for name, (query, chosen) in questions.items():
                started, used = time.perf_counter(), _children_s()
                command = [sys.executable, "-m", "freehold.cli", "takedown", query, str(run), "--json"]
                out = subprocess.run(command, check=True, capture_output=True).stdout
                seconds[name].append(time.perf_counter() - started)
                cpu[name].append(_children_s() - used)
                answer = json.loads(out)
                reached = {c["step"]: c["documents"] for c in answer["runs"][0]["checkpoints"]}
                if (answer["rows"], reached) != expected(ledger, chosen):
                    raise SystemExit(f"{name}: {answer['rows']} rows, {reached}; expected {expected(ledger, chosen)}")
        result = {
            "documents": args.documents,
            "seconds": seconds,
            "cpu_s": cpu,
            "median_s": {name: statistics.median(values) for name, values in seconds.items()},
            "spread_s": {name: max(values) - min(values) for name, values in seconds.items()},
            "median_cpu_s": {name: statistics.median(values) for name, values in cpu.items()},
            "others_busy_core_s": machine_busy_s() - busy - sum(map(sum, cpu.values())),
            "environment": environment("duckdb"),
        }
        write(args.output, result)
        for name, median in result["median_s"].items():
            used_s = result["median_cpu_s"][name]
            spread = result["spread_s"][name]
            print(f"{name}: {median:.2f} s (spread {spread:.2f}), {used_s:.2f} core-s; {args.documents:,} documents")
        print(f"others kept {result['others_busy_core_s']:.1f} core-s busy meanwhile")


if __name__ == "__main__":
    main()
