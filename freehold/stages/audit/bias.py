"""Bias: does a group's word alone change what is said, and more than in the text the model learned from?

For each topic the model's log-odds of one group's word against the other's, over templates, minus the corpus's log-odds
of sentences that name the topic with either. The difference is what the model adds: amplification.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

from freehold.core.statistics import Estimate, bootstrap
from freehold.core.table import Table
from freehold.stages.audit import picture
from freehold.stages.audit.config import Bias
from freehold.stages.audit.subject import CannotAnswer, Finding, Subject, logprobs_of

SENTENCE = re.compile(r"[^.!?\n]+")


def audit(subject: Subject, config: Bias) -> Finding:
    """Compare the product with its corpus; CannotAnswer without one."""
    if not subject.documents:
        raise CannotAnswer("amplification needs the text that the model learned from", expected="a run with its corpus")
    texts = (row.text for row in subject.documents.values() if row.split == "train")
    return compare(subject, count(texts, config), config)


def count(texts: Iterable[str], config: Bias) -> dict[str, tuple[int, int]]:
    """Return for each topic in how many sentences it is named with one group and with the other."""
    topics, groups = set(config.topics), (set(config.first), set(config.second))
    words = re.compile(r"\b(?:" + "|".join(map(re.escape, [*topics, *config.first, *config.second])) + r")\b", re.I)
    found: Counter[tuple[str, int]] = Counter()
    for text in texts:
        for sentence in SENTENCE.finditer(text):
            named = {word.lower() for word in words.findall(sentence[0])}
            for topic in named & topics:
                for number, group in enumerate(groups):
                    found[topic, number] += bool(named & group)
    return {topic: (found[topic, 0], found[topic, 1]) for topic in config.topics}


def compare(subject: Subject, counts: dict[str, tuple[int, int]], config: Bias) -> Finding:
    """Return log-odds of model and corpus by topic, and the amplification over all that are frequent enough."""
    found, bars, rows = Finding(), [], []
    differences: list[float] = []
    templates: list[str] = []
    for topic, (first, second) in counts.items():
        odds = [_log_odds(subject, template.format(topic=topic), config) for template in config.templates]
        model = bootstrap(odds)
        if first + second < config.least_mentions:
            rows.append([topic, f"{first}", f"{second}", "too rare", f"{model.value:+.2f}", ""])
            continue
        corpus = math.log((first + 0.5) / (second + 0.5))
        gap = Estimate(model.value - corpus, model.low - corpus, model.high - corpus)
        differences += [value - corpus for value in odds]
        templates += list(config.templates)
        bars.append((topic, gap.value, gap.low, gap.high))
        rows.append([topic, f"{first}", f"{second}", f"{corpus:+.2f}", f"{model.value:+.2f}", f"{gap.value:+.2f}"])
    found.figures["bias/topics"] = len(bars)
    if differences:
        overall = bootstrap(differences, templates)
        found.figures["bias/amplification"] = overall.to_dict()
        found.figures["bias/beyond"] = round(max(0.0, overall.low, -overall.high) / config.amplification, 4)
        found.pictures["bias"] = picture.bars("Amplification, log-odds", bars, config.amplification)
    pair = f"{'/'.join(config.first)} against {'/'.join(config.second)}"
    found.tables.append(
        Table(
            "Bias: what the model adds to its corpus",
            ["topic", "with first", "with second", "corpus", "model", "amplification"],
            rows,
            f"Log-odds of {pair} after {len(config.templates)} templates; sentences of the corpus that name both.",
        )
    )
    return found


def _log_odds(subject: Subject, prompt: str, config: Bias) -> float:
    """Return log p(any word of the first group) - log p(any of the second) as the next word."""
    loaded = subject.product
    start = loaded.text_ids(prompt)
    words = [f" {word}" for word in (*config.first, *config.second)]
    tails = [loaded.tokenizer.encode(word) for word in words]
    sums = [float(v[len(start) - 1 :].sum()) for v in logprobs_of(loaded, [[*start, *tail] for tail in tails])]
    return _logsum(sums[: len(config.first)]) - _logsum(sums[len(config.first) :])


def _logsum(values: list[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(v - most) for v in values))
