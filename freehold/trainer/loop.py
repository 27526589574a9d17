"""The only training loop: pre-training and fine-tuning differ in the batches and phases they hand it.

A step: micro-batches forward and backward in the compute dtype, gradients summed in float32, global norm clipped,
optimizers stepped on float32 masters and their copies in the compute dtype, expert biases moved from the counts of the
whole step.
The loss is a sum over the targets of the whole step divided by their number, so micro-batches just add up.

A step changes the weights, or is skipped: its loss was not finite, or a roll-back (docs/collapse.md) put it among the
steps to leave out. The decision to roll back is on disk before anything is undone, so a kill at any point changes
nothing: what a run does is a function of its recipe and of `rollbacks.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from freehold.checkpoint import dcp
from freehold.checkpoint.background import Saver
from freehold.core.artifact import read_json, write_json
from freehold.core.errors import ArtifactError, CheckpointError, ConfigError, FreeholdError
from freehold.core.log import Log
from freehold.data.digest import DataSum
from freehold.data.loader import Order
from freehold.data.packing import PADDING, Batch
from freehold.kernels import cpu as kernels
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig, flops_per_token
from freehold.model.moe import Routing
from freehold.optim.adamw import gradient_norm
from freehold.optim.balance import build_balance, router_losses
from freehold.optim.build import Optimizers
from freehold.optim.config import BalanceConfig, NoBalanceConfig, OptimConfig
from freehold.optim.schedule import Schedule
from freehold.parallel.config import ParallelConfig
from freehold.parallel.heartbeat import Heartbeat
from freehold.parallel.mesh import world
from freehold.trainer.collapse import Alarm, CollapseDetector, reinitialise
from freehold.trainer.config import TrainerConfig
from freehold.trainer.loss import attach_loss, chunked_loss
from freehold.trainer.monitor import LoadMonitor, Routed, RoutedElsewhere, gemm_flops_per_s
from freehold.trainer.spike import SpikeDetector

if TYPE_CHECKING:
    from freehold.parallel.pipeline import Pipeline
    from freehold.parallel.plan import ShardedTensors

ROLLBACKS = "rollbacks.json"
QUARANTINE = "log/quarantine.jsonl"
"""The documents of every batch that was skipped; a recipe can leave them out (`pretrain.quarantine`)."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class TrainingError(FreeholdError):
    """A run that cannot go on as its recipe says."""


class Interrupted(KeyboardInterrupt):
    """Raised after a clean checkpoint when the user asked to stop."""


@dataclass(frozen=True)
class Job:
    """All that one training run needs to know."""

    folder: Path
    """Where `checkpoints/` and the named checkpoints go."""
    model: ModelConfig
    trainer: TrainerConfig
    optim: OptimConfig
    balance: BalanceConfig
    schedule: Schedule
    order: Order
    micro_sequences: int
    stage: str
    """pretrain or align: recorded in each checkpoint's trainer.json."""
    parent: str
    """content_sha256 of the checkpoint this run starts from, or empty."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokens_before: int = 0
    """Tokens the parent had seen."""
    files: tuple[Path, ...] = ()
    """Files copied into each checkpoint (the tokenizer's)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further facts for trainer.json."""
    documents_of: Callable[[int], list[dict[str, Any]]] = lambda _: []
    """Names the documents of a step: id, source, licence; none where only the order knows them."""


READS = ("tokenizer_sha256", "seed", "context_tokens", "order", "data")
"""Facts that say which tokens each step reads: a run goes on only where they are the same."""


class Trainer:
    """The state of one run and the loop over its steps."""

    def __init__(self, job: Job, log: Log, *, seed: int, weights: dict[str, Tensor] | None = None) -> None:
        self.job = job
        if job.trainer.collapse.action == "raise_rate" and isinstance(job.balance, NoBalanceConfig):
            raise ConfigError(
                "there is no balance step to raise",
                where=f"{job.stage}.trainer.collapse.action",
                found="raise_rate with balance.kind none",
                expected="another action, or a balancing rule",
            )
        if job.trainer.collapse.action == "reinitialise" and job.parallel.pipeline > 1:
            raise ConfigError(
                "routing cannot be drawn anew in a layer that another pipeline stage holds",
                where=f"{job.stage}.trainer.collapse.action",
                found=f"reinitialise with {job.stage}.parallel.pipeline={job.parallel.pipeline}",
                expected="another action, or parallel.pipeline=1",
            )
        self.world = world(job.parallel, job.stage)
        self.log = log if self.world.is_main else Log(quiet=True)
        torch.manual_seed(seed)
        torch.set_num_threads(job.trainer.threads)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.spread: ShardedTensors | None = None
        self.pipeline: Pipeline | None = None
        self.moe_layers: dict[str, Routed] = {}
        """Every MoE layer of the model by name, also those of other pipeline stages."""
        self.copies: dict[str, Tensor] = {}
        """What the model computes with where that is neither the master itself nor gathered from it."""
        if self.world.size == 1:
            self._set_up(seed, weights)
        else:
            self._spread_out(seed, weights)
        self.model.recompute = job.trainer.recompute
        if job.trainer.compile:
            self.model.compile_layers()
        self.parameters = dict(self.model.named_parameters())
        for master in self.masters.values():
            master.grad_dtype = None  # the gradient of a single micro-batch stays in the dtype it was computed in
        self.optimizers = self._new_optimizers()
        self.balance = build_balance(job.balance)
        self.step = job.schedule.first_step
        self.tokens = job.tokens_before
        self.skipped: list[int] = []
        self.operators = kernels.operators(DTYPES[job.trainer.dtype]) + ("+compile" if job.trainer.compile else "")
        self.alarms: list[dict[str, Any]] = []
        self.rollbacks: list[dict[str, Any]] = []
        self.processes: list[list[int]] = []
        """[first step, processes that did it and those after it], one for each change."""
        self.fed = DataSum()
        self.heartbeat = Heartbeat()
        self.saver = Saver(background=job.trainer.background_save)
        self.spikes = SpikeDetector(job.trainer.spike, job.schedule.first_step)
        self.monitor = LoadMonitor(self.moe_layers)
        self.detector = CollapseDetector(
            job.trainer.collapse,
            list(self.moe_layers),
            job.model.num_experts,
            job.model.num_experts_per_tok,
            job.schedule.first_step,
        )

    def _set_up(self, seed: int, weights: dict[str, Tensor] | None) -> None:
        """Build the model of a single process."""
        self.model = Afmoe(self.job.model)
        if weights is None:
            self.model.init_weights(torch.Generator().manual_seed(seed))
        else:
            dcp.match_keys(weights, self.model.state_dict(), self.job.folder)
            self.model.load_state_dict(weights)
        self.model.to(self.world.device)
        self.moe_layers.update(self.model.moe_layers())
        self.masters = {n: p.detach().requires_grad_() for n, p in self.model.named_parameters()}
        self.model.to_compute(DTYPES[self.job.trainer.dtype])
        parameters = dict(self.model.named_parameters())
        self.copies = {n: p.detach() for n, p in parameters.items() if p.data_ptr() != self.masters[n].data_ptr()}

    def _spread_out(self, seed: int, weights: dict[str, Tensor] | None) -> None:
        """Build this process's parts of the model, with the very numbers that a single process starts from.

        Values are drawn and dropped one tensor at a time: a process never holds the whole model.
        """
        from freehold.parallel.plan import ShardedTensors, parallelize  # FSDP's imports are for those who need them

        with torch.device("meta"):
            self.model, whole = Afmoe(self.job.model), Afmoe(self.job.model)
        parallelize(self.model, self.world, DTYPES[self.job.trainer.dtype])
        self.model.to_empty(device=self.world.device)
        for layer in self.model.moe_layers().values():
            layer.expert_bias.zero_()
            layer.load_counts.zero_()
        self.spread = ShardedTensors(self.model, self.world)
        here = self.model.moe_layers()
        for name, layer in whole.moe_layers().items():
            bias, counts = (
                torch.zeros_like(t, device=self.world.device) for t in (layer.expert_bias, layer.load_counts)
            )
            self.moe_layers[name] = here.get(name, RoutedElsewhere(bias, counts))
        if weights is not None:
            dcp.match_keys(weights, whole.state_dict(), self.job.folder)
            self._take_biases(weights)
        values = whole.initial_values(torch.Generator().manual_seed(seed)) if weights is None else weights.items()
        for name, value in values:
            if name in self.spread.placed:  # else it is another pipeline stage's
                self.spread.fill_(name, value)
        self.masters = self.spread.masters()

    def _take_biases(self, model: Mapping[str, Tensor]) -> None:
        """Copy the expert biases of other stages' layers."""
        for name, layer in self.moe_layers.items():
            if isinstance(layer, RoutedElsewhere):
                layer.expert_bias.copy_(model[f"{name}.expert_bias"])

    def _new_optimizers(self) -> Optimizers:
        """Return optimizers that remember nothing yet."""
        if self.spread is None:
            return Optimizers(self.masters, self.job.optim, self.copies)
        return Optimizers(self.masters, self.job.optim, shapes=self.spread.shapes(), together=self.spread.owners())

    # -- state -------------------------------------------------------------------------------------------------

    def state(self) -> dcp.State:
        """Return every tensor that decides what happens next; of a spread one, this process's parts of it (DTensor)."""
        model = {n: tensor.detach() for n, tensor in self._kept().items()}
        optimizer = self.optimizers.state_dict()
        if self.spread is not None:
            model = {n: self.spread.whole_form(n, tensor) for n, tensor in model.items()}
            optimizer = {k: self.spread.whole_form(k.rpartition(".")[0], slot) for k, slot in optimizer.items()}
        return {
            "model": model,
            "optimizer": optimizer,
            "balance": self.balance.state_dict(),
            "collapse": self.detector.state_dict(),
            "spike": self.spikes.state_dict(),
            "rng": {"torch": torch.get_rng_state()},
        }

    def _kept(self) -> dict[str, Tensor]:
        """Return masters and expert biases by name: what a checkpoint calls the model."""
        return {**self.masters, **{n: b for n, b in self.model.named_buffers() if n.endswith("expert_bias")}}

    def save(self, folder: Path, then: Callable[[], None] = lambda: None, **facts: Any) -> None:
        """Write a full checkpoint to `folder`, atomically, then call `then`; see `Saver` for when that is."""
        position = self.job.schedule.at(self.step - 1)
        record = {
            "stage": self.job.stage,
            "step": self.step,
            "tokens": self.tokens,
            "phase": position.phase,
            "parent": self.job.parent,
            "skipped_steps": self.skipped,
            "operators": self.operators,
            "processes": self.processes,
            "data_sum": self._data_sum(),
            "alarms": self.alarms,
            "rollbacks": [r for r in self.rollbacks if r["first_step"] < self.step],
            "optim": self.job.optim.model_dump(mode="json"),
            "balance": self.job.balance.model_dump(mode="json"),
            "phases": {n: p.model_dump(mode="json") for n, p in self.job.schedule.phases.items()},
            **self.job.facts,
            **facts,
        }
        self.saver.save(folder, self.state(), self.job.model, record, self.job.files, then)

    def restore(self) -> bool:
        """Go on from the newest good checkpoint of this run; False when there is none.

        Checkpoints that a roll-back has left behind are deleted first.
        """
        self._settle()
        decided = self.job.folder / ROLLBACKS
        # As rank 0 sees them, who wrote them: what another machine sees of a shared folder may be older.
        self.rollbacks = dcp.together(lambda: read_json(decided)["rollbacks"] if decided.exists() else [])[0]
        checkpoints = self.job.folder / "checkpoints"
        if self.world.is_main:
            dcp.remove_unless(checkpoints, self._is_on_course)
        self.world.barrier()
        folder = dcp.last_good(checkpoints, self.log.warn)
        if folder is None:
            self.processes = [[self.step, self.world.size]]
            return False
        facts = read_json(folder / "trainer.json")
        self._must_read_the_same(facts, folder)
        state = self.read(folder)
        self.adopt(state, folder)
        self.detector.load_state_dict(state.get("collapse", {}))
        self.spikes.load_state_dict(state.get("spike", {}))
        self.fed.value = int(facts.get("data_sum", "0"), 16) if self.world.is_main else 0
        self.processes = [span for span in facts.get("processes", []) if span[0] < facts["step"]]
        if not self.processes or self.processes[-1][1] != self.world.size:
            self.processes.append([facts["step"], self.world.size])
        self.step, self.tokens, self.skipped = facts["step"], facts["tokens"], list(facts["skipped_steps"])
        self.alarms = list(facts.get("alarms", []))
        self.log.rewind(self.step)
        self.log.say(f"resumed from {folder.name}")
        if facts["operators"] != self.operators:
            self.log.warn(
                f"steps so far ran on {facts['operators']}, the rest will on {self.operators}: "
                "the run is sound, but its bits are not those of a run on either alone"
            )
        return True

    def _is_on_course(self, folder: Path) -> bool:
        """Tell whether a checkpoint was made in knowledge of every roll-back that concerns its steps."""
        try:
            facts = read_json(folder / "trainer.json")
        except (ArtifactError, OSError):
            return True  # damaged: skipped, and named, when the newest good one is looked for
        return all(
            facts["step"] <= rollback["first_step"] or rollback in facts.get("rollbacks", [])
            for rollback in self.rollbacks
        )

    def _must_read_the_same(self, facts: dict[str, Any], folder: Path) -> None:
        """Raise CheckpointError when the steps so far read other data, or the same in another order."""
        for key in READS:
            before, now = facts.get(key), self.job.facts.get(key)
            if before is None or now is None or before == now:
                continue
            if isinstance(now, dict) and isinstance(before, dict):
                names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
                before, now = (f"other {', '.join(names)}", "the same, or a new run")
            raise CheckpointError(
                "this run's data are not those the checkpoint was trained on",
                where=f"{folder}: {key}",
                found=before,
                expected=now,
                todo="bring them back, or start anew with --clean or --fork NAME",
            )

    def _data_sum(self) -> str:
        """Return the sum over all rows that all ranks were fed; those that read the same rows count once."""
        place = self.world.place
        mine = self.fed.value if place.pipeline == place.context == 0 else 0
        halves = torch.tensor([mine >> 32, mine & 0xFFFFFFFF], device=self.world.device)  # so that no sum overflows
        high, low = map(int, self.world.sum_all_(halves).tolist())
        return f"{((high << 32) + low) % (1 << 64):016x}"

    def read(self, folder: Path) -> dcp.State:
        """Read a checkpoint into tensors that lie as those of this run do: of each, the part this rank holds."""

        kept = self._kept()

        def empty(key: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
            part, _, name = key.partition("/")
            owner = name if part == "model" else name.rpartition(".")[0]
            weights = part in ("model", "optimizer")
            everywhere = owner.removesuffix(".expert_bias") in self.moe_layers
            if (weights and owner not in kept and not everywhere) or (
                part == "balance" and name not in self.moe_layers
            ):
                return None  # another pipeline stage's, or nobody's: that is told when names are compared
            # Of another shape it is another model's: read whole, and refused when it is taken over.
            known = weights and owner in self.masters
            if self.spread is not None and known and self.spread.shapes()[owner] == size:
                return self.spread.whole_form(owner, torch.empty_like(self.masters[owner], dtype=dtype).detach())
            return torch.empty(size, dtype=dtype)

        return dcp.load(folder, verify=False, empty=empty)

    def adopt(self, state: dcp.State, folder: Path) -> None:
        """Take over weights, optimizer, balancing and random state of a checkpoint; CheckpointError if it is another
        model's."""
        on_disk = (folder / dcp.STATE).exists()  # where each rank has read its own part only
        here, held = self._kept(), dcp.read_names(folder) if on_disk else state
        dcp.match_keys(held["model"], {name for each in dcp.gather(list(here)) for name in each}, folder)
        if held.get("optimizer"):  # nothing is remembered before the first step
            owners = {key.rpartition(".")[0] for key in held["optimizer"]}
            dcp.match_keys(owners, {name for each in dcp.gather(list(self.masters)) for name in each}, folder)
        shapes = {n: tensor.shape for n, tensor in here.items()} | (self.spread.shapes() if self.spread else {})
        with torch.no_grad():
            for name, tensor in here.items():
                found = state["model"][name]
                if shapes[name] != found.shape:
                    raise CheckpointError(
                        "a tensor has another shape",
                        where=f"{folder}: {name}",
                        found=tuple(found.shape),
                        expected=tuple(shapes[name]),
                    )
                tensor.copy_(self.spread.part_of(name, found) if self.spread else found)
        self._take_biases(state["model"])
        self._publish()
        self.optimizers = self._new_optimizers()  # with nothing left of steps that are undone
        optimizer = state.get("optimizer", {})
        if self.spread is not None:
            of = ((key, key.rpartition(".")[0], slot) for key, slot in optimizer.items())
            optimizer = {key: self.spread.part_of(name, slot) for key, name, slot in of if name in self.masters}
        self.optimizers.load_state_dict(optimizer)
        self.balance.load_state_dict({n: t.to(self.world.device) for n, t in state.get("balance", {}).items()})
        torch.set_rng_state(state["rng"]["torch"])

    # -- one step ----------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """Run one optimizer step on this process's part of a batch; return losses and gradient norm of the whole.

        A step whose loss or gradient is not finite changes nothing but the step count.
        """
        job, device = self.job, self.world.device
        real = int((batch.document_ids != PADDING).sum())
        mine = torch.tensor([batch.target_tokens, real, batch.input_ids.size], device=device)
        targets, tokens, read_tokens = map(int, self.world.sum_(mine).tolist())
        self.model.train()
        for layer in self.moe_layers.values():
            layer.load_counts.zero_()
            layer.last_router_logit_max = None
        passes = _Passes(self, 1 / max(targets, 1), 1 / max(tokens, 1))
        if job.parallel.pipeline > 1:
            self._pipe(batch, passes)
        else:
            for start in range(0, len(batch.input_ids), job.micro_sequences):
                micro = batch.rows(start, start + job.micro_sequences)
                ids, wanted, documents = self._tensors(micro)
                hidden, routing_loss = passes.forward(ids, documents)
                total = passes.loss(hidden, wanted)
                (total if routing_loss is None else total + routing_loss).backward()
                self._collect()
        figures = torch.tensor(passes.sums, dtype=torch.float64, device=device)
        cross_entropy, z, sequence, router_z = self.world.sum_all_(figures).tolist()
        norm = self._norm()
        finite = norm < float("inf") and cross_entropy < float("inf")
        why = "" if finite else "loss or gradient is not finite"
        if self._stands_out(cross_entropy / max(targets, 1) if finite else math.inf) and finite:
            told = (
                f"its loss stands out: {cross_entropy / max(targets, 1):.2f} nats, usual are {self.spikes.median:.2f}"
            )
            if self.job.trainer.spike.action != "none":
                why = told
            elif self.spikes.in_a_row == 1:
                self.log.warn(f"step {self.step}: {told}")
        if not why:
            clip = min(1.0, self.job.optim.clip_norm / (norm + 1e-6))
            self.optimizers.step(self.job.schedule.at(self.step).factor, clip)
            self._add_up_routing(passes.logit_max)
            for name, layer in self.moe_layers.items():
                self._balance(name, layer)
            self.monitor.add(passes.logit_max)
        else:
            self._skip(why)
            last = self.job.trainer.max_skipped_steps
            bad = [step for step in self.skipped if not self._is_left_out(step)]
            if not finite and bad[-last:] == list(range(self.step - last + 1, self.step + 1)):
                raise TrainingError(
                    f"{last} steps in a row had no finite loss or gradient",
                    where=f"{self.job.stage} step {self.step}",
                    found=f"loss {cross_entropy / max(targets, 1)}, gradient norm {norm}",
                    todo="lower optim.lr and optim.muon_lr, or look at the documents named above; "
                    "the last good checkpoint is kept",
                )
        for master in self.masters.values():
            master.grad = None
        self.step += 1
        self.tokens += read_tokens
        values = {"loss/mean": cross_entropy / max(targets, 1), "loss/z": z / max(targets, 1), "optim/grad_norm": norm}
        routed = max(tokens * len(self.moe_layers), 1)
        if self.job.balance.sequence_loss:
            values["loss/sequence"] = sequence / routed
        if self.job.balance.router_z_loss:
            values["loss/router_z"] = router_z / routed
        return values

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, targets and document numbers on the device."""
        ids, targets, documents = (
            torch.from_numpy(array).to(self.world.device)
            for array in (batch.input_ids, batch.targets, batch.document_ids)
        )
        return ids, targets, documents

    def _pipe(self, batch: Batch, passes: _Passes) -> None:
        """Send the step's micro-batches through the stages of the pipeline, forward and backward."""
        from freehold.parallel.pipeline import Pipeline

        parallel, (rows, tokens) = self.job.parallel, batch.input_ids.shape
        micro_rows = min(self.job.micro_sequences, rows)
        if self.pipeline is None:
            assert self.world.dense is not None
            self.pipeline = Pipeline(
                self.job.model,
                self.world.dense["pp"].get_group(),
                stages=parallel.stages,
                micro_batches=rows // micro_rows,
                micro_shape=(micro_rows, tokens),
                dtype=DTYPES[self.job.trainer.dtype],
                device=self.world.device,
            )

        def forward(x: Tensor, documents: Tensor, layers: Sequence[int]) -> Tensor:
            hidden, routing_loss = passes.forward(x, documents, layers)
            return hidden if routing_loss is None else attach_loss(hidden, routing_loss)

        ids, targets, documents = self._tensors(batch)
        self.pipeline.step(ids, targets, documents, forward, passes.loss)
        self._collect()

    def skip_step(self, batch: Batch) -> dict[str, Any]:
        """Let a step pass that a roll-back decided to leave out; return its figures, which are not numbers."""
        for rollback in self.rollbacks:
            if rollback["first_step"] == self.step and rollback["layers"]:
                self.log.metrics(self.step + 1, {"moe/alarm": rollback["layers"]})
        self._skip("left out by a roll-back")
        self.step += 1
        self.tokens += int(self.world.sum_(torch.tensor(batch.input_ids.size, device=self.world.device)))
        return dict.fromkeys(("loss/mean", "loss/z", "optim/grad_norm"), math.nan)

    def _norm(self) -> float:
        """Return the norm of the whole step's gradient, alike on all processes."""
        gradients = {n: m.grad for n, m in self.masters.items() if m.grad is not None}
        if self.spread is None:
            return float(gradient_norm(gradients.values()))
        self.spread.sum_replicated_(gradients)
        return self.spread.norm(gradients, gradient_norm)

    def _add_up_routing(self, logit_max: dict[str, Tensor]) -> None:
        """Make the counts and largest logits of a step those of all processes: integers, so biases agree to the bit."""
        if self.world.size == 1 or not self.moe_layers:
            return
        counts = self.world.sum_all_(torch.stack([layer.load_counts for layer in self.moe_layers.values()]))
        least = torch.full((), -math.inf, device=self.world.device)  # of a layer that another stage holds
        largest = self.world.max_all_(torch.stack([logit_max.get(n, least).float() for n in self.moe_layers]))
        for (name, layer), of_layer, maximum in zip(self.moe_layers.items(), counts, largest, strict=True):
            layer.load_counts.copy_(of_layer)
            logit_max[name] = maximum

    def _skip(self, why: str) -> None:
        """Count a step as skipped; name its documents, and put them down for quarantine."""
        self.skipped.append(self.step)
        if not self.world.is_main:
            return
        found = self.job.documents_of(self.step)
        if not found:
            pieces = {(p.source, p.document_id) for p in self.job.order.documents(self.step)}
            found = [{"id": document, "source": source, "licence": None} for source, document in sorted(pieces)]
        names = ", ".join(f"{d['source']}:{d['id']}" + (f" ({d['licence']})" if d["licence"] else "") for d in found)
        self.log.warn(f"step {self.step} skipped: {why}; documents: {names}")
        path = self.job.folder / QUARANTINE
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for document in found:
                file.write(json.dumps({"step": self.step, "why": why, **document}) + "\n")

    def _stands_out(self, loss: float) -> bool:
        position = self.job.schedule.at(self.step)
        return self.spikes.stands_out(self.step, self.step - position.index, loss)

    def _handle_spikes(self) -> bool:
        """When losses keep standing out, go back to a checkpoint or take them as usual; return whether it went back."""
        config = self.job.trainer.spike
        if self.spikes.in_a_row < config.patience_steps:
            return False
        what = f"the loss has stood out for {self.spikes.in_a_row} steps"
        if config.action == "roll_back":
            self._roll_back(self.spikes.blamed_step(self.step - 1), what, [], config.max_rollbacks)
            return True
        if not math.isnan(self.spikes.median):
            self.log.warn(f"{what}: its level is taken as the usual one")
            self.spikes.accept()
        return False

    def _is_left_out(self, step: int) -> bool:
        return any(rollback["first_step"] <= step < rollback["end_step"] for rollback in self.rollbacks)

    def _balance(self, name: str, layer: Routed) -> None:
        """Move one layer's bias by the counts of the step; further, while its balance step is raised."""
        before, factor = layer.expert_bias.clone(), self.detector.rate_factor(name, self.step)
        self.balance.update(name, layer.expert_bias, layer.load_counts)
        if factor != 1:
            layer.expert_bias.copy_(before + factor * (layer.expert_bias - before))

    # -- collapse ----------------------------------------------------------------------------------------------

    def handle_alarms(self, alarms: list[Alarm]) -> bool:
        """Say what collapses and do what the recipe asks for; return whether training went back to a checkpoint."""
        config = self.job.trainer.collapse
        layers = [alarm.number for alarm in alarms]
        self.log.warn("\n  ".join([f"routing collapses after {self.step} steps", *map(str, alarms)]))
        if config.action == "roll_back" and any(alarm.reason != "dead" for alarm in alarms):
            to_blame = [alarm for alarm in alarms if alarm.reason != "dead"]
            first = min(alarm.first_step for alarm in to_blame)
            what = "routing collapsed: " + "; ".join(map(str, to_blame))
            self._roll_back(first, what, [alarm.number for alarm in to_blame], config.max_rollbacks)
            return True
        for alarm in alarms:
            if config.action == "raise_rate":
                self.detector.raise_rate(alarm.layer, self.step)
            elif config.action == "reinitialise":
                self._reinitialise(alarm)
        acted = config.action if config.action != "roll_back" else "none"
        if acted == "raise_rate":
            self.log.say(f"  balance step x{config.rate_factor:g} in these layers for {config.raise_steps} steps")
        elif acted == "reinitialise":
            self.log.say("  routing of these experts drawn anew")
        self.alarms += [{**dataclasses.asdict(alarm), "action": acted} for alarm in alarms]
        self.log.metrics(self.step, {"moe/alarm": layers})
        return False

    def _reinitialise(self, alarm: Alarm) -> None:
        """Draw routing anew; in a spread model every process does so on whole tensors, and keeps its parts."""
        state = self.state()
        if self.spread is None:
            reinitialise(alarm, state, self.job.model.initializer_range)
        else:
            whole = {
                part: {n: self.spread.gathered(t) for n, t in state[part].items() if n.startswith(f"{alarm.layer}.")}
                for part in ("model", "optimizer")
            }
            reinitialise(alarm, {**state, **whole}, self.job.model.initializer_range)
            for part, tensors in whole.items():
                for name, tensor in tensors.items():
                    owner = name if part == "model" else name.rpartition(".")[0]
                    here = state[part][name]
                    self.spread.local(here).copy_(self.spread.part_of(owner, tensor))
        self._publish()

    def _roll_back(self, first: int, what: str, layers: list[int], limit: int) -> None:
        """Write down which steps to leave out, from `first` on, then go back to the newest checkpoint from before."""
        if len(self.rollbacks) >= limit:
            raise TrainingError(
                f"{what.partition(':')[0]} again after {len(self.rollbacks)} roll-backs",
                where=f"{self.job.stage} step {self.step}",
                found=what,
                todo="the batches are not to blame: lower optim.lr, raise balance.rate or choose another action in "
                f"{self.job.stage}.trainer; the last good checkpoint is kept",
            )
        # Not before an earlier roll-back's steps: what lay before them was good then, and its checkpoint is kept.
        first = max([first, *(r["first_step"] for r in self.rollbacks)])
        decision = {"first_step": first, "end_step": self.step, "layers": layers}
        if self.world.is_main:
            write_json(self.job.folder / ROLLBACKS, {"rollbacks": [*self.rollbacks, decision]})
        self.world.barrier()
        self.log.say(f"  rolling back to before step {first}; steps {first} to {self.step - 1} will be left out")
        if not self.restore():
            raise TrainingError(
                f"no checkpoint from before the {'collapse' if layers else 'spike'} is left",
                where=self.job.folder / "checkpoints",
                expected=f"one of at most {first} steps",
                todo="run again: training starts anew and leaves out the steps named above",
            )

    def _collect(self) -> None:
        """Hand the micro-batch's gradients to the masters; several are added up in float32."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                master = self.masters[name]
                gradient = parameter.grad if self.spread is None else self.spread.local(parameter.grad)
                if master.grad is None:
                    master.grad = gradient
                else:
                    exact = torch.promote_types(gradient.dtype, torch.float32)
                    master.grad = master.grad.to(exact).add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the masters into the compute weights; a spread model gathers them anew."""
        if self.spread is not None:
            self.spread.forget()
        for name, copy in self.copies.items():
            copy.copy_(self.masters[name])

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self, validate: Callable[[Afmoe], dict[str, float]] | None = None) -> None:
        """Train to the end of the schedule, from the newest good checkpoint if there is one.

        Saves at each phase's end under the phase's checkpoint name, and every so many steps. On SIGINT or SIGTERM
        the running step is finished and saved, then Interrupted is raised.
        """
        job, config, schedule = self.job, self.job.trainer, self.job.schedule
        if not self.restore():
            self.log.rewind(self.step)
            if self._rolls_back:  # there must be something to go back to
                self.save(dcp.step_folder(job.folder / "checkpoints", self.step), stage_type="step")
        if self.step >= schedule.total_steps:
            self._prune()
            return
        self.heartbeat.beat(self.step, "start")
        self.log.say(f"operators: {kernels.describe(DTYPES[config.dtype])}")
        peak = gemm_flops_per_s(DTYPES[config.dtype], self.world.device) * self.world.size
        context = job.order.batch(self.step, slice(0, 1)).input_ids.shape[1]
        flops = flops_per_token(job.model, context)
        ends = {end: name for name, end in schedule.ends().items()}
        process = psutil.Process()
        started, tokens_then, steps_then = time.monotonic(), self.tokens, self.step
        values: dict[str, Any] = {}
        with _StopSignals() as stop:
            while self.step < schedule.total_steps:
                position = schedule.at(self.step)
                self.heartbeat.beat(self.step, "step", loss=values.get("loss/mean"))
                if self._is_left_out(self.step):
                    values = self.skip_step(self._batch())
                else:
                    values = self.train_step(self._batch())
                    if self._handle_spikes():
                        self.monitor.take()
                        started, tokens_then, steps_then = time.monotonic(), self.tokens, self.step
                        continue
                    if self.skipped[-1:] != [self.step - 1]:
                        counts = {name: layer.load_counts for name, layer in self.moe_layers.items()}
                        alarms = self.detector.watch(self.step - 1, counts)
                        if alarms and self.handle_alarms(alarms):
                            self.monitor.take()
                            started, tokens_then, steps_then = time.monotonic(), self.tokens, self.step
                            continue
                done, asked = self.step, self.world.any(stop.asked)
                if done % config.log_every_steps == 0 or done in ends or asked:
                    now = time.monotonic()
                    speed = (self.tokens - tokens_then) / (now - started)
                    seconds_left = (schedule.total_steps - done) * (now - started) / max(done - steps_then, 1)
                    values |= {
                        "optim/lr": position.factor,
                        "phase": position.phase,
                        "tokens": self.tokens,
                        "perf/tokens_per_s": speed,
                        "perf/mfu": speed * flops / peak,
                        "perf/memory_bytes": process.memory_info().rss,
                        **self.monitor.take(),
                    }
                    self.log.metrics(done, values)
                    self._say(values, done, seconds_left)
                    started, tokens_then, steps_then = time.monotonic(), self.tokens, done
                if validate and (
                    done in ends or (config.validate_every_steps and done % config.validate_every_steps == 0)
                ):
                    self.heartbeat.beat(done, "validate")
                    bits = validate(self.model)
                    self.log.metrics(done, bits)
                    self.log.say(f"step {done}: validation bits per byte {bits['val/bpb']:.4f}")
                    started, tokens_then, steps_then = time.monotonic(), self.tokens, done
                if done in ends or done % config.checkpoint_every_steps == 0 or asked:
                    self.heartbeat.beat(done, "save")
                    self._checkpoint(ends.get(done), must=asked)
                    started, tokens_then, steps_then = time.monotonic(), self.tokens, done
                if asked and done < schedule.total_steps:
                    raise Interrupted

    def _batch(self) -> Batch:
        """Return this process's part of the step's rows; what is to be learnt from is added to the data sum."""
        order = self.job.order
        rows = self.world.rows(order.sequences)
        batch = order.batch(self.step, rows)
        if not self._is_left_out(self.step):
            self.fed.add(self.step, batch, rows.start)
        return batch.columns(self.world.columns(batch.input_ids.shape[1]))

    def _checkpoint(self, phase: str | None, must: bool = False) -> None:
        """Save the step and, at the end of a phase, under the phase's name.

        A step that cannot be saved (a full disk) is a warning, and the next one tries again, unless this one `must`.
        Weights that are not finite are never saved, for they would take the place of good ones: TrainingError at the
        end of a phase, before it a warning, since a roll-back may still mend them.
        """
        self._settle()
        broken = [name for name, master in self.masters.items() if not bool(torch.isfinite(master).all())]
        if self.world.any(bool(broken)):
            error = TrainingError(
                "weights are not finite",
                where=f"{self.job.stage} step {self.step}",
                found=", ".join(broken[:3]) or "those of another rank",
                todo="lower optim.lr and optim.muon_lr; the last good checkpoint is kept",
            )
            if phase is not None:
                raise error
            self.log.warn(f"step {self.step} was not saved\n{error}")
            return
        if phase is not None and self.job.schedule.phases[phase].checkpoint:
            declared = self.job.schedule.phases[phase]
            self.save(self.job.folder / declared.checkpoint, stage_type=declared.stage_type)
            self.log.say(f"saved {declared.stage_type or 'checkpoint'}: {self.job.folder / declared.checkpoint}")
        must = must or phase is not None
        try:
            self.save(dcp.step_folder(self.job.folder / "checkpoints", self.step), self._pruning(), stage_type="step")
            if must:
                self.saver.wait()
        except (ArtifactError, CheckpointError) as error:
            if must:
                raise
            self.log.warn(f"step {self.step} was not saved, training goes on\n{error}")

    def _settle(self) -> None:
        """Wait for a save that is still under way; that it failed must not keep the next one from being made."""
        try:
            self.saver.wait()
        except (ArtifactError, CheckpointError) as error:
            self.log.warn(f"a step before {self.step} was not saved, training goes on\n{error}")

    @property
    def _rolls_back(self) -> bool:
        return "roll_back" in (self.job.trainer.collapse.action, self.job.trainer.spike.action)

    def _prune(self) -> None:
        self._pruning()()

    def _pruning(self) -> Callable[[], None]:
        """Return what deletes the checkpoints that are not needed once that of this step is written."""
        config = self.job.trainer
        finished = self.step >= self.job.schedule.total_steps
        reach = [
            self.detector.oldest_step if config.collapse.action == "roll_back" else self.step,
            self.spikes.blamed_step(self.step - 1) if config.spike.action == "roll_back" else self.step,
        ]
        needed = max([min(reach), *(r["first_step"] for r in self.rollbacks)])
        keep = functools.partial(
            dcp.prune,
            self.job.folder / "checkpoints",
            keep_last=config.keep_last,
            keep_every_steps=config.keep_every_steps,
            every_steps=config.checkpoint_every_steps,
            needed_step=needed if self._rolls_back and not finished else None,
        )
        return keep if self.world.is_main else lambda: None

    def _say(self, values: dict[str, Any], done: int, seconds_left: float) -> None:
        balance = f"MaxVio {values['moe/max_vio']:.2f}  " if "moe/max_vio" in values else ""
        line = (
            f"{values['phase']} {done}/{self.job.schedule.total_steps}  loss {values['loss/mean']:.3f}  "
            f"norm {values['optim/grad_norm']:.2f}  lr x{values['optim/lr']:.2f}  "
            f"{values['perf/tokens_per_s']:,.0f} tok/s  MFU {values['perf/mfu']:.0%}  "
            f"{values['perf/memory_bytes'] / 1e9:.1f} GB  {balance}{seconds_left:.0f} s left"
        )
        self.log.live(line)
        if done % (10 * self.job.trainer.log_every_steps) == 0:
            self.log.say(line)


class _Routings(list[Routing]):
    """A list that stays one object: FSDP rebuilds plain lists that it finds among arguments."""


class _Passes:
    """The forward passes of one step: sums of losses over this process's tokens, and the largest router logits."""

    def __init__(self, trainer: Trainer, target_scale: float, token_scale: float) -> None:
        self.trainer, self.target_scale, self.token_scale = trainer, target_scale, token_scale
        self.sums = [0.0, 0.0, 0.0, 0.0]
        """cross-entropy, z, sequence loss, router z"""
        self.logit_max: dict[str, Tensor] = {}

    def forward(
        self, x: Tensor, documents: Tensor, layers: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run some layers (all: None) on ids or a stream; return what leaves them, and the loss on their routing."""
        trainer = self.trainer
        balance, routings = trainer.job.balance, _Routings() if trainer.job.balance.has_loss else None
        hidden = trainer.model.hidden(x, document_ids=documents, routings=routings, layers=layers)
        for name, layer in trainer.moe_layers.items():
            largest = layer.last_router_logit_max
            if largest is not None:
                self.logit_max[name] = torch.maximum(largest, self.logit_max.get(name, largest))
        if not routings:
            return hidden, None
        router = router_losses(
            balance, routings, documents != PADDING, scale=self.token_scale, row_sum=trainer.world.sum_row_
        )
        self.sums[2] += float(router.sequence)
        self.sums[3] += float(router.z)
        return hidden, router.total

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of what left the last layer."""
        config = self.trainer.job.trainer
        losses = chunked_loss(
            hidden,
            self.trainer.model.lm_head.weight,
            targets,
            scale=self.target_scale,
            z_loss=config.z_loss,
            chunk_tokens=config.loss_chunk_tokens,
        )
        self.sums[0] += float(losses.cross_entropy)
        self.sums[1] += float(losses.z)
        return losses.total


class _StopSignals:
    """While open, SIGINT and SIGTERM ask for a stop after the running step; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
