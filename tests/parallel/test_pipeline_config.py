"""Which pipelines a recipe may ask for."""

import pytest

from freehold.core.errors import ConfigError
from freehold.model.config import ModelConfig
from freehold.parallel.config import ParallelConfig, validate_layout

LAPTOP = ModelConfig.model_validate({"preset": "laptop"})


def parallelize(parallel, sequences, micro_sequences):
    validate_layout(
        ParallelConfig(**parallel),
        LAPTOP,
        context_tokens=512,
        sequences=sequences,
        micro_sequences=micro_sequences,
        stage="pretrain",
    )


@pytest.mark.parametrize(
    ("parallel", "sequences", "micro", "where", "words"),
    [
        ({"pipeline": 2}, 8, 0, "batch.micro_sequences", "1 passes of 8 rows on each data rank, through 2 ranks"),
        ({"pipeline": 4, "shard": 2}, 8, 2, "batch.micro_sequences", "2 passes of 2 rows"),
        ({"pipeline": 2, "schedule": "interleaved"}, 5, 1, "batch.micro_sequences", "a multiple of 2"),
        ({"pipeline": LAPTOP.num_hidden_layers + 1}, 64, 1, "parallel.pipeline", "more stages than layers"),
        ({"pipeline": LAPTOP.num_hidden_layers, "schedule": "interleaved"}, 64, 1, "parallel.pipeline", "stages"),
    ],
)
def test_what_does_not_fill_a_pipeline_is_refused(parallel, sequences, micro, where, words):
    with pytest.raises(ConfigError, match=words) as raised:
        parallelize(parallel, sequences, micro)
    assert raised.value.where == f"pretrain.{where}"


@pytest.mark.parametrize(
    ("parallel", "sequences", "micro"),
    [
        ({"pipeline": 2}, 8, 4),
        ({"pipeline": 2}, 5, 1),
        ({"pipeline": 2, "schedule": "interleaved"}, 6, 1),
        ({"schedule": "interleaved"}, 8, 0),
    ],
)
def test_what_fills_it_is_taken(parallel, sequences, micro):
    parallelize(parallel, sequences, micro)
