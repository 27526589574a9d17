"""What one CUDA device does: the tests marked cuda, training steps next to transformers, decoding, memory against plan.

Run by `gpu.sh`, which sets the environment. Each section is a process of its own with a time limit, so that one that
runs out of memory or hangs costs only itself. What a section needs and this Python lacks is named, and only that
section, or its peer, is skipped. The result is written after each section.

    tests       pytest -m cuda tests/cuda
    step_S      8 layers, d 256, 32 experts: ours eager and compiled, transformers with torch.compile, same batch
    step_M      12 layers, d 512, 128 experts
    step_nano   the width of Trinity Nano (d 1024, 128 experts of which 8, vocabulary 200,192) and 6 of its 56 layers
    decode      the Nano-width slice in bfloat16: tokens a second of 1 and 32 requests, next to transformers' generate

Steps of ours are those of the trainer: forward, backward, clip, AdamW, expert balancing. The peak memory of each is
compared with the planner's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOTAL_S = 480
"""All sections together."""
LIMITS = {"tests": 150, "step_S": 75, "step_M": 90, "step_nano": 110, "decode": 75}
"""Seconds of a section."""
NEEDED = ("torch", "numpy", "pydantic", "yaml", "psutil", "safetensors", "pyarrow")
NEEDS = {"tests": (*NEEDED, "pytest", "tokenizers", "jinja2")} | dict.fromkeys(list(LIMITS)[1:], NEEDED)
PEERS = {"tests": ("transformers", "fastapi", "httpx")} | dict.fromkeys(list(LIMITS)[1:], ("transformers",))
"""What only a part of a section needs."""
ROOT = Path(__file__).resolve().parents[1]


def missing(names: tuple[str, ...]) -> list[str]:
    """Return those of some packages that this Python cannot import."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sections", default="", help="names, separated by blanks (default: all)")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # a child: run this section, print its result
    args = parser.parse_args()
    if args.one:
        print(json.dumps(SECTIONS[args.one](args.device)), flush=True)
        os._exit(0)  # the compiler's worker processes take long to end by themselves
    wanted = args.sections.split() or list(LIMITS)
    if unknown := set(wanted) - set(LIMITS):
        parser.error(f"no such section: {', '.join(sorted(unknown))} (there are {', '.join(LIMITS)})")
    if lacking := missing(("torch",)):
        parser.error(f"this Python has no {lacking[0]}; PYTHON= names another one")
    result: dict[str, Any] = {"machine": machine(args.device), "sections": {}}
    started = time.monotonic()
    for name in wanted:
        left = TOTAL_S - (time.monotonic() - started)
        result["sections"][name] = found = in_child(name, args.device, min(LIMITS[name], left))
        print(f"{name}: {summary(found)}", flush=True)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(found["status"] == "failed" for found in result["sections"].values()))


def machine(device: str) -> dict[str, Any]:
    """Return the device and the versions; ends the script where there is no such device."""
    import torch

    names = ("transformers", "pytest", "fastapi", *NEEDED)
    result = {"device": device, "python": sys.version.split()[0], "torch": torch.__version__}
    result |= {"missing": missing(tuple(dict.fromkeys(names))), "cuda": torch.version.cuda}
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("there is no CUDA device here; DEVICE=cpu rehearses")
        properties = torch.cuda.get_device_properties(0)
        result |= {"name": properties.name, "memory_bytes": properties.total_memory}
        result |= {"capability": f"{properties.major}.{properties.minor}", "devices": torch.cuda.device_count()}
    return result


def in_child(name: str, device: str, limit_s: float) -> dict[str, Any]:
    """Run a section in a process of its own; return its result and a status: ok, failed, skipped, late."""
    if lacking := missing(NEEDS[name]):
        return {"status": "skipped", "missing": lacking}
    if limit_s < 10:
        return {"status": "skipped", "why": f"the {TOTAL_S} s of the script are used up"}
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, __file__, "--one", name, "--device", device]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        try:
            output = child.communicate(timeout=limit_s)[0]
            status = "failed" if child.returncode else "ok"
        except subprocess.TimeoutExpired:
            # Compilers and pytest have children: the whole session ends.
            os.killpg(child.pid, 9)
            output, status = child.communicate()[0], "late"
        errors.seek(0)
        last = errors.read().splitlines()[-15:]
    found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - begun, 1)}
    if lacking := missing(PEERS[name]):
        found["skipped for lack of"] = lacking
    with contextlib.suppress(ValueError, IndexError):
        found |= json.loads(output.splitlines()[-1])
    return found if found["status"] == "ok" else found | {"last_lines": last}


def summary(found: dict[str, Any]) -> str:
    """Return a section's result in a line."""
    shown = {k: v for k, v in found.items() if k in ("seconds", "tokens_per_s", "ratio", "passed", "missing", "why")}
    return " ".join([found["status"], *(f"{name}={value}" for name, value in shown.items())])


# -- sections ---------------------------------------------------------------------------------------------------------


def run_tests(device: str) -> dict[str, Any]:
    """Run the tests marked cuda; failures are named."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "tests/cuda", "-q", "-rfEs", "-p", "no:cacheprovider"]
    environment = {**os.environ, "FREEHOLD_TEST_DEVICE": device}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    named = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    for line in lines:
        # The progress lines have one letter a test; a quiet pytest has no last line of counts.
        if line.strip() and set(line.split()[0]) <= set(".FEsxX") and line.rstrip().endswith("%]"):
            for letter, word in zip(".FsE", counts, strict=True):
                counts[word if word != "failed" else "failed"] += line.split()[0].count(letter)
    problems = {} if done.returncode == 0 else {"status": "failed", "output": lines[-60:]}
    return {**counts, "named": named, **problems}


def shape_of(name: str, device: str) -> tuple[Any, int, int]:
    """Return (model config, rows, tokens of a row) of a section; tiny ones for a rehearsal."""
    from train_step import SHAPES as STEPS

    from freehold.model.config import SHAPES, ModelConfig

    if name == "nano":
        # All widths, the vocabulary and the router are Nano's; two dense layers and one period of four MoE layers.
        shape = ModelConfig(**{**SHAPES["nano"], "num_hidden_layers": 6, "max_position_embeddings": 8192})
        rows, tokens = 8, 2048
    else:
        shape, rows, tokens = ModelConfig(**STEPS[name][0]), *{"S": (64, 512), "M": (32, 1024)}[name]
    if device == "cpu":
        small = {"num_hidden_layers": 2, "num_experts": 8, "num_dense_layers": 1, "vocab_size": 512, "hidden_size": 64}
        small |= {"intermediate_size": 128, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "layer_types": None}
        small |= {"max_position_embeddings": 128, "sliding_window": 32, "head_dim": 32}
        return ModelConfig(**{**shape.model_dump(), **small}), 2, 64
    return shape, rows, tokens


def training_step(name: str) -> Callable[[str], dict[str, Any]]:
    """Return the section that times a step of one shape."""
    return lambda device: time_step(*shape_of(name, device), device)


def time_step(shape: Any, rows: int, tokens: int, device: str) -> dict[str, Any]:
    """Time our step, eager and compiled, and transformers' with torch.compile, on the same batch and weights."""
    import numpy as np
    import torch

    from freehold.data.packing import text_batch
    from freehold.model.config import flops_per_token
    from freehold.trainer.monitor import gemm_flops_per_s

    repeats = 10 if device == "cuda" else 2
    rng = np.random.default_rng(0)
    batch = text_batch(rng.integers(2, shape.vocab_size, (rows, tokens + 1)).astype(np.uint32), 0, 0)
    size = 8192 if device == "cuda" else 1024
    peak, found = gemm_flops_per_s(torch.bfloat16, device, size=size, seconds=1), {}
    weights: dict[str, Any] = {}
    for who, compiled in (("ours", False), ("ours+compile", True)):
        found[who] = time_ours(shape, batch, repeats, device, compiled, weights)
    planned = planned_bytes(shape, rows, tokens)
    found["transformers"] = time_peer(shape, weights, batch, repeats, device)
    del weights
    flops = flops_per_token(shape, tokens) * rows * tokens
    middle = {who: statistics.median(f["seconds"]) for who, f in found.items() if "seconds" in f}
    ours = min(middle[who] for who in ("ours", "ours+compile") if who in middle)
    result = {
        "shape": {"rows": rows, "tokens": tokens, **shape.model_dump(mode="json", exclude={"layer_types"})},
        "runs": found,
        "gemm_flops_per_s": peak,
        "tokens_per_s": {who: round(rows * tokens / s) for who, s in middle.items()},
        "mfu": {who: flops / s / peak for who, s in middle.items()},
        "memory": {"planned_bytes": planned, "measured_bytes": found["ours"].get("peak_bytes")},
    }
    if "transformers" in middle:
        result["ratio"] = round(middle["transformers"] / ours, 3)
        close = abs(found["ours"]["first_loss"] - found["transformers"]["first_loss"]) < 2e-2
        if not close:
            result |= {"status": "failed", "why": "the first losses differ"}
    return result


def time_ours(
    shape: Any, batch: Any, repeats: int, device: str, compiled: bool, weights: dict[str, Any]
) -> dict[str, Any]:
    """Time our step; the first weights go into `weights` if it is empty. A compiler that fails is an answer, too."""
    import train_step

    reset_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        rows = len(batch.input_ids)
        trainer = train_step.ours(shape, "bfloat16", rows, Path(folder), device=device, compiled=compiled)
        # Copies: on a CPU they would be the tensors that the steps below change.
        if not weights:
            for name, tensor in trainer.checkpoints.tensors()["model"].items():
                weights[name] = tensor.detach().float().cpu().clone()
        try:
            first = trainer.train_step(batch)["loss/mean"]
            seconds = repeat(lambda: trainer.train_step(batch), repeats, device)
        except Exception as problem:
            if not compiled:
                raise
            return {"error": f"{type(problem).__name__}: {str(problem)[:300]}"}
        return {"first_loss": first, "seconds": seconds, **peak_bytes(device)}


def time_peer(shape: Any, weights: Any, batch: Any, repeats: int, device: str) -> dict[str, Any]:
    """Time transformers' step, compiled with grouped products, or why it could not be."""
    import train_step

    if missing(("transformers",)):
        return {"error": "transformers is not installed"}
    problems = []
    # Compiled first: the fastest that was found on CPUs; the others are for versions that cannot compile it.
    for experts, compiled in (("grouped_mm", True), ("grouped_mm", False), ("eager", False)):
        try:
            reset_peak(device)
            theirs = train_step.Theirs(shape, weights, experts, compiled, device=device)
            first = theirs.step(batch, autocast=True)
            seconds = repeat(lambda t=theirs: t.step(batch, autocast=True), repeats, device)
        except Exception as problem:  # noqa: PERF203  # a candidate that cannot run is not the best one
            problems.append(f"{experts}{'+compile' * compiled}: {type(problem).__name__}: {str(problem)[:200]}")
            theirs = None
            continue
        how = {"experts": experts, "compiled": compiled, "problems": problems}
        return {"first_loss": first, "seconds": seconds, **how, **peak_bytes(device)}
    return {"error": problems}


def decode(device: str) -> dict[str, Any]:
    """Time greedy decoding of 1 and 32 requests, ours and transformers', on the Nano-width slice in bfloat16."""
    import torch

    from freehold.infer.engine import Engine
    from freehold.infer.sampler import Sampling
    from freehold.model.afmoe import Afmoe

    shape, _, _ = shape_of("nano", device)
    new = 128 if device == "cuda" else 8
    model = Afmoe(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.to_compute(torch.bfloat16).requires_grad_(False).to(device).eval()
    engine = Engine(model)
    rows: dict[str, Any] = {}
    for requests in (1, 32):
        prompts = [[2 + (7 * i + j) % 500 for j in range(32)] for i in range(requests)]
        sampling = Sampling(temperature=0.0, max_tokens=new)
        seconds = repeat(lambda p=prompts, s=sampling: engine.generate(p, s), 2, device)
        rows[f"ours_{requests}"] = {"seconds": seconds, "tokens_per_s": requests * new / min(seconds)}
    if not missing(("transformers",)):
        rows |= peer_decode(shape, model, new, device)
    return {"new_tokens": new, "runs": rows, "tokens_per_s": {n: round(r["tokens_per_s"]) for n, r in rows.items()}}


def peer_decode(shape: Any, model: Any, new: int, device: str) -> dict[str, Any]:
    """Time transformers' generate with the same weights."""
    import torch
    from transformers import AfmoeConfig, AfmoeForCausalLM

    from freehold.model.config import to_hf_dict

    hf = AfmoeConfig(**{k: v for k, v in to_hf_dict(shape, "bfloat16").items() if k != "architectures"})
    theirs = AfmoeForCausalLM(hf).to(torch.bfloat16)
    theirs.load_state_dict(model.state_dict())
    theirs = theirs.to(device).eval()
    rows = {}
    for requests in (1, 32):
        ids = torch.tensor([[2 + (7 * i + j) % 500 for j in range(32)] for i in range(requests)], device=device)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        mask = torch.ones_like(ids)
        seconds = repeat(lambda x=ids, m=mask, s=settings: theirs.generate(x, attention_mask=m, **s), 2, device)
        rows[f"transformers_{requests}"] = {"seconds": seconds, "tokens_per_s": requests * new / min(seconds)}
    return rows


# -- measuring --------------------------------------------------------------------------------------------------------


def repeat(step: Callable[[], object], times: int, device: str) -> list[float]:
    """Return the seconds of each of some repetitions, after two that are not kept; the device is waited for."""
    import torch

    seconds = []
    for number in range(times + 2):
        begun = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - begun)
    return seconds


def reset_peak(device: str) -> None:
    """Give memory back and start counting the peak again."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> dict[str, int]:
    """Return the device's peak memory since the last reset; nothing on a CPU."""
    import torch

    return {"peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {}


def planned_bytes(shape: Any, rows: int, tokens: int) -> float:
    """Return the peak memory that the planner gives for a step on one device."""
    from freehold.planner.config import PlanConfig
    from freehold.planner.estimate import estimate

    batch = {"context_tokens": tokens, "sequences": rows, "micro_sequences": rows}
    plan = PlanConfig(model=shape, batch=batch, matrices="adamw", machine={"device": "h200"})
    return float(estimate(plan, judge=False)["figures"]["memory/peak"].value)


SECTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "tests": run_tests,
    "step_S": training_step("S"),
    "step_M": training_step("M"),
    "step_nano": training_step("nano"),
    "decode": decode,
}

if __name__ == "__main__":
    raise SystemExit(main())
