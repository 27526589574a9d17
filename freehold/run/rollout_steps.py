"""What trained one step of reinforcement learning, and the same computed again from the ledger of rollouts alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from freehold.core.document import Conversation, read_rows
from freehold.core.errors import DataError
from freehold.core.log import read_metrics
from freehold.data.rollouts import FOLDER, TRAINED, Rollout, RolloutLedger, batch_of
from freehold.run.layout import ALIGN, CURATE, METRICS, RunFolder
from freehold.run.step_documents import documents_of_step


@dataclass(frozen=True)
class Why:
    """What trained a step."""

    run: str
    step: int
    policies: list[str]
    """SHA-256 of the weights that answered."""
    drawn_at: list[int]
    environments: dict[str, str]
    """Name -> version."""
    licences: dict[str, int]
    """Licence -> answers under it; those of prompts and of what tools returned."""
    sources: dict[str, int]
    teachers: list[str]
    why: dict[str, int]
    """How many answers were trained, and why the others were not."""
    groups: list[dict[str, Any]]
    documents: list[dict[str, Any]]
    """Of a step that is no reinforcement learning: its documents by source and licence."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    def text(self) -> str:
        """Return it for people."""
        if not self.groups:
            lines = [f"step {self.step} of {self.run} learned from {len(self.documents)} documents"]
            return "\n".join(lines + [f"  {d['source']}:{d['id']}  {d['licence']}" for d in self.documents])
        lines = [
            f"step {self.step} of {self.run}: " + ", ".join(f"{n} {what}" for what, n in self.why.items()),
            f"  answered by the weights {', '.join(p[:16] for p in self.policies)}, after step {self.drawn_at}",
            "  judged by " + ", ".join(f"{name} {version}" for name, version in self.environments.items()),
            "  licences: " + ", ".join(f"{licence} ({n})" for licence, n in self.licences.items()),
        ]
        if self.teachers:
            lines.append(f"  teachers: {', '.join(self.teachers)}")
        for group in self.groups:
            rewards = " ".join(f"{reward:.2f}" for reward in group["rewards"])
            lines.append(f"  {group['task']}: rewards {rewards}; {group['why']}  {group['prompt'][:60]!r}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Replay:
    """What was computed again."""

    step: int
    rewards: int
    advantages: int
    loss: float | None
    difference: str
    """The first one; empty when every bit is equal."""
    note: str = ""

    def text(self) -> str:
        """Return it for people."""
        what = f"step {self.step}: {self.rewards} rewards, {self.advantages} advantages" + (
            f", loss {self.loss:.6g}" if self.loss is not None else ""
        )
        end = f"DIFFERS: {self.difference}" if self.difference else "every bit equal"
        return f"{what}: {end}" + (f"\n  {self.note}" if self.note else "")


def why(run_folder: Path, step: int) -> Why:
    """Return what trained a step of align; DataError when the run has no such step."""
    found = _find(run_folder, step)
    if found is None:
        documents = documents_of_step(RunFolder(run_folder).stage(ALIGN), step)
        if not documents:
            raise DataError("no step of align is known by that number", where=run_folder, found=step)
        return Why(run_folder.name, step, [], [], {}, {}, {}, [], {}, [], documents)
    _, rollouts, _ = found
    groups: dict[int, list[Rollout]] = {}
    for one in rollouts:
        groups.setdefault(one.group, []).append(one)
    return Why(
        run=run_folder.name,
        step=step,
        policies=sorted({one.policy for one in rollouts}),
        drawn_at=sorted({one.drawn_at for one in rollouts}),
        environments=dict(sorted({(one.environment, one.version) for one in rollouts})),
        licences=_counted(one.licence for one in rollouts if one.why == TRAINED),
        sources=_counted(one.source or one.environment for one in rollouts if one.why == TRAINED),
        teachers=sorted({one.teacher for one in rollouts if one.teacher}),
        why=_counted(one.why for one in rollouts),
        groups=[_shown(group) for _, group in sorted(groups.items())],
        documents=[],
    )


def replay(run_folder: Path, step: int) -> Replay:
    """Compute rewards, advantages and the loss of a step again, and compare every bit with what was recorded.

    Raises DataError when the step is no step of reinforcement learning, ArtifactError for a damaged ledger.
    """
    from freehold.data.grading import grade

    found = _find(run_folder, step)
    if found is None:
        raise DataError(
            "the step has no rollouts to replay",
            where=run_folder,
            found=step,
            todo="`freehold why` says what it learned",
        )
    ledger, rollouts, settings = found
    again = [_judged_again(one, environment) for one, environment in _environments(run_folder, rollouts, settings)]
    for one, parts in zip(rollouts, again, strict=True):
        if parts != one.parts:
            where = f"reward of {one.task}, answer {one.member}: {one.parts} recorded, {parts} now"
            return Replay(step, len(rollouts), 0, None, where)
    batch = ledger.read(batch_of(step, ledger.steps()) or 0)[0]
    for recorded, now in zip(batch, grade(batch, settings), strict=True):
        if recorded != now:
            where = (
                f"{recorded.task}, answer {recorded.member}: advantage {recorded.advantage!r}, now {now.advantage!r}"
            )
            return Replay(step, len(rollouts), len(batch), None, where)
    return _loss_again(step, ledger, rollouts, len(batch), settings)


def _find(run_folder: Path, step: int) -> tuple[RolloutLedger, list[Rollout], dict[str, Any]] | None:
    """Return the ledger that has rollouts for a step, these, and the settings they were graded with."""
    align = RunFolder(run_folder).stage(ALIGN)
    for folder in sorted([align / FOLDER, *align.glob(f"phases/*/{FOLDER}")]):
        ledger = RolloutLedger(folder)
        first = batch_of(step, ledger.steps())
        if first is not None:
            rollouts, settings = ledger.read(first)
            mine = [one for one in rollouts if one.step == step]
            if mine and settings.get("graded", True):
                return ledger, mine, settings
    return None


def _environments(run_folder: Path, rollouts: list[Rollout], settings: dict[str, Any]) -> Iterator[tuple[Rollout, Any]]:
    """Yield each rollout with the environment that judged it; DataError when that has another version now."""
    from freehold.environments.audit import open_environment

    def conversations(source: str) -> Iterator[Conversation]:
        for path in sorted((RunFolder(run_folder).stage(CURATE) / "conversations").glob("*.parquet")):
            yield from (row for row in read_rows(path, Conversation) if row.source == source and row.split == "train")

    opened: dict[str, Any] = {}
    for one in rollouts:
        if one.environment not in opened:
            kind, given = settings["environments"][one.environment]
            opened[one.environment] = open_environment(kind, given, settings["seed"], conversations, one.environment)
            version = opened[one.environment].version
            if version != one.version:
                raise DataError(
                    "the environment has another version than the one that judged",
                    where=one.environment,
                    found=version,
                    expected=one.version,
                    todo="install the package at the version of the run",
                )
        yield one, opened[one.environment]


def _judged_again(one: Rollout, environment: Any) -> str:
    from freehold.environments.protocol import Task

    task = Task(one.task, tuple(json.loads(one.prompt)), json.loads(one.answer))
    parts = environment.reward(task, json.loads(one.state), json.loads(one.turns))
    return json.dumps({name: float(value) for name, value in parts.items()}, ensure_ascii=False, sort_keys=True)


def _loss_again(
    step: int, ledger: RolloutLedger, rollouts: list[Rollout], graded: int, settings: dict[str, Any]
) -> Replay:
    """Compute the loss from the recorded log-probabilities: those of the training pass where none differs."""
    rows = [row for row in read_metrics(ledger.folder.parent / METRICS) if row["step"] == step + 1]
    recorded = next((row for row in rows if "policy/loss" in row), None)
    trained = [one for one in rollouts if one.why == TRAINED]
    if recorded is None or not trained:
        note = "nothing was trained" if not trained else "its loss was not logged: see trainer.log_every_steps"
        return Replay(step, len(rollouts), graded, None, "", note)
    if recorded["policy/differs"]:
        note = "the weights had moved since the answers were drawn: their loss needs the weights, not the ledger"
        return Replay(step, len(rollouts), graded, None, "", note)
    loss = exact_loss(trained, settings)
    difference = "" if loss == recorded["policy/loss"] else f"loss {recorded['policy/loss']!r} recorded, {loss!r} now"
    return Replay(step, len(rollouts), graded, loss, difference)


def exact_loss(trained: list[Rollout], settings: dict[str, Any]) -> float:
    """Return the loss of a step whose ratios are all 1, summed as the training loop sums it."""
    import numpy as np
    import torch

    from freehold.core.marks import IGNORE
    from freehold.data.rollouts import policy_batch
    from freehold.losses.policy import PolicyLoss

    loss = PolicyLoss(**settings["loss"])
    batch = policy_batch(trained, 0)
    counts = loss.counts(batch)
    scales = {name: 1 / max(count, 1) for name, count in counts.items()}
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(batch.targets), settings["micro"]):
        part = batch.rows(start, start + settings["micro"])
        names = ("targets", "behaviour", "advantage", "reference", "sequence")
        columns = {name: torch.from_numpy(np.ascontiguousarray(getattr(part, name))) for name in names}
        kept = columns["targets"] != IGNORE
        total = total + loss.of(columns["behaviour"][kept], kept, columns, scales).sums["policy/loss"]
    return float(total / max(counts[loss.reports["policy/loss"]], 1))


def _counted(names: Iterator[str] | Any) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _shown(group: list[Rollout]) -> dict[str, Any]:
    first = group[0]
    return {
        "task": first.task,
        "environment": first.environment,
        "document": first.document,
        "licence": first.licence,
        "prompt": json.loads(first.prompt)[-1]["content"],
        "answer": json.loads(first.answer),
        "rewards": [one.reward for one in group],
        "advantages": [one.advantage for one in group],
        "parts": [json.loads(one.parts) for one in group],
        "answers": [json.loads(one.turns)[-1]["content"] if json.loads(one.turns) else "" for one in group],
        "why": ", ".join(sorted({one.why for one in group})),
    }
