"""The only training loop, in the order of events: batch, step, guards, metrics, validation, checkpoint.

Pre-training and fine-tuning differ in the batches, phases and losses of their `Job`. A step changes the weights, or is
skipped: its loss was not finite, it was a spike, or a roll-back put it among the steps to skip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import Tensor

from freehold.checkpoint import dcp
from freehold.core.log import Log
from freehold.data.packing import Batch
from freehold.kernels import cpu as kernels
from freehold.model.afmoe import Afmoe
from freehold.optim.balance import build_balance
from freehold.parallel.heartbeat import Heartbeat
from freehold.parallel.mesh import world
from freehold.trainer.calendar import Calendar, Due
from freehold.trainer.callbacks import Callbacks
from freehold.trainer.checkpoints import Checkpoints
from freehold.trainer.deferred import Deferred
from freehold.trainer.device import describe, prepare
from freehold.trainer.errors import Interrupted
from freehold.trainer.guards import Continue, Guards, RollBack, Skip, Stop, Treat, as_record, stacked_loads
from freehold.trainer.job import Job
from freehold.trainer.monitor import LoadMonitor, Meter, Stopwatch
from freehold.trainer.progress import Progress
from freehold.trainer.quarantine import quarantine
from freehold.trainer.signals import StopSignals
from freehold.trainer.state import build_state
from freehold.trainer.step import ForwardBackward, StepResult
from freehold.trainer.update import Update


class Trainer:
    """One run: its parts, and the loop over its steps.

    deferred: figures stay on the device until a log point. None chooses: not on CPUs, where reading is free, nor where
    a guard is configured to act on them.
    """

    def __init__(
        self,
        job: Job,
        log: Log,
        *,
        seed: int,
        weights: dict[str, Tensor] | None = None,
        deferred: bool | None = None,
    ) -> None:
        self.job = job
        self.world = world(job.parallel, job.stage)
        # Ranks other than the first stay silent: they would say the same.
        self.log = log if self.world.is_main else Log(quiet=True)
        # Before any random number is drawn, and before memory is taken.
        settings = prepare(job, self.world.device, seed)
        self.state = build_state(job, self.world, seed, weights)
        self.progress = Progress(job.schedule.first_step, job.tokens_before)
        self.balance = build_balance(job.balance)
        self.guards = Guards(job, list(self.state.moe_layers), self.progress, self.log)
        # A guard that may act must see a step before the next one; without one, log points are early enough.
        self.deferred = self.world.device.type != "cpu" and not self.guards.acts if deferred is None else deferred
        # Where guards act, one read of the device a step is all they need: nothing else waits for it.
        queued = self.deferred or self.world.device.type != "cpu"
        self.forward_backward = ForwardBackward(job, self.state, self.world, deferred=queued)
        self.monitor = LoadMonitor(self.state.moe_layers)
        self.update = Update(job, self.world, self.state, self.balance, self.guards, self.monitor)
        self.checkpoints = Checkpoints(
            job, self.world, self.log, self.state, self.guards, self.balance, self.progress, settings
        )
        self.calendar = Calendar(job, self.world, deferred=queued)
        self.heartbeat = Heartbeat()
        self.callbacks = Callbacks(job, self.log, main=self.world.is_main)
        self.unread = Deferred()

    @property
    def model(self) -> Afmoe:
        """Return the model, with the weights it computes with."""
        return self.state.model

    @property
    def step(self) -> int:
        """Return how many steps are done."""
        return self.progress.step

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(
        self,
        validate: Callable[[Afmoe], dict[str, float]] | None = None,
        ready: Callable[[Trainer], None] = lambda _: None,
    ) -> None:
        """Train to the end of the schedule, from the newest good checkpoint if there is one.

        `ready` is called once the weights are those of the step to continue from.

        Saves at each phase's end under the phase's checkpoint name, and every `checkpoint_every_steps`. On SIGINT or
        SIGTERM the running step is finished and saved, then Interrupted is raised.
        """
        schedule, progress = self.job.schedule, self.progress
        if not self._begin():
            return
        with StopSignals() as signals, contextlib.closing(self.callbacks):
            # Trackers learn at which step they start, so only after the restore.
            self.callbacks.open(progress.step)
            ready(self)
            watch, loss = Stopwatch(progress.step, progress.tokens), None
            meter = Meter(self.job, self.world, progress.step)
            while progress.step < schedule.total_steps:
                self.heartbeat.beat(progress.step, "step", loss=loss)
                # A rolled-back step still reads its rows: it counts as tokens, and the order does not move.
                batch = self.next_batch()
                # Of one process alone: several would have to agree that none of them has a target.
                empty = self.world.size == 1 and not batch.target_tokens
                skipped = empty or progress.rolled_back(progress.step)
                result = self.skip_step(batch) if skipped else self.train_step(batch)
                done = progress.step
                # All ranks agree on what is due: each of these may hold a collective.
                due = self.calendar.after(done, signals)
                # After a roll-back nothing is due: the state is that of an earlier step.
                if self.look_back(due, result, skipped):
                    watch.restart(progress.step, progress.tokens)
                    continue
                if due.log:
                    loss = result.loss
                    # The lap ends here, so that the next one does not include the writing of metrics.
                    speed = meter.read(done, progress.tokens, *watch.lap(done, progress.tokens))
                    self.callbacks.log(done, {**result, **speed, **self.monitor.take()})
                if validate and due.validate:
                    self.heartbeat.beat(done, "validate")
                    self.callbacks.log(done, validate(self.model))
                    watch.restart(done, progress.tokens)
                if due.save:
                    self.heartbeat.beat(done, "save")
                    self.checkpoints.save_step(due.phase, required=due.stop)
                    watch.restart(done, progress.tokens)
                if due.stop and done < schedule.total_steps:
                    raise Interrupted
        # What is left, closing files and groups, has no steps to count.
        self.heartbeat.beat(progress.step, "done")

    def _begin(self) -> bool:
        """Restore what there is; return whether steps are left to do."""
        found = self.restore()
        self.log.say(f"device: {describe(self.job.parallel, self.world.device)}")
        if self.world.device.type == "cpu":
            self.log.say(f"operators: {kernels.describe(self.job.dtype)}")
        if not found:
            self.callbacks.rewind(self.step)
            # Without it the first window of a run would have nothing to return to.
            if self.guards.rolls_back:  # there must be something to roll back to
                self.checkpoints.save(dcp.step_folder(self.checkpoints.folder, self.step), stage_type="step")
        if self.step >= self.job.schedule.total_steps:
            # A run killed between its last save and its pruning has some checkpoints too many.
            self.checkpoints.pruning()()
            return False
        self.heartbeat.beat(self.step, "start")
        return True

    # -- one step ----------------------------------------------------------------------------------------------

    def next_batch(self) -> Batch:
        """Return this process's part of the step's rows; adds the rows to the data digest, unless they are skipped."""
        order, step = self.job.order, self.step
        rows = self.world.rows(order.sequences)
        batch = order.batch(step, rows)
        if not self.progress.rolled_back(step):
            self.progress.digest.add(step, batch, rows.start)
        return batch.columns(self.world.columns(batch.input_ids.shape[1]))

    def train_step(self, batch: Batch) -> StepResult:
        """Run one optimizer step on this process's part of a batch; return the figures of the full batch.

        A step whose loss or gradient is not finite changes nothing but the step count. Raises TrainingError when too
        many in a row were not.
        """
        step, result = self.step, self.forward_backward(batch)
        if self.deferred:
            # Nothing below waits for the device: the next step is queued while this one runs.
            self.update.on_device(step, result)
            self.unread.add(step, result, self.state.moe_layers)
        else:
            self.update.share_routing(result.logit_max)
            result.loads = stacked_loads(self.state.moe_layers.values())
            self._judge(step, result)
        if self.job.watch is not None:
            loads = {name: layer.load_counts for name, layer in self.state.moe_layers.items()}
            self.job.watch(step, self.state.masters, loads)
        self.state.clear_gradients()
        self.progress.count(batch, self.world)
        return result

    def _judge(self, step: int, result: StepResult) -> None:
        """Apply a step, or skip it; the guards decide."""
        match self.guards.before_update(step, result.loss, result["optim/grad_norm"]):
            # A deferred step was applied, or not, by the device itself.
            case Continue() if not self.deferred:
                self.update(step, result)
            case Skip(why):
                self._skip(step, why)
            case Stop(error, why):
                self._skip(step, why)
                raise error

    def skip_step(self, batch: Batch) -> StepResult:
        """Pass over a step that a roll-back decided to skip, or without targets; its figures are not numbers."""
        for rollback in self.progress.rollbacks:
            # Once for each roll-back, at its first step: the alarm belongs to the curve, not to each step.
            if rollback["first_step"] == self.step and rollback["layers"]:
                self.callbacks.log(self.step + 1, {"moe/alarm": rollback["layers"]})
        blamed = self.progress.rolled_back(self.step)
        self._skip(self.step, "a roll-back blames it" if blamed else "it has nothing to learn from")
        self.progress.count(batch, self.world)
        return StepResult.skipped(self.forward_backward.names)

    def _skip(self, step: int, why: str) -> None:
        self.progress.skipped.append(step)
        if self.world.is_main:
            quarantine(self.job, self.log, step, why)

    # -- guards ------------------------------------------------------------------------------------------------

    def look_back(self, due: Due, result: StepResult, skipped: bool) -> bool:
        """Have the guards judge the steps since they last did; return whether training was rolled back.

        skipped: a roll-back skipped the step, so that it says nothing of the weights.
        """
        if self.deferred:
            if due.reads:
                self.catch_up()
            return False
        if skipped:
            return False
        loads = None if self.progress.last_skipped(self.step - 1) else result.host_loads()
        return self.act(self.guards.after_update(self.step, loads))

    def catch_up(self) -> None:
        """Judge deferred steps in order. No action is configured, so the worst is an error or a warning."""
        for step, result, load in self.unread.read():
            self._judge(step, result)
            self.act(self.guards.after_update(step + 1, None if self.progress.last_skipped(step) else load))

    def act(self, decision: Continue | RollBack | Treat) -> bool:
        """Do what the guards decided after an update; return whether training was rolled back."""
        match decision:
            case RollBack():
                self.checkpoints.roll_back(decision)
                self.callbacks.rewind(self.step)
                self.monitor.take()
                return True
            # The alarm is recorded even where the recipe asks for nothing but a warning.
            case Treat(alarms, action):
                if action == "reinitialise":
                    for alarm in alarms:
                        self.state.reinitialise(alarm, self.balance.state_dict())
                    self.log.say("  routing of these experts drawn again")
                self.progress.alarms += [as_record(alarm, action) for alarm in alarms]
                self.callbacks.log(self.step, {"moe/alarm": [alarm.number for alarm in alarms]})
        return False

    def restore(self) -> bool:
        """Continue from the newest good checkpoint; False without one."""
        found = self.checkpoints.restore()
        if found:
            self.callbacks.rewind(self.step)
        return found
