"""Level 3 of verifying a release: ask the released model again and compare with the answers that the release holds.

Greedy answers of a sample of the recorded items are made again from the files in the release; of choices, the recorded
choice must be at least as probable, by byte, as the expected one. A share must agree: the export rounds what the
evaluation had in full, so a near tie may fall the other way.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freehold.core.errors import ProofError
from freehold.core.statistics import Estimate, share
from freehold.run.layout import EVALUATE, EXPORT, RunFolder
from freehold.run.reproduce import read_manifests

if TYPE_CHECKING:
    from freehold.api import Loaded

LEAST_AGREEMENT = 0.9
"""Share of the answers that must come out as recorded: refused when the sample's 95 % interval is below it."""


class OtherBehaviour(ProofError):
    """A release whose model does not answer as the release says it did."""

    code = 5


@dataclass(frozen=True)
class Agreement:
    """How many of the sampled answers came out as recorded."""

    checkpoint: str
    items: int
    same: int
    interval: Estimate
    differing: list[str]


def check(pack: Path, samples: int, nonce: str) -> Agreement:
    """Ask again; OtherBehaviour when too few answers agree, ProofError when the release cannot be asked."""
    manifests, folder = read_manifests(pack), pack / "model" / "hf"
    if EVALUATE not in manifests or not folder.is_dir():
        raise ProofError(
            "behaviour cannot be measured again",
            where=pack,
            found="no evaluation" if EVALUATE not in manifests else "only the hashes of the model's files",
            todo="verify with --level 2, or get the release with its model",
        )
    name = str(manifests[EXPORT]["config"]["checkpoint"]).rpartition("/")[2]
    rows = _rows(pack / "evaluation", name)
    rows.sort(key=lambda row: hashlib.sha256(f"{nonce}\0{row['id']}".encode()).digest())
    done = _ask(folder, rows[:samples], manifests[EVALUATE]["config"])
    differing = [row["id"] for row, same in zip(rows, done, strict=False) if not same]
    found = Agreement(name, len(done), sum(done), share(sum(done), len(done)), differing)
    if found.interval.high < LEAST_AGREEMENT:
        raise OtherBehaviour(
            "the model does not answer as the release says",
            where=folder,
            found=f"{found.same} of {found.items} sampled answers agree; not {', '.join(differing[:4])}",
            expected=f"at least {LEAST_AGREEMENT:.0%}",
            todo="do not use it; ask its maker",
        )
    return found


def _rows(evaluation: Path, checkpoint: str) -> list[dict[str, Any]]:
    """Return the recorded answers of the exported checkpoint, each with the kind of its task."""
    path = evaluation / "answers" / f"{checkpoint}.jsonl"
    if not path.exists():
        raise ProofError("the release holds no answers of the model that it exports", where=path)
    results = json.loads((evaluation / RunFolder(Path()).evaluation.name).read_text(encoding="utf-8"))
    kinds = {task: sums["kind"] for task, sums in results["checkpoints"][checkpoint]["tasks"]["tasks"].items()}
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{**row, "kind": kinds[row["task"]]} for row in map(json.loads, lines)]


def _ask(folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> list[bool]:
    from freehold.api import load
    from freehold.infer.sampler import Sampling

    loaded = load(folder, dtype=config["dtype"])
    prompts = [loaded.prompt_ids(row["question"]) for row in rows]
    sampling = Sampling(temperature=0.0, max_tokens=config["max_answer_tokens"], stop_ids=loaded.stop_ids)
    asked = [i for i, row in enumerate(rows) if row["kind"] == "generate"]
    said = loaded.engine.generate([prompts[i] for i in asked], sampling)
    texts = {i: loaded.tokenizer.decode(one.ids, skip_specials=True) for i, one in zip(asked, said, strict=True)}
    return [
        texts[i] == row["answer"] if i in texts else _chosen_again(loaded, prompts[i], row)
        for i, row in enumerate(rows)
    ]


def _chosen_again(loaded: Loaded, prompt: list[int], row: dict[str, Any]) -> bool:
    """Whether the recorded choice is at least as probable by byte as the expected one."""
    if row["answer"] == row["expected"]:
        return bool(row["correct"])
    both = [str(row["answer"]), str(row["expected"])]
    tails = [loaded.tokenizer.encode(text) for text in both]
    values = loaded.engine.score([[*prompt, *tail] for tail in tails])
    rates = [sum(v[-len(t) :]) / len(s.encode()) for v, t, s in zip(values, tails, both, strict=True)]
    return rates[0] >= rates[1]
