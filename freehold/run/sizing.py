"""How large a model, and how long a training, an amount of text and a machine are good for. Imports no torch.

Rules of thumb, each with its source; the planner turns them into memory and time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from freehold.core.config import fill
from freehold.model.config import parameter_counts
from freehold.planner.config import PlanConfig
from freehold.planner.estimate import estimate
from freehold.planner.hardware import DEVICES

# Text up to this size gets this vocabulary; a larger one leaves most rows of the embedding with too few examples.
VOCABULARIES = ((3e5, 1024), (1e6, 2048), (2.5e7, 4096), (1.5e8, 8192), (1.5e9, 16384), (math.inf, 32768))
# Bytes of English that a token of such a vocabulary holds, measured on the laptop corpus; other scripts hold fewer.
BYTES_PER_TOKEN = {1024: 2.3, 2048: 2.7, 4096: 3.2, 8192: 3.6, 16384: 3.9, 32768: 4.2}
CPU_VOCABULARY = 8192
EPOCHS = 4
"""Readings of a text that are worth nearly as much as new text (Muennighoff et al. 2023, arXiv:2305.16264)."""
TOKENS_PER_PARAMETER = 4
"""Of the parameters a token uses: below this a smaller model ends better. Hoffmann et al. 2022 (arXiv:2203.15556) have
20 for much text; little text is read often, and a model too small for it would be all that is left."""
LEAST_STEPS = 40
ADVICE = 0.8
"""Share of the device's memory that a plan may take."""

SHAPES: tuple[tuple[str, dict[str, Any], int, int], ...] = (
    ("workstation", {"preset": "workstation"}, 1024, 128),
    ("laptop", {"preset": "laptop"}, 512, 8),
    (
        "half the laptop",
        {"preset": "laptop", "hidden_size": 64, "intermediate_size": 192, "moe_intermediate_size": 64, "head_dim": 32,
         "num_experts": 8, "sliding_window": 64},
        256, 8,
    ),
)  # fmt: skip
"""(name, shape, tokens of a row, rows of a step), the largest first."""


@dataclass(frozen=True)
class Machine:
    """What trains: a row of the planner's devices, and the matrix rate measured here (FLOP/s; None: the table's)."""

    device: str
    gemm_flops_s: float | None = None

    @property
    def slowness(self) -> float:
        """Return by how much longer this machine takes than the table's."""
        if not self.gemm_flops_s:
            return 1.0
        # Never below 1: the products of a small model do not gain what one large product does.
        return max(DEVICES[self.device].flops / self.gemm_flops_s, 1.0)


@dataclass(frozen=True)
class Size:
    """A model, and how long it is trained."""

    name: str
    model: dict[str, Any]
    context_tokens: int
    sequences: int
    micro_sequences: int
    steps: int
    epochs: float
    seconds: float
    """By the planner, of pre-training."""
    peak_bytes: float
    active: int
    """Parameters that a token uses."""
    vocab_size: int

    @property
    def step_tokens(self) -> int:
        """Return the tokens of a step."""
        return self.context_tokens * self.sequences


def vocabulary(text_bytes: int) -> int:
    """Return the size of the vocabulary for an amount of text."""
    return next(size for limit, size in VOCABULARIES if text_bytes <= limit)


def tokens_of(text_bytes: int, vocab_size: int) -> int:
    """Return about how many tokens some text has."""
    return int(text_bytes / BYTES_PER_TOKEN[vocab_size])


def choose(text_bytes: int, machine: Machine, limit_s: float) -> Size:
    """Return the largest model that the text can teach in the `limit_s` seconds that pre-training may take here.

    Where even the smallest learns too little in that time, it is returned nevertheless.
    """
    # On a CPU the head of a large vocabulary would take most of a step.
    vocab_size = min(vocabulary(text_bytes), CPU_VOCABULARY if machine.device == "cpu" else 1 << 20)
    wanted = EPOCHS * tokens_of(text_bytes, vocab_size)
    sizes = [_shortened(_size(shape, vocab_size, wanted, machine), limit_s) for shape in SHAPES]
    room = ADVICE * DEVICES[machine.device].memory_bytes
    fits = [
        size
        for size in sizes
        if size.peak_bytes <= room and size.steps * size.step_tokens >= TOKENS_PER_PARAMETER * size.active
    ]
    return (fits or sizes[-1:])[0]


def _size(shape: tuple[str, dict[str, Any], int, int], vocab_size: int, tokens: int, machine: Machine) -> Size:
    name, model, context, rows = shape
    model = {**model, "vocab_size": vocab_size}
    # 64 rows of 1,024 tokens are enough work for a GPU, and fit 40 GB.
    micro = rows if machine.device == "cpu" else min(rows, 64)
    steps = max(round(tokens / (context * rows)), LEAST_STEPS)
    on_cpu = {"mfu": 0.2, "kernels": "native"} if machine.device == "cpu" else {}
    plan = fill(
        PlanConfig,
        {
            "model": model,
            "tokens": steps * context * rows,
            "batch": {"context_tokens": context, "sequences": rows, "micro_sequences": micro},
            "machine": {"device": machine.device, **on_cpu},
        },
        "plan",
    )
    figures = estimate(plan, judge=False)["figures"]
    return Size(
        name,
        model,
        context,
        rows,
        micro,
        steps,
        epochs=EPOCHS * steps * context * rows / max(tokens, 1),
        seconds=steps * figures["step/time"].value * machine.slowness,
        peak_bytes=figures["memory/peak"].value,
        active=parameter_counts(plan.model)["active_with_head"],
        vocab_size=vocab_size,
    )


def _shortened(size: Size, limit_s: float) -> Size:
    """Return a training cut to the time, never below the fewest steps that are worth a learning-rate schedule."""
    share = min(1.0, limit_s / size.seconds)
    steps = max(int(size.steps * share), LEAST_STEPS)
    share = steps / size.steps
    return replace(size, steps=steps, epochs=size.epochs * share, seconds=size.seconds * share)
