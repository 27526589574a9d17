"""Instruction delta: what alignment changed, in four cells: answers by (base, aligned) x (with template, without).

In each cell both models read the same answer; a position is unshifted when the aligned model's best token is the base's
best too, marginal when it is its second or third, shifted otherwise (URIAL, 2312.01552). The cells without template
show how much of the change is the template's (2605.24583).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from freehold.core.document import Conversation, read_rows
from freehold.core.statistics import bootstrap
from freehold.core.table import Table
from freehold.infer.sampler import Sampling
from freehold.stages.audit import picture
from freehold.stages.audit.config import Delta
from freehold.stages.audit.subject import CannotAnswer, Finding, Subject, logits_of

if TYPE_CHECKING:
    from freehold.api import Loaded

CELLS = [(author, template) for author in ("aligned", "base") for template in (True, False)]
GROUPS = {
    "attention": "self_attn", "router": "router", "experts": "mlp.experts", "shared experts": "shared_experts",
    "embedding": "embed_tokens", "head": "lm_head", "norms": "norm",
}  # fmt: skip


def audit(subject: Subject, config: Delta) -> Finding:
    """Compare the last checkpoint with the one before; CannotAnswer without two of one tokenizer."""
    if len(subject.models) < 2:
        raise CannotAnswer("what alignment changed needs the model before it", found=", ".join(subject.models))
    base, aligned = list(subject.models.values())[-2:]
    found = Finding()
    _cells(subject, base, aligned, config, found)
    _weights(base, aligned, found)
    return found


def _cells(subject: Subject, base: Loaded, aligned: Loaded, config: Delta, found: Finding) -> None:
    prompts = list(_prompts(subject, config.prompts))
    rows, bars = [], []
    for author, template in CELLS:
        name = f"{author} {'with' if template else 'without'} template"
        starts = [aligned.prompt_ids(text) if template else aligned.text_ids(text) for text in prompts]
        writer = aligned if author == "aligned" else base
        sampling = Sampling(temperature=0.0, max_tokens=config.answer_tokens, stop_ids=aligned.stop_ids)
        answers = [generation.ids for generation in writer.engine.generate(starts, sampling)]
        compared = list(_compare(base, aligned, starts, answers))
        places = np.concatenate([ranks for ranks, _ in compared]) if compared else np.zeros(0)
        kl = bootstrap(
            [float(k) for _, kls in compared for k in kls], [i for i, (_, kls) in enumerate(compared) for _ in kls]
        )
        shares = [float((places == 1).mean()), float(((places > 1) & (places <= 3)).mean()), float((places > 3).mean())]
        key = f"delta/{author}_{'with' if template else 'without'}_template"
        found.figures |= {f"{key}/shifted": round(shares[2], 4), f"{key}/kl": kl.to_dict()}
        rows.append([name, f"{len(places):,}", *(f"{100 * s:.1f}" for s in shares), f"{kl.value:.4f}"])
        bars.append((name, kl.value, kl.low, kl.high))
        if (author, template) == CELLS[0]:
            found.details["shifted"] = _shifted(aligned, answers, [ranks for ranks, _ in compared])
    header = ["answers of", "positions", "unshifted %", "marginal %", "shifted %", "KL, nats"]
    found.tables.append(Table("Instruction delta: base and aligned read the same answers", header, rows))
    found.pictures["delta"] = picture.bars("KL of aligned from base, nats a token", bars)


def _prompts(subject: Subject, count: int) -> Iterator[str]:
    """Yield held-out questions, else those of training: first user messages of curated conversations."""
    paths = sorted((subject.corpus / "conversations").glob("*.parquet")) if subject.corpus else []
    rows = [row for path in paths for row in read_rows(path, Conversation)]
    held_out = [row for row in rows if row.split == "validation"] or rows
    asked = [
        m["content"] for row in held_out for m in row.messages if m["role"] == "user" and isinstance(m["content"], str)
    ]
    if not asked:
        raise CannotAnswer("what alignment changed is asked with held-out questions", expected="curated conversations")
    for number in subject.random("delta").permutation(len(asked))[:count]:
        yield asked[number]


def _compare(
    base: Loaded, aligned: Loaded, starts: list[list[int]], answers: list[list[int]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each answer the rank in base of the aligned model's best token, and the KL, at each of its tokens."""
    rows = [[*start, *answer] for start, answer in zip(starts, answers, strict=True)]
    before = dict(logits_of(base, rows))
    after = dict(logits_of(aligned, rows))
    for i, answer in enumerate(answers):
        old, new = (side[i][len(starts[i]) - 1 : len(rows[i]) - 1] for side in (before, after))
        if len(answer):
            yield _ranks(old, new), _kl(new, old)


def _ranks(old: Tensor, new: Tensor) -> np.ndarray:
    best = new.argmax(-1, keepdim=True)
    # Ties count for the aligned model's token: an unchanged model has rank 1 everywhere.
    return (1 + (old > old.gather(-1, best)).sum(-1)).numpy()


def _kl(new: Tensor, old: Tensor) -> np.ndarray:
    p, q = new.double().log_softmax(-1), old.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).numpy()


def _shifted(aligned: Loaded, answers: list[list[int]], ranks: list[np.ndarray]) -> list[str]:
    """Return the tokens at shifted positions, the most frequent first."""
    said = zip(filter(None, answers), ranks, strict=True)
    tokens = Counter(ids[i] for ids, places in said for i in np.flatnonzero(places > 3))
    return [aligned.tokenizer.decode([token], skip_specials=False) for token, _ in tokens.most_common(12)]


@torch.no_grad()
def _weights(base: Loaded, aligned: Loaded, found: Finding) -> None:
    """Add the relative norm of the change of each group of weights, and the mean effective rank of its matrices."""
    old = dict(base.model.named_parameters())
    sums: dict[str, list[float]] = {}
    for name, parameter in aligned.model.named_parameters():
        group = next((g for g, part in GROUPS.items() if part in name), "dense")
        change = (parameter.double() - old[name].double()) if name in old else parameter.double()
        known = sums.setdefault(group, [0.0, 0.0, 0.0, 0.0])
        known[0] += float(change.square().sum())
        known[1] += float(old[name].double().square().sum()) if name in old else 0.0
        if change.ndim > 1 and min(change.shape[-2:]) <= 512:
            ranks = _effective_rank(change.reshape(-1, *change.shape[-2:])[:4])
            known[2], known[3] = known[2] + sum(ranks), known[3] + len(ranks)
    bars = []
    for group, (changed, before, rank_sum, matrices) in sums.items():
        relative = (changed / before) ** 0.5 if before else 0.0
        found.figures[f"delta/weights/{group.replace(' ', '_')}"] = round(relative, 6)
        bars.append((group, relative, relative, relative))
        found.details.setdefault("effective_rank", {})[group] = round(rank_sum / matrices, 2) if matrices else None
    rows = [[name, f"{value:.4f}", f"{found.details['effective_rank'][name] or ''}"] for name, value, _, _ in bars]
    found.tables.append(Table("Change of the weights", ["group", "relative norm", "effective rank"], rows))
    found.pictures["weights"] = picture.bars("Change of the weights, relative norm", bars)


def _effective_rank(matrices: Tensor) -> list[float]:
    """Return exp of the entropy of the singular values' shares (Roy and Vetterli 2007); 0 for an unchanged matrix."""
    values = torch.linalg.svdvals(matrices.float())  # [n, r]
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp_min(1e-30)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(-1)
    return [float(e.exp()) if t > 0 else 0.0 for e, t in zip(entropy, total.squeeze(-1), strict=True)]
