"""Compare our importance matrix with llama.cpp's own sums, taken through its evaluation callback on the same ids.

    python benchmarks/imatrix.py MODEL_FOLDER [--chunks 4]

The folder (a checkpoint or Hugging Face folder) is exported as F32. llama.cpp, from the library in the pinned xllamacpp
wheel, evaluates chunks of random ids; at every product with a weight of a layer the callback adds the squares of the
inputs in fp32, by expert, as llama.cpp's tools/imatrix does. Ours are `freehold.stages.export.calibrate`. Printed:
whether all weights and counts are equal, the largest relative difference of a matrix (norm of the difference over
norm; at most 1e-5 is allowed), and that of any single sum, where the order of fp32 sums in both runtimes shows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from freehold.checkpoint import dcp, hf
from freehold.infer.llama_eval import MUL_MAT, Node, evaluate
from freehold.model.afmoe import Afmoe
from freehold.stages.export import calibrate
from freehold.stages.export.files import write_files

CHUNK_TOKENS, LARGEST_DIFFERENCE = 64, 1e-5


class Sums:
    """fp32 sums of squares and counts by the name of a weight."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}

    def seen(self, op: str, name: str, node: Node) -> None:
        """Add the inputs of one product; the router's weight is not quantized."""
        if "ffn_gate_inp" in name:
            return
        inputs = node.source(1).values()
        if op == MUL_MAT:
            self.add(name, 1, np.zeros(inputs.shape[0] * inputs.shape[1], int), inputs.reshape(-1, inputs.shape[-1]))
        else:
            chosen = node.source(2).values(np.int32)[0]
            rows = np.broadcast_to(inputs, (*chosen.shape, inputs.shape[-1]))
            self.add(name, node.source(0).ne[2], chosen.reshape(-1), rows.reshape(-1, inputs.shape[-1]))

    def add(self, name: str, matrices: int, owner: np.ndarray, rows: np.ndarray) -> None:
        """Add rows to the matrices that own them."""
        sums = self.sums.setdefault(name, np.zeros((matrices, rows.shape[1]), np.float32))
        counts = self.counts.setdefault(name, np.zeros(matrices, np.int64))
        np.add.at(sums, owner, np.square(rows, dtype=np.float32))
        np.add.at(counts, owner, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--chunks", type=int, default=4)
    args = parser.parse_args()
    native = (args.model / dcp.STATE).exists()
    config, state = dcp.read_model(args.model) if native else hf.load_hf(args.model)
    model = Afmoe(config)
    model.load_state_dict({n: t.bfloat16().float() if t.ndim > 1 else t.float() for n, t in state.items()})
    random = np.random.default_rng(0)
    length = min(CHUNK_TOKENS, config.max_position_embeddings)
    chunks = [[int(i) for i in random.integers(32, config.vocab_size - 32, length)] for _ in range(args.chunks)]
    ours = calibrate.collect(model, chunks)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        hf.save_hf(folder / "hf", config, model.state_dict(), torch.bfloat16)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / "hf" / name).write_bytes((args.model / name).read_bytes())
        write_files(folder / "hf", config, {"F32": folder / "x.gguf"}, name="x")
        theirs = Sums()
        evaluate(folder / "x.gguf", chunks, theirs.seen)
    same = ours.sums.keys() == theirs.sums.keys()
    counts = all(np.array_equal(ours.counts[n].numpy(), theirs.counts[n]) for n in theirs.counts if n in ours.counts)
    single = matrix = 0.0
    for name in theirs.sums.keys() & ours.sums.keys():
        wanted, found = ours.sums[name].numpy(), theirs.sums[name]
        scale = np.maximum(np.abs(wanted), wanted.mean() * 1e-3 + 1e-30)
        single = max(single, float((np.abs(found - wanted) / scale).max()))
        matrix = max(matrix, float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)))
    result = {"weights": len(theirs.sums), "same_weights": same, "same_counts": counts}
    result |= {"largest_difference_of_a_matrix": matrix, "largest_difference_of_a_sum": single}
    print(json.dumps(result))
    sys.exit(0 if same and counts and matrix <= LARGEST_DIFFERENCE else 1)


if __name__ == "__main__":
    main()
