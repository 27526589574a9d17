"""Measure how fast the engine answers, next to llama.cpp, transformers and vLLM, from the same weights.

    python benchmarks/inference.py [--llama BUILD/bin] [--sections decode,prefill,context,quantized]

The model has shape (b): 109 M parameters of which a token uses 22 M, random weights in bfloat16. Every engine runs in a
process of its own, in the order A B B A; a figure is the median of its rounds, and a ratio is taken within a round. The
cores that others kept busy are recorded with each round. llama.cpp is `llama-batched-bench` of a folder built from
source (`cmake -DGGML_NATIVE=ON`), the better one of flash attention on and off; without `--llama` it is the prebuilt
`xllamacpp`, one stream only. `--peers transformers` and `--vllm PYTHON` (an interpreter that has vLLM) are optional.
The result is written after each section.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import psutil

from freehold.core.environment import SETTINGS

SHAPE = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "moe_intermediate_size": 256,
    "num_hidden_layers": 8, "num_dense_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "num_experts": 32, "num_experts_per_tok": 2, "sliding_window": 256, "max_position_embeddings": 131_072,
}  # fmt: skip
DECODE = [{"streams": n, "prompt": 16, "answer": k} for n, k in ((1, 48), (8, 16), (32, 8))]
CONTEXT_ANSWER = 24


def make_files(folder: Path, types: list[str]) -> None:
    """Write the model in Hugging Face form and as GGUF files of some types."""
    import torch

    from freehold.checkpoint.hf import save_hf
    from freehold.core.log import Log
    from freehold.model.afmoe import Afmoe
    from freehold.model.config import ModelConfig
    from freehold.stages.export import samples
    from freehold.stages.export.files import write_files
    from freehold.tokenizer import bpe

    config, hf = ModelConfig.model_validate(SHAPE), folder / "hf"
    model = Afmoe(config)
    model.init_weights(torch.Generator().manual_seed(0))
    hf.mkdir(parents=True)
    save_hf(hf, config, model.state_dict(), dtype=torch.bfloat16)
    texts = [*samples.KINDS.values(), *samples.SCRIPTS.values()]
    bpe.train(texts * 2, 600, Log(quiet=True)).save(hf)
    write_files(hf, config, {kind: folder / f"{kind}.gguf" for kind in types}, name="Bench")


# -- ours, in this process ------------------------------------------------------------------------------------------


def ours(model: Path, cases: list[dict[str, int]], threads: int) -> list[dict[str, float]]:
    """Return prompt and answer tokens a second of each case."""
    engine, found = open_engine(model, max(c["prompt"] + c["answer"] for c in cases) + 8, threads), []
    # After the engine, which sets the process up before PyTorch is loaded.
    import torch

    from freehold.infer.sampler import Sampling

    for case in [{"streams": 1, "prompt": 16, "answer": 4}, *cases]:
        generator = torch.Generator().manual_seed(case["prompt"])
        prompts = torch.randint(8192, (case["streams"], case["prompt"]), generator=generator).tolist()
        for prompt in prompts:
            engine.submit(prompt, Sampling(temperature=0, max_tokens=case["answer"] + 1))
        began = time.perf_counter()
        # The first token of each comes with the prompt, as llama.cpp counts it.
        while engine.queue.waiting or any(r.pending > 1 for r in engine.queue.running):
            engine.step()
        between = time.perf_counter()
        while engine.step():
            pass
        ended = time.perf_counter()
        tokens = case["streams"] * case["prompt"], case["streams"] * case["answer"]
        found.append({"prefill": tokens[0] / (between - began), "decode": tokens[1] / (ended - between)})
    return found[1:]


def open_engine(model: Path, limit_tokens: int, threads: int) -> Any:
    """Return our engine for a folder or a GGUF file."""
    import freehold

    return freehold.load(model, device="cpu", dtype="bfloat16", threads=threads, limit_tokens=limit_tokens).engine


def theirs_transformers(model: Path, cases: list[dict[str, int]], threads: int) -> list[dict[str, float]]:
    """Return the same of transformers' own generation, greedy, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded, found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval(), []
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def seconds(ids: Any, tokens: int) -> float:
        began = time.perf_counter()
        loaded.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        return time.perf_counter() - began

    with torch.inference_mode():
        for case in [{"streams": 1, "prompt": 16, "answer": 2}, *cases]:
            ids = torch.randint(8192, (case["streams"], case["prompt"]))
            first, rest = seconds(ids, 1), seconds(ids, case["answer"] + 1)
            decode = case["streams"] * case["answer"] / max(rest - first, 1e-9)
            found.append({"prefill": ids.numel() / first, "decode": decode})
    return found[1:]


def theirs_vllm(model: Path, cases: list[dict[str, int]], threads: int) -> list[dict[str, float]]:
    """Return the same of vLLM; runs in an interpreter that has it."""
    from vllm import LLM, SamplingParams

    longest = max(c["prompt"] + c["answer"] for c in cases) + 8
    engine, found = LLM(str(model), dtype="bfloat16", max_model_len=longest, enable_prefix_caching=False), []
    for number, case in enumerate([{"streams": 1, "prompt": 16, "answer": 2}, *cases]):
        taken = []
        for tokens in (1, case["answer"] + 1):
            prompts = [{"prompt_token_ids": [(7 * i + s + number) % 8000 for i in range(case["prompt"])]}
                       for s in range(case["streams"])]  # fmt: skip
            began = time.perf_counter()
            engine.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
            taken.append(time.perf_counter() - began)
        n = case["streams"]
        found.append({"prefill": n * case["prompt"] / taken[0], "decode": n * case["answer"] / (taken[1] - taken[0])})
    return found[1:]


def theirs_wheel(model: Path, cases: list[dict[str, int]], threads: int) -> list[dict[str, float]]:
    """Return the same of the prebuilt llama.cpp, which takes one stream here."""
    from freehold.infer.llama import Llama

    found = []
    with Llama(model, max(c["prompt"] + c["answer"] for c in cases) + 64, threads=threads) as llama:
        for case in cases:
            body = {"prompt": [i % 8000 + 40 for i in range(case["prompt"])], "n_predict": case["answer"] + 1,
                    "ignore_eos": True, "cache_prompt": False, "temperature": 0}  # fmt: skip
            times = llama.ask("/completion", body)["timings"] if case["streams"] == 1 else {}
            found.append({"prefill": times.get("prompt_per_second", 0.0),
                          "decode": times.get("predicted_per_second", 0.0)})  # fmt: skip
    return found


IN_PROCESS = {"ours": ours, "transformers": theirs_transformers, "vllm": theirs_vllm, "xllamacpp": theirs_wheel}


# -- rounds -----------------------------------------------------------------------------------------------------


def in_process(name: str, python: str, model: Path, cases: list[dict[str, int]], threads: int) -> Any:
    """Run one engine in a process of its own."""
    command = [python, __file__, "--child", name, str(model), json.dumps(cases), str(threads)]
    done = subprocess.run(command, env={**os.environ, **SETTINGS}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def batched_bench(folder: Path, model: Path, cases: list[dict[str, int]], threads: int, flash: str) -> Any:
    """Run llama.cpp's own benchmark once for each case."""
    found = []
    for case in cases:
        tokens = case["streams"] * (case["prompt"] + case["answer"]) + 64
        command = [folder / "llama-batched-bench", "-m", model, "-c", tokens, "-b", 2048, "-ub", 512, "-t", threads,
                   "-tb", threads, "-fa", flash, "-npp", case["prompt"], "-ntg", case["answer"], "-npl",
                   case["streams"], "--output-format", "jsonl"]  # fmt: skip
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
        line = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
        found.append({"prefill": line["speed_pp"], "decode": line["speed_tg"]})
    return found


Run = Callable[[], list[dict[str, float]]]


def rounds(runs: dict[str, Run], cases: list[dict[str, int]], count: int) -> dict[str, Any]:
    """Run all engines in turn, forwards and backwards; return every round and the load of others."""
    found: dict[str, Any] = {name: [] for name in runs}
    loads = []
    for number in range(count):
        names = list(runs) if number % 2 == 0 else list(reversed(runs))
        for name in names:
            found[name].append(runs[name]())
            loads.append(psutil.getloadavg()[0])
    result: dict[str, Any] = {"load": common.middle(loads), "cases": []}
    for place, case in enumerate(cases):
        row: dict[str, Any] = {**case}
        for kind in ("prefill", "decode"):
            rates = {name: [each[place][kind] for each in values] for name, values in found.items()}
            row[kind] = {name: common.middle(values) for name, values in rates.items()}
            row[f"{kind}_ratio"] = ratios(rates)
        result["cases"].append(row)
    return result


def ratios(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Return ours over each peer; of several llama.cpp settings, over the best one of each round."""
    llama = [name for name in rates if name.startswith("llama.cpp")]
    peers = {name: values for name, values in rates.items() if name not in ("ours", *llama)}
    if llama:
        peers["llama.cpp"] = [max(each) for each in zip(*(rates[name] for name in llama), strict=True)]
    return {
        name: common.middle(own / other for own, other in zip(rates["ours"], values, strict=True))
        for name, values in peers.items()
        if all(values)
    }


def bandwidth(threads: int) -> float:
    """Return the bytes a second that threads read from memory, of 512 MB each, by processor time: the best of five.

    On a busy machine that is what a core would read if it had its time for itself.
    """
    import torch

    torch.set_num_threads(1)
    data, best = torch.zeros(2**27), 0.0
    for _ in range(5):
        began = time.thread_time()
        data.sum()
        best = max(best, data.nbytes / (time.thread_time() - began))
    return best * threads


def active_bytes(streams: int, context: int, weight_bytes: float) -> float:
    """Return the bytes of weights and keys that one step reads, with experts chosen independently."""
    s, layers = SHAPE, SHAPE["num_hidden_layers"]
    width, inner = s["hidden_size"], s["moe_intermediate_size"]
    query, key = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    moe = layers - s["num_dense_layers"]
    distinct = s["num_experts"] * (1 - (1 - s["num_experts_per_tok"] / s["num_experts"]) ** streams)
    weights = layers * width * (3 * query + 2 * key) + s["num_dense_layers"] * 3 * width * s["intermediate_size"]
    weights += moe * 3 * width * inner * (1 + distinct) + width * s["vocab_size"]
    held = sum(context if i % 4 == 3 else min(context, s["sliding_window"]) for i in range(layers))
    return weights * weight_bytes + moe * width * s["num_experts"] * 4 + streams * held * 2 * key * 2


def table(section: str, result: dict[str, Any]) -> str:
    """Return a section for people."""
    kind = "prefill" if section == "prefill" else "decode"
    lines = [f"{section}: tokens/s, median [least, most]; load {result['load']['median']:.1f}"]
    for row in result["cases"]:
        lines.append(f"  {row['streams']} streams, {row['prompt']} tokens of prompt")
        for name, m in row[kind].items():
            lines.append(f"    {name:24} {m['median']:9.1f} [{m['least']:.1f}, {m['most']:.1f}]")
        for name, m in row[f"{kind}_ratio"].items():
            lines.append(f"    ours / {name:17} {m['median']:9.2f} [{m['least']:.2f}, {m['most']:.2f}]")
        if "bound" in row:
            lines.append(f"    bound by memory {row['bound']:17.1f}")
    return "\n".join(lines)


def picture(result: dict[str, Any], path: Path) -> None:
    """Draw throughput over streams, and tokens a second over context."""
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    panels = [each for each in (("decode", "streams"), ("context", "prompt")) if each[0] in result["sections"]]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2), squeeze=False)
    for axis, (section, over) in zip(axes[0], panels, strict=True):
        cases = result["sections"][section]["cases"]
        for name in cases[0]["decode"]:
            at, middle = [case[over] for case in cases], [case["decode"][name]["median"] for case in cases]
            axis.plot(at, middle, marker="o", label=name)
        axis.set(xlabel="streams" if over == "streams" else "tokens of context", ylabel="tokens/s", ylim=(0, None))
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def engines(options: argparse.Namespace, folder: Path, cases: list[dict[str, int]], kind: str) -> dict[str, Run]:
    """Return what runs in a section, by name."""
    gguf, threads = folder / f"{kind}.gguf", options.threads
    own = folder / "hf" if kind == "BF16" else gguf
    runs: dict[str, Run] = {"ours": lambda: in_process("ours", sys.executable, own, cases, threads)}
    if options.llama:
        for flash in options.flash.split(","):
            runs[f"llama.cpp fa {flash}"] = functools.partial(batched_bench, options.llama, gguf, cases, threads, flash)
    else:
        runs["xllamacpp"] = lambda: in_process("xllamacpp", sys.executable, gguf, cases, threads)
    if kind == "BF16" and "transformers" in options.peers:
        runs["transformers"] = lambda: in_process("transformers", sys.executable, folder / "hf", cases, threads)
    if kind == "BF16" and options.vllm:
        runs["vllm"] = lambda: in_process("vllm", options.vllm, folder / "hf", cases, threads)
    return runs


def main() -> None:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="decode,prefill,context")
    parser.add_argument("--llama", type=Path, help="folder with llama-batched-bench")
    parser.add_argument("--peers", default="", help="transformers")
    parser.add_argument("--vllm", default="", help="an interpreter that has vLLM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompts", default="512,4096", help="tokens of the prompts of `prefill`")
    parser.add_argument("--contexts", default="16,4096,16384", help="tokens before the answer, for `context`")
    parser.add_argument("--flash", default="off,on", help="settings of llama.cpp's flash attention to try")
    parser.add_argument("--folder", type=Path, help="keep the models here")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/inference.json"))
    parser.add_argument("--figure", type=Path, help="draw what was measured so far, at the end")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, model, cases, threads = options.child
        print(json.dumps(IN_PROCESS[name](Path(model), json.loads(cases), int(threads))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        run(options, options.folder or Path(temporary))


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure section by section; what was measured before is kept in the file."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    has = [f for f in flags.split() if f.startswith(("avx512", "amx", "avx_vnni", "avx2"))]
    print("CPU:", " ".join(has))
    print("llama.cpp:", options.llama or "the prebuilt xllamacpp (built for AVX2), one stream")
    if not (folder / "hf").exists():
        make_files(folder, ["BF16", "Q8_0", "Q4_0"])
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    result |= common.environment("xllamacpp")
    result |= {"flags": has, "threads": options.threads, "bandwidth": bandwidth(options.threads)}
    result["llama.cpp"] = "built from source" if options.llama else "the prebuilt xllamacpp"
    prefill = [{"streams": 1, "prompt": int(n), "answer": 1} for n in options.prompts.split(",")]
    contexts = [{"streams": 1, "prompt": int(n), "answer": CONTEXT_ANSWER} for n in options.contexts.split(",")]
    kinds = {"decode": [("BF16", DECODE)], "prefill": [("BF16", prefill)], "context": [("BF16", contexts)],
             "quantized": [("Q8_0", DECODE), ("Q4_0", DECODE)]}  # fmt: skip
    for section in options.sections.split(","):
        for kind, cases in kinds[section]:
            name = section if kind == "BF16" else f"{section} {kind}"
            found = rounds(engines(options, folder, cases, kind), cases, options.rounds)
            for row in found["cases"]:
                step = active_bytes(row["streams"], row["prompt"], {"BF16": 2, "Q8_0": 1.0625, "Q4_0": 0.5625}[kind])
                row["bound"] = row["streams"] * result["bandwidth"] / step
            result.setdefault("sections", {})[name] = found
            common.write(options.out, result)
            print(table(section, found), flush=True)
    if options.figure:
        picture(result, options.figure)


if __name__ == "__main__":
    main()
