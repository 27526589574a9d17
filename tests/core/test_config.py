import pytest

from freehold.core.config import REMOVED, difference, fill, load_recipe, load_yaml, merge, parse_override
from freehold.core.errors import ConfigError
from freehold.stages.pretrain.config import PretrainConfig


def write(path, text):
    path.write_text(text)
    return path


def test_base_recipe_overrides(tmp_path):
    write(tmp_path / "base.yaml", "name: b\npretrain:\n  optim: {lr: 1e-3}\n  batch: {sequences: 4}\n")
    recipe = write(tmp_path / "r.yaml", "base: base.yaml\nname: r\npretrain:\n  batch: {sequences: 8}\n")
    data = load_recipe(recipe, ["pretrain.optim.lr=3e-4", "--pretrain.trainer.recompute=true"])
    config = fill(PretrainConfig, data["pretrain"], "pretrain")
    assert data["name"] == "r"
    assert (config.optim.lr, config.batch.sequences, config.trainer.recompute) == (3e-4, 8, True)


def test_numbers_in_any_spelling_fill_number_fields(tmp_path):
    text = "pretrain:\n  optim: {lr: 3e-4, weight_decay: .5, muon_lr: 0.020}\n"
    text += "  trainer: {keep_last: 007, recompute: yes}\n"
    text += "  phases: {a: {steps: 400_000, mixture: {code: 1e-1}, stage_type: 1e5}}\n"
    config = fill(PretrainConfig, load_recipe(write(tmp_path / "r.yaml", text))["pretrain"], "pretrain")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.muon_lr) == (3e-4, 0.5, 0.02)
    assert (config.trainer.keep_last, config.trainer.recompute) == (7, True)
    assert (config.phases["a"].steps, config.phases["a"].mixture) == (400_000, {"code": 0.1})
    assert config.phases["a"].stage_type == "1e5"


def test_keys_are_text(tmp_path):
    text = "1: a\n2024-01-01: b\non: c\nbase_of: &base {2: d, 3: e}\nmerged: {<<: *base, 3: f}\n"
    assert load_recipe(write(tmp_path / "r.yaml", text)) == {
        "1": "a", "2024-01-01": "b", "on": "c", "base_of": {"2": "d", "3": "e"}, "merged": {"2": "d", "3": "f"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="the key '1' is given twice"):
        load_recipe(write(tmp_path / "t.yaml", '1: a\n"1": b\n'))


@pytest.mark.parametrize("text", ["? [a, b]\n: 2", "? {a: 1}\n: 2", "a: !!map [1]", "a: !!set [1]", "[" * 3000])
def test_what_is_no_recipe_is_an_error_not_a_traceback(tmp_path, text):
    with pytest.raises(ConfigError, match="not YAML"):
        load_recipe(write(tmp_path / "r.yaml", text))
    with pytest.raises(ConfigError, match="not YAML"):
        parse_override(f"a={text}")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lrr=1", "did you mean `lr`"),
        ("optin.lr=1", "did you mean `optim`"),
        ("phases.stable.stepps=1", "did you mean `steps`"),
        ("balance.kind=smebu balance.rat=1", "did you mean `rate`"),
        ("model.num_expert=4", "did you mean `num_experts`"),
        ("zzz=1", "known keys here"),
    ],
)
def test_unknown_key_names_its_neighbour(override, says):
    data = {}
    for item in override.split():
        data = merge(data, parse_override(item))
    base = {"model": {"preset": "laptop"}, "phases": {"stable": {"steps": 2}}}
    with pytest.raises(ConfigError, match="unknown key") as error:
        fill(PretrainConfig, merge(base, data), "pretrain")
    assert says in str(error.value)
    assert "pretrain." in str(error.value)


def test_removed_key_names_its_constant(monkeypatch):
    constant = "stages/curate/filters.py: MIN_WORDS = 5"
    monkeypatch.setitem(REMOVED, "pretrain.phases.*.min_words", constant)
    with pytest.raises(ConfigError, match="removed") as error:
        fill(PretrainConfig, {"phases": {"stable": {"steps": 2, "min_words": 3}}}, "pretrain")
    assert error.value.where == "pretrain.phases.stable.min_words"
    assert constant in error.value.todo


def test_unknown_key_is_named_before_a_missing_one():
    with pytest.raises(ConfigError, match="did you mean `steps`"):
        fill(PretrainConfig, {"phases": {"stable": {"step": 24}}}, "pretrain")


@pytest.mark.parametrize(
    "name", ["base.tmp", "manifest.json", "metrics.jsonl", "key.json", "trace.parquet", ".x", "a/b", "a\n"]
)
def test_checkpoint_names_that_collide_with_files_of_the_stage(name):
    with pytest.raises(ConfigError, match=r"phases\.a\.checkpoint"):
        fill(PretrainConfig, {"phases": {"a": {"steps": 1, "checkpoint": name}}}, "pretrain")


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("phases.stable.steps=99999999999", "pretrain.phases.stable.steps"),
        ("optim.lr=fast", "pretrain.optim.lr"),
        ("optim.lr=-1", "pretrain.optim.lr"),
        ("optim.lr=.inf", "pretrain.optim.lr"),
        ("phases.stable.checkpoint=../x", "pretrain.phases.stable.checkpoint"),
        ("phases.stable.checkpoint=log", "pretrain.phases"),
        ("trainer.threads=100000", "pretrain.trainer.threads"),
        ("batch.sequences=2.5", "pretrain.batch.sequences"),
        ("trainer.dtype=fp8", "pretrain.trainer.dtype"),
        ("batch.sequences=1e9x", "pretrain.batch.sequences"),
    ],
)
def test_wrong_type_names_key_found_and_expected(override, where):
    with pytest.raises(ConfigError, match="not a valid value") as error:
        fill(PretrainConfig, merge({"phases": {"stable": {"steps": 2}}}, parse_override(override)), "pretrain")
    assert error.value.where.startswith(where)
    assert error.value.found
    assert error.value.expected


def test_missing_key():
    with pytest.raises(ConfigError, match="missing") as error:
        fill(PretrainConfig, {"phases": {"stable": {}}}, "pretrain")
    assert error.value.where == "pretrain.phases.stable.steps"


def test_micro_batches_must_divide():
    with pytest.raises(ConfigError, match="multiple of micro_sequences"):
        fill(PretrainConfig, {"batch": {"sequences": 8, "micro_sequences": 3}}, "pretrain")


def test_bad_recipes(tmp_path):
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="not YAML"):
        load_recipe(write(tmp_path / "a.yaml", "a: [1"))
    with pytest.raises(ConfigError, match="not a mapping"):
        load_recipe(write(tmp_path / "b.yaml", "- 1"))
    with pytest.raises(ConfigError, match="given twice"):
        load_recipe(write(tmp_path / "f.yaml", "name: a\nname: b"))
    with pytest.raises(ConfigError, match="not YAML"):
        load_recipe(write(tmp_path / "g.yaml", "a: &x [*x]"))
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path)
    write(tmp_path / "d.yaml", "base: e.yaml")
    with pytest.raises(ConfigError, match="base of its own"):
        load_recipe(write(tmp_path / "c.yaml", "base: d.yaml") if write(tmp_path / "e.yaml", "name: e") else None)
    for bad in ("lr", "=3", "a..b=1"):
        with pytest.raises(ConfigError, match="override must look like"):
            parse_override(bad)
    with pytest.raises(ConfigError, match="not YAML"):
        parse_override("a=[1")


def test_values_of_overrides_are_yaml():
    texts = {
        "a=1": 1,
        "a=0.5": 0.5,
        "a=3e-4": "3e-4",
        "a=2024-13-45": "2024-13-45",
        "a=!!bool foo": "foo",
        "a=true": True,
        'a="tiny"': "tiny",
        "a=x y": "x y",
        "a=[1, 2]": [1, 2],
        "a=": None,
    }
    assert {text: parse_override(text)["a"] for text in texts} == texts


def test_null_takes_a_mapping_of_the_base_away():
    base = {"phases": {"stable": {"steps": 2}, "anneal": {"steps": 3}}, "n": 4}
    assert merge(base, {"phases": {"stable": None}, "n": None}) == {"phases": {"anneal": {"steps": 3}}, "n": None}


def test_difference_names_keys():
    assert difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}, "d": 4}) == ["a.b: 1 -> 3", "d: (absent) -> 4"]
    assert difference({"a": 1}, {"a": 1}) == []


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [LAUGHS, "x: {" + ",".join(f"k{n}: 1" for n in range(15_000)) + "}", "x: " + "y" * 3_000_000, "x: &x [*x]"],
    ids=["aliases", "keys", "long", "loop"],
)
def test_yaml_is_counted_before_it_is_expanded(tmp_path, text):
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not YAML"):
        load_yaml(path)


def test_override_is_counted_before_it_is_expanded():
    with pytest.raises(ConfigError, match="not YAML"):
        parse_override("a.b=[&a [1,1,1,1,1,1,1,1,1,1], " + ", ".join(f"&a [{'*a,' * 10}]" for _ in range(8)) + "]")
