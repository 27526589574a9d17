"""Let a model do task items: greedy answers, and the likeliest of several choices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from freehold.core.errors import DataError
from freehold.core.log import Log
from freehold.infer.sampler import Sampling
from freehold.stages.evaluate.config import THINKING, EvaluateConfig
from freehold.stages.evaluate.harness import choice_ids
from freehold.stages.evaluate.items import Item, macro, normalise, score
from freehold.stages.evaluate.likelihood import batches
from freehold.stages.evaluate.likelihood import score as log_probabilities
from freehold.tokenizer.chat import render_ids
from freehold.tokenizer.output import TextStream

if TYPE_CHECKING:
    from freehold.api import Loaded


def do_tasks(
    loaded: Loaded, tasks: dict[str, list[Item]], config: EvaluateConfig, log: Log, name: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the scores per task, per part of a task and overall, and one row an item: asked, expected, answered."""
    by_task: dict[str, Any] = {}
    everything: list[dict[str, Any]] = []
    for task, items in tasks.items():
        what = f"{name}: {task}"
        if items[0].kind == "generate":
            rows = _generate(loaded, items, config, log, what, thinks=name == THINKING)
        else:
            rows = _choose(loaded, items, config, log, what)
        done = list(zip(items, (row["correct"] for row in rows), strict=True))
        parts = {part: _part([d for d in done if d[0].task == part]) for part in sorted({i.task for i in items})}
        refused = sum(refuses(row["answer"]) for row in rows)
        by_task[task] = {"kind": items[0].kind, **_total(done), **macro(parts), "refused": refused, "parts": parts}
        if "tokens" in rows[0]:
            by_task[task]["answer_tokens"] = round(sum(row["tokens"] for row in rows) / len(rows), 3)
        everything += [{"task": task, **row} for row in rows]
    correct = [row["correct"] for row in everything]
    overall = _total(list(zip([item for items in tasks.values() for item in items], correct, strict=True)))
    return {"tasks": by_task, "overall": overall}, everything


def refuses(answer: str) -> bool:
    """Return whether an answer says that the model does not know."""
    return normalise(answer).startswith("i do not know")


def _part(done: list[tuple[Item, bool]]) -> dict[str, Any]:
    """Return the score of a part; of a generate part also the share of its most frequent answer."""
    record = _total(done)
    if done[0][0].kind == "generate":
        most = Counter(normalise(str(item.answer)) for item, _ in done).most_common(1)[0][1]
        record["majority"] = round(most / len(done), 6)
    return record


def _total(done: list[tuple[Item, bool]]) -> dict[str, Any]:
    return score([correct for _, correct in done], [item.chance for item, _ in done])


def _prompt(loaded: Loaded, item: Item, room_tokens: int) -> list[int]:
    """Return the rendered prompt's ids; DataError when it leaves no room for `room_tokens` more."""
    ids, _ = render_ids(loaded.tokenizer, item.prompt, generation=True)
    limit = loaded.config.max_position_embeddings
    if len(ids) + room_tokens > limit:
        raise DataError(
            "a task item does not fit the model's context",
            where=item.id,
            found=f"{len(ids)} prompt tokens and {room_tokens} more",
            expected=f"at most {limit}",
        )
    return ids


def said(loaded: Loaded, ids: Sequence[int]) -> str:
    """Return what an answer says to its reader: its content, without reasoning."""
    text, parser = TextStream(loaded.tokenizer), loaded.answers.parser(())
    pieces = [piece for token in ids for piece in parser.feed(text.feed(token))]
    pieces += parser.feed(text.finish()) + parser.finish()
    return "".join(piece.text for piece in pieces if piece.kind == "content")


def _generate(
    loaded: Loaded, items: list[Item], config: EvaluateConfig, log: Log, what: str, thinks: bool
) -> list[dict[str, Any]]:
    room = config.max_answer_tokens + (config.max_reasoning_tokens if thinks else 0)
    sampling = Sampling(temperature=0.0, max_tokens=room, stop_ids=loaded.stop_ids)
    prompts = [_prompt(loaded, item, room) for item in items]
    texts, spent = [""] * len(items), [0] * len(items)
    for batch in log.track(batches([len(p) for p in prompts], config.batch_items), what, unit="batches"):
        for i, generation in zip(batch, loaded.engine.generate([prompts[i] for i in batch], sampling), strict=True):
            texts[i], spent[i] = said(loaded, generation.ids), len(generation.ids)
    right = [normalise(text) == normalise(str(item.answer)) for item, text in zip(items, texts, strict=True)]
    rows = [_row(item, item.answer, text, ok) for item, text, ok in zip(items, texts, right, strict=True)]
    return [{**row, "tokens": tokens} for row, tokens in zip(rows, spent, strict=True)]


def _choose(loaded: Loaded, items: list[Item], config: EvaluateConfig, log: Log, what: str) -> list[dict[str, Any]]:
    """Take the choice whose text has the highest log-probability per UTF-8 byte after the rendered prompt."""
    sequences, lengths = [], []
    for item in items:
        _, encoded = choice_ids(loaded.tokenizer, item)
        prompt = _prompt(loaded, item, max(map(len, encoded)))
        sequences += [prompt + ids for ids in encoded]
        lengths += [len(ids) for ids in encoded]
    values = log_probabilities(loaded.engine, sequences, batch_items=config.batch_items, log=log, what=what)
    totals = iter([math.fsum(v[-n:]) for v, n in zip(values, lengths, strict=True)])
    rows = []
    for item in items:
        choices = item.choices or []
        per_byte = [next(totals) / len(choice.encode()) for choice in choices]
        best = per_byte.index(max(per_byte))
        rows.append(_row(item, choices[int(item.answer)], choices[best], best == item.answer))
    return rows


def _row(item: Item, expected: object, answer: str, correct: bool) -> dict[str, Any]:
    asked = {"id": item.id, "part": item.task, "question": item.prompt[-1].get("content")}
    return {**asked, "expected": expected, "answer": answer, "correct": correct}
