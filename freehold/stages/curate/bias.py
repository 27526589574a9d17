"""Bias of the corpus itself: which attributes stand near which groups of people, and a filter that acts on it.

For every mention of a group it is noted whether a word of an attribute stands within a window. Two numbers follow: the
pointwise mutual information of group and attribute within an axis (Church & Hanks 1990), and the log odds ratio of a
group against the others of its axis, with its standard error (Bordia & Bowman 2019 use the same ratio for words; the
axes and attributes are in the manner of the association tests of Caliskan, Bryson & Narayanan 2017). The word lists are
our own and short on purpose: they are a yardstick that is the same before and after, not a description of people.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from freehold.stages.curate.config import Bias
from freehold.stages.curate.rules import BIAS_WINDOW_WORDS, MAX_LOG_ODDS
from freehold.text.words import Lookup, Words, word_hashes

AXES: dict[str, dict[str, str]] = {
    "gender": {
        "women": "she her hers herself woman women girl girls mother mothers daughter daughters wife wives sister"
        " sisters lady ladies queen aunt grandmother female females",
        "men": "he him his himself man men boy boys father fathers son sons husband husbands brother brothers gentleman"
        " gentlemen king uncle grandfather male males",
    },
    "age": {
        "young": "young youth youths teenager teenagers adolescent adolescents child children",
        "old": "old elderly aged pensioner pensioners senior seniors",
    },
    "religion": {
        "christian": "christian christians christianity church catholic catholics protestant protestants",
        "muslim": "muslim muslims islam islamic mosque",
        "jewish": "jew jews jewish judaism synagogue",
        "hindu": "hindu hindus hinduism",
        "buddhist": "buddhist buddhists buddhism",
    },
    "origin": {
        "african": "african africans nigerian nigerians kenyan kenyans ethiopian ethiopians ghanaian ghanaians",
        "asian": "asian asians chinese japanese indian indians korean koreans vietnamese",
        "european": "european europeans english french german germans italian italians spanish polish",
        "american": "american americans mexican mexicans brazilian brazilians canadian canadians",
        "arab": "arab arabs arabic egyptian egyptians iraqi iraqis syrian syrians",
    },
}
ATTRIBUTES: dict[str, str] = {
    "career": "business office career salary professional manager company profession executive job work",
    "family": "home family parents marriage wedding household kitchen cousin relatives nursery",
    "science": "science physics chemistry mathematics engineer engineering technology experiment theory laboratory",
    "arts": "art poetry dance music song novel theatre painting drama literature",
    "power": "power leader command govern rule ruler authority strong strength master",
    "beauty": "beautiful beauty pretty handsome lovely charming fair graceful",
    "violence": "kill killed murder attack attacked violence war terror terrorist weapon fight blood crime criminal",
    "virtue": "honest honesty kind kindness good noble wise wisdom loyal friend peace gentle",
    "fault": "evil wicked lazy liar cruel dirty stupid foolish greedy thief cheat shame",
    "poverty": "poor poverty beggar hunger hungry slum debt servant slave slaves",
    "wealth": "rich wealth wealthy fortune luxury treasure gold estate",
}
GROUPS = tuple((axis, group) for axis, groups in AXES.items() for group in groups)
SHAPE = (len(GROUPS), 1 + len(ATTRIBUTES))
"""What is counted of a document: mentions of each group, and those with each attribute near."""


@lru_cache(maxsize=1)
def lexicon() -> tuple[Lookup, np.ndarray]:
    """Return the words of all groups and attributes, and int64 [words]: a group's number, or -1 - an attribute's."""
    words: list[str] = []
    what: list[int] = []
    for number, (axis, group) in enumerate(GROUPS):
        words += AXES[axis][group].split()
        what += [number] * (len(words) - len(what))
    for number, text in enumerate(ATTRIBUTES.values()):
        words += text.split()
        what += [-1 - number] * (len(words) - len(what))
    if len(set(words)) != len(words):
        raise ValueError("a word stands for two things")
    return Lookup(word_hashes(words)), np.array(what)


def count(words: Sequence[Words], window_words: int = BIAS_WINDOW_WORDS) -> np.ndarray:
    """Return int32 [documents, groups, 1 + attributes]: mentions of each group, and those with the attribute near."""
    counts = np.zeros((len(words), *SHAPE), np.int32)
    if not words:
        return counts
    flat = np.concatenate([one.hashes for one in words])
    ends = np.cumsum([len(one.hashes) for one in words])
    lookup, what = lexicon()
    positions, places = lookup.find(flat)
    kinds = what[places]
    document = np.searchsorted(ends, positions, "right")
    group = kinds >= 0
    np.add.at(counts, (document[group], kinds[group], 0), 1)
    # Documents are put so far apart that no window reaches from one into the next.
    spread = positions + document * (window_words + 1)
    for attribute in range(len(ATTRIBUTES)):
        where = spread[kinds == -1 - attribute]
        if len(where):
            mentions = spread[group]
            near = np.searchsorted(where, mentions - window_words) < np.searchsorted(
                where, mentions + window_words, "right"
            )
            np.add.at(counts, (document[group][near], kinds[group][near], 1 + attribute), 1)
    return counts


def log_odds(here: np.ndarray, of: np.ndarray, rest: np.ndarray, rest_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log odds ratio of `here` in `of` against `rest` in `rest_of`, and its standard error.

    Half a case is added to each cell (Haldane 1956, Anscombe 1956), so that an empty one has an answer too.
    """
    cells = [here + 0.5, of - here + 0.5, rest + 0.5, rest_of - rest + 0.5]
    ratio = np.log(cells[0]) - np.log(cells[1]) - np.log(cells[2]) + np.log(cells[3])
    return ratio, np.sqrt(sum(1 / cell for cell in cells))


def _rest(counts: np.ndarray) -> np.ndarray:
    """Return for each group the sum over the other groups of its axis; same shape [..., groups, 1 + attributes]."""
    rest = np.empty_like(counts)
    for axis in AXES:
        mine = [i for i, (of, _) in enumerate(GROUPS) if of == axis]
        rest[..., mine, :] = counts[..., mine, :].sum(axis=-2, keepdims=True) - counts[..., mine, :]
    return rest


def associations(counts: np.ndarray, min_pairs: int) -> list[dict[str, Any]]:
    """Return what is said of each group against the others of its axis, surest first.

    `counts` is [groups, 1 + attributes]; attributes seen fewer than `min_pairs` times near the axis are skipped.
    """
    counts = counts.astype(np.int64)
    rest = _rest(counts)
    rows = []
    for number, (axis, group) in enumerate(GROUPS):
        mentions, others = counts[number, 0], rest[number, 0]
        for place, attribute in enumerate(ATTRIBUTES, 1):
            near, far = counts[number, place], rest[number, place]
            if near + far >= min_pairs and mentions and others:
                ratio, error = log_odds(near, mentions, far, others)
                expected = (near + far) / (mentions + others)
                rows.append(
                    {
                        "axis": axis,
                        "group": group,
                        "attribute": attribute,
                        "mentions": int(mentions),
                        "near": int(near),
                        "pmi": round(float(np.log2(near / mentions / expected)), 4) if near else None,
                        "log_odds": round(float(ratio), 4),
                        "z": round(float(ratio / error), 2),
                    }
                )
    return sorted(rows, key=lambda row: (-abs(row["z"]), row["axis"], row["group"], row["attribute"]))


def choose(counts: np.ndarray, order: Sequence[str], config: Bias) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """Return the documents to drop, each with what it pushes, and what became of each association over the limit.

    `counts` is [documents, groups, 1 + attributes], `order` breaks ties (the ids). The strongest association first: the
    documents that hold more than the rest of the axis would explain go, most excess first, until the ratio is
    within the limit or `max_dropped` of the documents are gone.
    """
    kept = np.ones(len(counts), bool)
    budget = int(config.max_dropped * len(counts))
    drops: dict[int, str] = {}
    report = []
    by_id = np.argsort(np.array(order))
    found = associations(counts.sum(axis=0), config.min_pairs)
    # What could be chance (|z| below 2) is let be.
    over_limit = [row for row in found if abs(row["log_odds"]) > MAX_LOG_ODDS and abs(row["z"]) >= 2]
    for row in sorted(over_limit, key=lambda row: -abs(row["log_odds"])):
        number = GROUPS.index((row["axis"], row["group"]))
        place = 1 + list(ATTRIBUTES).index(row["attribute"])
        mine = counts[:, number, [place, 0]].astype(np.int64)
        axis = [i for i, (of, _) in enumerate(GROUPS) if of == row["axis"]]
        rest = sum(counts[:, i, [place, 0]].astype(np.int64) for i in axis) - mine
        # Too much near this group, or too much near the others: one is the other turned round.
        over, under = (mine, rest) if row["log_odds"] > 0 else (rest, mine)
        totals = over[kept].sum(axis=0), under[kept].sum(axis=0)
        explained = over[:, 1] * (totals[1][0] + 0.5) / (totals[1][1] + 1)
        excess = np.where(kept, over[:, 0] - explained, -np.inf)
        ranked = by_id[np.argsort(-excess[by_id], kind="stable")]
        ranked = ranked[excess[ranked] > 0][: max(0, budget - len(drops))]
        left = [total - np.cumsum(part[ranked], axis=0) for total, part in zip(totals, (over, under), strict=True)]
        columns = [np.concatenate([[t[i]], part[:, i]]) for t, part in zip(totals, left, strict=True) for i in (0, 1)]
        ratios = log_odds(columns[0], columns[1], columns[2], columns[3])[0]
        within = np.flatnonzero(ratios <= MAX_LOG_ODDS)
        needed = int(within[0]) if len(within) else len(ratios) - 1
        what = f"{row['group']} ({row['axis']}) and {row['attribute']}: log odds {row['log_odds']:+.2f}"
        for index in ranked[:needed].tolist():
            drops[index] = what
            kept[index] = False
        report.append({**row, "dropped": needed, "log_odds_then": round(float(ratios[needed]), 4)})
    return drops, report


def table(slices: Iterable[tuple[str, np.ndarray]], min_pairs: int) -> dict[str, Any]:
    """Return the associations of each slice (a source, or all) as the report shows them."""
    return {name: associations(counts, min_pairs) for name, counts in slices}
