"""Adapters as folders that peft, transformers, vLLM and llama.cpp's converter read: per-expert 2-D keys, one rank, one
alpha. Our own facts are next to them, the base's fingerprint among them.

Read are also adapters of others: the same layout, and peft's own with stacked experts.
Shapes: E experts, r rank, d width, i expert width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from freehold.core.artifact import read_json, write_json
from freehold.core.errors import CheckpointError
from freehold.model.adapted import attached, shape_of, sites
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.model.groups import LINEAR, group_of
from freehold.model.lora import Factors, Pair

CONFIG, WEIGHTS, FACTS = "adapter_config.json", "adapter_model.safetensors", "freehold_adapter.json"
PREFIX = "base_model.model."
FORMAT = 1
"""`format_version` of FACTS."""


@dataclass(frozen=True)
class Adapter:
    """Factors by the name of their matrix, and what is known of them."""

    pairs: dict[str, Pair]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Return the largest rank."""
        return max(pair.rank for pair in self.pairs.values())

    @property
    def groups(self) -> tuple[str, ...]:
        """Return the groups that have factors."""
        return tuple(dict.fromkeys(group_of(name) for name in self.pairs))


def of_model(model: Afmoe, facts: Mapping[str, Any] | None = None) -> Adapter:
    """Return the factors of a model, in float32."""
    pairs = {n: Pair(f.a.detach().float(), f.b.detach().float(), f.scale) for n, f in attached(model).items()}
    return Adapter(pairs, dict(facts or {}))


def check_shapes(adapter: Adapter, model: Afmoe) -> None:
    """Raise CheckpointError for factors of a matrix that the model lacks, or of another shape."""
    places = {name: (module, attribute) for _, name, module, attribute in sites(model)}
    for name, pair in adapter.pairs.items():
        if name not in places:
            raise CheckpointError("the model has no such matrix", where="adapter", found=name)
        stacks, outs, ins = shape_of(*places[name])
        expected = ((stacks, pair.rank, ins), (stacks, outs, pair.rank))
        if (tuple(pair.a.shape), tuple(pair.b.shape)) != expected:
            raise CheckpointError(
                "the adapter is of another shape",
                where=name,
                found=(tuple(pair.a.shape), tuple(pair.b.shape)),
                expected=expected,
                todo="it was made for another model: another width, or another number of experts",
            )


def put_on(model: Afmoe, adapter: Adapter) -> None:
    """Give a model the factors of an adapter, frozen; CheckpointError when they are of another shape."""
    check_shapes(adapter, model)
    places = {name: (module, attribute) for _, name, module, attribute in sites(model)}
    dtype = model.lm_head.weight.dtype
    for name, pair in adapter.pairs.items():
        module, attribute = places[name]
        stacks, outs, ins = shape_of(module, attribute)
        factors = Factors(stacks, outs, ins, pair.rank, pair.scale * pair.rank)
        factors.a.data, factors.b.data = pair.a.to(dtype), pair.b.to(dtype)
        setattr(module, attribute, factors.requires_grad_(False))


# --- one form for everybody ------------------------------------------------------------------------------------------


def uniform(adapter: Adapter, alpha: float) -> Adapter:
    """Return the same adapter with one rank and one scale alpha / rank: ranks filled with zeros, scales inside B.

    Servers ignore patterns of ranks and scales, so there must be none.
    """
    rank = adapter.rank
    pairs = {}
    for name, pair in adapter.pairs.items():
        more = rank - pair.rank
        # Exact where the ratio is a power of two, as it is for the usual ranks and top-k.
        b = pair.b * (pair.scale / (alpha / rank))
        a, b = torch.nn.functional.pad(pair.a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))
        pairs[name] = Pair(a, b, alpha / rank)
    return Adapter(pairs, adapter.facts)


def to_disk(adapter: Adapter, config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their names in peft's layout, each expert for itself.

    An expert's gate, up and down are always written together: what was not adapted has factors of zeros.
    """
    tensors: dict[str, Tensor] = {}

    def put(stem: str, a: Tensor, b: Tensor) -> None:
        tensors[f"{PREFIX}{stem}.lora_A.weight"] = a.contiguous().clone()
        tensors[f"{PREFIX}{stem}.lora_B.weight"] = b.contiguous().clone()

    for name, pair in adapter.pairs.items():
        stem, _, last = name.rpartition(".")
        if not stem.endswith(".experts"):
            put(name, pair.a[0], pair.b[0])
            continue
        inner = config.moe_intermediate_size
        for expert in range(config.num_experts):
            a, b = pair.a[expert], pair.b[expert]
            if last == "gate_up_proj":
                put(f"{stem}.{expert}.gate_proj", a, b[:inner])
                put(f"{stem}.{expert}.up_proj", a, b[inner:])
            else:
                put(f"{stem}.{expert}.down_proj", a, b)
    _fill_experts(tensors, adapter, config)
    return dict(sorted(tensors.items()))


def _fill_experts(tensors: dict[str, Tensor], adapter: Adapter, config: ModelConfig) -> None:
    """Add zeros for the half of the experts that was not adapted: readers want all three matrices of an expert."""
    rank, wide, inner = adapter.rank, config.hidden_size, config.moe_intermediate_size
    stems = {name.rpartition(".")[0] for name in adapter.pairs if ".experts." in name and ".shared" not in name}
    for stem in stems:
        for expert in range(config.num_experts):
            for part, outs, ins in (("gate_proj", inner, wide), ("up_proj", inner, wide), ("down_proj", wide, inner)):
                key = f"{PREFIX}{stem}.{expert}.{part}"
                tensors.setdefault(f"{key}.lora_A.weight", torch.zeros(rank, ins))
                tensors.setdefault(f"{key}.lora_B.weight", torch.zeros(outs, rank))


def peft_config(adapter: Adapter, config: ModelConfig, alpha: float, base: str) -> dict[str, Any]:
    """Return `adapter_config.json`: which modules and parameters of `AfmoeForCausalLM` have factors.

    There `gate_proj`, `up_proj` and `down_proj` always mean the routed experts; the attention's output gate, shared
    experts and dense layers can only be reached as parameters.
    """
    modules: list[str] = []
    parameters: list[str] = []
    for group in adapter.groups:
        family, _, part = group.partition(".")
        if group == "experts.gate_up" or group == "experts.down":
            modules += [name for name in ("gate_proj", "up_proj", "down_proj") if name not in modules]
        elif family == "attention" and part != "gate":
            modules.append(f"{part}_proj")
        elif group == "router":
            modules.append("router.gate")
        elif family == "dense":
            parameters += [f"layers.{i}.mlp.{part}_proj.weight" for i in range(config.num_dense_layers)]
        elif family == "shared":
            parameters.append(f"shared_experts.{part}_proj.weight")
        else:
            parameters.append("self_attn.gate_proj.weight")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": modules,
        "target_parameters": parameters or None,
    }


def save(folder: Path, adapter: Adapter, config: ModelConfig, *, alpha: float, base: str) -> dict[str, int]:
    """Write an adapter's folder; return what was written: tensors and parameters. CheckpointError when a count differs.

    `base` is what peft looks for when it loads the base by itself.
    """
    even = uniform(adapter, alpha)
    tensors = to_disk(even, config)
    _check_uniform(tensors, even.rank)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, peft_config(even, config, alpha, base))
    true_ranks = {
        group: max(p.rank for n, p in adapter.pairs.items() if group_of(n) == group) for group in adapter.groups
    }
    write_json(folder / FACTS, {**adapter.facts, "format_version": FORMAT, "true_ranks": true_ranks})
    return {"tensors": len(tensors), "parameters": sum(t.numel() for t in tensors.values())}


def _check_uniform(tensors: Mapping[str, Tensor], rank: int) -> None:
    for key, tensor in tensors.items():
        found = tensor.shape[0 if ".lora_A." in key else 1]
        if found != rank:
            raise CheckpointError("a factor has another rank", where=key, found=found, expected=rank)


# --- reading ---------------------------------------------------------------------------------------------------------

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<stem>.+?)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def read(folder: Path, config: ModelConfig) -> Adapter:
    """Read an adapter's folder, ours or another tool's, for a model of this shape.

    CheckpointError for a kind of adapter that is not plain LoRA, for a key that belongs to no matrix, for experts that
    are missing, and for another number of experts.
    """
    settings = read_json(folder / CONFIG, CheckpointError, None)
    for name in ("use_dora", "modules_to_save", "lora_bias"):
        if settings.get(name):
            raise CheckpointError(
                "not a plain low-rank adapter", where=folder / CONFIG, found=f"{name}: {settings[name]}"
            )
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            "not a LoRA adapter", where=folder / CONFIG, found=settings.get("peft_type"), expected="peft_type: LORA"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError("not a safetensors file", where=folder / WEIGHTS, found=error) from error
    facts = read_json(folder / FACTS, CheckpointError, None) if (folder / FACTS).exists() else {}
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError("a tensor belongs to no matrix of the model", where=folder / WEIGHTS, found=key)
        halves.setdefault(match["stem"], {})[match["side"]] = tensor.float()
    return Adapter(_Reader(settings, config, folder / WEIGHTS).pairs(halves), facts)


@dataclass(frozen=True)
class _Reader:
    """Turns factors by their names on disk into ours."""

    settings: dict[str, Any]
    config: ModelConfig
    where: Path

    def pairs(self, halves: dict[str, dict[str, Tensor]]) -> dict[str, Pair]:
        """Return the factors by the names of our matrices."""
        found: dict[str, Pair] = {}
        experts: dict[str, dict[int, dict[str, Pair]]] = {}
        for stem, sides in halves.items():
            if sides.keys() != {"A", "B"}:
                raise CheckpointError("one of two factors is missing", where=self.where, found=f"{stem}: {list(sides)}")
            one = re.fullmatch(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj", stem)
            stack = re.fullmatch(r"(.+\.mlp\.experts)(\.base_layer)?", stem)
            if one:
                pair = self._pair(stem, sides["A"][None], sides["B"][None])
                experts.setdefault(one[1], {}).setdefault(int(one[2]), {})[one[3]] = pair
            elif stack:
                name, pair = self._stacked(stack[1], bool(stack[2]), sides)
                found[name] = pair
            elif any(stem.endswith(f".{module}") for module in LINEAR.values()):
                found[stem] = self._pair(stem, sides["A"][None], sides["B"][None])
            else:
                raise CheckpointError("a tensor belongs to no matrix of the model", where=self.where, found=stem)
        for stem, of_expert in experts.items():
            found |= self._joined(stem, of_expert)
        return found

    def _pair(self, stem: str, a: Tensor, b: Tensor, rank: int = 0) -> Pair:
        return Pair(a, b, self._scale(stem, rank or a.shape[1]))

    def _scale(self, stem: str, rank: int) -> float:
        alpha = float(self.settings.get("lora_alpha", rank))
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?{pattern}", stem):
                alpha = float(value)
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _stacked(self, stem: str, inner: bool, sides: dict[str, Tensor]) -> tuple[str, Pair]:
        """Return a stack in peft's layout: A has rows e r + j, B has columns j E + e: there the expert runs fastest."""
        count, wide, narrow = self.config.num_experts, self.config.hidden_size, self.config.moe_intermediate_size
        a, b = sides["A"], sides["B"]
        # With both stacks adapted the inner one is gate_up; alone it has the outer name, and the shape decides.
        gate_up = inner or (a.shape[1] == wide and b.shape[0] == 2 * narrow)
        ins, outs = (wide, 2 * narrow) if gate_up else (narrow, wide)
        if a.shape[0] % count or a.shape[1] != ins or b.shape != (outs, a.shape[0]):
            raise CheckpointError(
                "stacked factors are of another shape",
                where=f"{self.where}: {stem}",
                found=(tuple(a.shape), tuple(b.shape)),
                expected=f"A [{count} r, {ins}], B [{outs}, r {count}]",
                todo="it was made for another model: another width, or another number of experts",
            )
        rank = a.shape[0] // count
        a, b = a.view(count, rank, ins), b.view(outs, rank, count).permute(2, 0, 1).contiguous()
        return f"{stem}.{'gate_up_proj' if gate_up else 'down_proj'}", self._pair(stem, a, b, rank)

    def _joined(self, stem: str, of_expert: dict[int, dict[str, Pair]]) -> dict[str, Pair]:
        """Return the stacks of experts that were written one by one."""
        expected = list(range(self.config.num_experts))
        if sorted(of_expert) != expected:
            raise CheckpointError(
                "the adapter has another number of experts",
                where=f"{self.where}: {stem}",
                found=f"{len(of_expert)} experts",
                expected=f"{len(expected)}",
                todo="an adapter of some experts must hold zeros for the others",
            )
        rows = [of_expert[expert] for expert in expected]
        if any(row.keys() != {"gate", "up", "down"} for row in rows):
            raise CheckpointError(
                "a matrix of an expert is missing", where=f"{self.where}: {stem}", found=list(rows[0])
            )
        return {
            f"{stem}.gate_up_proj": _both([row["gate"] for row in rows], [row["up"] for row in rows]),
            f"{stem}.down_proj": Pair(
                torch.cat([row["down"].a for row in rows]),
                torch.cat([row["down"].b for row in rows]),
                rows[0]["down"].scale,
            ),
        }


def _both(gates: list[Pair], ups: list[Pair]) -> Pair:
    """Return gate and up as one stack: with one A where they share it, else side by side with twice the rank."""
    gate_a, up_a = (torch.cat([pair.a for pair in pairs]) for pairs in (gates, ups))  # [E, r, d]
    gate_b, up_b = (torch.cat([pair.b for pair in pairs]) for pairs in (gates, ups))  # [E, i, r]
    if gate_a.shape == up_a.shape and torch.equal(gate_a, up_a):
        return Pair(gate_a, torch.cat([gate_b, up_b], 1), gates[0].scale)
    b = torch.cat(
        [torch.nn.functional.pad(gate_b, (0, up_b.shape[2])), torch.nn.functional.pad(up_b, (gate_b.shape[2], 0))], 1
    )
    return Pair(torch.cat([gate_a, up_a], 1), b, gates[0].scale)


def check_base(adapter: Adapter, fingerprint: str, tokenizer_sha256: str, where: object) -> None:
    """Raise CheckpointError for an adapter of another base or tokenizer; of another tool's adapter nothing is known."""
    for what, key, found in (
        ("the adapter was made for another base", "base_sha256", fingerprint),
        ("the adapter was made with another tokenizer", "tokenizer_sha256", tokenizer_sha256),
    ):
        expected = adapter.facts.get(key)
        if expected and found and expected != found:
            raise CheckpointError(
                what,
                where=where,
                found=found[:16],
                expected=str(expected)[:16],
                todo="open it on the model that it was trained on; freehold_adapter.json names it",
            )


# --- sums of adapters ------------------------------------------------------------------------------------------------


def soup(adapters: list[tuple[Adapter, float]], where: object = "soup") -> Adapter:
    """Return the exact weighted sum of adapters: A stacked, weighted B next to each other.

    CheckpointError when they are of different bases, or when one has trained the router: experts are then not the same.
    """
    first = adapters[0][0]
    for each, _ in adapters:
        if each.facts.get("base_sha256") != first.facts.get("base_sha256"):
            raise CheckpointError("the adapters are of different bases", where=where)
        if "router" in each.groups or each.facts.get("router") in ("lora", "full"):
            raise CheckpointError(
                "an adapter that trained the router cannot be added to another",
                where=where,
                todo="train with router: frozen",
            )
    names = dict.fromkeys(name for each, _ in adapters for name in each.pairs)
    pairs = {}
    for name in names:
        parts = [(each.pairs[name], weight) for each, weight in adapters if name in each.pairs]
        a = torch.cat([pair.a for pair, _ in parts], 1)
        b = torch.cat([pair.b * (pair.scale * weight) for pair, weight in parts], 2)
        pairs[name] = Pair(a, b, 1.0)
    facts = {
        **first.facts,
        "soup": [{"weight": weight, "adapter": each.facts.get("name", "")} for each, weight in adapters],
    }
    return Adapter(pairs, facts)


# --- merge -----------------------------------------------------------------------------------------------------------


@dataclass
class Merged:
    """What a merge did: matrices changed, how large the change is, and how much of that bfloat16 swallows."""

    matrices: int = 0
    change: float = 0.0
    norm: float = 0.0
    vanished: int = 0
    values: int = 0

    def record(self) -> dict[str, Any]:
        """Return the figures for a manifest."""
        return {
            "matrices": self.matrices,
            "relative_change": math.sqrt(self.change / max(self.norm, 1e-30)),
            "vanished_share": self.vanished / max(self.values, 1),
        }


def merge(name: str, tensor: Tensor, adapter: Adapter, into: Merged, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a base tensor with its factors added in float32 and rounded once; counts in `into`."""
    pair = adapter.pairs.get(name.removesuffix(".weight"))
    if pair is None:
        return tensor
    stack = tensor if tensor.ndim == 3 else tensor[None]
    out = torch.empty(stack.shape, dtype=dtype)
    for number, weight in enumerate(stack):
        exact = weight.float()
        delta = pair.scale * (pair.b[number] @ pair.a[number])
        out[number] = (exact + delta).to(dtype)
        into.change += float(delta.square().sum())
        into.norm += float(exact.square().sum())
        into.vanished += int(((out[number].float() == exact.to(dtype).float()) & (delta != 0)).sum())
        into.values += delta.numel()
    into.matrices += 1
    return out.view_as(tensor)
