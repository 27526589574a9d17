"""Adaptation: open the base, give it factors, train them by the one loop, prove and measure what came out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from freehold.checkpoint import adapter as adapters
from freehold.checkpoint import base as frozen
from freehold.checkpoint import dcp, hf
from freehold.checkpoint.adapter import Adapter, Pair
from freehold.core.artifact import (
    Workspace,
    atomic_folder,
    hash_files,
    read_json,
    write_atomic,
    write_json,
    write_manifest,
)
from freehold.core.errors import CheckpointError
from freehold.core.machine import check_memory_fits
from freehold.data.exposure import ROW_BYTES
from freehold.data.shards import ShardSet
from freehold.losses.cross_entropy import CrossEntropy
from freehold.model import adapted
from freehold.model.afmoe import Afmoe
from freehold.optim.schedule import Schedule
from freehold.stages.adapt import coverage, gguf, measure, proof, rows
from freehold.stages.adapt.config import AdaptConfig
from freehold.stages.adapt.coverage import CoverageError, Watch
from freehold.stages.adapt.source import Base, name_of, open_base
from freehold.stages.adapt.train import Built, HeldRouting, build, check_router
from freehold.tokenizer.bpe import Tokenizer
from freehold.trainer.drift import gate_mass
from freehold.trainer.stage import Stage, Start, train_stage
from freehold.trainer.validate import validator

ADAPTER, ADAPTER_GGUF, MERGED, OWN = "adapter", "adapter.gguf", "merged", "adapted"
"""What the stage leaves: a folder for peft, a file for llama.cpp, a merged model, a checkpoint trained in full."""


@dataclass
class _Run:
    """One adaptation: what was opened, and the model once it is built."""

    config: AdaptConfig
    work: Workspace
    tokenizer: Tokenizer
    base: Base
    old: ShardSet | None
    built: Built | None = None
    watch: Watch | None = None
    held: HeldRouting | None = None

    def make(self) -> Afmoe:
        """Return the model that trains; called by the trainer."""
        config = self.config
        new = rows.new_held_out(config, self.work, self.tokenizer, self.base)
        self.built = build(config, self.base, self.work.seed, lambda model: gate_mass(model, rows.batches(new)))
        model = self.built.model
        planned = config.adapted if config.preset != "own" else ()
        masked = config.data == "conversations"
        self.watch = Watch(model, config.check_steps, planned, self.built.chosen, last_layer_masked=masked)
        if self.held is not None:
            self.held.watch(model)
        return model

    def see(self, step: int, masters: Mapping[str, Tensor], loads: Mapping[str, Tensor]) -> None:
        """Let the coverage report see a step."""
        assert self.watch is not None
        self.watch(step, masters, loads)

    @property
    def done(self) -> Built:
        """Return the model; the trainer has built it."""
        assert self.built is not None
        return self.built


def run(config: AdaptConfig, work: Workspace) -> dict[str, Any]:
    """Train to the end of the last phase; resumable at any step. Returns steps, what was adapted, drift and proofs.

    Raises CoverageError when a planned group did not train, TrainingError when the drift gate fails (everything is
    written then), and CheckpointError for a base of another tokenizer.
    """
    steps = sum(phase.steps for phase in config.phases.values())
    check_memory_fits(steps * config.batch.sequences * ROW_BYTES, "the order of the rows", "adapt.phases")
    tokenizer = Tokenizer.load(work.input("tokenize") / "tokenizer")
    base = open_base(config.base, tokenizer)
    config.batch.check_fits(base.config.max_position_embeddings, "adapt")
    one = _Run(config, work, tokenizer, base, rows.open_replay(config, base, tokenizer, work))
    counts = _train(one)
    check_router(one.done, config)
    report = _write_coverage(one)
    if config.preset == "own":
        figures: dict[str, Any] = {"parameters": sum(row["trained_parameters"] for row in report)}
    else:
        figures = _write_adapter(one, steps)
    drift = _measure(one)
    found = {**counts, **figures, "base_sha256": one.done.base_sha256, "router": config.router}
    if drift:
        found["drift"] = measure.short(drift)
        measure.judge(config, drift, work)
    return found


def _train(one: _Run) -> dict[str, Any]:
    config, work, base = one.config, one.work, one.base
    inner = CrossEntropy(config.trainer.z_loss, config.trainer.loss_chunk_tokens)
    if config.router == "replay_kl":
        one.held = HeldRouting(inner, config.router_kl)
    phases = dict(config.phases)
    if config.preset == "own":
        last = list(phases)[-1]
        changes = {"checkpoint": phases[last].checkpoint or OWN, "stage_type": phases[last].stage_type or "Adapted"}
        phases[last] = phases[last].model_copy(update=changes)
    config = config.model_copy(update={"phases": phases})
    new = rows.new_held_out(config, work, one.tokenizer, base)
    stage = Stage(
        name="adapt",
        model=base.config,
        order=rows.build_order(config, work, one.tokenizer, base, one.old),
        schedule=Schedule(phases),
        tokenizer=work.input("tokenize") / "tokenizer",
        facts={"tokenizer_sha256": one.tokenizer.sha256, "begins_with": list(base.begins_with)},
        start=Start(parent=base.parent, tokens=base.tokens),
        loss=one.held or inner,
        validate=lambda world: validator(new, world),
        build=one.make,
        watch=one.see,
    )
    try:
        return train_stage(stage, config, work)
    except CoverageError:
        _write_coverage(one)
        raise


def _write_coverage(one: _Run) -> list[dict[str, Any]]:
    """Write and print what was adapted."""
    config, watch = one.config, one.watch
    assert watch is not None
    path = one.work.folder / "coverage.json"
    if watch.seen == 0 and path.exists():  # a resumed run has no first steps: those before it were seen
        return list(read_json(path)["groups"])
    ranks = {} if config.preset == "own" else config.ranks(one.base.config.num_experts_per_tok)
    report = watch.table(ranks, config.quantize)
    tokens = {layer: counts.tolist() for layer, counts in watch.tokens.items()}
    write_json(path, {"steps": watch.seen, "groups": report, "tokens_by_expert": tokens, "chosen": watch.chosen})
    for line in coverage.show(report).splitlines():
        one.work.log.say(f"  {line}")
    return report


def _factors(one: _Run) -> Adapter:
    """Return the factors of the last step as they were trained, in float32."""
    last = dcp.last_good(one.work.folder / "checkpoints", one.work.log.warn)
    if last is None:
        raise CheckpointError("the last step has no checkpoint", where=one.work.folder / "checkpoints")
    masters = dcp.load(last, ["model"], verify=False)["model"]
    pairs = {}
    for name, factors in adapted.attached(one.done.model).items():
        stem, _, last_name = name.rpartition(".")
        key = f"{stem}.factors_{last_name}" if stem.endswith(".experts") else f"{name}.factors"
        pairs[name] = Pair(masters[f"{key}.a"], masters[f"{key}.b"], factors.scale)
    return Adapter(pairs, _facts(one))


def _facts(one: _Run) -> dict[str, Any]:
    config = one.config
    return {
        "name": one.work.run_name,
        "base": name_of(one.base),
        "base_sha256": one.done.base_sha256,
        "base_parent": one.base.parent,
        "experts": one.base.config.num_experts,
        "tokenizer_sha256": one.tokenizer.sha256,
        "begins_with": list(one.base.begins_with),
        "preset": config.preset,
        "groups": list(config.adapted),
        "router": config.router,
        "router_sha256": one.done.router_sha256,
        "quantize": config.quantize,
        "alpha": config.alpha,
        "chosen_experts": one.done.chosen,
    }


def _write_adapter(one: _Run, steps: int) -> dict[str, Any]:
    """Write what others open: the adapter's folder and GGUF file, or a merged model where the router was trained."""
    config, work = one.config, one.work
    adapter = _factors(one)
    figures: dict[str, Any] = {"parameters": sum(p.a.numel() + p.b.numel() for p in adapter.pairs.values())}
    if config.router == "full" or config.merge:
        figures["merged"] = _write_merged(one, adapter)
    if config.router == "full":
        work.log.say("  the router was trained: only merged/ is written, no adapter holds a router's bias")
        return figures
    folder, file = work.folder / ADAPTER, work.folder / ADAPTER_GGUF
    facts = {
        **adapter.facts, "stage": "adapt", "stage_type": "Adapter", "step": steps, "phase": list(config.phases)[-1],
        "parent": one.base.parent, "tokens": one.base.tokens + steps * config.batch.step_tokens, "skipped_steps": [],
    }  # fmt: skip
    with atomic_folder(folder) as temporary:
        written = adapters.save(temporary, adapter, one.base.config, alpha=config.alpha, base=name_of(one.base))
        for path in sorted((work.input("tokenize") / "tokenizer").iterdir()):
            if path.name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copyfile(path, temporary / path.name)
        write_json(temporary / "trainer.json", facts)
        write_manifest(temporary, kind="adapter", counts=written, files=hash_files(temporary))
    written["gguf_tensors"] = gguf.write(file, adapter, one.base.config, alpha=config.alpha, name=work.run_name)
    work.log.say(f"  adapter: {folder}, {written['parameters']:,} numbers; for llama.cpp: {file}")
    figures["written"] = written
    if config.proof.run:
        ids = next(iter(rows.new_held_out(config, work, one.tokenizer, one.base).values())).batch.input_ids[0]
        ids = [int(i) for i in ids[: min(config.proof.tokens, one.base.config.max_position_embeddings)]]
        record = proof.prove(folder, file, one.base.folder, one.base.config, ids, config.proof.tolerance, work.log.say)
        write_json(work.folder / "proof.json", record)
        if record["failures"]:
            raise CheckpointError(
                "the written adapter does not answer as the trained one",
                where=work.folder / "proof.json",
                found="; ".join(record["failures"]),
                expected=f"log-probabilities within {config.proof.tolerance:g}",
            )
        figures["proof"] = {tool: found.get("difference") for tool, found in record["tools"].items()}
    return figures


def _write_merged(one: _Run, adapter: Adapter) -> dict[str, Any]:
    """Write the base with its factors added, in Hugging Face form, tensor by tensor; return the counts.

    Where the base was trained in blocks the merge is into its published weights: another model than blocks and adapter.
    """
    base, done, trained = one.base, adapters.Merged(), dict(one.done.model.named_parameters())
    state: dict[str, Tensor] = {}
    for name, tensor in frozen.stream(base.folder):
        exact = adapters.merge(name, tensor, adapter, done)
        if one.config.router == "full" and name.endswith("router.gate.weight"):
            exact = trained[name].detach()
        elif one.config.router == "full" and name.endswith("expert_bias"):
            exact = dict(one.done.model.named_buffers())[name].detach()
        state[name] = exact
    if done.matrices != len(adapter.pairs):
        raise CheckpointError(
            "not every adapted matrix was merged", where=MERGED, found=done.matrices, expected=len(adapter.pairs)
        )
    with atomic_folder(one.work.folder / MERGED) as temporary:
        hf.save_hf(temporary, base.config, state)
        for path in sorted((one.work.input("tokenize") / "tokenizer").iterdir()):
            shutil.copyfile(path, temporary / path.name)
    return done.record()


def _measure(one: _Run) -> dict[str, Any]:
    """Write how far the model is from its base: drift.json, drift.md and drift.svg; empty when it is not measured."""
    config, work = one.config, one.work
    if not config.drift.tokens:
        return {}
    new = rows.new_held_out(config, work, one.tokenizer, one.base)
    old: dict[str, Any] = {}
    if one.old is not None:
        old = rows.text_held_out(config, one.old, rows.old_sources(config, one.old, "validation"), one.base)
    if config.preset != "own":
        adapters.put_on(one.done.model, _factors(one))
    drift, pictures = measure.measure(config, one.base, one.done.model, new, old)
    drift["stand_in"] = one.old is not None and one.base.own_text is None
    write_json(work.folder / "drift.json", drift)
    for name, picture in pictures.items():
        write_atomic(work.folder / f"drift-{name}.svg", picture)
    table = measure.table(drift)
    write_atomic(work.folder / "drift.md", table.markdown(1))
    for line in table.text().splitlines():
        work.log.say(f"  {line}")
    return drift
