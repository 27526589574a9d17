"""Adapters: bytes of LoRA and QLoRA by rank rule, by format of the frozen experts, and by where these are.

Only routed experts are packed. Attention, dense and shared layers, router, embedding and head stay in bf16: packing
them too costs four times the loss to save 4 % of the bytes. An expert's rank is r / k, since k experts share a token.
"""

from __future__ import annotations

from typing import NamedTuple

from freehold.core.table import Table
from freehold.model.config import ModelConfig, parameter_counts
from freehold.planner.config import PlanConfig
from freehold.planner.hardware import GB
from freehold.planner.memory import NF4_BITS, kept_bytes

EXPERT_BITS = {"BF16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5, "Q4_K": 4.5, "NF4": NF4_BITS, "Q3_K": 3.4375, "Q2_K": 2.625}
"""Bits a weight of the frozen experts."""
ADAPTER_ERROR = 0.05
"""Activations are counted tensor by tensor; what an allocator adds is not."""
STATE_BYTES = 16
"""Of one trained parameter: float32 master, gradient, two moments."""
OFFLOAD_BYTES_S = 25e9
"""Host to device, one direction of PCIe 5 as programs reach it."""


class AdapterPlan(NamedTuple):
    """What adapting a model takes."""

    base: float
    """Bytes of the frozen weights on the device."""
    host: float
    """Bytes of experts in host memory."""
    trained: float
    """Trained parameters."""
    adapters: float
    """Bytes of their state."""
    working: float
    """Activations, logits and one unpacked expert."""

    @property
    def device(self) -> float:
        """Return the bytes on the device."""
        return self.base + self.adapters + self.working


def expert_rank(model: ModelConfig, rank: int, rule: str = "active") -> int:
    """Return the rank of an expert's factors: r / k with the rule `active`, r with `same`."""
    return max(1, rank // model.num_experts_per_tok) if rule == "active" else rank


def adapter_parameters(model: ModelConfig, rank: int, rule: str = "active", share: float = 1.0) -> dict[str, float]:
    """Return trained parameters by group; `share` of the routed experts are adapted. Router and ends stay frozen."""
    d, h, k, inner = model.hidden_size, model.query_width, model.key_width, model.moe_intermediate_size
    moe_layers = model.num_hidden_layers - model.num_dense_layers
    # Factors of q, o and the gate, then of k and v: one side of each matrix is d.
    attention = model.num_hidden_layers * rank * (3 * (d + h) + 2 * (d + k))
    dense = model.num_dense_layers * rank * 3 * (d + model.intermediate_size)
    shared = moe_layers * rank * 3 * (d + inner * model.num_shared_experts)
    routed = moe_layers * model.num_experts * share * expert_rank(model, rank, rule) * 3 * (d + inner)
    return {"attention": attention, "dense": dense, "shared": shared, "routed": routed}


def adapter_plan(
    config: PlanConfig, *, rank: int = 16, rule: str = "active", experts: str = "Q4_0", share: float = 1.0,
    kept: float = 1.0, offload: bool = False,
) -> AdapterPlan:  # fmt: skip
    """Return the bytes of adapting a model on one device, one sequence at a time, with recompute.

    experts: format of the frozen routed experts. share: of the experts that get adapters. kept: of the experts that
    pruning left. offload: experts are in host memory, one layer's comes over at a time.
    """
    m, counts = config.model, parameter_counts(config.model, config.parts)
    moe_layers = m.num_hidden_layers - m.num_dense_layers
    routed = moe_layers * counts["expert"] * m.num_experts
    packed = routed * kept * EXPERT_BITS[experts] / 8
    rest = (counts["total"] - routed) * 2.0
    groups = adapter_parameters(m, rank, rule, share * kept)
    tokens = config.batch.context_tokens
    dense, moe = kept_bytes(config)
    logits = min(config.loss_chunk_tokens or tokens, tokens) * m.vocab_size * 12.0
    working = tokens * (m.num_hidden_layers * m.hidden_size * 2 + max(dense, moe)) + logits
    # One expert is unpacked at a time, never a layer.
    working += 2.0 * counts["expert"]
    trained = sum(groups.values())
    if offload:
        # Two layers of packed experts: one computes while the next arrives.
        return AdapterPlan(rest + 2 * packed / max(1, moe_layers), packed, trained, trained * STATE_BYTES, working)
    return AdapterPlan(rest + packed, 0.0, trained, trained * STATE_BYTES, working)


CASES: tuple[tuple[str, dict[str, object]], ...] = (
    ("bf16 LoRA", {"experts": "BF16"}),
    ("Q8_0 experts", {"experts": "Q8_0"}),
    ("Q4_0 or Q4_K experts", {"experts": "Q4_0"}),
    ("NF4 experts, scales quantized twice", {"experts": "NF4"}),
    ("Q3_K experts", {"experts": "Q3_K"}),
    ("Q2_K experts", {"experts": "Q2_K"}),
    ("NF4, one rank for all (r on every expert)", {"experts": "NF4", "rule": "same"}),
    ("NF4, 10 % of the experts adapted", {"experts": "NF4", "share": 0.1}),
    ("NF4, half the experts pruned", {"experts": "NF4", "kept": 0.5}),
    ("NF4, experts in host memory", {"experts": "NF4", "offload": True}),
)
DEVICE_SETS: tuple[tuple[str, float], ...] = (
    ("1 x 80 GB", 80), ("2 x 48 GB", 96), ("2 x 80 GB", 160), ("2 x 141 GB", 282), ("1 x 288 GB", 288),
    ("4 x 80 GB", 320), ("8 x 80 GB", 640), ("8 x 141 GB", 1128),
)  # fmt: skip


def adapter_table(config: PlanConfig, rank: int = 16) -> Table:
    """Return what adapting takes by format and place of the experts, and the smallest set of devices that holds it."""
    rows = []
    for name, how in CASES:
        plan = adapter_plan(config, rank=rank, **how)  # type: ignore[arg-type]
        fitting = next((devices for devices, size in DEVICE_SETS if plan.device <= size * GB), "none of these")
        rows.append([
            name, f"{plan.base / GB:,.1f}", f"{plan.trained / 1e9:,.2f} B", f"{plan.adapters / GB:,.1f}",
            f"{plan.working / GB:,.1f}", f"{plan.device / GB:,.1f}", f"{plan.host / GB:,.0f}" if plan.host else "",
            fitting,
        ])  # fmt: skip
    header = ("experts", "base GB", "trained", "state GB", "working GB", "device GB", "host GB", "first that holds it")
    note = (
        f"Rank {rank}, {expert_rank(config.model, rank)} on a routed expert; {config.batch.context_tokens:,} tokens, "
        "one sequence, recompute, head in chunks. Error 5 %: activations are counted, allocators are not."
    )
    return Table("Adapters on one device", header, rows, note, left=(0, 7))


def qlora_answer(config: PlanConfig) -> str:
    """Return in words what holds of "QLoRA of Large in 100 to 150 GB", with the numbers of this plan."""

    def device(**how: object) -> float:
        return adapter_plan(config, **how).device / GB  # type: ignore[arg-type]

    q4, nf4, half = device(experts="Q4_0"), device(experts="NF4"), device(experts="NF4", kept=0.5)
    two = device(experts="Q2_K", kept=0.5)
    away = adapter_plan(config, experts="NF4", offload=True)
    seconds = 2 * away.host / OFFLOAD_BYTES_S
    return (
        f"QLoRA in 100 to 150 GB? Not with all experts: {q4:,.0f} GB with Q4_0 or Q4_K experts, {nf4:,.1f} GB with NF4 "
        f"whose scales are quantized twice. With half the experts pruned it is {half:,.1f} GB. One 80 GB GPU is enough "
        f"only with {away.host / GB:,.0f} GB of NF4 experts in host memory ({away.device / GB:,.0f} GB on the GPU). "
        f"They cross the bus twice a pass, about {seconds:,.0f} s at {OFFLOAD_BYTES_S / GB:,.0f} GB/s: sensible over "
        f"many micro-batches only. Two 48 GB GPUs hold none of these: half the experts at 2 bits need {two:,.0f} GB."
    )


def adapt_tables(config: PlanConfig, rank: int = 16) -> list[Table]:
    """Return all tables of `freehold plan NAME --adapt`."""
    groups = adapter_parameters(config.model, rank)
    rows = [[name, f"{n / 1e6:,.1f} M"] for name, n in groups.items()]
    return [adapter_table(config, rank), Table("Trained parameters", ("group", "parameters"), rows)]
