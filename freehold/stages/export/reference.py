"""What our own model says about the proof's passages: the measure every export is held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from freehold.model.config import ModelConfig
from freehold.stages.export import samples
from freehold.tokenizer import chat
from freehold.tokenizer.bpe import Tokenizer

ROUTING_TIE = 2e-6
"""Two experts at the edge of the top-k closer than this: fp32 itself does not say which is chosen."""
BEST_TIE = 1e-5
"""Two best tokens closer than this in log-probability are equally good."""
FAR = 1e9
SHORT_TOKENS = 48
BEYOND_WINDOW_TOKENS = 64


@dataclass
class Passage:
    """A token sequence and what a model says about it."""

    name: str
    ids: list[int]
    logits: Tensor
    """[T, V] fp32."""
    chosen: Tensor
    """[MoE layers, T, k] experts in ascending order."""


def passages(tokenizer: Tokenizer, config: ModelConfig) -> Iterator[tuple[str, list[int]]]:
    """Yield (name, ids): every sample cut short, and two passages longer than the sliding window."""
    texts = samples.KINDS | samples.SCRIPTS
    for name, text in texts.items():
        yield name, [tokenizer.bos, *tokenizer.encode(text)][:SHORT_TOKENS]
    for name, (messages, tools) in samples.CONVERSATIONS.items():
        yield name, chat.render_ids(tokenizer, messages, tools=tools, generation=True)[0][: 2 * SHORT_TOKENS]
    # Beyond the window, where a wrong window or a global layer taken for a sliding one shows.
    length = min(config.sliding_window + BEYOND_WINDOW_TOKENS, config.max_position_embeddings)
    for name, order in (("long", list(texts.values())), ("long, reversed", list(texts.values())[::-1])):
        ids = [i for text in order for i in [*tokenizer.encode(text), tokenizer.end_of_text]]
        yield name, ([tokenizer.bos] + ids * (length // len(ids) + 1))[:length]


@contextmanager
def watch_routing(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Collect (logits, bias, chosen experts) of each MoE layer in order, from our model or transformers'."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        seen.append((outputs[0], inputs[1], outputs[2]))

    routers = [module for name, module in model.named_modules() if name.endswith(".mlp.router")]
    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def settled(model: nn.Module, named: Sequence[tuple[str, list[int]]]) -> tuple[list[Passage], int]:
    """Run our model over the passages; return them, each cut before its first routing tie, and the tokens cut.

    At a tie the sum's order decides which expert is chosen, in any runtime, and everything after it differs: a
    comparison would measure chance. Our model alone decides what a tie is, before any comparison.
    """
    result, cut_tokens = [], 0
    device = next(model.parameters()).device
    for name, ids in named:
        with watch_routing(model) as seen:
            logits = model(torch.tensor([ids], device=device))[0].float().cpu()
        seen = [(scores.cpu(), bias.cpu(), chosen.cpu()) for scores, bias, chosen in seen]
        tie = torch.zeros(len(ids), dtype=torch.bool)
        for router_logits, bias, chosen in seen:
            k = chosen.shape[-1]
            if k < bias.numel():
                scores = (router_logits.sigmoid() + bias).topk(k + 1, dim=-1).values
                tie |= scores[:, k - 1] - scores[:, k] < ROUTING_TIE
        length = int(tie.int().argmax()) if tie.any() else len(ids)
        cut_tokens += len(ids) - length
        if length:
            stacked = torch.stack([c.sort(dim=-1).values[:length] for _, _, c in seen])
            result.append(Passage(name, ids[:length], logits[:length], stacked))
    return result, cut_tokens


def log_probabilities(logits: Tensor) -> np.ndarray:
    """Return normalised log-probabilities in float64, so that a KL of 1e-11 is not rounding."""
    return logits.cpu().double().log_softmax(-1).numpy()


@dataclass
class Agreement:
    """How far a candidate's next-token distributions are from the reference's, over some positions."""

    kl: list[float]
    best: list[bool]

    @classmethod
    def empty(cls) -> Agreement:
        """Nothing compared yet."""
        return cls([], [])

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Compare log-probabilities [..., V] of some positions."""
        reference, candidate = np.atleast_2d(reference), np.atleast_2d(candidate)
        with np.errstate(invalid="ignore"):
            terms = np.exp(reference) * (reference - candidate)
        # A candidate that says nothing about a token, or not a number, is as far away as can be.
        kl = np.where(np.isfinite(candidate).all(-1), np.nansum(terms, -1), FAR)
        self.kl += np.maximum(kl, 0.0).tolist()
        top = np.take_along_axis(reference, candidate.argmax(-1)[:, None], -1)[:, 0]
        self.best += (top >= reference.max(-1) - BEST_TIE).tolist()

    @property
    def mean_kl(self) -> float:
        """Nats per position."""
        return float(np.mean(self.kl))

    def record(self) -> dict[str, float]:
        """Return the figures for `parity.json`."""
        return {
            "positions": len(self.kl),
            "mean_kl": figure(self.mean_kl),
            "median_kl": figure(float(np.median(self.kl))),
            "p99_kl": figure(float(np.quantile(self.kl, 0.99))),
            "max_kl": figure(max(self.kl)),
            "top1_agreement": round(float(np.mean(self.best)), 6),
        }


def figure(value: float) -> float:
    """Round up to two digits; below 1e-8, where only rounding noise is left, to the power of ten above.

    So that the record of an export does not change with the machine's mood.
    """
    if value <= 0:
        return 0.0
    unit = 10.0 ** (np.floor(np.log10(max(value, 1e-14))) - (1 if value >= 1e-8 else 0))
    return float(f"{np.ceil(value / unit) * unit if value >= 1e-8 else unit * 10:.2g}")
