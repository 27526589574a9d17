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
import ctypes
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import xllamacpp

from freehold.checkpoint import dcp, hf
from freehold.model.afmoe import Afmoe
from freehold.stages.export import calibrate
from freehold.stages.export.files import write_files

CHUNK_TOKENS, LARGEST_DIFFERENCE = 64, 1e-5
MUL_MAT, MUL_MAT_ID = "MUL_MAT", "MUL_MAT_ID"


class Params(ctypes.Structure):
    """Room for the parameters of a model or a context, which go by value; a callee reads its own part."""

    _fields_ = [("raw", ctypes.c_uint8 * 1024)]  # noqa: RUF012


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [  # noqa: RUF012
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


class Tensor(ctypes.Structure):
    """ggml_tensor."""

    _fields_ = [  # noqa: RUF012
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Tensor), ctypes.c_bool, ctypes.c_void_p)


def library() -> ctypes.CDLL:
    """Return llama.cpp's C interface."""
    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(path))
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = Params
    lib.llama_model_load_from_file.restype = lib.llama_init_from_model.restype = ctypes.c_void_p
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Params]
    lib.llama_init_from_model.argtypes = [ctypes.c_void_p, Params]
    lib.llama_batch_get_one.restype = Batch
    lib.llama_decode.argtypes = [ctypes.c_void_p, Batch]
    lib.ggml_op_name.restype = ctypes.c_char_p
    lib.llama_get_memory.restype = ctypes.c_void_p
    lib.llama_get_memory.argtypes = [ctypes.c_void_p]
    lib.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    return lib


def values(tensor: Tensor, kind: type = np.float32) -> np.ndarray:
    """Return a tensor [ne2, ne1, ne0] of 4-byte values, rows possibly apart."""
    shape, strides = tensor.ne[2::-1], tensor.nb[2::-1]
    size = tensor.ne[2] * tensor.nb[2]
    raw = (ctypes.c_uint8 * size).from_address(tensor.data)
    return np.ndarray(shape, kind, raw, strides=strides).copy()


class Sums:
    """fp32 sums of squares and counts by the name of a weight."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib, self.sums, self.counts = lib, {}, {}
        self.callback = CALLBACK(self.seen)

    def seen(self, pointer: object, ask: bool, _: object) -> bool:
        """Say whether a node is wanted, or add its inputs."""
        tensor = pointer.contents  # type: ignore[attr-defined]
        op = self.lib.ggml_op_name(tensor.op).decode()
        if op not in (MUL_MAT, MUL_MAT_ID):
            return not ask
        name = Tensor.from_address(tensor.src[0]).name.decode()
        if not name.startswith("blk.") or not name.endswith(".weight") or "ffn_gate_inp" in name:
            return not ask
        if ask:
            return True
        inputs = values(Tensor.from_address(tensor.src[1]))
        if op == MUL_MAT:
            self.add(name, 1, np.zeros(inputs.shape[0] * inputs.shape[1], int), inputs.reshape(-1, inputs.shape[-1]))
        else:
            chosen = values(Tensor.from_address(tensor.src[2]), np.int32)[0]
            experts = Tensor.from_address(tensor.src[0]).ne[2]
            rows = np.broadcast_to(inputs, (*chosen.shape, inputs.shape[-1]))
            self.add(name, experts, chosen.reshape(-1), rows.reshape(-1, inputs.shape[-1]))
        return True

    def add(self, name: str, matrices: int, owner: np.ndarray, rows: np.ndarray) -> None:
        """Add rows to the matrices that own them."""
        sums = self.sums.setdefault(name, np.zeros((matrices, rows.shape[1]), np.float32))
        counts = self.counts.setdefault(name, np.zeros(matrices, np.int64))
        np.add.at(sums, owner, np.square(rows, dtype=np.float32))
        np.add.at(counts, owner, 1)


def evaluate(path: Path, chunks: list[list[int]]) -> Sums:
    """Run llama.cpp over the chunks."""
    lib = library()
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    params, sums = lib.llama_context_default_params(), Sums(lib)
    raw = bytes(params.raw)
    # cb_eval and its data are null by default, and stand before the two types of the cache, which are F16 (1).
    at = raw.index(bytes(16) + b"\1\0\0\0\1\0\0\0")
    at += -at % 8
    ctypes.memmove(ctypes.addressof(params) + at, ctypes.byref(ctypes.cast(sums.callback, ctypes.c_void_p)), 8)
    ctypes.memmove(ctypes.addressof(params) + at + 16, bytes(8), 8)  # a cache in F32
    enums = raw.index(b"\xff" * 16)  # rope scaling, pooling, attention, flash attention: all unset
    ctypes.memmove(ctypes.addressof(params) + enums + 12, bytes(4), 4)  # no flash attention: it computes in F16
    context = lib.llama_init_from_model(model, params)
    for ids in chunks:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        batch, wanted = lib.llama_batch_get_one(tokens, len(ids)), (ctypes.c_int8 * len(ids))(*[1] * len(ids))
        batch.logits = ctypes.addressof(wanted)  # else the last layer computes the last token only
        if lib.llama_decode(context, batch):
            sys.exit("llama_decode failed")
    return sums


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
        theirs = evaluate(folder / "x.gguf", chunks)
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
