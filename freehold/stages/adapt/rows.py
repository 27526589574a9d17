"""What adaptation reads: new text or conversations, old text among them, and held-out rows of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from freehold.core.artifact import Workspace
from freehold.core.document import Conversation, read_rows
from freehold.core.errors import ConfigError, DataError
from freehold.data.loader import WHOLE, ConversationOrder, Order, PhaseRows, Piece, Source, TextOrder
from freehold.data.packing import Batch, Example, conversation_batch, pack
from freehold.data.shards import ShardSet
from freehold.stages.adapt.config import AdaptConfig
from freehold.stages.adapt.source import Base
from freehold.tokenizer.bpe import END_OF_TEXT, Tokenizer
from freehold.tokenizer.chat import render_ids
from freehold.trainer.validate import HeldOut, held_out


@dataclass(frozen=True)
class ReplayBatch(Batch):
    """A batch that says which rows are old text."""

    old: np.ndarray
    """bool [B, T]: True in rows of old text"""


class WithReplay:
    """The rows of new data and of old text in one step, the new ones first."""

    def __init__(self, new: Order, old: Order) -> None:
        self.new, self.old = new, old
        self.sequences = new.sequences + old.sequences

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        """Return the rows of one optimizer step, or a part of them."""
        # Complete steps of both, cut afterwards: a part of a step is the same rows for any number of micro-batches.
        both = [self.new.batch(step), self.old.batch(step)]
        fields = {f.name: np.concatenate([getattr(b, f.name) for b in both])[part] for f in dataclasses.fields(Batch)}
        old = np.concatenate([np.full(b.input_ids.shape, number == 1) for number, b in enumerate(both)])
        return ReplayBatch(**fields, old=old[part])

    def documents(self, step: int) -> list[Piece]:
        """Return the documents of one optimizer step, in row order."""
        return [*self.new.documents(step), *self.old.documents(step)]


def build_order(config: AdaptConfig, work: Workspace, tokenizer: Tokenizer, base: Base, old: ShardSet | None) -> Order:
    """Return the rows of every step; DataError when there is nothing to learn from."""
    replayed = config.replayed_rows if old is not None else 0
    if config.data == "conversations":
        new: Order = ConversationOrder(
            examples(work, tokenizer, "train"),
            context_tokens=config.batch.context_tokens,
            sequences=config.batch.sequences - replayed,
            steps=sum(phase.steps for phase in config.phases.values()),
            seed=work.seed,
            pad=tokenizer.pad,
        )
    else:
        shards = ShardSet.load(work.input("tokenize") / "tokens", verify=True, tokenizer_sha256=tokenizer.sha256)
        new = _text(config, work, base, shards.sources("train"), config.batch.sequences - replayed, None)
    if old is None or not replayed:
        return new
    return WithReplay(
        new, _text(config, work, base, old_sources(config, old, "train"), replayed, config.replay.mixture)
    )


def _text(
    config: AdaptConfig,
    work: Workspace,
    base: Base,
    sources: Mapping[str, Source],
    sequences: int,
    mixture: dict[str, float] | None,
) -> TextOrder:
    return TextOrder(
        sources,
        [PhaseRows(n, p.steps, p.mixture if mixture is None else mixture) for n, p in config.phases.items()],
        context_tokens=config.batch.context_tokens,
        sequences=sequences,
        seed=work.seed,
        separator=END_OF_TEXT,
        begin=base.begin,
    )


def examples(work: Workspace, tokenizer: Tokenizer, split: str) -> list[Example]:
    """Return the conversations of a split as ids with loss masks; DataError when there are none to train on."""
    found = []
    for path in sorted((work.input("curate") / "conversations").glob("*.parquet")):
        for row in read_rows(path, Conversation):
            if row.split == split and not any("rejected" in m or "label" in m for m in row.messages):
                ids, mask = render_ids(tokenizer, row.messages, tools=row.messages[0].get("tools"))
                found.append(Example(row.id, row.source, ids, mask))
    if split == "train" and not found:
        raise DataError(
            "there are no conversations to learn from",
            where=work.input("curate") / "conversations",
            todo="add a source of conversations to gather.sources, or set adapt.data: text",
        )
    return found


def open_replay(config: AdaptConfig, base: Base, tokenizer: Tokenizer, work: Workspace) -> ShardSet | None:
    """Return the shards of old text; None where none is wanted or known.

    ConfigError when the recipe names a folder that is none. A base without its own text learns without replay, and the
    report says so.
    """
    folder = config.replay.source or base.own_text
    if folder is None or not (folder / "index.json").exists():
        if config.replay.source is not None:
            raise ConfigError(
                "no text to replay",
                where="adapt.replay.source",
                found=folder,
                expected="a folder of tokens, e.g. runs/laptop/tokenize/tokens",
            )
        if config.replayed_rows:
            work.log.warn(
                "the base brings no text of its own: nothing is replayed, and forgetting is not measured; "
                "name a stand-in with adapt.replay.source"
            )
        return None
    shards = ShardSet.load(folder, tokenizer_sha256=tokenizer.sha256)
    known = old_sources(config, shards, "train")
    unknown = sorted(config.replay.mixture.keys() - known.keys())
    if unknown:
        raise ConfigError(
            "replay names a source that is not there, or that was taken down",
            where=f"adapt.replay.mixture.{unknown[0]}",
            found=unknown[0],
            expected=", ".join(known),
        )
    return shards


def old_sources(config: AdaptConfig, shards: ShardSet, split: str) -> dict[str, Source]:
    """Return the sources of old text without what was taken down: sources by name, documents by id."""
    gone = set(config.replay.exclude)
    return {name: source for name, source in shards.sources(split, without=gone).items() if name not in gone}


def new_held_out(config: AdaptConfig, work: Workspace, tokenizer: Tokenizer, base: Base) -> dict[str, HeldOut]:
    """Return held-out rows of the new data by source."""
    if config.data == "text":
        shards = ShardSet.load(work.input("tokenize") / "tokens")
        return text_held_out(config, shards, shards.sources("validation"), base)
    rows = [e for e in examples(work, tokenizer, "validation") if len(e.ids) - 1 <= config.batch.context_tokens]
    return {"conversations": _packed(_some(rows, config.drift.tokens), config, tokenizer)} if rows else {}


def _some(rows: Sequence[Example], tokens: int) -> list[Example]:
    ends = np.cumsum([len(row.ids) for row in rows])
    return list(rows[: max(1, int(np.searchsorted(ends, tokens, side="right")))])


def _packed(rows: Sequence[Example], config: AdaptConfig, tokenizer: Tokenizer) -> HeldOut:
    """Return conversations as held-out rows; what is paid for is what the assistant says."""
    full = pack([len(row.ids) - 1 for row in rows], config.batch.context_tokens)
    batch = conversation_batch([[rows[i] for i in row] for row in full], config.batch.context_tokens, tokenizer.pad)
    said = [[i for i, keep in zip(r.ids, r.loss_mask, strict=True) if keep] for r in rows]
    return HeldOut(batch, max(1, sum(len(tokenizer.decode(ids).encode()) for ids in said)))


def text_held_out(
    config: AdaptConfig, shards: ShardSet, sources: Mapping[str, Source], base: Base
) -> dict[str, HeldOut]:
    """Return held-out rows of each source of text."""
    return {
        name: held_out(
            source,
            shards.document_bytes("validation", name),
            config.batch.context_tokens,
            config.drift.tokens,
            base.begin,
        )
        for name, source in sources.items()
        if source.total_tokens
    }


def batches(rows: Mapping[str, HeldOut]) -> Iterator[Batch]:
    """Yield the rows of each source."""
    for held in rows.values():
        yield held.batch
