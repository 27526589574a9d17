"""The CPU kernels against their references in fp64: values, gradients, ragged and empty sizes; and their absence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.kernels import cpu
from freehold.model import reference
from freehold.model.attention import attend
from freehold.model.masks import Mask, first_seen
from freehold.model.rows import route
from freehold.optim import muon

# What fp32 sums, and one rounding of each number to bfloat16 on the way in and out, can cost.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _needs_kernels(request: pytest.FixtureRequest) -> None:
    parameters = getattr(request.node, "callspec", None)
    dtype = parameters.params.get("dtype") if parameters else None
    if dtype is not None and not cpu.available(torch.empty(1, dtype=dtype)):
        pytest.skip(cpu.describe(dtype))


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(kernel: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Check the kernel's value and the gradient of every input against the plain form in fp64."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    ours, theirs = kernel(*leaves), plain(*exact)
    given = random(*ours.shape, dtype=ours.dtype, seed=99)
    pairs = [(ours, theirs)]
    pairs += zip(
        torch.autograd.grad(ours, leaves, given), torch.autograd.grad(theirs, exact, given.double()), strict=True
    )
    for found, expected in pairs:
        assert found.shape == expected.shape
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[inputs[0].dtype] * scale + 1e-7)


@DTYPES
@pytest.mark.parametrize(("rows", "ins", "outs"), [(1, 16, 16), (7, 32, 48), (130, 16, 80), (1100, 96, 208)])
def test_linear(dtype: torch.dtype, rows: int, ins: int, outs: int) -> None:
    x, w = random(rows, ins, dtype=dtype, seed=1), random(outs, ins, dtype=dtype, seed=2)
    compare(cpu.linear, F.linear, [x, w])


@DTYPES
@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [0, 0, 601, 0], [1, 1, 1, 1], [0, 0, 0, 0], [40] * 20], ids=str)
def test_experts(dtype: torch.dtype, counts: list[int]) -> None:
    numbers, experts = torch.tensor(counts), len(counts)
    x = random(sum(counts), 32, dtype=dtype, seed=1)
    weights = [random(experts, 2 * 48, 32, dtype=dtype, seed=2) / 6, random(experts, 32, 48, dtype=dtype, seed=3) / 7]
    compare(
        lambda x, *w: cpu.experts(x, numbers, *w)[0],
        lambda x, *w: reference.grouped_swiglu(x, numbers, *w),
        [x, *weights],
    )


@DTYPES
def test_feed_forward(dtype: torch.dtype) -> None:
    weights = [random(*shape, dtype=dtype, seed=n) / 6 for n, shape in enumerate([(80, 32), (80, 32), (32, 80)])]
    x = random(3, 190, 32, dtype=dtype, seed=5)
    compare(lambda *a: cpu.feed_forward(*a)[0], reference.feed_forward, [x, *weights])


@DTYPES
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "groups", "width", "window"),
    [
        (2, 37, 4, 2, 32, 5),
        (1, 200, 2, 1, 64, 64),
        (2, 130, 6, 2, 16, 1000),
        (1, 16, 2, 1, 32, 9),
        (1, 321, 2, 2, 128, 99),
    ],
)
def test_attention(
    dtype: torch.dtype, batch: int, tokens: int, heads: int, groups: int, width: int, window: int
) -> None:
    q, k, v = (random(batch, h, tokens, width, dtype=dtype, seed=h + n) for n, h in enumerate((heads, groups, groups)))
    place = torch.arange(tokens)
    documents = (place // 50).expand(batch, -1)
    start = first_seen(tokens, window, documents, batch)
    assert start is not None
    allowed = (place >= start[..., None]) & (place <= place[:, None])
    compare(
        lambda q, k, v: attend(q, k, v, Mask(None, False, None, start=start)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None], enable_gqa=True),
        [q, k, v],
    )


@DTYPES
def test_norm_and_rotation(dtype: torch.dtype) -> None:
    x = random(2, 67, 3, 64, dtype=dtype, seed=1)
    gain = torch.linspace(0.5, 1.5, 64)
    compare(lambda x: cpu.norm(x, gain, 1e-5, None, None), lambda x: F.rms_norm(x, (64,), gain.double(), 1e-5), [x])
    leaf, exact = gain.clone().requires_grad_(), gain.double().requires_grad_()
    cpu.norm(x, leaf, 1e-5, None, None).sum().backward()
    F.rms_norm(x.double(), (64,), exact, 1e-5).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-3)
    angles = torch.linspace(0, 6, 67 * 32).view(67, 32)
    cos, sin = angles.cos(), angles.sin()

    def plain(x: Tensor) -> Tensor:
        y = F.rms_norm(x, (64,), gain.double(), 1e-5).transpose(1, 2)
        return reference.rotate(y, cos.double(), sin.double()).transpose(1, 2)

    compare(lambda x: cpu.norm(x, gain, 1e-5, cos, sin), plain, [x])


@DTYPES
def test_gate_gather_and_combine(dtype: torch.dtype) -> None:
    x, gate = random(65, 48, dtype=dtype, seed=1), 4 * random(65, 48, dtype=dtype, seed=2)
    compare(cpu.gated, lambda x, g: x * g.sigmoid(), [x, gate])
    path = route(torch.randint(0, 6, (65, 3), generator=torch.Generator().manual_seed(3)))
    compare(lambda x: cpu.gather(x, path.token, path.inverse), lambda x: reference.gather(x, path), [x])
    y, base, weights = random(195, 48, dtype=dtype, seed=4), random(65, 48, dtype=dtype, seed=5), torch.rand(65, 3)
    compare(
        lambda y, b: cpu.combine(y, path.inverse, weights, b),
        lambda y, b: reference.combine(y, path, weights.double(), b),
        [y, base],
    )
    leaf, exact = weights.clone().requires_grad_(), weights.double().requires_grad_()
    cpu.combine(y, path.inverse, leaf, base).sum().backward()
    reference.combine(y.double(), path, exact, base.double()).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-4)


@DTYPES
def test_cross_entropy(dtype: torch.dtype) -> None:
    logits, targets = 3 * random(33, 96, dtype=dtype, seed=1), torch.arange(33) % 96
    exact = logits.double().requires_grad_()
    partition = exact.logsumexp(1)
    nll = partition - exact.gather(1, targets[:, None]).squeeze(1)
    (0.5 * (nll.sum() + 0.01 * partition.square().sum())).backward()
    found_nll, found_partition = cpu.cross_entropy_(logits, targets, 0.5, 0.01)
    torch.testing.assert_close(found_nll.double(), nll.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_partition.double(), partition.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=0, atol=TOLERANCE[dtype] / 2)


@DTYPES
def test_what_is_not_a_number_is_not_hidden(dtype: torch.dtype) -> None:
    x = random(40, 32, dtype=dtype, seed=1)
    x[3, 5], x[7, 1] = torch.nan, torch.inf
    for y in (
        cpu.norm(x, torch.ones(32), 1e-5, None, None),
        cpu.gated(x, x),
        cpu.linear(x, x),
        cpu.cross_entropy_(x.clone(), torch.zeros(40, dtype=torch.int64), 1.0, 0.0)[0],
    ):
        assert not torch.isfinite(y[3]).all()
        assert torch.isfinite(y[4]).all() or y.shape[-1] == 40


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 48, 80), (3, 80, 48), (4, 144, 144)])
def test_orthogonalisation(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = random(*shape, dtype=dtype, seed=1)
    exact = muon.orthogonalize(x.double())
    assert (muon.orthogonalize(x).double() - exact).norm() / exact.norm() < 0.02


@DTYPES
def test_threads_do_not_change_the_bits(dtype: torch.dtype) -> None:
    before, results = torch.get_num_threads(), []
    counts = torch.tensor([50, 0, 700, 3])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        shapes = [(753, 32), (4, 64, 32), (4, 32, 32)]
        leaves = [random(*shape, dtype=dtype, seed=n).requires_grad_() for n, shape in enumerate(shapes)]
        y = cpu.norm(cpu.experts(leaves[0], counts, *leaves[1:])[0], torch.ones(32), 1e-5, None, None)
        y = cpu.linear(y, leaves[2][0])
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_registered_as_pytorch_wants_it(dtype: torch.dtype) -> None:
    """Schema, fake shapes, autograd and tracing, by PyTorch's own checker."""

    def leaf(*shape: int) -> Tensor:
        return random(*shape, dtype=dtype, seed=len(shape)).requires_grad_()

    counts, start = torch.tensor([5, 0, 30]), torch.zeros(2, 20, dtype=torch.int32)
    path = route(torch.arange(70).view(35, 2) % 3)
    for operator, arguments in (
        (cpu.linear, (leaf(40, 16), leaf(32, 16))),
        (cpu.experts, (leaf(35, 16), counts, leaf(3, 32, 16), leaf(3, 16, 16))),
        (cpu.feed_forward, (leaf(40, 16), leaf(32, 16), leaf(32, 16), leaf(16, 32))),
        (cpu.gather, (leaf(35, 16), path.token, path.inverse)),
        (cpu.combine, (leaf(70, 16), path.inverse, leaf(35, 2), leaf(35, 16))),
        (cpu.norm, (leaf(40, 16), leaf(16), 1e-5, None, None)),
        (cpu.gated, (leaf(40, 16), leaf(40, 16))),
        (cpu.attention, (leaf(2, 20, 4, 16), leaf(2, 20, 2, 16), leaf(2, 20, 2, 16), start)),
    ):
        torch.library.opcheck(operator, arguments)
    weight, copy = random(48, 16, dtype=torch.float32, seed=8), torch.empty(48, 16, dtype=dtype)
    numbers = {"scale": 0.5, "step": 3, "lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    moments = torch.zeros(48, 16), torch.ones(48, 16)
    torch.library.opcheck(cpu.adamw_, (weight, leaf(48, 16).detach(), *moments, copy), numbers)
    update = torch.empty(48, 16, dtype=torch.bfloat16)
    torch.library.opcheck(cpu.muon_momentum_, (weight, leaf(48, 16).detach(), update, 0.5, 0.9, True))
    torch.library.opcheck(cpu.muon_move_, (weight, update, copy, 0.1, 0.9))
    torch.library.opcheck(cpu.square_sums, (leaf(48, 16).detach(),))


# --- when they cannot be had --------------------------------------------------------------------------------------

SCRIPT = "import torch; from freehold.kernels import cpu; from freehold.model import ops; x = torch.ones(64, {n}); "
SCRIPT += "print(cpu.describe(x.dtype)); "
SCRIPT += "ops.linear(x, torch.ones({n}, {n})); ops.linear(x, torch.ones({n}, {n}))"


def run(tmp_path: Path, width: int = 16, **environment: str) -> tuple[str, str]:
    where = {"XDG_CACHE_HOME": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(n=width)], env={**os.environ, **where}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def test_failing_compiler_is_named_and_its_log_kept(tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX-512, so nothing is compiled")
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho no room left; exit 3\n")
    compiler.chmod(0o755)
    said, _ = run(tmp_path, CXX=str(compiler))
    (log,) = (tmp_path / "freehold").glob("*.log")
    assert said == f"PyTorch ({compiler} failed; what it said is in {log})"
    assert "no room left" in log.read_text()
    said, _ = run(tmp_path, CXX="no-such-compiler")
    assert said.startswith("PyTorch (no-such-compiler could not be run")


def test_they_can_be_switched_off(tmp_path: Path) -> None:
    assert run(tmp_path, FREEHOLD_NATIVE="0") == ("PyTorch (switched off by FREEHOLD_NATIVE=0)", "")


def test_unsupported_shape_is_reported_once(tmp_path: Path) -> None:
    if not cpu.available(torch.empty(1)):
        pytest.skip(cpu.describe(torch.float32))
    _, reported = run(tmp_path, width=24, XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME", ""))
    assert reported == "kernels: row widths that are no multiples of 16 run on PyTorch's operators"


def test_without_home_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that is not in /etc/passwd, and no HOME: a container that is started with any user."""
    from freehold.kernels import build

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(build.UnavailableError, match="set HOME or XDG_CACHE_HOME"):
        build.load(cpu.SOURCE, cpu.FLAGS, "native")
