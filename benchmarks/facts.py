"""How often a fact must be met before it is known: the curve of alignment, and what each kind of task gains.

Fine-tunes a Base of a run by the align stage itself, keeps a checkpoint at several steps, and has each do the tasks of
the run: taught facts in wordings that training does not use, facts that were only stated, places that do not exist,
procedures. Prints a line a checkpoint, writes `results/facts.json`, and with `--picture` draws the curve.

    .venv/bin/python benchmarks/facts.py --run runs/laptop
    .venv/bin/python benchmarks/facts.py --run runs/laptop --set optim.lr=2e-3 --set replay=0.25 --points 5
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from common import environment, write

from freehold.api import load
from freehold.core.artifact import Workspace
from freehold.core.log import Log
from freehold.corpora.wordings import TAUGHT
from freehold.run.layout import RunFolder
from freehold.stages.align import run as align
from freehold.stages.align.config import AlignConfig
from freehold.stages.evaluate.config import EvaluateConfig
from freehold.stages.evaluate.items import Item, read_items
from freehold.stages.evaluate.tasks import do_tasks

TASKS = {
    "facts_taught": "taught facts",
    "facts_text_only": "facts only stated, of four",
    "facts_text_only_open": "facts only stated, freely",
    "unknown_places": "unknown places refused",
    "procedures": "procedures",
}


def main() -> None:
    """Train, measure, draw."""
    options = arguments()
    run = RunFolder(options.run)
    inputs = {stage: options.__dict__[stage] or run.stage(stage) for stage in ("curate", "tokenize", "pretrain")}
    config = settings(run, options)
    tasks = read_items(inputs["curate"] / "tasks", options.items)
    tasks = {task: items for task, items in tasks.items() if task in TASKS}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = options.keep or Path(scratch)
        work = Workspace(folder, "align", "facts", options.seed, Log(folder), inputs)
        started = time.monotonic()
        counts = align.run(config, work)
        seconds = time.monotonic() - started
        print(f"{seconds:.0f} s, {counts.get('forgetting')}", flush=True)
        rows = [measure(folder / p.checkpoint, p.checkpoint, tasks) for p in config.phases.values() if p.checkpoint]
        met = exposures(folder / "trace.parquet", inputs["curate"], [p.steps for p in config.phases.values()])
    found = {
        "environment": environment(),
        "settings": config.model_dump(mode="json"),
        "seconds": round(seconds, 1),
        "forgetting": counts.get("forgetting"),
        "checkpoints": [row | {"exposures": times} for row, times in zip(rows, met, strict=True)],
    }
    write(options.json, found)
    if options.picture:
        options.picture.write_bytes(draw(found))


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/laptop"), help="run whose Base, text and tasks are used")
    for stage in ("curate", "tokenize", "pretrain"):
        parser.add_argument(f"--{stage}", type=Path, help=f"folder of {stage}, when it is another run's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of align")
    parser.add_argument("--points", type=int, default=1, help="checkpoints of the first phase, evenly spaced")
    parser.add_argument("--items", type=int, help="items of each task, in file order; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="where temporary checkpoints go")
    parser.add_argument("--keep", type=Path, help="folder that the checkpoints stay in")
    parser.add_argument("--picture", type=Path, help="PNG of the curve")
    parser.add_argument("--json", type=Path, default=Path("results/facts.json"))
    return parser.parse_args()


def settings(run: RunFolder, options: argparse.Namespace) -> AlignConfig:
    """Return align as the recipe of the run has it, with the changes, its first phase in `points` parts."""
    source = run.resolved("align")
    found: dict[str, Any] = yaml.safe_load(source.read_text()) if source.exists() else shipped()
    for change in options.set:
        key, _, value = change.partition("=")
        *path, last = key.split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
        place[last] = yaml.safe_load(value)
    found["phases"] = {name: phase for name, phase in found["phases"].items() if phase is not None}
    if options.points > 1:
        found["phases"] = parts(found["phases"], options.points)
    return AlignConfig(**found)


def shipped() -> dict[str, Any]:
    """Return align as the laptop recipe has it."""
    path = Path(__file__).parents[1] / "recipes" / "laptop.yaml"
    return dict(yaml.safe_load(path.read_text())["align"])


def parts(phases: dict[str, Any], points: int) -> dict[str, Any]:
    """Return the phases with the first one cut into parts of equal length, each with a checkpoint, on one schedule."""
    (name, first), *others = phases.items()
    steps, start, end = first["steps"] // points, first.get("start", 1.0), first.get("end", 1.0)
    found: dict[str, Any] = {}
    for number in range(points):
        last = number == points - 1
        found[f"{name}{number}"] = {
            **first,
            "steps": steps,
            "warmup_steps": 0 if number else first.get("warmup_steps", 0),
            "start": start + (end - start) * number / points,
            "end": start + (end - start) * (number + 1) / points,
            "checkpoint": first["checkpoint"] if last else f"{first['checkpoint']}-{number + 1}",
        }
    return found | dict(others)


def exposures(trace: Path, curated: Path, steps: list[int]) -> list[float]:
    """Return how often a taught fact was asked on average in alignment until the end of each phase."""
    facts: dict[str, tuple[str, ...]] = {}
    for path in sorted((curated / "conversations").glob("*.parquet")):
        for row in pq.read_table(path, columns=["id", "path", "split"]).to_pylist():
            kind, _, rest = row["path"].partition("/")
            member, _, asked = rest.partition("#")
            relation = asked.partition("#")[0]
            if kind == "facts" and relation in TAUGHT and row["split"] == "train":
                facts[row["id"]] = (member, relation)
    table = pq.read_table(trace, columns=["document_id", "steps"]).to_pylist()
    read = [step for row in table if row["document_id"] in facts for step in row["steps"]]
    ends = [sum(steps[: number + 1]) for number in range(len(steps))]
    return [round(sum(step <= end for step in read) / len(set(facts.values())), 2) for end in ends]


def draw(found: dict[str, Any]) -> bytes:
    """Return the picture: what is known after how many exposures of alignment."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = found["checkpoints"]
    times = [row["exposures"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for relation in rows[0]["facts_taught"]["parts"]:
        shares = [100 * row["facts_taught"]["parts"][relation]["accuracy"] for row in rows]
        left.plot(times, shares, marker="o", label=relation)
    for task, name in TASKS.items():
        right.plot(times, [100 * row[task]["macro"] for row in rows], marker="o", label=name)
    left.set(title="Taught facts, in wordings of the test", ylabel="right, percent", ylim=(0, 102))
    right.set(title="Each task, mean of its parts")
    for axes in (left, right):
        axes.set_xlabel("times a taught fact was asked in alignment")
        axes.legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def measure(folder: Path, name: str, tasks: dict[str, list[Item]]) -> dict[str, Any]:
    """Return the scores of one checkpoint, and print them."""
    loaded = load(folder, dtype="bfloat16")
    scores, answers = do_tasks(loaded, tasks, EvaluateConfig(), Log(quiet=True), name)
    line = [f"{name}:"]
    for task, record in scores["tasks"].items():
        line.append(
            f"{task} {100 * record['accuracy']:.1f} (macro {100 * record['macro']:.1f}, {record['refused']} no)"
        )
    print("  ".join(line))
    for task, record in scores["tasks"].items():
        shown = (f"{part} {100 * one['accuracy']:.0f}" for part, one in record["parts"].items())
        print(f"   {task}: {', '.join(shown)}", flush=True)
    wrong = [row for row in answers if not row["correct"]]
    for row in wrong[:: max(1, len(wrong) // 12)]:
        print(f"      {row['task']}: {row['question'][-70:]!r} -> {row['answer']!r}, not {row['expected']!r}")
    return {"checkpoint": name, **scores["tasks"]}


if __name__ == "__main__":
    main()
