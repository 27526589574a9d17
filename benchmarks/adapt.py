"""A step of expert LoRA compared with transformers and peft, interleaved in one process; our own steps to each other.

Ours: factors of rank 8 on the routed experts over a bfloat16 base, over the same in Q4_0 blocks, and full tuning.
Theirs: transformers' AfmoeForCausalLM in bfloat16 with peft's `target_parameters` on the stacked experts. Forward,
backward and AdamW on the same batch of 2,048 tokens. Both start from factors of zeros, so the first losses must agree.

    python benchmarks/adapt.py --rounds 5 --json benchmarks/results/adapt.json      speed, two minutes
    python benchmarks/adapt.py --memory nano                                         one QLoRA step on Nano's full shape
    python benchmarks/adapt.py --memory narrow                                       the same on a shape of a tenth
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import psutil
import torch
from common import environment, interleaved, middle, write
from torch import nn

from freehold.kernels import grouped
from freehold.kernels.grouped import Weights
from freehold.losses.cross_entropy import chunked_loss
from freehold.model import adapted
from freehold.model.afmoe import Afmoe
from freehold.model.config import PRESETS, ModelConfig, to_hf_dict
from freehold.optim.build import Optimizers
from freehold.optim.config import OptimConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 8, "num_dense_layers": 1, "num_experts": 32,
    "num_experts_per_tok": 4, "moe_intermediate_size": 128, "intermediate_size": 768, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 128, "max_position_embeddings": 512,
}  # fmt: skip
ROWS, TOKENS, RANK = 4, 512, 8
RANKS = {"experts.gate_up": RANK, "experts.down": RANK}
SGD_FREE = OptimConfig(matrices="adamw", lr=1e-4)


def batch(vocabulary: int, rows: int = ROWS, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random ids and the ids that follow them."""
    ids = torch.randint(32, vocabulary, (rows, tokens + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def our_step(model: Afmoe, ids: torch.Tensor, targets: torch.Tensor) -> Callable[[], float]:
    """Return a step of whatever of a model trains: masters in float32, compute weights in bfloat16."""
    masters = {n: p.detach().float().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    copies = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for master in masters.values():
        master.grad_dtype = None
    optimizers = Optimizers(masters, SGD_FREE, copies)

    def step() -> float:
        hidden = model.hidden(ids)
        loss = chunked_loss(hidden, model.lm_head.weight, targets, scale=1 / targets.numel())
        loss.total.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                masters[name].grad, parameter.grad = parameter.grad, None
        optimizers.step(1.0)
        return float(loss.cross_entropy) / targets.numel()

    return step


def ours(config: ModelConfig, state: dict[str, torch.Tensor], quantize: str, ranks: dict[str, int]) -> Afmoe:
    """Return a model with factors; without ranks every parameter trains."""
    model = Afmoe(config)
    model.load_state_dict(state)
    model.to_compute(torch.bfloat16)
    if quantize:
        adapted.quantize_experts(model, quantize)
    if ranks:
        adapted.attach(model, ranks, 32, torch.Generator().manual_seed(0))
        model.to_compute(torch.bfloat16)
    return model.train()


def their_step(config: ModelConfig, state: dict[str, torch.Tensor], ids: torch.Tensor, targets: torch.Tensor) -> Any:
    """Return a step of transformers with peft on the stacked experts."""
    import peft
    import transformers

    theirs = transformers.AfmoeConfig(**{k: v for k, v in to_hf_dict(config).items() if k not in ("architectures",)})
    model = transformers.AfmoeForCausalLM(theirs)
    model.load_state_dict(state, strict=False)
    model = model.to(torch.bfloat16)
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, settings)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> float:
        logits = wrapped(ids).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def speed(rounds: int) -> dict[str, Any]:
    """Time the steps in turn; return medians and ratios."""
    config = ModelConfig(**SHAPE)
    model = Afmoe(config)
    model.init_weights(torch.Generator().manual_seed(0))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids, targets = batch(config.vocab_size)
    steps: dict[str, Callable[[], float]] = {
        "lora": our_step(ours(config, state, "", RANKS), ids, targets),
        "qlora": our_step(ours(config, state, "Q4_0", RANKS), ids, targets),
        "full": our_step(ours(config, state, "", {}), ids, targets),
    }
    steps["peft"] = their_step(config, state, ids, targets)
    first = {name: step() for name, step in steps.items()}
    if abs(first["lora"] - first["peft"]) > 0.02:
        raise SystemExit(f"not the same computation: {first}")
    found = interleaved(steps, rounds)
    seconds = {name: middle(one["seconds"] for one in each) for name, each in found.items()}
    middles = {name: each["median"] for name, each in seconds.items()}
    return {
        "shape": SHAPE,
        "first_losses": first,
        "seconds": seconds,
        "tokens_per_s": {name: ids.numel() / value for name, value in middles.items()},
        "peft_over_lora": middles["peft"] / middles["lora"],
        "lora_over_full": middles["lora"] / middles["full"],
        "qlora_over_lora": middles["qlora"] / middles["lora"],
        "foreign_cores": middle(one["foreign_cores"] for each in found.values() for one in each),
    }


def random_blocks(stacks: int, outs: int, ins: int, kind: str) -> Weights:
    """Return random blocks of a type without making the numbers first: scales near 1e-2, levels uniform."""
    data = torch.randint(0, 256, (stacks, outs, grouped.block_bytes(kind, ins)), dtype=torch.uint8)
    view = data.view(stacks, outs, -1, 18)
    view[..., 0], view[..., 1] = 0x1F, 0x21  # fp16 0.01
    return Weights(data, outs, ins, grouped.FORMS[kind])


def memory(name: str, tokens: int) -> dict[str, Any]:
    """Take one QLoRA step on a shape with random weights; return the peak memory of this process."""
    config = PRESETS["nano"]
    if name == "narrow":
        config = config.model_copy(update={
            "num_experts": 32, "num_hidden_layers": 12, "layer_types": config.layer_types[:12], "vocab_size": 32768
        })  # fmt: skip
    with torch.device("meta"):
        model = Afmoe(config)
    generator = torch.Generator().manual_seed(0)
    for path, module in model.named_modules():
        for last, parameter in list(module.named_parameters(recurse=False)):
            if path.endswith(".experts"):
                stacks, outs, ins = parameter.shape
                delattr(module, last)
                setattr(module, last.replace("_proj", "_blocks"), random_blocks(stacks, outs, ins, "Q4_0"))
                continue
            values = torch.ones(parameter.shape)
            if parameter.ndim > 1:
                values = (torch.randn(parameter.shape, generator=generator) * config.initializer_range).bfloat16()
            setattr(module, last, nn.Parameter(values, requires_grad=False))
    for layer in model.moe_layers().values():
        layer.register_buffer("expert_bias", torch.zeros(config.num_experts))
    of_expert = max(1, 16 // config.num_experts_per_tok)
    adapted.attach(model, {"experts.gate_up": of_expert, "experts.down": of_expert}, 32, generator)
    model.to_compute(torch.bfloat16).train()
    model.recompute = True
    loaded = psutil.Process().memory_info().rss
    ids, targets = batch(config.vocab_size, 1, tokens)
    step = our_step(model, ids, targets)
    start = time.perf_counter()
    loss = step()
    return {
        "shape": name,
        "parameters": sum(p.numel() for p in model.parameters())
        + sum(
            b.outs * b.ins * len(b.data)
            for layer in model.moe_layers().values()
            for b in (layer.experts.gate_up_blocks, layer.experts.down_blocks)
            if b is not None
        ),
        "tokens": tokens,
        "loss": loss,
        "seconds": time.perf_counter() - start,
        "loaded_bytes": loaded,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", choices=["nano", "narrow"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        result = {**environment(), **memory(args.memory, args.tokens)}
    else:
        result = {**environment("peft", "transformers"), **speed(args.rounds)}
    write(args.json, result)
    for key, value in result.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
