"""The results as tables, for results.md and for the report of a run."""

from __future__ import annotations

from typing import Any

from freehold.core.table import Table
from freehold.stages.evaluate.config import MADE_BY
from freehold.stages.evaluate.needles import needle_tables

KNOWN, STATED, UNKNOWN = "facts_taught", "facts_text_only", "unknown_places"


def in_order(checkpoints: dict[str, Any]) -> dict[str, Any]:
    """Return results in the order the checkpoints are made; others follow by name (JSON keys are sorted)."""
    made = [name for name in MADE_BY if name in checkpoints]
    return {name: checkpoints[name] for name in [*made, *sorted(set(checkpoints) - set(made))]}


def tables(results: dict[str, Any]) -> list[Table]:
    """Return bits per byte next to the compressors, and, when tasks were done, accuracies and the gain."""
    tested = {name: result["tasks"] for name, result in in_order(results["checkpoints"]).items() if "tasks" in result}
    by_harness = {n: r["harness"] for n, r in in_order(results["checkpoints"]).items() if "harness" in r}
    shown = [_bits(results), *([_tasks(tested, results["gain"])] if tested else [])]
    if tested and KNOWN in next(iter(tested.values()))["tasks"]:
        shown.append(_knowledge({name: tasks["tasks"] for name, tasks in tested.items()}))
    return [*shown, *needle_tables(results), *([_harness(by_harness)] if by_harness else [])]


def parts(results: dict[str, Any]) -> Table:
    """Return the accuracy on each part of each task, for those who want to know where it comes from."""
    tested = {
        name: result["tasks"]["tasks"] for name, result in in_order(results["checkpoints"]).items() if "tasks" in result
    }
    first = next(iter(tested.values()))
    rows = []
    for task, record in first.items():
        for part, counted in record["parts"].items():
            found = [tasks[task]["parts"][part]["accuracy"] for tasks in tested.values()]
            rows.append([f"{task}: {part}", str(counted["items"]), *(f"{100 * value:.0f}" for value in found)])
    return Table("Parts of the tasks", ["part", "items", *tested], rows, "Accuracy in percent; few items, wide errors.")


def _knowledge(tested: dict[str, dict[str, Any]]) -> Table:
    """Return what the models know, and whether they know what they do not know."""

    def share(record: dict[str, Any]) -> str:
        return f"{100 * record['macro']:.1f} [{100 * record['macro_low']:.1f}–{100 * record['macro_high']:.1f}]"

    def worst(record: dict[str, Any]) -> str:
        name, part = min(record["parts"].items(), key=lambda one: one[1]["accuracy"])
        return f"{name} {100 * part['accuracy']:.0f}"

    def multiple(record: dict[str, Any]) -> str:
        name, part = min(record["parts"].items(), key=lambda one: one[1]["accuracy"] / one[1]["majority"])
        return f"{name} {part['accuracy'] / part['majority']:.1f} x"

    def refused(record: dict[str, Any]) -> str:
        return f"{100 * record['refused'] / record['items']:.1f}"

    wanted = (
        ("taught facts right, mean of the relations", KNOWN, share),
        ("the relation known worst", KNOWN, worst),
        ("least multiple of a relation's commonest answer", KNOWN, multiple),
        ("taught facts refused", KNOWN, refused),
        ("facts only stated, of four, mean of the relations", STATED, share),
        ("facts only stated, answered freely", f"{STATED}_open", share),
        ("places that do not exist refused", UNKNOWN, refused),
    )
    rows = [
        [name, *(figure(tasks[task]) for tasks in tested.values())]
        for name, task, figure in wanted
        if task in next(iter(tested.values()))
    ]
    note = "Percent, with the 95 % interval of a mean of relations; asked in wordings that training does not use."
    return Table("What is known", ["what", *tested], rows, note)


def _harness(found: dict[str, Any]) -> Table:
    first = next(iter(found.values()))
    rows = [
        [task, metric, *(f"{tasks[task][metric]:.4f}" for tasks in found.values())]
        for task, figures in first.items()
        for metric in figures
    ]
    return Table("lm-evaluation-harness", ["task", "metric", *found], rows, "Counted by the harness over our engine.")


def _bits(results: dict[str, Any]) -> Table:
    settings, text, checkpoints = results["settings"], results["text"], in_order(results["checkpoints"])
    rows = []
    for source in [*text["sources"], None]:
        plain = text["overall"] if source is None else text["sources"][source]
        row = [source or "all", f"{plain['bytes']:,}", f"{plain['xz']:.3f}", f"{plain['zstd']:.3f}"]
        for result in checkpoints.values():
            found = result["bits_per_byte"]
            value = (found["overall"] if source is None else found["sources"][source])["bits_per_byte"]
            row.append(f"{value:.3f} ({value / plain['xz']:.2f})")
        rows.append(row)
    return Table(
        "Bits per byte of held-out text",
        ["source", "bytes", "xz -9", "zstd -19", *checkpoints],
        rows,
        f"Exact code length over every token, windows of {settings['context_tokens']} tokens, {settings['dtype']}. "
        "In brackets: the share of what xz needs. xz (Python lzma, preset 9) and zstd (pyarrow, level 19) compress "
        "the same bytes, all documents of a source in one run; they start from nothing, the model has read the "
        "training text.",
    )


def _tasks(tested: dict[str, Any], gain: dict[str, Any]) -> Table:
    first = next(iter(tested.values()))
    rows = []
    for task in [*first["tasks"], None]:
        records = [r["overall"] if task is None else r["tasks"][task] for r in tested.values()]
        row = [task or "all", str(records[0]["items"]), f"{100 * records[0]['chance']:.0f}"]
        row += [f"{100 * r['accuracy']:.1f} [{100 * r['low']:.1f}–{100 * r['high']:.1f}]" for r in records]
        if gain:
            row.append(f"{100 * (gain['overall'] if task is None else gain['tasks'][task]):+.1f}")
        rows.append(row)
    return Table(
        "Tasks",
        ["task", "items", "chance", *tested, *([f"{gain['to']} − {gain['from']}"] if gain else [])],
        rows,
        "Accuracy in percent with its 95 % Wilson interval. Greedy answers through the chat template, compared after "
        "whitespace, case and a final dot are levelled; of choices, the one with the highest log-probability per byte.",
    )
