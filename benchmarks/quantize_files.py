"""Compare our quantized files with those of llama.cpp's own quantizer (`llama_model_quantize`), file by file.

    python benchmarks/quantize_files.py --llama LIBLLAMA.so [--model FOLDER] [--imatrix FILE.gguf] [--out FILE.json]

The library is llama.cpp built from source (`pip download --no-binary :all: llama-cpp-python==0.3.36` has it under
vendor/llama.cpp; the wheel of xllamacpp does not export the function). Its header gives the parameters below.
Without `--model`: random models of three shapes: whole 256-blocks with 16 experts, the same with exactly 8 (which
llama.cpp mixes in another way), and widths that are no whole blocks. Each without and with an importance matrix.

For every type: the same tensors in the same order, the same types, the same bytes, the same keys. One hash of
all tensor bytes a file is kept. Exit 1 when anything differs.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from freehold.checkpoint import hf
from freehold.core.log import Log
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.stages.export import calibrate, samples
from freehold.stages.export.files import write_files
from freehold.tokenizer import bpe

FILE_TYPES = {"Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "Q4_0": 2, "Q3_K_M": 12}
"""llama_ftype by name."""
SHAPES = {
    "256 wide, 16 experts": {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 16},
    "256 wide, 8 experts": {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 8},
    "192 wide, 16 experts": {"hidden_size": 192, "moe_intermediate_size": 96, "num_experts": 16},
}


class Imatrix(ctypes.Structure):
    """llama_model_imatrix_data; the last has no name."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]  # noqa: RUF012


class Parameters(ctypes.Structure):
    """llama_model_quantize_params."""

    _fields_ = [  # noqa: RUF012
        *((name, ctypes.c_int32) for name in ("nthread", "ftype", "output_type", "embedding_type")),
        *((name, ctypes.c_bool) for name in ("requantize", "output", "copy", "pure", "keep_split", "dry_run")),
        *((name, ctypes.c_void_p) for name in ("imatrix", "overrides", "tensors", "prune")),
        ("max_buffer", ctypes.c_size_t),
    ]


def means(path: Path) -> dict[str, np.ndarray]:
    """Return the mean squares by weight as llama.cpp's quantizer reads them: idle matrices have ones."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name, _, part = tensor.name.rpartition(".")
        found.setdefault(name, {})[part] = tensor.data.reshape(-1 if part == "counts" else tensor.data.shape)
    result = {}
    for name, parts in found.items():
        counts = parts["counts"].reshape(-1, 1)
        sums = parts["in_sum2"].reshape(len(counts), -1)
        result[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
    return result


def quantize(lib: ctypes.CDLL, source: Path, target: Path, kind: int, importance: dict[str, np.ndarray]) -> None:
    """Write a file by llama.cpp's own quantizer."""
    parameters = lib.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = 1, kind
    rows = [Imatrix(name.encode(), data.ctypes.data, data.size) for name, data in importance.items()]
    table = (Imatrix * (len(rows) + 1))(*rows)
    if rows:
        parameters.imatrix = ctypes.addressof(table)
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        sys.exit(f"llama_model_quantize failed on {source}")


def difference(ours: Path, theirs: Path) -> tuple[list[str], str]:
    """Return what differs between two files, and a hash of all tensor bytes of ours."""
    a, b = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    found = []
    if [t.name for t in a.tensors] != [t.name for t in b.tensors]:
        found.append("names or order of tensors")
    digest = hashlib.sha256()
    for x, y in zip(a.tensors, b.tensors, strict=False):
        digest.update(x.data.tobytes())
        if x.tensor_type != y.tensor_type:
            found.append(f"{x.name}: {x.tensor_type.name} against {y.tensor_type.name}")
        elif x.data.tobytes() != y.data.tobytes():
            found.append(f"{x.name}: bytes")
    # llama.cpp's command line, not its quantizer, adds the four keys that describe an importance matrix.
    if differing := {key for key in set(a.fields) ^ set(b.fields) if not key.startswith("quantize.imatrix.")}:
        found.append(f"keys {sorted(differing)}")
    return found, digest.hexdigest()


def random_model(shape: dict[str, int], folder: Path) -> None:
    """Write a random model and its tokenizer in Hugging Face form."""
    texts = [*samples.KINDS.values(), *samples.SCRIPTS.values()]
    bpe.train(texts * 2, 760, Log(quiet=True)).save(folder)
    config = ModelConfig(
        vocab_size=768, intermediate_size=2 * shape["hidden_size"], num_hidden_layers=8, num_dense_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts_per_tok=2, num_shared_experts=1,
        sliding_window=64, max_position_embeddings=512, global_attn_every_n_layers=4, **shape,
    )  # fmt: skip
    model = Afmoe(config)
    model.init_weights(torch.Generator().manual_seed(5))
    hf.save_hf(folder, config, model.state_dict(), torch.bfloat16)


def calibrated(folder: Path, path: Path) -> None:
    """Write an importance matrix of random text."""
    config, state = hf.load_hf(folder)
    model = Afmoe(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    random = np.random.default_rng(1)
    chunks = [[int(i) for i in random.integers(32, config.vocab_size - 32, 64)] for _ in range(8)]
    calibrate.write_imatrix(path, calibrate.collect(model, chunks), dataset="random", chunks=len(chunks))


def compare(lib: ctypes.CDLL, folder: Path, imatrix: Path | None, scratch: Path) -> list[dict[str, Any]]:
    """Return a row for each type."""
    config, _ = hf.load_hf(folder)
    ours = {kind: scratch / f"ours-{kind}.gguf" for kind in ("BF16", *FILE_TYPES)}
    write_files(folder, config, ours, name="x", imatrix=imatrix)
    importance = means(imatrix) if imatrix else {}
    rows = []
    for kind, number in FILE_TYPES.items():
        theirs = scratch / f"theirs-{kind}.gguf"
        quantize(lib, ours["BF16"], theirs, number, importance)
        found, digest = difference(ours[kind], theirs)
        rows.append(
            {"type": kind, "importance": bool(imatrix), "equal": not found, "differs": found[:5], "sha256": digest}
        )
        theirs.unlink()
        print(f"{kind}{' with importance' if imatrix else ''}: {found[:3] or 'equal'}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, required=True, help="libllama.so of a build from source")
    parser.add_argument("--model", type=Path, help="Hugging Face folder instead of random models")
    parser.add_argument("--imatrix", type=Path, help="importance matrix of that model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lib = ctypes.CDLL(str(args.llama))
    lib.llama_model_quantize_default_params.restype = Parameters
    lib.llama_model_quantize.restype = ctypes.c_uint32
    lib.llama_backend_init()
    rows = []
    for name, shape in ({"given": {}} if args.model else SHAPES).items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.model or Path(scratch) / "hf"
            if not args.model:
                random_model(shape, folder)
            imatrix = args.imatrix or Path(scratch) / "imatrix.gguf"
            if not args.imatrix:
                calibrated(folder, imatrix)
            print(name)
            for which in (None, imatrix):
                place = Path(scratch) / ("with" if which else "without")
                place.mkdir()
                rows += [{"model": name, **row} for row in compare(lib, folder, which, place)]
    result = {"equal": sum(row["equal"] for row in rows), "files": len(rows), "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['equal']} of {result['files']} files equal")
    sys.exit(0 if result["equal"] == result["files"] else 1)


if __name__ == "__main__":
    main()
