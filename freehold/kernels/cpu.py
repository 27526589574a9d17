"""The CPU kernels of cpu.cpp: built on first use, loaded, and registered with PyTorch as `freehold::` operators.

They need a C++ compiler (c++, g++ or clang++, $CXX, or the `ziglang` package) and a CPU with AVX-512; bfloat16 needs
its bf16 instructions too. Where something is missing `available` says False, ops.py takes PyTorch's own way, and
`describe` says why. FREEHOLD_NATIVE=0 switches them off. Each operator has a fake form (shapes without data, for
`torch.compile`) and a gradient; what they compute is documented in ops.py, which holds the references.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freehold.kernels import build

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
WIDTH_MULTIPLE = 16


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Return the loaded kernels, or why there are none."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" and os.environ.get("FREEHOLD_NATIVE", "1") != "0":
        return "this CPU has no AVX-512"
    try:
        library = build.load(SOURCE, FLAGS, "native")
    except (build.UnavailableError, OSError) as problem:
        return str(problem)
    entries = [getattr(_openmp(), name, None) for name in ("GOMP_parallel", "omp_get_num_threads")]
    library.freehold_threads(*(ctypes.cast(entry, ctypes.c_void_p) if entry else None for entry in entries))
    library.freehold_tiles()
    return library


def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library PyTorch runs on, so that both share one pool of threads."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    try:
        return ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1")
    except OSError:
        return None


def available(x: Tensor, *widths: int) -> bool:
    """Return whether the kernels take tensors like `x` with rows of these widths; a refused shape is reported once."""
    return x.device.type == "cpu" and _computes(x.dtype, *widths)


@torch.compiler.assume_constant_result
def _computes(dtype: torch.dtype, *widths: int) -> bool:
    """Return whether the kernels take a dtype and widths; a compiled layer asks when it is traced."""
    library = _library()
    if isinstance(library, str):
        return False
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and library.freehold_bf16()):
        return False
    if any(width % WIDTH_MULTIPLE for width in widths):
        _report_widths()
        return False
    return True


def operators(dtype: torch.dtype) -> str:
    """Return the name of the operators a model of this dtype runs on, on CPU: other names, other bits."""
    library = _library()
    if isinstance(library, ctypes.CDLL) and available(torch.empty(0, dtype=dtype)):
        # A system that refuses the tile registers computes other bits with the same library.
        return Path(library._name).stem + ("-amx" if library.freehold_tiles() and dtype == torch.bfloat16 else "")
    return "pytorch"


def describe(dtype: torch.dtype) -> str:
    """Return the same for people, with the reason why there are no kernels."""
    name, library = operators(dtype), _library()
    if name != "pytorch":
        return f"CPU kernels ({name})"
    missing = f"the kernels have no {str(dtype).removeprefix('torch.')} on this CPU"
    return f"PyTorch ({library if isinstance(library, str) else missing})"


@functools.cache
def _report_widths() -> None:
    """Print, once, that some rows are not for the kernels."""
    line = f"row widths that are no multiples of {WIDTH_MULTIPLE} run on PyTorch's operators"
    print(f"kernels: {line}", file=sys.stderr)


def call(name: str, like: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Run a kernel in the dtype of `like`; tensors must be contiguous."""
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(_library(), f"freehold_{name}")(like.dtype == torch.float32, torch.get_num_threads(), *values)


def changed(*tensors: Tensor | None) -> None:
    """Raise the version counters of tensors that a kernel writes to: PyTorch does not see it."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


# --- operators: schema, kernel, shapes ---------------------------------------------------------------------------

_ops = torch.library.Library("freehold", "DEF")


def operator(schema: str, shapes: Any) -> Any:
    """Register a kernel under a schema; `shapes` makes its empty outputs from the same arguments."""
    name = schema.partition("(")[0]

    def register(function: Any) -> Any:
        _ops.define(schema)
        _ops.impl(name, function, "CPU")
        torch.library.register_fake(f"freehold::{name}", shapes, lib=_ops)
        return getattr(torch.ops.freehold, name).default

    return register


def rows_of(x: Tensor) -> int:
    """Return how many rows a tensor [..., d] has."""
    return x.numel() // x.shape[-1]


def _linear_shapes(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


@operator("linear(Tensor x, Tensor w) -> Tensor", _linear_shapes)
def linear(x: Tensor, w: Tensor) -> Tensor:
    """Return x w^T."""
    x, y = x.contiguous(), _linear_shapes(x, w)
    if rows_of(x):  # the kernel divides its work by them
        call("linear", x, x, w, y, rows_of(x), w.shape[1], w.shape[0])
    return y


@operator(
    "linear_backward(Tensor dy, Tensor x, Tensor w, bool weights=True) -> (Tensor, Tensor)",
    lambda dy, x, w, weights=True: (torch.empty_like(x), torch.empty_like(w)),
)
def linear_backward(dy: Tensor, x: Tensor, w: Tensor, weights: bool = True) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and w (the latter empty unless `weights`)."""
    dy, x = dy.contiguous(), x.contiguous()
    dx, dw = torch.empty_like(x), torch.empty_like(w) if weights else w.new_empty(0)
    shape = (rows_of(x), w.shape[1], w.shape[0])
    call("linear_input_gradient", x, dy, w, dx, *shape)
    if weights:
        call("linear_weight_gradient", x, dy, x, dw, *shape)
    return dx, dw


def _experts_shapes(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(len(x), gate_up.shape[1])


@operator("experts(Tensor x, Tensor counts, Tensor gate_up, Tensor down) -> (Tensor, Tensor)", _experts_shapes)
def experts(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's SwiGLU by its expert, and gate(x) and up(x) for the backward pass."""
    y, both = _experts_shapes(x, counts, gate_up, down)
    number, width, inner = down.shape
    up = gate_up.data_ptr() + inner * width * gate_up.element_size()
    call("swiglu", x, x, counts, number, gate_up, up, 2 * inner * width, down, both, y, width, inner)
    return y, both


@operator(
    "experts_backward(Tensor dy, Tensor x, Tensor both, Tensor counts, Tensor gate_up, Tensor down, bool weights) "
    "-> (Tensor, Tensor, Tensor)",
    lambda dy, x, both, counts, gate_up, down, weights: (
        torch.empty_like(x), torch.empty_like(gate_up), torch.empty_like(down)
    ),
)  # fmt: skip
def experts_backward(
    dy: Tensor, x: Tensor, both: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate_up and down (the latter two empty unless `weights`)."""
    number, width, inner = down.shape
    dy, dx, dboth, product = dy.contiguous(), torch.empty_like(x), torch.empty_like(both), x.new_empty(len(x), inner)
    dgate_up, ddown = (torch.empty_like(gate_up), torch.empty_like(down)) if weights else (x.new_empty(0),) * 2
    half = inner * width * gate_up.element_size()
    outputs = (dgate_up, dgate_up.data_ptr() + half, ddown) if weights else (None, None, None)
    call(
        "swiglu_backward", x, dy, x, both, counts, number, gate_up, gate_up.data_ptr() + half, 2 * inner * width, down,
        product, dboth, dx, *outputs, width, inner,
    )  # fmt: skip
    return dx, dgate_up, ddown


def _feed_forward_shapes(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(rows_of(x), 2 * len(gate))


@operator("feed_forward(Tensor x, Tensor gate, Tensor up, Tensor down) -> (Tensor, Tensor)", _feed_forward_shapes)
def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return the SwiGLU of every row, and gate(x) and up(x) for the backward pass."""
    x = x.contiguous()
    y, both = _feed_forward_shapes(x, gate, up, down)
    inner, width = gate.shape
    call("swiglu", x, x, torch.tensor([rows_of(x)]), 1, gate, up, 0, down, both, y, width, inner)
    return y, both


@operator(
    "feed_forward_backward(Tensor dy, Tensor x, Tensor both, Tensor gate, Tensor up, Tensor down, bool weights) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda dy, x, both, gate, up, down, weights: (
        torch.empty_like(x), torch.empty_like(gate), torch.empty_like(up), torch.empty_like(down)
    ),
)  # fmt: skip
def feed_forward_backward(
    dy: Tensor, x: Tensor, both: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate, up and down (the latter three empty unless `weights`)."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    dgate, dup, ddown = (torch.empty_like(t) if weights else t.new_empty(0) for t in (gate, up, down))
    inner, width = gate.shape
    product, dboth = x.new_empty(rows_of(x), inner), torch.empty_like(both)
    call(
        "swiglu_backward", x, dy, x, both, torch.tensor([rows_of(x)]), 1, gate, up, 0, down,
        product, dboth, dx, *((dgate, dup, ddown) if weights else (None, None, None)), width, inner,
    )  # fmt: skip
    return dx, dgate, dup, ddown


@operator(
    "gather(Tensor x, Tensor token, Tensor inverse) -> Tensor",
    lambda x, token, inverse: x.new_empty(len(token), x.shape[1]),
)
def gather(x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
    """Return x[token]."""
    x, y = x.contiguous(), x.new_empty(len(token), x.shape[1])
    call("take_rows", x, x, token, y, len(token), x.shape[1])
    return y


@operator(
    "gather_backward(Tensor dy, Tensor inverse, int tokens) -> Tensor",
    lambda dy, inverse, tokens: dy.new_empty(tokens, dy.shape[1]),
)
def gather_backward(dy: Tensor, inverse: Tensor, tokens: int) -> Tensor:
    """Return the gradient of x: the sum of each token's rows."""
    dy, dx = dy.contiguous(), dy.new_empty(tokens, dy.shape[1])
    call("sum_rows", dy, dy, inverse, None, None, dx, tokens, len(inverse) // tokens, dy.shape[1])
    return dx


@operator(
    "combine(Tensor y, Tensor inverse, Tensor weights, Tensor base) -> Tensor",
    lambda y, inverse, weights, base: torch.empty_like(base),
)
def combine(y: Tensor, inverse: Tensor, weights: Tensor, base: Tensor) -> Tensor:
    """Return base plus each token's weighted rows of y."""
    y, base, out = y.contiguous(), base.contiguous(), base.new_empty(base.shape)
    call("sum_rows", y, y, inverse, weights.contiguous(), base, out, *weights.shape, y.shape[1])
    return out


@operator(
    "combine_backward(Tensor dout, Tensor y, Tensor inverse, Tensor weights) -> (Tensor, Tensor)",
    lambda dout, y, inverse, weights: (torch.empty_like(y), torch.empty_like(weights)),
)
def combine_backward(dout: Tensor, y: Tensor, inverse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y and weights."""
    weights = weights.contiguous()
    dy, dweights = torch.empty_like(y), torch.empty_like(weights)
    call("sum_rows_backward", y, dout.contiguous(), y, inverse, weights, dy, dweights, *weights.shape, y.shape[1])
    return dy, dweights


def _norm_sizes(x: Tensor, cos: Tensor | None) -> tuple[int, int]:
    """Return the rows of angles there are, and the heads that share each."""
    return (1, 1) if cos is None else (cos.numel() // cos.shape[-1], x.shape[-2])


@operator(
    "norm(Tensor x, Tensor gain, float eps, Tensor? cos, Tensor? sin) -> Tensor",
    lambda x, gain, eps, cos, sin: torch.empty_like(x),
)
def norm(x: Tensor, gain: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Return x normalised over its last dimension; with angles [T or B T, D/2], [B, T, H, D] then rotated."""
    x = x.contiguous()
    y = torch.empty_like(x)
    call("norm", x, x, gain, eps, cos, sin, *_norm_sizes(x, cos), y, rows_of(x), x.shape[-1])
    return y


@operator(
    "norm_backward(Tensor dy, Tensor x, Tensor gain, float eps, Tensor? cos, Tensor? sin) -> (Tensor, Tensor)",
    lambda dy, x, gain, eps, cos, sin: (torch.empty_like(x), torch.empty_like(gain)),
)
def norm_backward(
    dy: Tensor, x: Tensor, gain: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and gain."""
    dy, x = dy.contiguous(), x.contiguous()
    dx, dgain = torch.empty_like(x), torch.empty_like(gain)
    call("norm_backward", x, dy, x, gain, eps, cos, sin, *_norm_sizes(x, cos), dx, dgain, rows_of(x), x.shape[-1])
    return dx, dgain


@operator("gated(Tensor x, Tensor gate) -> Tensor", lambda x, gate: torch.empty_like(x))
def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Return x sigmoid(gate)."""
    x, gate = x.contiguous(), gate.contiguous()
    y = torch.empty_like(x)
    call("gated", x, x, gate, y, x.numel())
    return y


@operator(
    "gated_backward(Tensor dy, Tensor x, Tensor gate) -> (Tensor, Tensor)",
    lambda dy, x, gate: (torch.empty_like(x), torch.empty_like(gate)),
)
def gated_backward(dy: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and gate."""
    dy, x, gate = dy.contiguous(), x.contiguous(), gate.contiguous()
    dx, dgate = torch.empty_like(x), torch.empty_like(gate)
    call("gated_backward", x, dy, x, gate, dx, dgate, x.numel())
    return dx, dgate


def _attention_shapes(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty(batch, heads, tokens, dtype=torch.float32)


@operator("attention(Tensor q, Tensor k, Tensor v, Tensor start) -> (Tensor, Tensor)", _attention_shapes)
def attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Attend from each query t to the keys start[b, t] .. t; q [B, T, H, D], k, v [B, T, K, D], start int32 [B, T]."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, log_sums = _attention_shapes(q, k, v, start)
    batch, tokens, heads, width = q.shape
    call("attention", q, q, k, v, start, width**-0.5, out, log_sums, batch, tokens, heads, k.shape[2], width)
    return out, log_sums


@operator(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor start, Tensor out, Tensor log_sums) "
    "-> (Tensor, Tensor, Tensor)",
    lambda dout, q, k, v, start, out, log_sums: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
)
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    batch, tokens, heads, width = q.shape
    call(
        "attention_backward", q, dout.contiguous(), q, k, v, out, log_sums, start, width**-0.5, dq, dk, dv,
        batch, tokens, heads, k.shape[2], width,
    )  # fmt: skip
    return dq, dk, dv


@operator(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, float scale, float z_loss) -> (Tensor, Tensor)",
    lambda logits, targets, scale, z_loss: (
        logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)
    ),
)  # fmt: skip
def cross_entropy_(logits: Tensor, targets: Tensor, scale: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """Turn logits into the gradient of scale (nll + z_loss log_partition^2); return nll and log_partition by row."""
    nll, log_partition = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    call("cross_entropy", logits, logits, targets, scale, z_loss, nll, log_partition, *logits.shape)
    return nll, log_partition


@operator("orthogonalize_(Tensor(a!) matrices, Tensor coefficients) -> ()", lambda matrices, coefficients: None)
def orthogonalize_(matrices: Tensor, coefficients: Tensor) -> None:
    """Take the Newton-Schulz steps [s, 3] (float32) on each matrix [n, r, c] in place, a tall one transposed."""
    call("orthogonalize", matrices, matrices, coefficients, len(coefficients), *matrices.shape)


_STRETCH = 16384


@operator("square_sums(Tensor x) -> Tensor", lambda x: x.new_empty(-(-x.numel() // _STRETCH), dtype=torch.float32))
def square_sums(x: Tensor) -> Tensor:
    """Return the sum of squares of each stretch of 16,384 numbers, in float32."""
    x = x.contiguous()
    sums = x.new_empty(-(-x.numel() // _STRETCH), dtype=torch.float32)
    call("squares", x, x, sums, x.numel())
    return sums


@operator(
    "adamw_(Tensor(a!) weight, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? copy, "
    "float scale, int step, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()",
    lambda *_: None,
)
def adamw_(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, copy: Tensor | None,
    scale: float, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Take AdamW's `step`-th step from `scale` times the gradient; also write the weights to `copy`, of its dtype."""
    changed(weight, copy)
    call(
        "adamw", gradient, gradient.contiguous(), weight, exp_avg, exp_avg_sq, copy, scale, lr / (1 - beta1**step),
        1 - lr * weight_decay, beta1, beta2, (1 - beta2**step) ** 0.5, eps, weight.numel(),
    )  # fmt: skip


@operator(
    "muon_momentum_(Tensor(a!) momentum, Tensor gradient, Tensor(b!) update, float scale, float decay, bool nesterov) "
    "-> ()",
    lambda *_: None,
)
def muon_momentum_(
    momentum: Tensor, gradient: Tensor, update: Tensor, scale: float, decay: float, nesterov: bool
) -> None:
    """Move a momentum by `scale` times the gradient; write the raw update to `update` (bfloat16)."""
    call(
        "muon_momentum", gradient, gradient.contiguous(), momentum, update, scale, decay, nesterov, momentum.numel()
    )  # fmt: skip


@operator(
    "muon_move_(Tensor(a!) weight, Tensor update, Tensor(b!)? copy, float step, float decay) -> ()", lambda *_: None
)
def muon_move_(weight: Tensor, update: Tensor, copy: Tensor | None, step: float, decay: float) -> None:
    """Take `step` times the update (bfloat16) off `decay` times the weights; also write them to `copy`."""
    changed(weight, copy)
    call("muon_move", weight if copy is None else copy, weight, update, copy, step, decay, weight.numel())


# --- gradients -------------------------------------------------------------------------------------------------


def gradient(name: str, keep: Any, backward: Any) -> None:
    """Register the gradient of an operator: `keep(inputs, output)` are the tensors its backward pass reads."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # outputs kept for the backward pass have no gradient of their own
        ctx.save_for_backward(*keep(inputs, output))
        ctx.inputs = tuple(None if isinstance(value, Tensor) else value for value in inputs)
        ctx.rows = len(inputs[0])

    torch.library.register_autograd(f"freehold::{name}", backward, setup_context=setup_context, lib=_ops)


def _linear_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw = linear_backward(dy, *ctx.saved_tensors, ctx.needs_input_grad[1])
    return dx, dw if ctx.needs_input_grad[1] else None  # half the price where the weight is frozen


gradient("linear", lambda i, o: i, _linear_gradients)


def _experts_gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, both, counts, gate_up, down = ctx.saved_tensors
    weights = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    dx, dgate_up, ddown = experts_backward(dy, x, both, counts, gate_up, down, weights)
    return (dx, None, dgate_up, ddown) if weights else (dx, None, None, None)


gradient("experts", lambda i, o: (i[0], o[1], *i[1:]), _experts_gradients)


def _feed_forward_gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    weights = any(ctx.needs_input_grad[1:])
    found = feed_forward_backward(dy, *ctx.saved_tensors, weights)
    return found if weights else (found[0], None, None, None)


gradient("feed_forward", lambda i, o: (i[0], o[1], *i[1:]), _feed_forward_gradients)
gradient(
    "gather",
    lambda i, o: (i[2],),
    lambda ctx, dy: (gather_backward(dy, ctx.saved_tensors[0], ctx.rows), None, None),
)
gradient(
    "combine",
    lambda i, o: i[:3],
    lambda ctx, d: ((g := combine_backward(d, *ctx.saved_tensors))[0], None, g[1], d),
)


def _norm_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gain, cos, sin = ctx.saved_tensors
    return *norm_backward(dy, x, gain, ctx.inputs[2], cos, sin), None, None, None


gradient("norm", lambda i, o: (i[0], i[1], i[3], i[4]), _norm_gradients)
gradient("gated", lambda i, o: i, lambda ctx, dy: gated_backward(dy, *ctx.saved_tensors))
gradient(
    "attention",
    lambda i, o: (*i, *o),
    lambda ctx, d, _: (*attention_backward(d, *ctx.saved_tensors), None),
)
