"""Several adapters on one engine: each answers with the bits it has alone, and the base with its own."""

import pytest
import tiny
import torch

from freehold import api
from freehold.checkpoint import adapter as adapters
from freehold.checkpoint import base as frozen
from freehold.core.errors import CheckpointError, ConfigError, RequestError
from freehold.infer.engine import Engine
from freehold.infer.sampler import Sampling
from freehold.model import adapted
from freehold.model.afmoe import Afmoe
from freehold.model.groups import ADAPTABLE
from freehold.model.lora import Pair

CONFIG = tiny.config(hidden_size=32, moe_intermediate_size=32, head_dim=32)
PROMPTS = [[33, 40, 41, 42], [50, 51], [60, 35, 36]]


def model_of(seed: int = 0) -> Afmoe:
    return tiny.disturb(Afmoe(CONFIG), seed)


def pairs_of(seed: int, rank: int = 4, groups=ADAPTABLE) -> dict[str, Pair]:
    model = model_of()
    g = torch.Generator().manual_seed(seed)
    ranks = {group: rank for group in groups if group != "router"}
    for factors in adapted.attach(model, ranks, 32, g).values():
        torch.nn.init.normal_(factors.b, std=0.05, generator=g)
    return adapters.of_model(model).pairs


LOADED = {"a": pairs_of(1), "b": pairs_of(2, rank=7, groups=("experts.gate_up", "experts.down", "attention.q"))}


def answers(engine: Engine, names: list[str]) -> list[tuple[list[int], list[float]]]:
    settings = [Sampling(temperature=0, max_tokens=5, adapter=name) for name in names]
    return [(g.ids, g.logprobs) for g in engine.generate(PROMPTS[: len(names)], settings)]


def test_each_adapter_answers_as_alone():
    plain, shared = Engine(model_of()), Engine(model_of())
    base = [answers(plain, ["", "", ""])[n] for n in range(3)]
    shared.add_adapters(LOADED)
    assert shared.exact
    assert answers(shared, ["", "", ""]) == base, "loading adapters changes the base"
    mixed = answers(shared, ["b", "", "a"])
    assert mixed[1] == base[1]
    for number, name in ((0, "b"), (2, "a")):
        alone = Engine(model_of())
        alone.add_adapters({name: LOADED[name]})
        settings = Sampling(temperature=0, max_tokens=5, adapter=name)
        (answer,) = alone.generate([PROMPTS[number]], settings)
        assert (answer.ids, answer.logprobs) == mixed[number]
        assert mixed[number][1] != base[number][1], "the adapter changes nothing"


def test_scores_are_those_of_the_adapted_model():
    engine, model = Engine(model_of()), model_of()
    engine.add_adapters(LOADED)
    adapters.put_on(model, adapters.Adapter(LOADED["b"]))
    scored = engine.score_top(PROMPTS[:1], 0, "b")[0].logprobs[1:]
    exact = model(torch.tensor(PROMPTS[:1]))[0].log_softmax(-1)
    expected = [float(exact[i, token]) for i, token in enumerate(PROMPTS[0][1:])]
    assert scored == pytest.approx(expected, abs=1e-4)


def test_adapter_that_is_not_loaded_is_refused():
    engine = Engine(model_of())
    with pytest.raises(RequestError, match="no such adapter"):
        engine.generate(PROMPTS[:1], Sampling(adapter="a"))
    engine.add_adapters(LOADED)
    with pytest.raises(RequestError, match="no such adapter"):
        engine.generate(PROMPTS[:1], Sampling(adapter="c"))


def test_adapter_of_the_router_is_not_served_next_to_others():
    pair = Pair(torch.zeros(1, 2, 32), torch.zeros(1, 4, 2), 1.0)
    with pytest.raises(ConfigError, match="router"):
        Engine(model_of()).add_adapters({"x": {"model.layers.1.mlp.router.gate": pair}})


def test_load_refuses_an_adapter_of_another_base(tiny_checkpoint, tiny_model, tmp_path):
    found = frozen.fingerprint(tiny_model.state_dict().items())
    model = Afmoe(tiny_model.config)
    model.load_state_dict(tiny_model.state_dict())
    adapted.attach(model, {"attention.q": 2}, 32, torch.Generator().manual_seed(0))
    for name, base in (("good", found), ("other", "0" * 64)):
        adapter = adapters.of_model(model, {"base_sha256": base})
        adapters.save(tmp_path / name, adapter, tiny_model.config, alpha=32, base="x")
    loaded = api.load(tiny_checkpoint, threads=1, adapters={"good": tmp_path / "good"})
    assert loaded.engine.generate([[5, 6]], Sampling(temperature=0, max_tokens=2, adapter="good"))[0].ids
    with pytest.raises(CheckpointError, match="another base"):
        api.load(tiny_checkpoint, threads=1, adapters={"other": tmp_path / "other"})
