"""What llama.cpp computes inside a layer, seen through its evaluation callback (`cb_eval`).

The server of llama.cpp reports distributions only. Its C interface, exported by the pinned xllamacpp wheel, calls back
at every product of matrices: there the third input of a product by expert holds the experts each token was sent to.
Structures go by value and wheels have no headers, so the fields are found by their default values, which are checked;
where they are not as expected the answer is an error, never a guess. The module runs in a process of its own (`routing`
starts it), so a crash in foreign code ends with an error here.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from freehold.core.errors import ExportError

SECONDS = 600
"""A proof evaluates about 2,000 tokens; a child that takes longer than this hangs."""
MUL_MAT, MUL_MAT_ID = "MUL_MAT", "MUL_MAT_ID"
CACHE_TYPES = b"\1\0\0\0\1\0\0\0"
"""type_k, type_v: F16 by default; `cb_eval` and its data, null by default, stand before them."""


class Parameters(ctypes.Structure):
    """Room for the parameters of a model or a context, which go by value; a callee reads its own part."""

    _fields_ = [("raw", ctypes.c_uint8 * 1024)]  # noqa: RUF012


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [  # noqa: RUF012
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


class Node(ctypes.Structure):
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

    def source(self, number: int) -> Node:
        """Return one of the inputs."""
        return Node.from_address(self.src[number])

    def values(self, kind: type = np.float32) -> np.ndarray:
        """Return a copy of the values [ne2, ne1, ne0], 4 bytes each; rows may be apart in memory."""
        shape, strides = self.ne[2::-1], self.nb[2::-1]
        raw = (ctypes.c_uint8 * (self.ne[2] * self.nb[2])).from_address(self.data)
        return np.ndarray(shape, kind, raw, strides=strides).copy()


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Node), ctypes.c_bool, ctypes.c_void_p)
Seen = Callable[[str, str, Node], None]
"""Gets the operation, the name of the weight and the node of each product with a weight of a layer."""


def library() -> ctypes.CDLL:
    """Return llama.cpp's C interface."""
    import xllamacpp

    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(path))
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = Parameters
    lib.llama_model_load_from_file.restype = lib.llama_init_from_model.restype = ctypes.c_void_p
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Parameters]
    lib.llama_init_from_model.argtypes = [ctypes.c_void_p, Parameters]
    lib.llama_batch_get_one.restype = Batch
    lib.llama_decode.argtypes = [ctypes.c_void_p, Batch]
    lib.ggml_op_name.restype = ctypes.c_char_p
    lib.llama_get_memory.restype = ctypes.c_void_p
    lib.llama_get_memory.argtypes = [ctypes.c_void_p]
    lib.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    return lib


def evaluate(path: Path, chunks: Sequence[Sequence[int]], seen: Seen) -> None:
    """Run llama.cpp over chunks of ids with an F32 cache and without flash attention, which computes in F16.

    ExportError when its parameters are not as expected, the file cannot be opened, or a chunk fails.
    """
    lib = library()
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    callback = CALLBACK(lambda pointer, ask, _: _product(lib, pointer.contents, ask, seen))
    context = model and lib.llama_init_from_model(model, _parameters(lib, callback))
    if not context:
        raise ExportError("llama.cpp cannot open the file", where=path)
    for ids in chunks:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        batch, wanted = lib.llama_batch_get_one(tokens, len(ids)), (ctypes.c_int8 * len(ids))(*[1] * len(ids))
        batch.logits = ctypes.addressof(wanted)  # else the last layer computes the last token only
        if lib.llama_decode(context, batch):
            raise ExportError("llama.cpp cannot evaluate", where=path, found=f"{len(ids)} tokens")


def _parameters(lib: ctypes.CDLL, callback: object) -> Parameters:
    """Return a context's parameters with the callback, an F32 cache and no flash attention."""
    parameters = lib.llama_context_default_params()
    raw = bytes(parameters.raw)
    at = raw.find(bytes(16) + CACHE_TYPES)
    at += -at % 8 if at >= 0 else 0
    unset = raw.find(b"\xff" * 16)  # rope scaling, pooling, attention, flash attention: -1 is "unspecified"
    if at < 0 or unset < 0 or raw[at : at + 24] != bytes(16) + CACHE_TYPES:
        raise ExportError("llama.cpp's parameters are not as expected", where="xllamacpp", todo="use the pinned wheel")
    start = ctypes.addressof(parameters)
    ctypes.memmove(start + at, ctypes.byref(ctypes.cast(callback, ctypes.c_void_p)), 8)  # type: ignore[arg-type]
    ctypes.memmove(start + at + 16, bytes(8), 8)  # both caches in F32 (0)
    ctypes.memmove(start + unset + 12, bytes(4), 4)  # no flash attention
    return parameters  # type: ignore[no-any-return]


def _product(lib: ctypes.CDLL, node: Node, ask: bool, seen: Seen) -> bool:
    """Say whether a node is wanted (`ask`), or hand it over; True continues the computation."""
    op = lib.ggml_op_name(node.op).decode()
    if op not in (MUL_MAT, MUL_MAT_ID):
        return not ask
    name = node.source(0).name.decode()
    if not name.startswith("blk.") or not name.endswith(".weight"):
        return not ask
    if not ask:
        seen(op, name, node)
    return True


def routing(path: Path, chunks: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the experts llama.cpp chose: int32 [MoE layers, tokens of all chunks, k], ascending by expert.

    ExportError, with the end of what the process said, when it fails.
    """
    command = [sys.executable, "-m", __name__, str(path)]
    ended = subprocess.run(command, input=json.dumps([list(c) for c in chunks]).encode(), capture_output=True,
                           timeout=SECONDS)  # fmt: skip
    lines = ended.stdout.splitlines()
    if ended.returncode or not lines:
        said = ended.stderr.decode(errors="replace").splitlines()[-8:]
        raise ExportError("llama.cpp's routing cannot be read", where=path, found="\n            ".join(said))
    return np.array(json.loads(lines[-1]), np.int32)


def _report(path: Path) -> None:
    """Read chunks from standard input, print the experts of each layer as one line of JSON."""
    layers: dict[int, list[list[int]]] = {}

    def seen(op: str, name: str, node: Node) -> None:
        if op == MUL_MAT_ID and "ffn_down_exps" in name:
            chosen = np.sort(node.source(2).values(np.int32)[0], -1)  # [tokens, k]
            layers.setdefault(int(name.split(".")[1]), []).extend(chosen.tolist())

    evaluate(path, json.load(sys.stdin), seen)
    print(json.dumps([layers[layer] for layer in sorted(layers)]), flush=True)


if __name__ == "__main__":
    _report(Path(sys.argv[1]))
