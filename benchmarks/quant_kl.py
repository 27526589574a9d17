"""Measure the KL of every quantized type with three kinds of calibration, on held-out text, of a trained model.

    freehold run recipes/quant.yaml
    python benchmarks/quant_kl.py runs/quant --out benchmarks/results/quant_kl.json

Calibration: none, ones (every input counts the same) and ours (our engine on the first half of the held-out text, and
sample conversations). KL is measured on the second half, with three seeds that choose the windows of text: from our
model in fp32, holding the bf16 weights, to llama.cpp, in nats per position.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freehold.checkpoint.hf import load_hf
from freehold.model.afmoe import Afmoe
from freehold.stages.export import calibrate, gguf_writer
from freehold.stages.export.files import write_files
from freehold.stages.export.llama import ExactLlama
from freehold.stages.export.reference import Agreement, log_probabilities
from freehold.tokenizer.bpe import Tokenizer

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M")
WINDOW_TOKENS, LAST_TOKENS = 96, 8


def ones(config: Any) -> calibrate.Collector:
    """Return an importance of one for every input of every weight of the layers."""
    found = calibrate.Collector()
    for name, shape in gguf_writer.tensor_shapes(config).items():
        if name.startswith("blk.") and len(shape) > 1 and "ffn_gate_inp" not in name:
            experts = shape[0] if len(shape) == 3 else 1
            found.sums[name] = torch.ones(experts, shape[-1], dtype=torch.float64)
            found.counts[name] = torch.ones(experts, dtype=torch.int64)
    return found


def windows(text: list[int], tokenizer: Tokenizer, seed: int, count: int) -> list[list[int]]:
    """Return windows of a text at places that a seed chooses, each begun as every text is."""
    starts = np.random.default_rng(seed).integers(0, max(1, len(text) - WINDOW_TOKENS), count)
    return [[*tokenizer.prefix, *text[int(s) : int(s) + WINDOW_TOKENS]] for s in starts]


@torch.inference_mode()
def kl(path: Path, model: Afmoe, chosen: list[list[int]], log: Path) -> dict[str, float]:
    """Return the agreement of a file with our model on the last positions of each window."""
    agreement = Agreement.empty()
    with ExactLlama(path, WINDOW_TOKENS + 16, log, 2) as llama:
        for ids in chosen:
            logits = model(torch.tensor([ids]))[0]
            for length in range(len(ids) - LAST_TOKENS + 1, len(ids) + 1):
                theirs = llama.log_probabilities(ids[:length], model.config.vocab_size)
                agreement.add(log_probabilities(logits[length - 1]), theirs)
    return agreement.record()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with export/hf and tokenize")
    parser.add_argument("--tokens", type=int, default=100_000, help="of calibration")
    parser.add_argument("--windows", type=int, default=12, help="of text for each seed")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    hf = args.run / "export" / "hf"
    config, state = load_hf(hf)
    with torch.device("meta"):
        model = Afmoe(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    model.eval()
    tokenizer, text = Tokenizer.load(hf), calibrate.held_out(args.run / "tokenize")
    middle = len(text) // 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        chunks = calibrate.make_chunks(tokenizer, text[:middle], args.tokens, config.max_position_embeddings)
        for name, collector in (("ones", ones(config)), ("ours", calibrate.collect(model, chunks))):
            calibrate.write_imatrix(folder / f"{name}.gguf", collector, dataset=name, chunks=len(chunks))
        for kind in ("none", "ones", "ours"):
            files = {t: folder / kind / f"{t}.gguf" for t in args.types.split(",")}
            write_files(hf, config, files, name="Quant", imatrix=None if kind == "none" else folder / f"{kind}.gguf")
            for file_type, path in files.items():
                for seed in range(3):
                    found = kl(path, model, windows(text[middle:], tokenizer, seed, args.windows), folder / "log")
                    about = {"type": file_type, "calibration": kind, "seed": seed, "bytes": path.stat().st_size}
                    rows.append(about | found)
                    print(json.dumps(rows[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"run": args.run.name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
