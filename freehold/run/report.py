"""What a run made, as a picture (report.png), a page (report.md) and a text for the terminal.

Reads only what the stages left in the run folder; a part whose stage has not run is skipped with a note.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from freehold.core.artifact import MANIFEST, read_json, write_atomic
from freehold.core.errors import ArtifactError
from freehold.core.log import printable, read_metrics
from freehold.core.machine import program
from freehold.core.table import Table
from freehold.run.layout import ALIGN, EXPORT, NAMED, PRETRAIN, TOKENIZE, TRAINER_FACTS, WALK, RunFolder, training
from freehold.run.questions import five
from freehold.stages.evaluate.table import tables as evaluation_tables

MOST_SITES = 30
"""Sites with reserved documents that the report names."""
SPLITS = ("train", "validation")
# Figures of parity.json that are shown, and under which name.
PARITY = {
    "mean_kl": "mean KL",
    "max_kl": "largest KL",
    "top1_agreement": "same best token",
    "routing_agreement": "same routing",
    "positions": "positions",
    "passed": "proven",
}


def write_report(run_folder: Path) -> Path:
    """Write report.png (when there are training metrics) and report.md; return the path of report.md."""
    run = RunFolder(run_folder)
    if not run.any_finished():
        raise ArtifactError("not a run folder: no stage has finished in it", where=run_folder, todo="see runs/")
    rows = training_rows(run_folder)
    picture = run.picture
    if not rows:
        picture.unlink(missing_ok=True)  # of an earlier run
    else:
        from freehold.run.figure import draw

        write_atomic(picture, draw(rows, _read_json(RunFolder(run_folder).evaluation)))
    parts = [f"# Run `{run_folder.name}`\n"]
    parts.append("![Loss, learning rate, expert load, balance and router over training](report.png)\n" if rows else "")
    parts += [table.markdown() for table in tables(run_folder)]
    answer = _read_json(RunFolder(run_folder).answer)
    if answer:
        parts.append(f"## A question to the server\n\n> {answer['question']}\n\n{_quoted(answer['answer'])}\n")
    missing = _missing(run_folder)
    if missing:
        parts.append(f"Not in this report, for the stage has not finished: {', '.join(missing)}.\n")
    path = run.report
    write_atomic(path, "\n".join(part for part in parts if part))
    return path


def write_data_picture(path: Path, facts: dict[str, Any]) -> None:
    """Write the picture of a data card (`freehold card`)."""
    from freehold.run.figure import draw_data

    write_atomic(path, draw_data(facts))


def summary(run_folder: Path, width: int = 118) -> str:
    """Return the same tables as plain text of at most `width` columns, for the end of `freehold run`."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    asked = five(run_folder)
    for table in [*tables(run_folder), *([asked] if asked else [])]:
        shown = RichTable(title=Text(table.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(table.header):
            left = index in table.left
            shown.add_column(Text(name), justify="left" if left else "right", overflow="fold", no_wrap=not left)
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        console.print(shown)
    answer = _read_json(RunFolder(run_folder).answer)
    if answer:
        console.print(Text(f"asked the server: {answer['question']}\nit answered:      {answer['answer']}"))
    missing = _missing(run_folder)
    if missing:
        console.print(Text(f"not finished, so not shown: {', '.join(missing)}"))
    else:
        console.print(Text("\n".join(["", "next:", *(f"  {line}" for line in next_commands(run_folder))])))
    return printable(out.getvalue())


def next_commands(run_folder: Path) -> list[str]:
    """Return what a user may want to type after a finished run."""
    run = RunFolder(run_folder)
    freehold = program()
    return [
        f"{freehold} chat {run_folder}",
        f"{freehold} serve {run_folder} --port 8000",
        *(f"{freehold} serve {path}" for path in run.gguf("Q8_0")),
        f"{freehold} trace sotu --run {run_folder}"
        if run.shard("sotu").exists()
        else f"{freehold} trace --step 1 --run {run_folder}",
        f"{freehold} lineage {run_folder}",
        *([f"{freehold} verify {run.release} --root {run.release_root}"] if run.release_root.exists() else []),
        f"report: {run.report}, picture: {run.picture}",
    ]


def training_rows(run_folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of pretraining, then those of alignment with steps counted on, as the phase SFT."""
    rows = read_metrics(RunFolder(run_folder).metrics(PRETRAIN))
    last = max((row["step"] for row in rows), default=0)
    for row in read_metrics(RunFolder(run_folder).metrics(ALIGN)):
        rows.append({**row, "step": last + row["step"], "phase": "SFT"})
    return rows


def tables(run_folder: Path, *, of_metrics: bool = True) -> list[Table]:
    """Return every table there is something to fill with; without `of_metrics` no `metrics.jsonl` is read."""
    run = RunFolder(run_folder)
    found = [_made(run_folder), *([_training(run_folder)] if of_metrics else []), _mixture(run_folder)]
    results = _read_json(run.evaluation)
    if results:
        found += evaluation_tables(results)
    found += [Table(**table) for table in _read_json(run.audits).get("tables", [])]
    found += [
        *([_balance(run_folder)] if of_metrics else []),
        _parity(run_folder),
        _licences(run_folder),
        _reserved(run_folder),
    ]
    return [table for table in found if table.rows]


def _made(run_folder: Path) -> Table:
    rows = []
    for name in WALK:
        manifest = _read_json(RunFolder(run_folder).manifest(name))
        if manifest:
            seconds = f"{manifest['seconds']:,.1f}" if "seconds" in manifest else ""
            memory = f"{manifest['peak_memory_bytes'] / 1e9:.2f}" if "peak_memory_bytes" in manifest else ""
            rows.append([name, name + "/", manifest["content_sha256"][:12], seconds, memory])
    for relative in NAMED:
        manifest = _read_json(run_folder / relative / MANIFEST)
        if manifest:
            what = _read_json(run_folder / relative / TRAINER_FACTS).get("stage_type", relative)
            rows.append([what, relative + "/", manifest["content_sha256"][:12], "", ""])
    files = _read_json(RunFolder(run_folder).manifest(EXPORT)).get("files", {})
    for name, record in sorted(files.items()):
        if name.endswith((".gguf", ".safetensors")):
            kind = "HF" if name.endswith(".safetensors") else "GGUF"
            size = f"{kind} {name.rpartition('/')[2]} ({record['bytes'] / 1e6:,.1f} MB)"
            rows.append([size, f"{EXPORT}/{name}", record["sha256"][:12], "", ""])
    return Table("What was made", ["what", "where", "sha256", "seconds", "peak GB"], rows, left=(0, 1, 2))


def _training(run_folder: Path) -> Table:
    rows = []
    for name in training():
        metrics = read_metrics(RunFolder(run_folder).metrics(name))
        losses = [row["loss/mean"] for row in metrics if row.get("loss/mean") is not None]
        if not losses:
            continue
        # The middle of all steps: start-up and machine noise do not move it.
        speed, used = (_median(metrics, key) for key in ("perf/tokens_per_s", "perf/mfu"))
        memory = max((row["perf/memory_bytes"] for row in metrics if row.get("perf/memory_bytes")), default=None)
        rows.append(
            [
                name,
                f"{max(row['step'] for row in metrics):,}",
                f"{max(row.get('tokens', 0) for row in metrics):,}",
                f"{losses[0]:.3f}",
                f"{losses[-1]:.3f}",
                "" if speed is None else f"{speed:,.0f}",
                "" if used is None else f"{100 * used:.1f} %",
                "" if memory is None else f"{memory / 1e9:.2f}",
            ]
        )
    header = ["stage", "steps", "tokens", "first loss", "last loss", "tokens/s", "MFU", "peak memory GB"]
    return Table("Training", header, rows, "Tokens/s and MFU: median over the steps.")


def _mixture(run_folder: Path) -> Table:
    counts = _read_json(RunFolder(run_folder).manifest(PRETRAIN)).get("counts", {})
    shares = counts.get("mixture", [])
    phases = list(dict.fromkeys(share["phase"] for share in shares))
    rows = []
    for name in dict.fromkeys(share["source"] for share in shares):
        mine = {share["phase"]: share for share in shares if share["source"] == name}
        cells = [f"{mine[phase]['tokens']:,} (x{mine[phase]['upsampled']:.1f})" for phase in phases]
        rows.append([name, *cells, f"{counts['epochs'][name]:.2f}"])
    header = ["source", *(f"tokens in {phase}" for phase in phases), "epochs"]
    return Table("What pre-training read", header, rows, "x: share of the phase over the share of all tokens.")


def _balance(run_folder: Path) -> Table:
    rows = []
    metrics = read_metrics(RunFolder(run_folder).metrics(PRETRAIN))
    for key in sorted({k for row in metrics for k in row if k.startswith("moe/max_vio")}, key=_by_layer):
        number = key.partition("moe/max_vio")[2]
        values = _values(metrics, key)
        late = (_values(metrics, f"moe/{name}{number}") for name in ("entropy", "bias_abs_max", "router_logit_max"))
        name = "layer " + number[1:] if number else "all layers"
        figures = [values[0], max(values), _late(values), *map(_late, late)]
        rows.append([name, *("" if figure is None else f"{figure:.2f}" for figure in figures)])
    note = "MaxVio: (load of the busiest expert - mean load) / mean load of a step; 0 is perfect balance."
    note += " Entropy of the load: 1 is perfect balance. What has no other name is the mean of the last tenth."
    dead = _values(metrics, "moe/dead")
    if dead:
        note += f" Experts without a token in the last step: {dead[-1]:g}."
    alarms = [f"{row['step']} (layer {', '.join(map(str, row['moe/alarm']))})" for row in metrics if "moe/alarm" in row]
    if alarms:
        note += f" Collapse alarms: {len(alarms)}, the first at step {'; '.join(alarms[:3])}."
    header = ["layer", "MaxVio at first", "highest", "at last", "entropy", "largest bias", "largest logit"]
    return Table("Expert balance", header, rows, note)


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _late(values: list[float]) -> float | None:
    """Return the mean of the last tenth, which the noise of single steps does not move."""
    tail = values[-max(1, len(values) // 10) :]
    return sum(tail) / len(tail) if tail else None


def _parity(run_folder: Path) -> Table:
    parity = _read_json(RunFolder(run_folder).parity)
    exports = parity.get("exports", {})
    shown = {key: name for key, name in PARITY.items() if any(key in record for record in exports.values())}
    rows = [[name, *(_figure(record.get(key)) for key in shown)] for name, record in exports.items()]
    note = f"Against {parity['reference']}." if "reference" in parity else ""
    return Table("Parity of the exports", ["file", *shown.values()], rows, note)


def _licences(run_folder: Path) -> Table:
    sources = _read_json(RunFolder(run_folder).sources)
    rows = []
    for name, record in sorted(sources.items()):
        if "left_out" in record:
            rows.append([name, "", f"left out: {record['left_out']}", "", "0", "0"])
            continue
        rows.append(
            [
                name,
                record["version"],
                _licence_names(record["licences"]),
                record["wrapper_licence"],
                f"{record['documents']:,}",
                f"{record['bytes']:,}",
            ]
        )
    header = ["source", "version", "licence of the text", "of the package", "documents", "bytes"]
    return Table("Sources and licences", header, rows, left=(0, 1, 2, 3))


def _reserved(run_folder: Path) -> Table:
    """Return what gather skipped because its site reserves it, by site, in tokens of the run's tokenizer."""
    run = RunFolder(run_folder)
    hosts: dict[str, dict[str, Any]] = {}
    for record in _read_json(run.sources).values():
        for host, lost in record.get("reserved", {}).get("hosts", {}).items():
            found = hosts.setdefault(host, {**lost, "documents": 0, "bytes": 0})
            found["documents"] += lost["documents"]
            found["bytes"] += lost["bytes"]
    if not hosts:
        return Table("Reserved by their sites", [], [])
    counts = _read_json(run.manifest(TOKENIZE)).get("counts", {})
    kept = {key: sum(counts.get(split, {}).get(key, 0) for split in SPLITS) for key in ("tokens", "bytes")}
    rows = []
    ordered = sorted(hosts.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    total = kept["bytes"] + sum(lost["bytes"] for lost in hosts.values())
    for host, lost in ordered[:MOST_SITES]:
        tokens = f"{lost['bytes'] * kept['tokens'] / kept['bytes']:,.0f}" if kept["bytes"] else ""
        cells = [f"{lost['documents']:,}", f"{lost['bytes']:,}", tokens, f"{lost['bytes'] / total:.2%}"]
        rows.append([host, *cells, lost["date"], lost["rule"]])
    note = "Tokens: its bytes at the bytes a token of what was kept. Share: of all bytes, kept and reserved."
    note += f" {len(ordered) - MOST_SITES:,} more sites are in sources.json." if len(ordered) > MOST_SITES else ""
    header = ["site", "documents", "bytes", "tokens", "share", "date", "rule"]
    return Table("Reserved by their sites", header, rows, note, left=(0, 5, 6))


def _licence_names(documents: dict[str, int]) -> str:
    """Return the one licence, or each with its number of documents, the most frequent first."""
    if len(documents) == 1:
        return next(iter(documents))
    return ", ".join(f"{name} ({count:,})" for name, count in sorted(documents.items(), key=lambda d: -d[1]))


def _missing(run_folder: Path) -> list[str]:
    """Return the stages that have not finished; runs made before there was `rephrase` lack nothing."""
    run = RunFolder(run_folder)
    return [name for name, stage in WALK.items() if not stage.optional and not run.finished(name)]


def _read_json(path: Path) -> Any:
    """Return a JSON file's value, or an empty mapping when the stage has not written it."""
    return read_json(path) if path.exists() else {}


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    values = sorted(_values(rows, key))
    return values[len(values) // 2] if values else None


def _figure(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _quoted(text: str) -> str:
    return "\n".join("> " + line for line in ("**" + text.strip() + "**").splitlines())


def _by_layer(key: str) -> tuple[int, str]:
    number = key.rpartition("/")[2]
    return (int(number), "") if number.isdigit() else (-1, key)
