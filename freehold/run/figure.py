"""The picture of a training run: loss and bits per byte, learning rate, expert load, balance, the router's health."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

INK, MUTED, FAINT = "#1f2933", "#7b8794", "#d5dbe1"
BLUE, ORANGE, GREEN, RED = "#2563a8", "#d9772b", "#2f8f6b", "#b3261e"
PHASES = ("#eef3f8", "#fbf1e6", "#e9f4ee", "#f3eef8", "#f7f0f0")
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
HEAT_COLUMNS = 100
"""Most step bins of the heat map; more steps than that are summed."""
HEAT_LAYERS = 6
"""Most layers of the heat map; of more, that many are shown, evenly spaced, the first and the last among them."""


def draw(rows: list[dict[str, Any]], results: dict[str, Any]) -> bytes:
    """Return a PNG drawn from metrics rows (`step`, `phase`, slash names) and evaluate's results (may be empty)."""
    with matplotlib.rc_context(STYLE):
        return png(picture(rows, results))


def png(figure: Figure) -> bytes:
    """Return a figure as PNG, without the name of the software in it: same figure, same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def picture(rows: list[dict[str, Any]], results: dict[str, Any]) -> Figure:
    """Return the same as a matplotlib figure."""
    with matplotlib.rc_context(STYLE):
        # A Figure of its own, not pyplot: no window system is touched and no state is left behind.
        figure = Figure(figsize=(12.2, 8.8), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        grid = figure.add_gridspec(3, 2, height_ratios=(2.3, 1, 1))
        panels = [figure.add_subplot(grid[row, column]) for row in range(3) for column in range(2)]
        loss, heat, rate, balance, router, evenness = panels
        spans = phase_spans(rows)
        _loss(loss, rows, results)
        _heat(heat, [balance, evenness], rows)
        _rate(rate, rows)
        _balance(balance, rows)
        _router(router, rows)
        _evenness(evenness, rows)
        for axes in panels:
            _shade(axes, spans, names=axes in (loss, heat))
            axes.set_xlim(spans[0][1], spans[-1][2])
        for axes in (router, evenness):
            axes.set_xlabel("optimizer step")
    return figure


def draw_plan(plan: dict[str, Any]) -> bytes:
    """Return a PNG of a plan in its JSON form: memory by part, the step by part, ours over the published figures."""
    figures = {name: (f["value"], f["value"] * f["error"]) for name, f in plan["figures"].items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.2), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        memory, step, ratio = figure.subplots(1, 3, width_ratios=(1.1, 1.1, 1))
        parts = ("weights", "masters", "gradients", "optimizer", "activations", "logits", "all_to_all")
        _stack(memory, [(part, figures[f"memory/{part}"][0] / 2**30) for part in parts], "GiB",
               figures["memory/peak"][1] / 2**30)  # fmt: skip
        device = figures["memory/device"][0] / 2**30
        memory.axvline(device, color=INK, linestyle=(0, (5, 3)), linewidth=1.2)
        memory.set_xlim(0, max(memory.get_xlim()[1], device * 1.05))
        memory.set_title("Memory of a rank (dashed: device)")
        times = [(part, figures[f"step/{part}"][0]) for part in ("arithmetic", "optimizer", "bubble", "exposed")]
        _stack(step, times, "s", figures["step/time"][1])
        step.set_title("One optimizer step")
        rows = plan["published"]
        ratio.set_title("Ours over the published figure")
        if not rows:
            _note(ratio, "nothing published to compare with")
        for y, row in enumerate(rows):
            wrong = figures[row["figure"]][1] / row["published"]
            ratio.errorbar(row["planned"] / row["published"], y, xerr=wrong, fmt="o", color=BLUE, capsize=3)
        if rows:
            ratio.axvline(1, color=MUTED, linewidth=1)
            ratio.set_yticks(range(len(rows)), [row["figure"] for row in rows])
            ratio.invert_yaxis()
        return png(figure)


def _stack(axes: Axes, parts: list[tuple[str, float]], unit: str, wrong: float) -> None:
    """Draw parts one below the other, each starting where the last ended, and their sum with its error bar."""
    start = 0.0
    for y, (_, value) in enumerate(parts):
        axes.barh(y, value, left=start, color=BLUE, alpha=0.75)
        axes.text(start + value, y, f" {value:.3g}", va="center", color=MUTED, fontsize=8.5)
        start += value
    axes.barh(len(parts), start, xerr=wrong, color=ORANGE, alpha=0.75, ecolor=INK, capsize=3)
    axes.set_yticks(range(len(parts) + 1), [*(name.replace("_", " ") for name, _ in parts), "sum"])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_xlim(0, max(start + wrong, 1e-9) * 1.15)


def draw_calibration(found: dict[str, Any]) -> bytes:
    """Return the picture of a calibration: tokens of every expert by layer; black cells are experts that saw none."""
    layers = found["layers"]
    tokens = np.array([layer["tokens"] for layer in layers.values()], dtype=float)
    figure = Figure(figsize=(8, 1.5 + 0.3 * len(tokens)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.log10(np.maximum(tokens, 0.5)), aspect="auto", cmap="inferno", interpolation="nearest")
    figure.colorbar(image, label="log10 of tokens")
    axes.set_yticks(range(len(tokens)), list(layers))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    idle = int((tokens == 0).sum())
    axes.set_title(f"{found['tokens']:,} tokens of calibration: {idle} of {tokens.size} experts saw none")
    return png(figure)


def draw_experts(found: dict[str, Any]) -> bytes:
    """Return the picture of experts by domain: lift over the reference where it is known, else share of gate mass."""
    domains = found["domains"]
    figure = Figure(figsize=(8, 1 + 2.2 * len(domains)), layout="constrained")
    for axes, (name, domain) in zip(figure.subplots(len(domains), squeeze=False)[:, 0], domains.items(), strict=True):
        layers = domain["layers"]
        lifted = all("lift" in layer for layer in layers.values())
        values = np.array([layer["lift" if lifted else "mass"] for layer in layers.values()])
        if lifted:
            # Twice as much and half as much are equally far from 1.
            image = axes.imshow(np.log2(np.maximum(values, 1 / 16)), aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3)
        else:
            image = axes.imshow(values, aspect="auto", cmap="inferno")
        figure.colorbar(image, label="log2 of lift" if lifted else "share of gate mass")
        axes.set_yticks(range(len(values)), list(layers))
        axes.set(xlabel="expert", ylabel="layer", title=f"{name}: {domain['tokens']:,} tokens")
    return png(figure)


def draw_data(facts: dict[str, Any]) -> bytes:
    """Return a PNG of a corpus from the facts of its card: sources, licences, lengths, languages, drops, reading."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 7.2), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        axes = [figure.add_subplot(2, 3, place) for place in range(1, 7)]
        _bars(axes[0], "Tokens by source", [(r["source"], r["tokens"]) for r in facts["sources"]], BLUE)
        rows = [(r["licence"], r["documents"] + r["conversations"]) for r in facts["licences"]]
        _bars(axes[1], "Rows by licence", rows, BLUE)
        _lengths(axes[2], facts["lengths"])
        _bars(axes[3], "Rows by language rule", [(r["language"], r["documents"]) for r in facts["languages"]], GREEN)
        _bars(axes[4], "Dropped rows by reason", list(facts["counts"].get("dropped", {}).items()), ORANGE)
        read: dict[str, int] = {}
        for row in facts["read"]:
            read[row["source"]] = read.get(row["source"], 0) + row["tokens"]
        _bars(axes[5], "Tokens read, by source", list(read.items()), GREEN)
        return png(figure)


def _bars(axes: Axes, title: str, rows: list[tuple[str, int]], colour: str, most: int = 10) -> None:
    """Draw one bar a name, the longest on top, with its number; names beyond `most` are summed into one."""
    axes.set_title(title)
    rows = sorted((row for row in rows if row[1]), key=lambda row: (-row[1], row[0]))
    if len(rows) > most:
        rest = rows[most - 1 :]
        rows = [*rows[: most - 1], (f"{len(rest)} others", sum(count for _, count in rest))]
    if not rows:
        _note(axes, "none recorded")
        axes.set_xticks([])
        return
    names = [name if len(name) <= 30 else name[:29] + "\u2026" for name, _ in rows]
    bars = axes.barh(range(len(rows)), [count for _, count in rows], color=colour, height=0.7)
    axes.bar_label(bars, [f"{count:,}" for _, count in rows], padding=3, color=MUTED, fontsize=8)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.25)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _lengths(axes: Axes, lengths: dict[str, list[int]]) -> None:
    axes.set_title("Documents by length")
    counts, edges = lengths["documents"], lengths["edges_bytes"]
    used = [place for place, count in enumerate(counts) if count]
    if not used:
        _note(axes, "not tokenized yet")
        return
    places = range(used[0], used[-1] + 1)
    bars = axes.bar(places, [counts[place] for place in places], color=BLUE, width=0.85)
    axes.bar_label(bars, [f"{counts[place]:,}" for place in places], padding=2, color=MUTED, fontsize=8)
    axes.set_xticks(places, [f"\u2265 {edges[place]:,}" for place in places], rotation=30, ha="right")
    axes.set_xlabel("bytes")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def phase_spans(rows: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Return (phase, first step, last step) of each run of equal phases; neighbours touch.

    A row that names no phase (validation alone) belongs to the phase before it.
    """
    spans: list[tuple[str, int, int]] = []
    for row in rows:
        phase = str(row.get("phase") or (spans[-1][0] if spans else ""))
        if spans and spans[-1][0] == phase:
            spans[-1] = (phase, spans[-1][1], row["step"])
        else:
            spans.append((phase, spans[-1][2] if spans else row["step"], row["step"]))
    return spans


def heat_map(rows: list[dict[str, Any]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return layer names, bin edges in steps [bins + 1], and load relative to an equal share [bins, layers, E].

    Steps are summed into at most `HEAT_COLUMNS` bins. 1 is an equal share, 0 a dead expert.
    """
    kept = [row for row in rows if any(key.startswith("moe/load/") for key in row)]
    names = sorted({k.rpartition("/")[2] for row in kept for k in row if k.startswith("moe/load/")}, key=_number)
    if not kept:
        return [], np.zeros(0), np.zeros((0, 0, 0))
    loads = np.array([[row[f"moe/load/{name}"] for name in names] for row in kept], dtype=np.float64)
    starts = np.unique(np.linspace(0, len(kept), min(HEAT_COLUMNS, len(kept)) + 1).astype(int))[:-1]
    binned = np.add.reduceat(loads, starts, axis=0)
    steps = np.array([row["step"] for row in kept])
    relative = binned / np.maximum(binned.mean(axis=2, keepdims=True), 1e-9)
    # A row covers the steps since the row before it.
    return names, np.append(np.append(0, steps)[starts], steps[-1]), relative


def _loss(axes: Axes, rows: list[dict[str, Any]], results: dict[str, Any]) -> None:
    axes.set_title("Training loss and held-out bits per byte", pad=18)
    steps, values = _series(rows, "loss/mean")
    axes.plot(steps, values, color=FAINT, linewidth=0.7)
    axes.plot(steps, _smooth(values), color=MUTED, linewidth=1.4, label="training loss, nats per token")
    names = sorted({k for row in rows for k in row if k.startswith("val/bpb/")})
    right = axes.twinx()
    right.spines["right"].set(visible=True, color=BLUE)
    right.tick_params(axis="y", colors=BLUE)
    _many(right, rows, names, BLUE, "each source")
    steps, values = _series(rows, "val/bpb")
    label = "bits per byte, validation rows of training"
    right.plot(steps, values, color=BLUE, linewidth=2.2, marker="o", markersize=3, label=label)
    base = results.get("checkpoints", {}).get("base", {}).get("bits_per_byte", {}).get("overall", {})
    if base and len(steps):
        # The number of the report's table: all held-out text, counted as evaluate does.
        label = f"Base, evaluated: {base['bits_per_byte']:.3f}"
        right.plot(steps[-1], base["bits_per_byte"], color=BLUE, marker="D", linestyle="", label=label)
    elif len(values):
        place: Any = {"xytext": (0, 6), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        right.annotate(f"{values[-1]:.2f}", (steps[-1], values[-1]), **place, color=BLUE, fontweight="bold")
    xz = results.get("text", {}).get("overall", {}).get("xz")
    if xz:
        right.axhline(xz, color=ORANGE, linewidth=1.3, linestyle=(0, (5, 3)), label=f"xz -9 on held-out text: {xz:.2f}")
    axes.set_ylabel("loss", color=MUTED)
    right.set_ylabel("bits per byte", color=BLUE)
    axes.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    handles = [h for a in (right, axes) for h in a.get_legend_handles_labels()[0]]
    right.legend(handles=handles, loc="lower left")


def _many(axes: Axes, rows: list[dict[str, Any]], names: list[str], colour: str, label: str) -> None:
    """Draw one thin line a name, all under one entry of the legend."""
    for name in names:
        steps, values = _series(rows, name)
        axes.plot(steps, _smooth(values), color=colour, linewidth=0.8, alpha=0.4, label=label)
        label = "_"  # matplotlib leaves names that begin so out of the legend


def _rate(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.set_title("Learning rate schedule")
    steps, values = _series(rows, "optim/lr")
    axes.plot(steps, values, color=GREEN, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")


def _heat(axes: Axes, below: list[Axes], rows: list[dict[str, Any]]) -> None:
    names, edges, relative = heat_map(rows)
    shown = np.unique(np.linspace(0, len(names) - 1, min(HEAT_LAYERS, len(names))).round().astype(int))
    some = f" ({len(shown)} of {len(names)} layers)" if len(shown) < len(names) else ""
    axes.set_title(f"Load of every expert, 1 = an equal share{some}", pad=18)
    names, relative = [names[i] for i in shown], relative[:, shown]
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    if not names:
        _note(axes, "no expert loads in the metrics")
        return
    bins, layers, experts = relative.shape
    image = relative.reshape(bins, layers * experts).T
    lines = np.arange(layers * experts + 1)
    mesh = axes.pcolormesh(edges, lines, image, cmap=_two_sided(), vmin=0, vmax=2, rasterized=True)
    for layer in range(1, layers):
        axes.axhline(layer * experts, color="white", linewidth=3)
    axes.set_yticks([(i + 0.5) * experts for i in range(layers)], [f"layer {n}" for n in names])
    axes.invert_yaxis()
    # Next to both axes of the column, so that their steps stay one above the other.
    place: Any = {"ax": [axes, *below], "shrink": 0.36, "aspect": 24, "pad": 0.015, "anchor": (0, 0.95)}
    bar = axes.figure.colorbar(mesh, **place, ticks=[0, 0.5, 1, 1.5, 2])
    bar.ax.set_yticklabels(["0", "0.5", "1", "1.5", "≥ 2"])
    bar.outline.set_visible(False)  # type: ignore[operator]


def _balance(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.set_title("MaxVio: how far the busiest expert is above its share")
    if not _layers(axes, rows, "moe/max_vio", ORANGE, "mean over layers"):
        return
    alarms = sorted({row["step"] for row in rows if row.get("moe/alarm")})
    if alarms:
        place: Any = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(alarms, [1.0] * len(alarms), "v", color=RED, markersize=6, label="collapse alarm", **place)
    axes.legend(loc="upper right", ncols=3)


def _router(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.set_title("Router: largest logit, largest selection bias")
    if not _layers(axes, rows, "moe/router_logit_max", BLUE, "logit, largest of all layers"):
        return
    right = axes.twinx()
    right.spines["right"].set(visible=True, color=GREEN)
    right.tick_params(axis="y", colors=GREEN)
    _layers(right, rows, "moe/bias_abs_max", GREEN, "|bias|, largest of all layers")
    axes.set_ylabel("logit", color=BLUE)
    right.set_ylabel("|bias|", color=GREEN)
    handles = [axes.get_lines()[-1], right.get_lines()[-1]]
    right.legend(handles=handles, loc="lower right")


def _evenness(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.set_title("Entropy of the load, 1 = even; dead experts")
    if not _layers(axes, rows, "moe/entropy", BLUE, "entropy, mean over layers"):
        return
    steps, dead = _series(rows, "moe/dead")
    right = axes.twinx()
    right.spines["right"].set(visible=True, color=RED)
    right.tick_params(axis="y", colors=RED)
    right.fill_between(steps, dead, step="pre", color=RED, alpha=0.6, linewidth=0, label="experts without a token")
    right.set_ylim(0, max(4.0, 1.2 * dead.max(initial=0)))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(top=1)
    right.legend(handles=[axes.get_lines()[-1], *right.collections], loc="center right")


def _layers(axes: Axes, rows: list[dict[str, Any]], key: str, colour: str, label: str) -> bool:
    """Draw a figure of the router, thin for each layer and thick over all; return whether there is any."""
    _many(axes, rows, sorted({k for row in rows for k in row if k.startswith(key + "/")}), colour, "each layer")
    steps, values = _series(rows, key)
    if not len(values):
        _note(axes, f"no {key} in the metrics")
        return False
    axes.plot(steps, _smooth(values), color=colour, linewidth=2, label=label)
    if key != "moe/entropy":
        axes.set_ylim(bottom=0)
    return True


def _shade(axes: Axes, spans: list[tuple[str, int, int]], *, names: bool) -> None:
    for number, (phase, first, last) in enumerate(spans):
        axes.axvspan(first, last, color=PHASES[number % len(PHASES)], zorder=-10, linewidth=0)
        if names:
            place: Any = {"xy": ((first + last) / 2, 1.01), "xycoords": axes.get_xaxis_transform()}
            axes.annotate(phase, **place, ha="center", va="bottom", color=MUTED, fontsize=8.5)


def _series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], dtype=np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return a centred running mean over about a fiftieth of the run, shorter at the ends."""
    half = len(values) // 100
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _two_sided() -> Any:
    """Return a colour map from blue (starved) over near-white (an equal share) to red-brown (overloaded)."""
    colours = ["#12365f", "#5b8fc7", "#f6f5f2", "#e0935a", "#9c3d12"]
    return matplotlib.colors.LinearSegmentedColormap.from_list("load", colours)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_yticks([])


def _number(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (-1, name)
