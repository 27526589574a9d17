"""A loss of a stage's own: more columns, another denominator, other reports; the loop is not touched."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

from freehold.core.log import read_metrics
from freehold.core.marks import IGNORE
from freehold.data.packing import Batch
from freehold.losses.protocol import LossSums
from freehold.trainer.loop import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from test_loop import make


@dataclasses.dataclass(frozen=True)
class WeightedBatch(Batch):
    """Targets with a weight each, as a policy loss has advantages."""

    weights: np.ndarray

    def _cut(self, *part):
        return WeightedBatch(*(getattr(self, field.name)[part] for field in dataclasses.fields(self)))

    def rows(self, start, stop):
        return self._cut(slice(start, stop))

    def columns(self, part):
        return self._cut(slice(None), part)


class Weighted:
    """-sum of w log p over targets, divided by the sum of w."""

    reports = {"policy/loss": "weight", "policy/agrees": "targets"}  # noqa: RUF012

    def counts(self, batch):
        return {"weight": int(batch.weights.sum()), "targets": batch.target_tokens}

    def __call__(self, hidden, head, columns, scales):
        logits = torch.nn.functional.linear(hidden.flatten(0, 1), head).float()
        target, weight = columns["targets"].flatten(), columns["weights"].flatten()
        nll = torch.nn.functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
        loss = (nll * weight).sum()
        agrees = (logits.argmax(1) == target).sum()
        return LossSums(loss * scales["weight"], {"policy/loss": loss.detach(), "policy/agrees": agrees})


class WeightedOrder:
    """The rows of another order, with weights."""

    def __init__(self, order, weight):
        self.order, self.weight = order, weight

    def __getattr__(self, name):
        return getattr(self.order, name)

    def batch(self, step, *part):
        batch = self.order.batch(step, *part)
        weights = np.full(batch.targets.shape, self.weight, dtype=np.int64)
        return WeightedBatch(batch.input_ids, batch.targets, batch.document_ids, weights)


def trainer_of(folder, weight, micro=2):
    plain = make(folder, micro=micro)
    job = dataclasses.replace(plain.job, loss=Weighted(), order=WeightedOrder(plain.job.order, weight))
    return Trainer(job, plain.log, seed=0)


def test_loss_of_a_stage_trains_and_reports(tmp_path):
    trainer_of(tmp_path, weight=3).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["policy/loss"] < rows[0]["policy/loss"] < 5
    assert all(0 <= row["policy/agrees"] <= 1 for row in rows)
    assert "loss/mean" not in rows[0]


def test_sums_are_divided_over_the_whole_step(tmp_path):
    whole, parts = trainer_of(tmp_path / "a", 3, micro=4), trainer_of(tmp_path / "b", 3, micro=1)
    batch = whole.job.order.batch(0)
    one, two = whole.train_step(batch), parts.train_step(batch)
    assert abs(one["policy/loss"] - two["policy/loss"]) < 1e-5
    assert abs(one["optim/grad_norm"] - two["optim/grad_norm"]) < 1e-4
