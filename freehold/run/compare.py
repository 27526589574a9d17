"""`freehold compare A B ...`: the same items and the same text for every model, with what the difference can show.

Shares with Wilson's interval, pairs with McNemar's exact test and a paired bootstrap that draws whole templates, bits
per byte by a paired bootstrap over documents; next to each the smallest difference that a set of this size shows
(2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freehold.core.artifact import write_atomic, write_json
from freehold.core.errors import ConfigError, DataError
from freehold.core.log import Log
from freehold.core.statistics import Estimate, bootstrap, mcnemar, share, smallest_difference
from freehold.core.table import Table
from freehold.run import page
from freehold.run.layout import CURATE, RunFolder

if TYPE_CHECKING:
    from freehold.stages.evaluate.config import EvaluateConfig

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Measured:
    """What one model did with every item and every text."""

    name: str
    answers: list[dict[str, Any]]
    """Rows with `id`, `task`, `part` and `correct`."""
    bits: dict[str, tuple[float, int]]
    """Bits and bytes of each held-out document, by its key."""


def tables(models: Sequence[Measured]) -> list[Table]:
    """Return shares by task, paired differences from the first model, and bits per byte.

    Raises DataError when two models were not asked the same items.
    """
    return [table for table in (_shares(models), _pairs(models), _bits(models)) if table.rows]


def pair(first: Measured, other: Measured, task: str = "") -> dict[str, Any]:
    """Return how two models compare on the items of a task, or on all."""
    one, two = ({row["id"]: row for row in m.answers if task in ("", row["task"])} for m in (first, other))
    if one.keys() != two.keys():
        missing = sorted(one.keys() ^ two.keys())
        raise DataError(
            "two models were not asked the same items",
            where=f"{first.name} and {other.name}",
            found=", ".join(missing[:4]),
            expected="the same task files and limits",
        )
    keys = sorted(one)
    gains = [int(two[key]["correct"]) - int(one[key]["correct"]) for key in keys]
    only = (gains.count(-1), gains.count(1))
    discordant = sum(only) / len(keys) if keys else 0.0
    return {
        "items": len(keys),
        "only_first": only[0],
        "only_other": only[1],
        "difference": bootstrap(gains, [one[key].get("part", key) for key in keys]).to_dict(),
        "p": mcnemar(*only),
        "smallest_difference": round(smallest_difference(len(keys), discordant), 4),
    }


def bits_pair(first: Measured, other: Measured) -> dict[str, Any]:
    """Return the difference in bits per byte over the documents that both read; whole documents are drawn."""
    keys = sorted(first.bits.keys() & other.bits.keys())
    total = sum(first.bits[key][1] for key in keys)
    # Each document's share of the sum, times their number: the mean over documents is then the difference in bits.
    scale = len(keys) / total if total else 0.0
    gaps = [(other.bits[key][0] - first.bits[key][0]) * scale for key in keys]
    return {"documents": len(keys), "bytes": total, "difference": bootstrap(gaps).to_dict()}


def compare(models: Sequence[Measured]) -> dict[str, Any]:
    """Return every comparison with the first model as JSON-able data."""
    if len(models) < 2:
        raise ConfigError("nothing to compare with", found=", ".join(m.name for m in models), expected="two models")
    first = models[0]
    found: dict[str, Any] = {"format_version": FORMAT_VERSION, "first": first.name, "models": {}}
    for model in models:
        right = sum(row["correct"] for row in model.answers)
        entry: dict[str, Any] = {"tasks": {task: _share(model, task) for task in _tasks(model)}}
        if model.answers:
            entry["overall"] = share(right, len(model.answers)).to_dict()
        if model.bits:
            entry["bits_per_byte"] = round(_rate(model), 6)
        if model is not first:
            asked = ("", *_tasks(first)) if first.answers else ()
            entry["paired"] = {task or "all": pair(first, model, task) for task in asked}
            entry["text"] = bits_pair(first, model)
        found["models"][model.name] = entry
    return found


def write(models: Sequence[Measured], output: Path) -> dict[str, Any]:
    """Write compare.json, compare.md and the picture compare.svg; return the comparison."""
    found = compare(models)
    write_json(output / "compare.json", found)
    text = "\n".join(table.markdown() for table in tables(models))
    write_atomic(output / "compare.md", f"# {' against '.join(m.name for m in models)}\n\n{text}\n![](compare.svg)\n")
    write_atomic(output / "compare.svg", _picture(found))
    return found


def measure(path: Path, run: RunFolder, limits: EvaluateConfig, log: Log, name: str = "") -> Measured:
    """Let a model do the items of a run and read its held-out text; `path` is anything that `freehold chat` opens."""
    from freehold import api
    from freehold.data.packing import cut
    from freehold.stages.evaluate.items import read_files, read_items
    from freehold.stages.evaluate.likelihood import score
    from freehold.stages.evaluate.tasks import do_tasks
    from freehold.stages.evaluate.text import held_out

    loaded, name = api.load(path, dtype=limits.dtype, device=limits.device), name or _name(path)
    curated = run.stage(CURATE)
    items = read_items(curated / "tasks", limits.max_items_per_task)
    items |= read_files(limits.files, limits.max_items_per_task, taken=items)
    answers = do_tasks(loaded, items, limits, log, name)[1] if items else []
    end, bits = loaded.tokenizer.end_of_text, {}
    for source, texts in held_out(curated, limits.max_bytes_per_source).items():
        for number, (text, whole) in enumerate(texts):
            ids = [*(loaded.begins_with or (end,)), *loaded.tokenizer.encode(text), *([end] if whole else [])]
            windows = cut(ids, min(limits.context_tokens, loaded.config.max_position_embeddings - 1))
            values = score(loaded.engine, windows, batch_items=limits.batch_items, log=Log(quiet=True), what=name)
            bits[f"{source}/{number}"] = (-sum(map(math.fsum, values)) / math.log(2), len(text.encode()))
    return Measured(name, answers, bits)


def _name(path: Path) -> str:
    """Return what a model is called in the tables: its last two parts, which no two checkpoints of a run share."""
    return "/".join(path.resolve().parts[-2:])


def _tasks(model: Measured) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in model.answers))


def _share(model: Measured, task: str) -> dict[str, float]:
    rows = [row for row in model.answers if row["task"] == task]
    return share(sum(row["correct"] for row in rows), len(rows)).to_dict()


def _rate(model: Measured) -> float:
    return sum(b for b, _ in model.bits.values()) / max(1, sum(n for _, n in model.bits.values()))


def _shares(models: Sequence[Measured]) -> Table:
    rows = []
    for task in _tasks(models[0]):
        shares = [_share(model, task) for model in models]
        items = sum(row["task"] == task for row in models[0].answers)
        cells = [f"{100 * s['value']:.1f} [{100 * s['low']:.1f}–{100 * s['high']:.1f}]" for s in shares]
        rows.append([task, str(items), *cells])
    return Table("Tasks, percent right with 95 % intervals", ["task", "items", *(m.name for m in models)], rows)


def _pairs(models: Sequence[Measured]) -> Table:
    rows = []
    for other in models[1:]:
        for task in ("", *_tasks(models[0])) if models[0].answers else ():
            found = pair(models[0], other, task)
            gap = found["difference"]
            rows.append(
                [
                    other.name,
                    task or "all",
                    f"{100 * gap['value']:+.1f} [{100 * gap['low']:+.1f}–{100 * gap['high']:+.1f}]",
                    f"{found['only_first']} / {found['only_other']}",
                    f"{found['p']:.3f}",
                    f"{100 * found['smallest_difference']:.1f}",
                ]
            )
    header = ["model", "task", "points", "only first / only this", "p", "smallest shown"]
    note = f"Against {models[0].name}, item by item: McNemar's exact p; the interval draws whole templates. "
    note += "Smallest shown: the difference that a set of this size and discordance shows in four of five cases."
    return Table("Paired differences", header, rows, note, left=(0, 1))


def _bits(models: Sequence[Measured]) -> Table:
    if not all(model.bits for model in models):
        return Table("Bits per byte", ["model"], [])
    rows = [[models[0].name, f"{_rate(models[0]):.4f}", ""]]
    for other in models[1:]:
        gap = bits_pair(models[0], other)["difference"]
        rows.append([other.name, f"{_rate(other):.4f}", f"{gap['value']:+.4f} [{gap['low']:+.4f}–{gap['high']:+.4f}]"])
    note = "Of the same held-out documents; the interval draws whole documents."
    return Table("Bits per byte", ["model", "bits per byte", f"against {models[0].name}"], rows, note)


def _picture(found: dict[str, Any]) -> str:
    """Return every model's share of right answers, or its bits per byte, as bars with intervals."""
    rows: list[tuple[str, Estimate]] = []
    for name, entry in found["models"].items():
        for task, s in entry["tasks"].items():
            rows.append((f"{name}: {task}", Estimate(s["value"], s["low"], s["high"])))
        if "bits_per_byte" in entry:
            value = entry["bits_per_byte"]
            rows.append((f"{name}: bits per byte", Estimate(value, value, value)))
    most = max((estimate.high for _, estimate in rows), default=1.0) or 1.0
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{24 * len(rows) + 16}" font-size="12">']
    for number, (label, estimate) in enumerate(rows):
        y, width = 24 * number + 8, 330 * estimate.value / most
        ends = [260 + 330 * end / most for end in (estimate.low, estimate.high)]
        parts.append(f'<text x="250" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect x="260" y="{y + 2}" width="{max(1, width):.1f}" height="13" fill="{page.COLOURS[0]}"/>')
        parts.append(f'<path d="M{ends[0]:.1f} {y + 8}H{ends[1]:.1f}" stroke="#222" stroke-width="2"/>')
        parts.append(f'<text x="{ends[1] + 6:.1f}" y="{y + 13}">{estimate.value:.3f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
