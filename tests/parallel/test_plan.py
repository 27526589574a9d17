"""What needs no processes: real clusters on paper, and what a CUDA device would be given."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from freehold.model import ops
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.parallel.config import ParallelConfig
from freehold.parallel.mesh import world
from freehold.parallel.plan import local, parallelize


@pytest.fixture
def fake_ranks():
    """Call as `fake_ranks(rank, size)`: this process believes to be one of many, and hears nothing of the others."""

    def join(rank, size):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield join
    torch.distributed.destroy_process_group()


# Of a rank: as published trials of PyTorch's plan count it, but with gains whole on every rank instead of sharded.
@pytest.mark.parametrize(
    ("preset", "degrees", "rank", "total", "sharded_gains", "experts"),
    [
        ("large", {"replicate": 16, "shard": 128, "expert": 8}, 2047, 398_635_272_192, 3_114_338_064, 3_057_647_616),
        ("mini", {"replicate": 4, "shard": 128, "expert": 8}, 0, 26_123_970_560, 204_093_520, None),
    ],
)
def test_a_cluster_is_sharded_on_meta_tensors(fake_ranks, preset, degrees, rank, total, sharded_gains, experts):
    parallel = ParallelConfig(**degrees)
    fake_ranks(rank, parallel.devices)
    with torch.device("meta"):
        model = Afmoe(ModelConfig.model_validate({"preset": preset}))
    parallelize(model, world(parallel), torch.bfloat16)
    named = dict(model.named_parameters())
    gains = sum(p.numel() for p in named.values() if p.ndim == 1)
    here = {name: local(p.detach()).numel() for name, p in named.items()}
    assert sum(p.numel() for p in named.values()) == total
    assert sum(here.values()) == sharded_gains - gains // 128 + gains
    stacks = [name for name in named if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert experts is None or sum(here[name] for name in stacks) == experts
    replicated, over_edp, over_ep = named[stacks[0]].placements
    assert (replicated, over_ep) == (Replicate(), Shard(0))
    assert over_edp.dim == 0  # whole matrices: Muon needs no company


def test_cuda_gets_grouped_products_and_is_asked_for_no_counts():
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), FakeTensorMode(), Calls():
        x, gate_up, down = (
            torch.empty(*shape, dtype=torch.bfloat16, device="cuda")
            for shape in ((64, 128), (4, 64, 128), (4, 128, 32))
        )
        y = ops.grouped_swiglu(x, torch.empty(4, dtype=torch.int64, device="cuda"), gate_up, down)
    assert (y.shape, y.device.type) == (x.shape, "cuda")
    assert called.count("aten._grouped_mm.default") == 2
    assert not [name for name in called if "local_scalar" in name]
