"""Answering: tokens a second and memory of a model on machines, by format of the weights, batch and context.

A decoding step reads the weights that its tokens meet and the keys and values of every sequence. Its time is the slower
of memory and arithmetic, plus what launching a layer costs. One published measurement sets the latter; the others are
compared with (`PUBLISHED_SERVING`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from freehold.core.table import Table
from freehold.model.config import ModelConfig, parameter_counts
from freehold.planner.hardware import DEVICES, GB, Device
from freehold.planner.memory import cache_bytes, weight_bytes

SERVE_ERROR = 0.35
"""Relative error of a step's time: the largest difference to what was published, rounded up (docs/plan.md)."""
REACHED = 0.7
"""Share of the memory's bandwidth that a decoding step reaches."""
LAYER_S = 0.31e-3
"""Seconds a layer costs on a GPU whatever the batch: Mini on one H200 gives 88 tokens a second in one stream."""
SERVE_MFU = 0.35
RESERVE = 0.08
"""Share of the memory left to buffers and fragmentation."""

HOST = Device(10e12, 384 * GB, 460 * GB, 0.0, 0.0, 1, 400, 1.5, "12 channels of DDR5-4800; price is a guess")


class Setup(NamedTuple):
    """Machines that answer together."""

    name: str
    device: Device
    devices: int

    @property
    def memory_bytes(self) -> float:
        """Return what weights and caches may take."""
        return (1 - RESERVE) * self.devices * self.device.memory_bytes

    @property
    def layer_s(self) -> float:
        """Return the fixed cost of a layer; a CPU's kernels have none worth counting."""
        return 0.0 if self.device.per_node == 1 else LAYER_S


SETUPS: tuple[Setup, ...] = (
    Setup("1 x 80 GB (H100)", DEVICES["h100"], 1),
    Setup("2 x 80 GB (H100)", DEVICES["h100"], 2),
    Setup("4 x 80 GB (H100)", DEVICES["h100"], 4),
    Setup("8 x 80 GB (H100)", DEVICES["h100"], 8),
    Setup("1 x 141 GB (H200)", DEVICES["h200"], 1),
    Setup("2 x 141 GB (H200)", DEVICES["h200"], 2),
    Setup("8 x 141 GB (H200)", DEVICES["h200"], 8),
    Setup("1 x 288 GB (B300)", DEVICES["b300"], 1),
    Setup("host with 384 GB", HOST, 1),
)


class Row(NamedTuple):
    """One way to serve a model."""

    setup: str
    weights: str
    sequences: int
    context_tokens: int
    needed_bytes: float
    fits: bool
    tokens_s: float
    usd_million: float
    """Dollars for a million tokens, when the batch is full all the time."""


def read_bytes(model: ModelConfig, kind: str, sequences: int) -> float:
    """Return the bytes of weights that a step of `sequences` tokens reads: each expert that one of them chose, once."""
    counts = parameter_counts(model)
    moe_layers = model.num_hidden_layers - model.num_dense_layers
    experts = moe_layers * counts["expert"] * model.num_experts
    # Every token of every layer chooses k of E; experts that no token chose are not read.
    met = 1 - (1 - model.num_experts_per_tok / model.num_experts) ** sequences
    # The embedding is a look-up of a few rows.
    each = weight_bytes(model, kind) / counts["total"]
    return each * (counts["total"] - counts["embedding"] - experts * (1 - met))


def step_seconds(model: ModelConfig, kind: str, setup: Setup, sequences: int, context_tokens: int) -> float:
    """Return the seconds of one decoding step of all sequences, each with `context_tokens` behind it."""
    device, counts = setup.device, parameter_counts(model)
    moved = read_bytes(model, kind, sequences) + sequences * cache_bytes(model, context_tokens)
    memory_s = moved / (REACHED * setup.devices * device.memory_bytes_s)
    flops = 2.0 * counts["active_with_head"] * sequences
    flops += 4.0 * model.query_width * model.num_full_layers * context_tokens * sequences
    return model.num_hidden_layers * setup.layer_s + max(memory_s, flops / (SERVE_MFU * setup.devices * device.flops))


def serve_row(model: ModelConfig, kind: str, setup: Setup, sequences: int, context_tokens: int) -> Row:
    """Return what a way of serving needs and gives."""
    needed = weight_bytes(model, kind) + sequences * cache_bytes(model, context_tokens)
    rate = sequences / step_seconds(model, kind, setup, sequences, context_tokens)
    price = setup.devices * setup.device.usd_hour / 3600 / rate * 1e6
    return Row(setup.name, kind, sequences, context_tokens, needed, needed <= setup.memory_bytes, rate, price)


def serving(model: ModelConfig, kinds: tuple[str, ...] = ("BF16", "FP8", "Q4_K_M", "Q3_K_M")) -> list[Row]:
    """Return the rows of a model: every setup, format, batch and context that a user asks about first."""
    longest = model.max_position_embeddings
    contexts = sorted({min(8192, longest), min(131_072, longest), longest})
    return [
        serve_row(model, kind, setup, sequences, context)
        for kind in kinds
        for setup in SETUPS
        for context in contexts
        for sequences in ((1, 8, 32) if context == contexts[0] else (1,))
    ]


def caches(model: ModelConfig) -> Table:
    """Return the bytes of the cache of one sequence by length, in bf16 and 8 bits."""
    rows = [
        [f"{n:,}", f"{cache_bytes(model, n) / GB:,.1f} GB", f"{cache_bytes(model, n, 1) / GB:,.1f} GB"]
        for n in (8192, 131_072, 262_144, 524_288, 1_000_000)
    ]
    note = "Global layers grow; sliding layers stop at their window. 8 bits: scales are not counted (+6 %)."
    return Table("Cache of one sequence", ("context", "bf16", "8 bits"), rows, note)


def holds(model: ModelConfig, kind: str = "Q4_K_M", context_tokens: int = 8192) -> Table:
    """Return which setups hold a model in a format with one sequence, and how fast it answers there."""
    rows = []
    for setup in SETUPS:
        row = serve_row(model, kind, setup, 1, context_tokens)
        full = most_sequences(model, kind, setup, context_tokens)
        many = serve_row(model, kind, setup, full, context_tokens) if full else None
        rows.append([
            setup.name, f"{setup.memory_bytes / GB:,.0f} GB", f"{row.needed_bytes / GB:,.0f} GB",
            f"{row.tokens_s:,.0f}" if row.fits else "does not fit",
            f"{full:,}", f"{many.tokens_s:,.0f}" if many else "", f"{many.usd_million:,.2f}" if many else "",
        ])  # fmt: skip
    header = ("machines", "usable", "needed", "tokens/s, one", "most sequences", "tokens/s, all", "USD a million")
    note = f"{kind}, {context_tokens:,} tokens of context each, 512 sequences at most. Speed ± {SERVE_ERROR:.0%}."
    return Table("Which machines hold it", header, rows, note)


def most_sequences(model: ModelConfig, kind: str, setup: Setup, context_tokens: int) -> int:
    """Return how many sequences fit next to the weights, 512 at most."""
    left = setup.memory_bytes - weight_bytes(model, kind)
    return max(0, min(512, int(left // cache_bytes(model, context_tokens))))


class PublishedServing(NamedTuple):
    """A measured speed of somebody's server."""

    model: str
    weights: str
    setup: Setup
    sequences: int
    context_tokens: int
    tokens_s: float
    source: str
    sets: str = ""
    """The constant it sets; empty: it is compared with."""


_EIGHT, _ONE = SETUPS[6], SETUPS[4]
_REPORT = "Trinity Large report, figure 4 (bars read by eye; vLLM 0.14, FP8); sequences = tokens/s x time per token"
PUBLISHED_SERVING: tuple[PublishedServing, ...] = (
    PublishedServing("mini", "BF16", _ONE, 1, 1024, 88, "Mini on one H200, vLLM, one stream", "LAYER_S"),
    PublishedServing("large", "FP8", _EIGHT, 435, 1280, 8700, _REPORT),
    PublishedServing("large", "FP8", _EIGHT, 445, 5120, 7300, _REPORT),
    PublishedServing("large", "FP8", _EIGHT, 384, 10240, 5900, _REPORT),
)


def compared(models: dict[str, ModelConfig]) -> Table:
    """Return our tokens a second next to the published ones."""
    rows = []
    for one in PUBLISHED_SERVING:
        seconds = step_seconds(models[one.model], one.weights, one.setup, one.sequences, one.context_tokens)
        ours = one.sequences / seconds
        rows.append([
            one.model, one.weights, one.setup.name, f"{one.sequences:,} x {one.context_tokens:,}", f"{ours:,.0f}",
            f"{one.tokens_s:,.0f}", f"{ours / one.tokens_s - 1:+.0%}" + (f" (sets {one.sets})" if one.sets else ""),
            one.source,
        ])  # fmt: skip
    header = ("model", "weights", "machines", "sequences x context", "planned", "published", "off", "source")
    note = (
        "The published steps also read new prompts, which ours do not. Stated without a measurement: 200 tokens a "
        "second and more, two to three times as fast as models of the same weight."
    )
    return Table("Tokens a second compared", header, rows, note, left=(0, 1, 2, 7))


def serve_tables(name: str, models: dict[str, ModelConfig]) -> list[Table]:
    """Return all tables of `freehold plan NAME --serve`."""
    model = models[name]
    return [*(holds(model, kind) for kind in ("Q4_K_M", "BF16")), caches(model), long_rows(model), compared(models)]


def long_rows(model: ModelConfig) -> Table:
    """Return what one sequence of a long context takes and how fast it is answered, on the machines that hold it."""
    rows = []
    for context in (131_072, 262_144, 524_288, 1_000_000):
        for setup in SETUPS:
            row = serve_row(model, "Q4_K_M", setup, 1, context)
            if row.fits:
                rows.append([f"{context:,}", setup.name, f"{row.needed_bytes / GB:,.0f} GB", f"{row.tokens_s:,.0f}"])
    note = "Q4_K_M, bf16 cache, one sequence. A context beyond what the model states is arithmetic, not a promise."
    return Table("Long contexts", ("context", "machines", "needed", "tokens/s"), rows, note, left=(0, 1))


def serve_json(name: str, models: dict[str, ModelConfig]) -> dict[str, Any]:
    """Return the rows as plain data."""
    return {"rows": [row._asdict() for row in serving(models[name])], "error": SERVE_ERROR,
            "files": {kind: weight_bytes(models[name], kind) for kind in ("Q4_K_M", "Q3_K_M", "Q8_0")}}  # fmt: skip
