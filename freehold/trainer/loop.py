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
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from freehold.checkpoint import native
from freehold.core.artifact import read_json, write_json
from freehold.core.errors import ArtifactError, CheckpointError, ConfigError, FreeholdError
from freehold.core.log import Log
from freehold.data.loader import Order
from freehold.data.packing import PADDING, Batch
from freehold.kernels import native as kernels
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig, flops_per_token
from freehold.model.moe import MoE, Routing
from freehold.optim.adamw import gradient_norm
from freehold.optim.balance import build_balance, router_losses
from freehold.optim.build import Optimizers
from freehold.optim.config import BalanceConfig, NoBalanceConfig, OptimConfig
from freehold.optim.schedule import Schedule
from freehold.trainer.collapse import Alarm, CollapseDetector, reinitialise
from freehold.trainer.config import TrainerConfig
from freehold.trainer.loss import chunked_loss
from freehold.trainer.monitor import LoadMonitor, gemm_flops_per_s

ROLLBACKS = "rollbacks.json"
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
    tokens_before: int = 0
    """Tokens the parent had seen."""
    files: tuple[Path, ...] = ()
    """Files copied into each checkpoint (the tokenizer's)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further facts for trainer.json."""


READS = ("tokenizer_sha256", "seed", "context_tokens", "order", "data")
"""Facts that say which tokens each step reads: a run goes on only where they are the same."""


class Trainer:
    """The state of one run and the loop over its steps."""

    def __init__(self, job: Job, log: Log, *, seed: int, weights: dict[str, Tensor] | None = None) -> None:
        self.job, self.log = job, log
        if job.trainer.collapse.action == "raise_rate" and isinstance(job.balance, NoBalanceConfig):
            raise ConfigError(
                "there is no balance step to raise",
                where=f"{job.stage}.trainer.collapse.action",
                found="raise_rate with balance.kind none",
                expected="another action, or a balancing rule",
            )
        torch.manual_seed(seed)
        torch.set_num_threads(job.trainer.threads)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.model = Afmoe(job.model)
        self.model.recompute = job.trainer.recompute
        if weights is None:
            self.model.init_weights(torch.Generator().manual_seed(seed))
        else:
            native.match_keys(weights, self.model.state_dict(), job.folder)
            self.model.load_state_dict(weights)
        self.masters = {n: p.detach().requires_grad_() for n, p in self.model.named_parameters()}
        for master in self.masters.values():
            master.grad_dtype = None  # the gradient of a single micro-batch stays in the dtype it was computed in
        self.model.to_compute(DTYPES[job.trainer.dtype])
        self.parameters = dict(self.model.named_parameters())
        self.copies = {n: p.detach() for n, p in self.parameters.items() if p.data_ptr() != self.masters[n].data_ptr()}
        """What the model computes with where that is not the master itself."""
        self.moe_layers = self.model.moe_layers()
        self.optimizers = Optimizers(self.masters, job.optim, self.copies)
        self.balance = build_balance(job.balance)
        self.step = job.schedule.first_step
        self.tokens = job.tokens_before
        self.skipped: list[int] = []
        self.operators = kernels.operators(DTYPES[job.trainer.dtype])
        self.alarms: list[dict[str, Any]] = []
        self.rollbacks: list[dict[str, Any]] = []
        self.monitor = LoadMonitor(self.moe_layers)
        self.detector = CollapseDetector(
            job.trainer.collapse,
            list(self.moe_layers),
            job.model.num_experts,
            job.model.num_experts_per_tok,
            job.schedule.first_step,
        )

    # -- state -------------------------------------------------------------------------------------------------

    def state(self) -> native.State:
        """Return every tensor that decides what happens next."""
        biases = {n: b for n, b in self.model.named_buffers() if n.endswith("expert_bias")}
        return {
            "model": {**{n: m.detach() for n, m in self.masters.items()}, **biases},
            "optimizer": self.optimizers.state_dict(),
            "balance": self.balance.state_dict(),
            "collapse": self.detector.state_dict(),
            "rng": {"torch": torch.get_rng_state()},
        }

    def save(self, folder: Path, **facts: Any) -> None:
        """Write a full checkpoint to `folder`, atomically."""
        position = self.job.schedule.at(self.step - 1)
        record = {
            "stage": self.job.stage,
            "step": self.step,
            "tokens": self.tokens,
            "phase": position.phase,
            "parent": self.job.parent,
            "skipped_steps": self.skipped,
            "operators": self.operators,
            "alarms": self.alarms,
            "rollbacks": [r for r in self.rollbacks if r["first_step"] < self.step],
            "optim": self.job.optim.model_dump(mode="json"),
            "balance": self.job.balance.model_dump(mode="json"),
            "phases": {n: p.model_dump(mode="json") for n, p in self.job.schedule.phases.items()},
            **self.job.facts,
            **facts,
        }
        native.save(folder, self.state(), self.job.model, record, self.job.files)

    def restore(self) -> bool:
        """Go on from the newest good checkpoint of this run; False when there is none.

        Checkpoints that a roll-back has left behind are deleted first.
        """
        decided = self.job.folder / ROLLBACKS
        self.rollbacks = read_json(decided)["rollbacks"] if decided.exists() else []
        checkpoints = self.job.folder / "checkpoints"
        native.remove_unless(checkpoints, self._is_on_course)
        folder = native.last_good(checkpoints, self.log.warn)
        if folder is not None:
            self._must_read_the_same(folder)
        if folder is None:
            return False
        state = native.load(folder, verify=False)
        self.adopt(state, folder)
        self.detector.load_state_dict(state.get("collapse", {}))
        facts = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
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

    def _must_read_the_same(self, folder: Path) -> None:
        """Raise CheckpointError when the steps so far read other data, or the same in another order."""
        facts = read_json(folder / "trainer.json")
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

    def adopt(self, state: native.State, folder: Path) -> None:
        """Take over weights, optimizer, balancing and random state of a checkpoint; CheckpointError if it is another
        model's."""
        native.match_keys(state["model"], self.model.state_dict(), folder)
        here = {**self.masters, **{n: b for n, b in self.model.named_buffers() if n in state["model"]}}
        with torch.no_grad():
            for name, tensor in here.items():
                found = state["model"][name]
                if tensor.shape != found.shape:
                    raise CheckpointError(
                        "a tensor has another shape",
                        where=f"{folder}: {name}",
                        found=tuple(found.shape),
                        expected=tuple(tensor.shape),
                    )
                tensor.copy_(found)
        self._publish()
        self.optimizers = Optimizers(
            self.masters, self.job.optim, self.copies
        )  # with nothing left of steps that are undone
        self.optimizers.load_state_dict(state.get("optimizer", {}))
        self.balance.load_state_dict(state.get("balance", {}))
        torch.set_rng_state(state["rng"]["torch"])

    # -- one step ----------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """Run one optimizer step on a global batch; return its losses and gradient norm.

        A step whose loss or gradient is not finite changes nothing but the step count.
        """
        targets, tokens = batch.target_tokens, int((batch.document_ids != PADDING).sum())
        cross_entropy = z = sequence = router_z = 0.0
        self.model.train()
        for layer in self.moe_layers.values():
            layer.load_counts.zero_()
        logit_max: dict[str, Tensor] = {}
        for start in range(0, len(batch.input_ids), self.job.micro_sequences):
            micro = batch.rows(start, start + self.job.micro_sequences)
            documents = torch.from_numpy(micro.document_ids)
            routings: list[Routing] | None = [] if self.job.balance.has_loss else None
            hidden = self.model.hidden(torch.from_numpy(micro.input_ids), document_ids=documents, routings=routings)
            losses = chunked_loss(
                hidden,
                self.model.lm_head.weight,
                torch.from_numpy(micro.targets),
                scale=1 / max(targets, 1),
                z_loss=self.job.trainer.z_loss,
                chunk_tokens=self.job.trainer.loss_chunk_tokens,
            )
            total = losses.total
            if routings:
                router = router_losses(self.job.balance, routings, documents != PADDING, scale=1 / max(tokens, 1))
                total = total + router.total
                sequence += float(router.sequence)
                router_z += float(router.z)
            total.backward()
            cross_entropy += float(losses.cross_entropy)
            z += float(losses.z)
            for name, layer in self.moe_layers.items():
                largest = layer.last_router_logit_max
                assert largest is not None
                logit_max[name] = torch.maximum(largest, logit_max.get(name, largest))
            self._collect()
        norm = float(gradient_norm(m.grad for m in self.masters.values() if m.grad is not None))
        finite = norm < float("inf") and cross_entropy < float("inf")
        if finite:
            clip = min(1.0, self.job.optim.clip_norm / (norm + 1e-6))
            self.optimizers.step(self.job.schedule.at(self.step).factor, clip)
            for name, layer in self.moe_layers.items():
                self._balance(name, layer)
            self.monitor.add(logit_max)
        else:
            self._skip("loss or gradient is not finite")
            last = self.job.trainer.max_skipped_steps
            bad = [step for step in self.skipped if not self._is_left_out(step)]
            if bad[-last:] == list(range(self.step - last + 1, self.step + 1)):
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
        self.tokens += batch.input_ids.size
        values = {"loss/mean": cross_entropy / max(targets, 1), "loss/z": z / max(targets, 1), "optim/grad_norm": norm}
        routed = max(tokens * len(self.moe_layers), 1)
        if self.job.balance.sequence_loss:
            values["loss/sequence"] = sequence / routed
        if self.job.balance.router_z_loss:
            values["loss/router_z"] = router_z / routed
        return values

    def leave_out(self, batch: Batch) -> dict[str, Any]:
        """Let a step pass that a roll-back decided to leave out; return its figures, which are not numbers."""
        for rollback in self.rollbacks:
            if rollback["first_step"] == self.step:
                self.log.metrics(self.step + 1, {"moe/alarm": rollback["layers"]})
        self._skip("left out by a roll-back")
        self.step += 1
        self.tokens += batch.input_ids.size
        return dict.fromkeys(("loss/mean", "loss/z", "optim/grad_norm"), math.nan)

    def _skip(self, why: str) -> None:
        self.skipped.append(self.step)
        documents = sorted({f"{p.source}:{p.document_id}" for p in self.job.order.documents(self.step)})
        self.log.warn(f"step {self.step} skipped: {why}; documents: {', '.join(documents)}")

    def _is_left_out(self, step: int) -> bool:
        return any(rollback["first_step"] <= step < rollback["end_step"] for rollback in self.rollbacks)

    def _balance(self, name: str, layer: MoE) -> None:
        """Move one layer's bias by the counts of the step; further, while its balance step is raised."""
        before, factor = layer.expert_bias.clone(), self.detector.rate_factor(name, self.step)
        self.balance.update(name, layer.expert_bias, layer.load_counts)
        if factor != 1:
            layer.expert_bias.copy_(before + factor * (layer.expert_bias - before))

    # -- collapse ----------------------------------------------------------------------------------------------

    def heed(self, alarms: list[Alarm]) -> bool:
        """Say what collapses and do what the recipe asks for; return whether training went back to a checkpoint."""
        config = self.job.trainer.collapse
        layers = [alarm.number for alarm in alarms]
        self.log.warn("\n  ".join([f"routing collapses after {self.step} steps", *map(str, alarms)]))
        if config.action == "roll_back" and any(alarm.reason != "dead" for alarm in alarms):
            self._roll_back([alarm for alarm in alarms if alarm.reason != "dead"])
            return True
        for alarm in alarms:
            if config.action == "raise_rate":
                self.detector.raise_rate(alarm.layer, self.step)
            elif config.action == "reinitialise":
                reinitialise(alarm, self.state(), self.job.model.initializer_range)
                self._publish()
        acted = config.action if config.action != "roll_back" else "none"
        if acted == "raise_rate":
            self.log.say(f"  balance step x{config.rate_factor:g} in these layers for {config.raise_steps} steps")
        elif acted == "reinitialise":
            self.log.say("  routing of these experts drawn anew")
        self.alarms += [{**dataclasses.asdict(alarm), "action": acted} for alarm in alarms]
        self.log.metrics(self.step, {"moe/alarm": layers})
        return False

    def _roll_back(self, alarms: list[Alarm]) -> None:
        """Write down which steps to leave out, then go back to the newest checkpoint from before them."""
        config = self.job.trainer.collapse
        if len(self.rollbacks) >= config.max_rollbacks:
            raise TrainingError(
                f"routing collapsed again after {len(self.rollbacks)} roll-backs",
                where=f"{self.job.stage} step {self.step}",
                found="; ".join(map(str, alarms)),
                todo="the batches are not to blame: lower optim.lr, raise balance.rate or choose another "
                f"{self.job.stage}.trainer.collapse.action; the last good checkpoint is kept",
            )
        # Not before an earlier roll-back's steps: what lay before them was good then, and its checkpoint is kept.
        first = max([min(alarm.first_step for alarm in alarms), *(r["first_step"] for r in self.rollbacks)])
        decision = {"first_step": first, "end_step": self.step, "layers": [alarm.number for alarm in alarms]}
        write_json(self.job.folder / ROLLBACKS, {"rollbacks": [*self.rollbacks, decision]})
        self.log.say(f"  rolling back to before step {first}; steps {first} to {self.step - 1} will be left out")
        if not self.restore():
            raise TrainingError(
                "no checkpoint from before the collapse is left",
                where=self.job.folder / "checkpoints",
                expected=f"one of at most {first} steps",
                todo="run again: training starts anew and leaves out the steps named above",
            )

    def _collect(self) -> None:
        """Hand the micro-batch's gradients to the masters; several are added up in float32."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                master = self.masters[name]
                if master.grad is None:
                    master.grad = parameter.grad
                else:
                    master.grad = master.grad.to(torch.float32).add_(parameter.grad)
                parameter.grad = None

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the masters into the compute weights."""
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
            if config.collapse.action == "roll_back":  # there must be something to go back to
                self.save(native.step_folder(job.folder / "checkpoints", self.step), stage_type="step")
        if self.step >= schedule.total_steps:
            self._prune()
            return
        self.log.say(f"operators: {kernels.describe(DTYPES[config.dtype])}")
        peak = gemm_flops_per_s(DTYPES[config.dtype])
        context = job.order.batch(self.step).input_ids.shape[1]
        flops = flops_per_token(job.model, context)
        ends = {end: name for name, end in schedule.ends().items()}
        process = psutil.Process()
        started, tokens_then, steps_then = time.monotonic(), self.tokens, self.step
        with _StopSignals() as stop:
            while self.step < schedule.total_steps:
                position = schedule.at(self.step)
                if self._is_left_out(self.step):
                    values = self.leave_out(job.order.batch(self.step))
                else:
                    values = self.train_step(job.order.batch(self.step))
                    if self.skipped[-1:] != [self.step - 1]:
                        counts = {name: layer.load_counts for name, layer in self.moe_layers.items()}
                        alarms = self.detector.watch(self.step - 1, counts)
                        if alarms and self.heed(alarms):
                            self.monitor.take()
                            started, tokens_then, steps_then = time.monotonic(), self.tokens, self.step
                            continue
                done = self.step
                if done % config.log_every_steps == 0 or done in ends or stop.asked:
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
                    bits = validate(self.model)
                    self.log.metrics(done, bits)
                    self.log.say(f"step {done}: validation bits per byte {bits['val/bpb']:.4f}")
                    started, tokens_then, steps_then = time.monotonic(), self.tokens, done
                if done in ends or done % config.checkpoint_every_steps == 0 or stop.asked:
                    self._checkpoint(ends.get(done))
                    started, tokens_then, steps_then = time.monotonic(), self.tokens, done
                if stop.asked and done < schedule.total_steps:
                    raise Interrupted

    def _checkpoint(self, phase: str | None) -> None:
        if phase is not None and self.job.schedule.phases[phase].checkpoint:
            declared = self.job.schedule.phases[phase]
            self.save(self.job.folder / declared.checkpoint, stage_type=declared.stage_type)
            self.log.say(f"saved {declared.stage_type or 'checkpoint'}: {self.job.folder / declared.checkpoint}")
        self.save(native.step_folder(self.job.folder / "checkpoints", self.step), stage_type="step")
        self._prune()

    def _prune(self) -> None:
        config = self.job.trainer
        rolls_back, finished = config.collapse.action == "roll_back", self.step >= self.job.schedule.total_steps
        needed = max([self.detector.oldest_step, *(r["first_step"] for r in self.rollbacks)])
        native.prune(
            self.job.folder / "checkpoints",
            keep_last=config.keep_last,
            keep_every_steps=config.keep_every_steps,
            every_steps=config.checkpoint_every_steps,
            needed_step=needed if rolls_back and not finished else None,
        )

    def _say(self, values: dict[str, Any], done: int, seconds_left: float) -> None:
        line = (
            f"{values['phase']} {done}/{self.job.schedule.total_steps}  loss {values['loss/mean']:.3f}  "
            f"norm {values['optim/grad_norm']:.2f}  lr x{values['optim/lr']:.2f}  "
            f"{values['perf/tokens_per_s']:,.0f} tok/s  MFU {values['perf/mfu']:.0%}  "
            f"{values['perf/memory_bytes'] / 1e9:.1f} GB  MaxVio {values.get('moe/max_vio', math.nan):.2f}  "
            f"{seconds_left:.0f} s left"
        )
        self.log.live(line)
        if done % (10 * self.job.trainer.log_every_steps) == 0:
            self.log.say(line)


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
