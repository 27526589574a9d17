"""Recipes: YAML plus dotted overrides, filled into frozen pydantic models; errors name the key and its neighbour."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from freehold.core.errors import ConfigError

C = TypeVar("C", bound="Config")

MOST_YAML_CHARS, MOST_NODES = 2_000_000, 20_000
"""Size of a recipe, a policy or an override; the largest shipped recipe has under 1,000 values."""

# Keys that have another name now: the error names the successor.
RENAMED: dict[str, str] = {
    "factbook_items": "taught_items, text_only_items",
    "max_kl_exact": "max_kl: {HF: ..., F32: ...}",
    "max_kl_bf16": "max_kl: {BF16: ...}",
    "max_kl_q8_0": "max_kl: {Q8_0: ...}",
    "max_kl_q6_k": "max_kl: {Q6_K: ...}",
    "max_kl_q5_k_m": "max_kl: {Q5_K_M: ...}",
    "max_kl_q4_k_m": "max_kl: {Q4_K_M: ...}",
    "max_kl_q4_0": "max_kl: {Q4_0: ...}",
    "max_kl_q3_k_m": "max_kl: {Q3_K_M: ...}",
}
# Settings that became constants, by full dotted key (`*` stands for any parts, as a source's name): the error names the
# constant, e.g. "trainer/guards.py: SPIKE_WINDOW = 128".
REMOVED: dict[str, str] = {
    "*.trainer.collapse.rate_factor": "trainer/collapse.py: RATE_FACTOR = 10",
    "*.trainer.collapse.raise_steps": "trainer/collapse.py: RAISE_STEPS = 100",
    "*.trainer.collapse.max_rollbacks": "trainer/guards.py: MAX_ROLLBACKS = 3",
    "*.trainer.spike.max_rollbacks": "trainer/guards.py: MAX_ROLLBACKS = 3",
    "*.trainer.spike.patience_steps": "trainer/spike.py: PATIENCE_STEPS = 4",
    "*.trainer.spike.blame_steps": "trainer/spike.py: BLAME_STEPS = 8",
    "*.trainer.max_skipped_steps": "trainer/guards.py: MAX_SKIPPED_STEPS = 10",
    "*.optim.muon_momentum": "optim/muon.py: MOMENTUM = 0.95",
    "*.optim.nesterov": "optim/muon.py: MOMENTUM = 0.95, always with Nesterov's look-ahead",
    "*.optim.eps": "optim/adamw.py: EPS = 1e-8",
    "gather.sources.*.licence_key": 'stages/gather/config.py: LICENCE_KEY = "licence"',
    "gather.sources.*.evidence_key": 'stages/gather/config.py: EVIDENCE_KEY = "licence_evidence"',
    "gather.sources.*.held_out_share": "corpora/teaching.py: HELD_OUT_SHARE = 0.25",
    "chat.top_p": "generation_config.json of the model, else api.py: DEFAULT",
    "chat.top_k": "generation_config.json of the model, else api.py: DEFAULT",
    "serve.max_batch": "infer/engine.py: 32 prompts or choices of one request are decoded together",
    "serve.answer_tokens": "stages/serve/run.py: ANSWER_TOKENS = 64",
    "serve.start_timeout_s": "stages/serve/run.py: START_TIMEOUT_S = 120",
    "*.parallel.supervise.start_s": "parallel/observe.py: START_S = 900",
    "*.parallel.supervise.slow_factor": "parallel/observe.py: SLOW_FACTOR = 2",
    "plan.machine.mfu_error": "planner/hardware.py: MFU_ERROR = 0.2",
    "plan.machine.facility": "planner/hardware.py: FACILITY = 1.5",
    "plan.machine.restart_s": "planner/hardware.py: RESTART_S = 600",
    "*.balance.smebu.kappa": "optim/balance.py: KAPPA = 2",
    "curate.kinds.prose.prose": (
        "stages/curate/rules.py: PROSE = {min_words: 20, mean_word_chars: [2.5, 9.0], min_letters: 0.5, "
        "max_symbols: 0.1, min_stop_words: 0.1, max_bullet_lines: 0.9, max_ellipsis_lines: 0.3, "
        "max_duplicate_lines: 0.4, max_duplicate_paragraphs: 0.2, max_repeated_ngrams: 0.35}"
    ),
    "curate.kinds.reference.prose": (
        "stages/curate/rules.py: REFERENCE = {min_words: 20, mean_word_chars: [2.5, 12.0], min_letters: 0.4, "
        "max_symbols: 0.1, min_stop_words: 0.08, max_bullet_lines: 1.0, max_ellipsis_lines: 0.3, "
        "max_duplicate_lines: 0.7, max_duplicate_paragraphs: 0.6, max_repeated_ngrams: 0.75}"
    ),
    "curate.kinds.docstring.prose": (
        "stages/curate/rules.py: DOCSTRING = {min_words: 10, mean_word_chars: [1.5, 12.0], min_letters: 0.3, "
        "max_symbols: 0.3, min_stop_words: 0.04, max_bullet_lines: 1.0, max_ellipsis_lines: 0.6, "
        "max_duplicate_lines: 0.7, max_duplicate_paragraphs: 0.6, max_repeated_ngrams: 0.75}"
    ),
    "curate.kinds.code.code": (
        "stages/curate/rules.py: CODE = {check_parses: true, max_line_chars: 2000, max_mean_line_chars: "
        "100.0, min_alphanumeric: 0.25, max_digits: 0.35, max_comment_lines: 0.8, drop_generated: true}"
    ),
    "curate.kinds.*.prose": "stages/curate/rules.py: LIMITS = null",
    "curate.kinds.*.code": "stages/curate/rules.py: LIMITS = null",
    "curate.kinds.code.max_chars": "stages/curate/rules.py: KindLimits.max_chars = 1_000_000",
    "curate.kinds.*.max_chars": "stages/curate/rules.py: KindLimits.max_chars = 4_000_000",
    "curate.kinds.*.max_line_chars": "stages/curate/rules.py: MAX_LINE_CHARS = 1_000_000",
    "curate.kinds.*.min_language_score": "stages/curate/rules.py: MIN_LANGUAGE_SCORE = 0.3",
    "curate.kinds.prose.cut": "stages/curate/rules.py: KindLimits.cut = true",
    "curate.kinds.reference.cut": "stages/curate/rules.py: KindLimits.cut = true",
    "curate.kinds.*.cut": "stages/curate/rules.py: KindLimits.cut = false",
    "curate.near_duplicates.shingle_words": "stages/curate/rules.py: SHINGLE_WORDS = 5",
    "curate.near_duplicates.min_words": "stages/curate/rules.py: NEAR_MIN_WORDS = 20",
    "curate.overlap.contained_share": "stages/curate/rules.py: CONTAINED_SHARE = 0.8",
    "curate.overlap.ngram_words": "stages/curate/rules.py: NGRAM_WORDS = 13",
    "curate.overlap.match_words": "stages/curate/rules.py: MATCH_WORDS = 50",
    "curate.lines.min_chars": "stages/curate/rules.py: LINE_CHARS = 30",
    "curate.classifier.kinds": "stages/curate/rules.py: JUDGED_KINDS = [prose, reference, docstring]",
    "curate.classifier.buckets_log2": "stages/curate/rules.py: BUCKETS_LOG2 = 18",
    "curate.classifier.snippet_words": "stages/curate/rules.py: SNIPPET_WORDS = 200",
    "curate.classifier.max_snippets": "stages/curate/rules.py: MAX_SNIPPETS = 4_000",
    "curate.classifier.steps": "stages/curate/rules.py: CLASSIFIER_STEPS = 100",
    "curate.classifier.learning_rate": "stages/curate/rules.py: CLASSIFIER_RATE = 0.3",
    "curate.classifier.decay": "stages/curate/rules.py: CLASSIFIER_DECAY = 1e-4",
    "curate.toxicity.kinds": "stages/curate/rules.py: JUDGED_KINDS = [prose, reference, docstring]",
    "curate.toxicity.passage_words": "stages/curate/rules.py: PASSAGE_WORDS = 50",
    "curate.toxicity.threshold": "stages/curate/rules.py: TOXIC = 0.95",
    "curate.toxicity.max_share": "stages/curate/rules.py: MAX_TOXIC_SHARE = 0.2",
    "curate.bias.window_words": "stages/curate/rules.py: BIAS_WINDOW_WORDS = 10",
    "curate.bias.max_log_odds": "stages/curate/rules.py: MAX_LOG_ODDS = 1.5",
    "curate.privacy.max_per_1000_chars": "stages/curate/rules.py: MAX_FINDINGS_PER_1000_CHARS = 5.0",
    "curate.privacy.min_to_drop": "stages/curate/rules.py: MIN_FINDINGS_TO_DROP = 10",
    "curate.split.min_documents": "stages/curate/rules.py: MIN_VALIDATION_DOCUMENTS = 2",
    "curate.split.large_bytes": "stages/curate/rules.py: LARGE_BYTES = 60_000",
    "rephrase.strategies.*.limits": "stages/rephrase/prompts.py: PROMPTS = null",
    "rephrase.timeout_s": "stages/rephrase/teacher.py: TIMEOUT_S = 300",
    "rephrase.wait_s": "stages/rephrase/teacher.py: WAIT_S = 1",
    "rephrase.teacher.gguf.context_tokens": "stages/rephrase/teacher.py: CONTEXT_TOKENS = 4096",
}


class Config(pydantic.BaseModel):
    """The base of every declaration: frozen, unknown keys refused, defaults checked too."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


SHIPPED = Path(__file__).resolve().parent.parent / "recipes"
"""The shipped recipes: a link to `recipes/` in a source tree, files in an installed package."""


def find_recipe(path: Path) -> Path:
    """Return the file of a recipe: the path itself, or for a bare name such as `laptop` the shipped recipe.

    Raises ConfigError with the nearest known recipe when there is none.
    """
    if path.is_file():
        return path
    shipped = SHIPPED / f"{path}.yaml"
    if path.parent == Path() and not path.suffix and shipped.is_file():
        return shipped
    known = sorted(p.as_posix() for p in Path("recipes").glob("*.yaml")) + sorted(
        p.stem for p in SHIPPED.glob("*.yaml")
    )
    near = difflib.get_close_matches(path.as_posix(), known, n=1, cutoff=0.3)
    raise ConfigError(
        "no such recipe", where=path, todo=f"did you mean {near[0]}?" if near else f"shipped: {', '.join(known)}"
    )


def user_path(text: str) -> Path:
    """Return a path of a recipe, `~` standing for the home folder; ConfigError where there is none.

    Paths are expanded when they are used, so that what a run keeps of its recipe names no one's home.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # HOME is not set, or no such user
        raise ConfigError(
            "a path begins with ~, but its home folder is unknown",
            where=text,
            found=str(error),
            todo="write the path in full, or set HOME",
        ) from error


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a mapping; ConfigError otherwise."""
    if not path.is_file():
        raise ConfigError("no such file", where=path, expected="a YAML file")
    try:
        data = _parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("the recipe is not YAML", where=path, found=error) from error
    if not isinstance(data, dict):
        raise ConfigError("the recipe is not a mapping", where=path, found=type(data).__name__, expected="key: value")
    return data


class _Loader(yaml.SafeLoader):
    """YAML without its silent traps: keys are text and given once, and only what is plainly a number becomes one.

    `007`, `1e5`, `1.50`, `2024-01-15` and `on` stay as they are written: a field that holds a number, a date or a
    truth value reads them (pydantic), one that holds text keeps them.
    """

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        """Read a value, counting: a text of many must be refused before it takes minutes."""
        self.count = getattr(self, "count", 0) + 1
        if self.count > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_NODES:,} values", None)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping, looking for keys that are not text (`1` is the text "1") or given twice."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        """Return a number if that is exactly how it is written (400_000 too), else the text."""
        text = str(self.construct_scalar(node))
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                value = kind(text)
                if text in (str(value), f"{value:_}"):
                    return value
        return text

    def construct_truth(self, node: yaml.ScalarNode) -> bool | str:
        """Return what `true` and `false` say, else the text."""
        text = str(self.construct_scalar(node))
        return {"true": True, "false": False}.get(text.lower(), text)


for _name, _construct in (
    ("int", _Loader.construct_number),
    ("float", _Loader.construct_number),
    ("bool", _Loader.construct_truth),
    ("timestamp", _Loader.construct_scalar),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _construct)


def _parse(text: str) -> Any:
    """Return what YAML text says; ValueError when it is not YAML or holds itself."""
    if len(text) > MOST_YAML_CHARS:
        raise ValueError(f"{len(text):,} characters, at most {MOST_YAML_CHARS:,}")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (size := _expanded(node, {})) > MOST_NODES:
            raise ValueError(f"{size:,} values once its aliases are written out, at most {MOST_NODES:,}")
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node stands for with every alias written out; ValueError for one that holds itself.

    Counted before anything is expanded: nine levels of ten aliases are ten thousand million values.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("a value that holds itself")
        return known[id(node)]
    known[id(node)] = 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def load_recipe(path: Path, overrides: typing.Sequence[str] = ()) -> dict[str, Any]:
    """Return defaults-free recipe data: one `base:` recipe, then this one, then `a.b=value` overrides."""
    path = find_recipe(path)
    data = load_yaml(path)
    if "base" in data:
        base = path.parent / str(data.pop("base"))
        base_data = load_yaml(find_recipe(base))
        if "base" in base_data:
            raise ConfigError("a base recipe may not have a base of its own", where=base, found=base_data["base"])
        data = merge(base_data, data)
    return override(data, overrides)


def override(data: dict[str, Any], items: typing.Iterable[str]) -> dict[str, Any]:
    """Return `data` with `a.b=value` overrides merged over it, the last one wins."""
    for item in items:
        data = merge(data, parse_override(item))
    return data


def parse_override(item: str) -> dict[str, Any]:
    """Turn `optim.lr=0.5` into `{"optim": {"lr": 0.5}}`; the value is read as YAML."""
    key, equals, text = item.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError("an override must look like key.subkey=value", found=item, expected="e.g. optim.lr=3e-4")
    try:
        result = _parse(text)
    except ValueError as error:
        raise ConfigError("the value of an override is not YAML", where=key, found=text) from error
    for part in reversed(key.split(".")):
        result = {part: result}
    return result


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `below` with `above` merged over it: mappings merge, null takes a mapping away, the rest is replaced."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, dict) and value is None:
            del result[key]
        else:
            result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def fill(cls: type[C], data: dict[str, Any], where: str) -> C:
    """Validate `data` as `cls`; one problem becomes one ConfigError naming key, found and expected.

    A key that is unknown goes first: it may be the one that is missing, misspelt.
    """
    try:
        return cls.model_validate(data)
    except pydantic.ValidationError as error:
        problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        raise _explain(cls, problem, where) from None


def refill(cls: type[Config], recorded: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a recorded declaration as today's class fills it: removed settings go, new ones get their default.

    Returned unchanged when today's class refuses it, or when a removed setting was not what its constant is now.
    """
    data = json.loads(json.dumps(recorded))
    while True:
        try:
            return cls.model_validate(data).model_dump(mode="json")
        except pydantic.ValidationError as error:
            unknown = [p["loc"] for p in error.errors() if p["type"] == "extra_forbidden"]
            if not unknown or not all(_remove(data, loc, where) for loc in unknown):
                return recorded


def _remove(data: Any, location: tuple[Any, ...], where: str) -> bool:
    """Remove a setting that is a constant now from recorded data; return whether its value was the constant's."""
    constant = _removed(".".join([where, *map(str, location)]))
    for part in location[:-1]:
        if isinstance(data, list) or part in data:  # else: the tag of a union
            data = data[part]
    if constant is None or location[-1] not in data:
        return False
    value = data.pop(location[-1])
    written = constant.partition(" = ")[2]
    stated = _parse(written if written[:1] in ("{", "[") else written.partition(",")[0])
    return value is True if isinstance(value, bool) and not isinstance(stated, bool) else _number(stated) == value


def _number(value: Any) -> Any:
    """Return a number that YAML left as text (`1e-8`) as a number."""
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    return value


def _removed(key: str) -> str | None:
    """Return the constant that a removed setting became."""
    return next((constant for pattern, constant in REMOVED.items() if fnmatch.fnmatchcase(key, pattern)), None)


def to_yaml(config: pydantic.BaseModel | dict[str, Any]) -> str:
    """Return a filled config as YAML text: the form kept with the result."""
    data = config if isinstance(config, dict) else config.model_dump(mode="json")
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def difference(old: Any, new: Any, at: str = "") -> list[str]:
    """Return one line for each key whose value differs: `optim.lr: 0.001 -> 0.0003`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            lines += difference(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{at}.{key}" if at else str(key))
        return lines
    return [] if old == new else [f"{at}: {old} -> {new}"]


def unknown_key(where: object, name: str, known: typing.Sequence[str]) -> ConfigError:
    """Return the error for a key that is none of `known`; it names the successor, the nearest, or all of them."""
    if name in RENAMED:
        return ConfigError("this key was renamed", where=where, expected=RENAMED[name])
    if constant := _removed(str(where)):
        todo = f"take the key out of the recipe; its value is now the constant in freehold/{constant}"
        return ConfigError("this setting was removed: it is a constant now", where=where, found=name, todo=todo)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    todo = f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(known)}"
    return ConfigError("unknown key", where=where, found=name, todo=todo)


def _explain(cls: type[pydantic.BaseModel], problem: Any, where: str) -> ConfigError:
    location = [str(part) for part in problem["loc"]]
    key = ".".join([where, *location]) if where else ".".join(location)
    if problem["type"] == "extra_forbidden":
        return unknown_key(key, location[-1], _fields_at(cls, location[:-1]))
    if problem["type"] == "missing":
        return ConfigError("a key is missing", where=key, expected="a value")
    return ConfigError("not a valid value", where=key, found=repr(problem.get("input")), expected=problem["msg"])


def _fields_at(cls: Any, location: list[str]) -> list[str]:
    """Return the field names of the model(s) reached from `cls` along a pydantic error location."""
    models = [cls]
    for part in location:
        following: list[Any] = []
        for model in models:
            if part in model.model_fields:
                following += _models_in(model.model_fields[part].annotation)
        # A tag of a union or a key of a mapping is a step in the location that names no field.
        models = following or models
        tagged = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]
        models = tagged or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, pydantic.BaseModel) else []
    return [model for inner in typing.get_args(annotation) for model in _models_in(inner)]
