"""Settings of training: what is refused, and what a removed setting says."""

import importlib
import re

import pytest

from freehold.core.config import REMOVED, fill, merge, parse_override
from freehold.core.errors import ConfigError
from freehold.optim.config import NoBalanceConfig
from freehold.stages.align.config import AlignConfig
from freehold.stages.pretrain.config import PretrainConfig

OURS = {key: constant for key, constant in REMOVED.items() if re.match(r"(trainer|optim)/", constant)}


@pytest.mark.parametrize("key", OURS)
@pytest.mark.parametrize(("stage", "cls"), [("pretrain", PretrainConfig), ("align", AlignConfig)])
def test_removed_setting_names_its_constant(stage, cls, key):
    path = key.removeprefix("*.").replace("balance.smebu", "balance")
    data = merge(parse_override(f"{path}=1"), {"balance": {"kind": "smebu"}})
    with pytest.raises(ConfigError, match="removed") as error:
        fill(cls, data, stage)
    file, name, value = re.search(r"freehold/(\w+/\w+)\.py: (\w+) = ([\d.e-]+)", str(error.value)).groups()
    module = importlib.import_module(f"freehold.{file.replace('/', '.')}")
    assert getattr(module, name) == float(value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"trainer": {"collapse": {"action": "raise_rate"}}, "balance": NoBalanceConfig()}, "needs a balancing rule"),
        (
            {
                "trainer": {"collapse": {"action": "reinitialise"}},
                "parallel": {"pipeline": 2},
                "batch": {"sequences": 4, "micro_sequences": 1},
            },
            "another pipeline stage holds",
        ),
    ],
)
@pytest.mark.parametrize(("stage", "cls"), [("pretrain", PretrainConfig), ("align", AlignConfig)])
def test_impossible_action_is_refused_by_the_recipe(stage, cls, overrides, says):
    with pytest.raises(ConfigError, match=says) as error:
        fill(cls, overrides, stage)
    assert error.value.where == f"{stage}.trainer.collapse.action"
