"""Importance matrices from our own engine: for each weight the mean square of its inputs, by expert.

Format and meaning are those of llama.cpp's tools/imatrix (GGUF, `in_sum2` and `counts` per matrix). Sums are fp64,
where llama.cpp's are fp32. An expert that no token reached gets the mean of its layer in place of sums, with a count
of 1, and is listed under `freehold.prior`: a neutral guess that is labelled, not calibration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from freehold.checkpoint import dcp, hf
from freehold.core.errors import DataError, ExportError
from freehold.data.shards import ShardSet
from freehold.model.afmoe import Afmoe
from freehold.model.device import Device, choose_device
from freehold.model.layers import SwiGLU
from freehold.model.moe import Experts, MoE
from freehold.stages.export import samples
from freehold.stages.export.imatrix import COUNTS, PRIOR, SUMS
from freehold.stages.export.reference import watch_routing
from freehold.tokenizer import chat
from freehold.tokenizer.bpe import Tokenizer

CHUNK_TOKENS = 512
"""Tokens of a chunk, begin token included; as llama.cpp's default."""
FLOOR_TOKENS = 16
"""Fewer tokens than this for the median expert of a layer are no calibration. llama.cpp warns below; we refuse."""


@dataclass
class Collector:
    """Sums of squares and counts by the GGUF name of a weight: fp64 [matrices, inputs], int64 [matrices]."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    mass: dict[int, Tensor] = field(default_factory=dict)
    """Share of the routed weight that each expert of a layer carried, summed over tokens."""

    def add(self, name: str, inputs: Tensor, counts: Tensor | None = None) -> None:
        """Add rows of inputs [rows, n]; with `counts` [experts] they are sorted by expert."""
        squares = inputs.detach().double().square()
        if counts is None:
            counts = torch.tensor([len(squares)])
            sums = squares.sum(0, keepdim=True)
        else:
            counts = counts.cpu()
            owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
            sums = squares.new_zeros(len(counts), squares.shape[1]).index_add_(0, owner.to(squares.device), squares)
        self.sums[name] = self.sums.get(name, 0) + sums.cpu()
        self.counts[name] = self.counts.get(name, 0) + counts

    @contextmanager
    def watching(self, model: Afmoe) -> Iterator[None]:
        """Add the inputs of every quantized weight of the layers while the model runs."""
        handles = []
        for number, block in model.model.layers.items():
            for part in ("q", "k", "v", "gate", "o"):
                name = f"blk.{number}.attn_{'output' if part == 'o' else part}.weight"
                module = getattr(block.self_attn, f"{part}_proj")
                handles.append(module.register_forward_pre_hook(self._linear(name)))
            stem, mlp = f"blk.{number}.ffn", block.mlp
            if isinstance(mlp, MoE):
                handles.append(mlp.shared_experts.register_forward_pre_hook(self._dense(stem, "_shexp")))
                handles.append(mlp.experts.register_forward_pre_hook(self._experts(stem)))
                handles.append(mlp.router.register_forward_hook(self._routed(int(number))))
            elif isinstance(mlp, SwiGLU):
                handles.append(mlp.register_forward_pre_hook(self._dense(stem, "")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _linear(self, name: str) -> Any:
        return lambda module, inputs: self.add(name, inputs[0].flatten(0, -2))

    def _dense(self, stem: str, end: str) -> Any:
        def add(module: SwiGLU, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            for part in ("gate", "up"):
                self.add(f"{stem}_{part}{end}.weight", x)
            inner = nn.functional.silu(x @ module.gate_proj.weight.T) * (x @ module.up_proj.weight.T)
            self.add(f"{stem}_down{end}.weight", inner)

        return add

    def _experts(self, stem: str) -> Any:
        def add(module: Experts, inputs: tuple[Tensor, ...]) -> None:
            rows, counts = inputs
            for part in ("gate", "up"):
                self.add(f"{stem}_{part}_exps.weight", rows, counts)
            parts = []
            for weight, group in zip(module.gate_up_proj, rows.split(counts.tolist()), strict=True):
                gate, up = (group @ weight.T).chunk(2, dim=-1)
                parts.append(nn.functional.silu(gate) * up)
            self.add(f"{stem}_down_exps.weight", torch.cat(parts), counts)

        return add

    def _routed(self, layer: int) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
            logits, weights, chosen = outputs
            mass = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
            mass.index_add_(0, chosen.flatten(), weights.flatten().double())
            self.mass[layer] = self.mass.get(layer, 0) + mass.cpu()

        return add


@torch.inference_mode()
def collect(model: Afmoe, chunks: Sequence[Sequence[int]]) -> Collector:
    """Run a model over chunks of ids and return what its weights saw."""
    collector = Collector()
    device = next(model.parameters()).device
    with collector.watching(model.eval()):
        for ids in chunks:
            model.hidden(torch.tensor([list(ids)], device=device))
    return collector


def make_chunks(tokenizer: Tokenizer, text: Sequence[int], tokens: int, longest: int) -> list[list[int]]:
    """Return chunks that begin as every text does: sample conversations through the template, then held-out text.

    `text` is the ids of the latter, cut into chunks of at most `CHUNK_TOKENS` and `longest`; `tokens` bounds them all.
    """
    size = min(CHUNK_TOKENS, longest)
    chunks = [chat.render_ids(tokenizer, messages, tools=tools)[0][:size] for messages, tools in samples.CALIBRATION]
    left, at = tokens - sum(map(len, chunks)), 0
    while left > 1 and at < len(text):
        taken = min(size, left) - len(tokenizer.prefix)
        chunks.append([*tokenizer.prefix, *text[at : at + taken]])
        at, left = at + taken, left - len(chunks[-1])
    return [chunk for chunk in chunks if len(chunk) > 1]


@torch.inference_mode()
def routed_tokens(model: Afmoe, chunks: Sequence[Sequence[int]]) -> np.ndarray:
    """Return how many tokens of each chunk every expert of every layer gets: int64 [chunks, layers x experts]."""
    device, rows = next(model.parameters()).device, []
    for ids in chunks:
        with watch_routing(model) as seen:
            model.hidden(torch.tensor([list(ids)], device=device))
        rows.append(torch.cat([torch.bincount(chosen.flatten(), minlength=bias.numel()) for _, bias, chosen in seen]))
    return torch.stack(rows).cpu().numpy()


def rare_first(counts: np.ndarray) -> list[int]:
    """Return an order of chunks [chunks, experts]: next is always the one that reaches the least served experts most.

    Greedy: a token for an expert that has seen n tokens so far is worth 1 / (1 + n).
    """
    seen, left, order = np.zeros(counts.shape[1]), list(range(len(counts))), []
    while left:
        best = left.pop(int(np.argmax(counts[left] @ (1 / (1 + seen)))))
        seen += counts[best]
        order.append(best)
    return order


def tokens_until(counts: np.ndarray, lengths: Sequence[int], floor: int) -> int | None:
    """Return how many tokens, in this order of chunks, until every reachable expert has seen `floor`; None = never.

    Experts that all chunks together give fewer than `floor` are not reachable.
    """
    total = counts.cumsum(0)
    reachable = total[-1] >= floor
    if not reachable.any():
        return None
    return int(np.cumsum(lengths)[(total[:, reachable] >= floor).all(1).argmax()])


def choose(
    model: Afmoe, chunks: list[list[int]], tokens: int, floor: int
) -> tuple[list[list[int]], dict[str, int | None]]:
    """Keep the chunks that serve rare experts first, up to `tokens`; return them and what the choice saves.

    The figures: tokens until every reachable expert has seen `floor`, in the order of the text and in ours.
    """
    counts, lengths = routed_tokens(model, chunks), np.array([len(chunk) for chunk in chunks])
    order = rare_first(counts)
    saved = {
        "tokens_to_floor_in_text_order": tokens_until(counts, lengths.tolist(), floor),
        "tokens_to_floor_rare_first": tokens_until(counts[order], lengths[order].tolist(), floor),
    }
    within = np.cumsum(lengths[order]) <= tokens
    # In the order of the text again: the sums do not depend on it, and a report is easier to follow.
    return [chunks[i] for i in sorted(np.array(order)[within].tolist())], saved


def report(collector: Collector, floor: int) -> dict[str, Any]:
    """Return tokens per expert and layer, idle and seldom experts, and the share of routed weight."""
    layers = {}
    for name, counts in sorted(collector.counts.items()):
        if name.endswith("ffn_up_exps.weight"):
            layer, values = int(name.split(".")[1]), counts.numpy()
            mass = collector.mass[layer].numpy()
            layers[layer] = {
                "tokens": values.tolist(),
                "min": int(values.min()),
                "p5": float(np.quantile(values, 0.05)),
                "median": float(np.median(values)),
                "idle": np.flatnonzero(values == 0).tolist(),
                "seldom": np.flatnonzero((values > 0) & (values < floor)).tolist(),
                "mass": [round(float(share), 5) for share in mass / max(mass.sum(), 1e-30)],
            }
    return {"floor_tokens": floor, "layers": {str(layer): layers[layer] for layer in sorted(layers)}}


def check_floor(found: dict[str, Any]) -> None:
    """Raise ExportError when the median expert of a layer saw fewer tokens than the floor."""
    layer, worst = min(found["layers"].items(), key=lambda item: item[1]["median"])
    if worst["median"] < found["floor_tokens"]:
        raise ExportError(
            "too little text to calibrate the experts", where=f"layer {layer}",
            found=f"the median expert saw {worst['median']:g} tokens, {len(worst['idle'])} experts none",
            expected=f"at least {found['floor_tokens']}", todo="give more text (--tokens, --text), or a lower floor",
        )  # fmt: skip


def with_prior(collector: Collector) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Return float32 sums and counts by weight, and which idle experts have the mean of their layer instead."""
    values, filled = {}, []
    for name in sorted(collector.sums):
        sums, counts = collector.sums[name].clone(), collector.counts[name].clone()
        idle = counts == 0
        if idle.any():
            sums[idle] = sums.sum(0) / counts.sum().clamp(min=1)
            counts[idle] = 1
            filled += [f"{name}:{expert}" for expert in np.flatnonzero(idle.numpy())]
        values[name] = sums.numpy().astype(np.float32), counts.numpy().astype(np.float32)
    return values, filled


def write_imatrix(path: Path, collector: Collector, *, dataset: str, chunks: int) -> list[str]:
    """Write an importance matrix in GGUF form; return the experts that have the prior only."""
    values, filled = with_prior(collector)
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", CHUNK_TOKENS)
    if filled:
        writer.add_array(PRIOR, filled)
    for name, (sums, counts) in values.items():
        writer.add_tensor(name + SUMS, sums)
        writer.add_tensor(name + COUNTS, counts[:, None])
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(path)
    return filled


def held_out(folder: Path) -> list[int]:
    """Return the ids of all held-out text of a `tokenize` stage, source after source."""
    shards = ShardSet.load(folder / "tokens")
    parts = [shard.tokens(0, shard.counts["tokens"]) for (_, split), shard in shards.shards.items() if split != "train"]
    return [int(i) for part in parts for i in part]


def calibrate(
    model: Afmoe,
    tokenizer: Tokenizer,
    text: Sequence[int],
    path: Path,
    *,
    dataset: str,
    tokens: int,
    floor: int,
    candidates: int = 1,
) -> dict[str, Any]:
    """Write the importance matrix of a model on some text; return the report. ExportError for too little text.

    With `candidates` above 1, that many times `tokens` are read for their routing, and the chunks that reach rare
    experts are kept.
    """
    chunks = make_chunks(tokenizer, text, tokens * candidates, model.config.max_position_embeddings)
    saved: dict[str, int | None] = {}
    if candidates > 1:
        chunks, saved = choose(model, chunks, tokens, floor)
    collector = collect(model, chunks)
    found = report(collector, floor)
    check_floor(found)
    filled = write_imatrix(path, collector, dataset=dataset, chunks=len(chunks))
    return {
        "file": path.name,
        "dataset": dataset,
        "chunks": len(chunks),
        "tokens": sum(map(len, chunks)),
        "prior_only": filled,
        **saved,
        **found,
    }


def calibrate_folder(
    folder: Path,
    path: Path,
    *,
    texts: Sequence[Path],
    tokenized: Path | None,
    tokens: int,
    floor: int,
    candidates: int,
    device: Device,
) -> dict[str, Any]:
    """Write the importance matrix of a model folder, on texts, or without any on the held-out text of a run.

    Errors as in `read_model`, `load_hf` and `calibrate`; DataError for a text that is not UTF-8.
    """
    config, state = dcp.read_model(folder) if (folder / dcp.STATE).exists() else hf.load_hf(folder)
    with torch.device("meta"):
        model = Afmoe(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    model.to(choose_device(device, "--device"))
    tokenizer = Tokenizer.load(folder)
    try:
        ids = [i for text in texts for i in tokenizer.encode(text.read_text(encoding="utf-8"))]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("a text cannot be read", where="--text", found=error, expected="UTF-8 files") from error
    if not texts and tokenized is not None:
        ids = held_out(tokenized)
    dataset = ", ".join(text.name for text in texts) or "held-out text of the run"
    dataset += ", and sample conversations"
    return calibrate(model, tokenizer, ids, path, dataset=dataset, tokens=tokens, floor=floor, candidates=candidates)
