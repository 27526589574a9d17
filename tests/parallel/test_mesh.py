import socket
from pathlib import Path

import pytest
import torch

from freehold.core.config import fill
from freehold.core.errors import ConfigError
from freehold.model.config import ModelConfig
from freehold.parallel import launch
from freehold.parallel.config import ParallelConfig, check_degrees, validate_layout
from freehold.parallel.heartbeat import FOLDER
from freehold.parallel.join import join
from freehold.parallel.launch import check_fits_machine
from freehold.parallel.mesh import World, place_of, world
from freehold.stages.align.config import AlignConfig as AlignConfig

MODEL = ModelConfig.model_validate({"preset": "laptop"})


def test_ranks_are_numbered_with_context_innermost():
    parallel = ParallelConfig(replicate=2, shard=3, context=2, pipeline=2)
    places = [place_of(rank, parallel) for rank in range(parallel.devices)]
    assert places == sorted(places)
    assert len(set(places)) == 24
    assert places[-1] == (1, 1, 2, 1)


def test_every_row_is_read_once_by_each_context_rank():
    parallel = ParallelConfig(replicate=2, shard=2, context=2)
    rows = list(range(8))
    read = [tuple(rows[World(parallel, rank).rows(8)]) for rank in range(8)]
    assert read[::2] == read[1::2] == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_one_process_is_a_world_without_a_group():
    alone = world(ParallelConfig())
    assert (alone.size, alone.dense, alone.is_main, alone.rows(8)) == (1, None, True, slice(0, 8))
    assert alone.any(True)
    assert not alone.any(False)


def test_one_process_is_not_sharded():
    with pytest.raises(ConfigError, match=r"pretrain\.parallel\.nproc=4"):
        world(ParallelConfig(shard=4), "pretrain")


def test_degrees_must_multiply():
    with pytest.raises(ConfigError, match=r"found: +replicate 2 x shard 3 .* = 6\n +expected: +4"):
        check_degrees(ParallelConfig(replicate=2, shard=3), 4, "processes")


@pytest.mark.parametrize(
    ("degrees", "batch", "where"),
    [
        ({"shard": 3, "expert": 3}, {}, "pretrain.parallel.expert"),
        ({"shard": 2, "expert": 4}, {}, "pretrain.parallel.expert"),
        ({"context": 8}, {}, "pretrain.parallel.context"),
        ({"pipeline": 99}, {}, "pretrain.parallel.pipeline"),
        ({"shard": 2}, {"sequences": 3}, "pretrain.batch.sequences"),
        ({"shard": 16}, {}, "pretrain.batch.sequences"),
        ({"shard": 2}, {"micro_sequences": 8}, "pretrain.batch.sequences"),
        ({"nproc": 4}, {}, "pretrain.parallel"),
    ],
)
def test_what_does_not_divide_names_its_key(degrees, batch, where):
    batch = {"context_tokens": 512, "sequences": 8, "micro_sequences": 0} | batch
    with pytest.raises(ConfigError) as error:
        validate_layout(ParallelConfig(**degrees), MODEL, **batch, stage="pretrain")
    assert error.value.where == where


def test_a_mesh_larger_than_this_machine_is_not_started(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"(?s)align\.parallel\.nproc.*1000000 processes: about 300,000 GB.*--dry-run"
    ):
        check_fits_machine(ParallelConfig(nproc=1_000_000), "align")
    with monkeypatch.context() as one:
        one.setattr(launch.Path, "glob", lambda *_: iter([Path("/dev/nvidia0")]))
        with pytest.raises(ConfigError, match=r"(?s)more processes than devices.*align\.parallel\.nproc.*found: +999"):
            check_fits_machine(ParallelConfig(nproc=999, device="cuda"), "align")
        one.setattr(launch.Path, "glob", lambda *_: iter([]))  # other makers' devices have other names
        check_fits_machine(ParallelConfig(nproc=999, device="cuda"), "align")
    monkeypatch.setenv("LOCAL_RANK", "999")
    with pytest.raises(ConfigError, match=r"(?s)no CUDA device.*align\.parallel\.device.*LOCAL_RANK 999"):
        world(ParallelConfig(device="cuda"), "align")


def test_recipe_refuses_what_needs_no_checkpoint_to_see():
    with pytest.raises(ConfigError, match=r"align\.parallel\.nproc"):
        fill(AlignConfig, {"parallel": {"nproc": 2, "shard": 3}}, "align")
    with pytest.raises(ConfigError, match=r"align\.batch\.sequences"):
        fill(AlignConfig, {"parallel": {"shard": 3}, "batch": {"sequences": 4}}, "align")


def test_ranks_that_cannot_meet_say_where_they_tried(monkeypatch, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ConfigError, match=rf"(?s)did not meet.*MASTER_PORT={port}.*already in use"):
            join(ParallelConfig(shard=2), {})
        monkeypatch.setenv(FOLDER, str(tmp_path))  # a supervisor tries the next port: no mistake of the user's
        with pytest.raises(torch.distributed.DistError):
            join(ParallelConfig(shard=2), {})
