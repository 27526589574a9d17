"""What alignment costs: held-out bits per byte of the pre-training text, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from freehold.checkpoint import dcp
from freehold.core.artifact import Workspace, write_json
from freehold.data.shards import ShardSet
from freehold.model.afmoe import Afmoe
from freehold.stages.align.config import AlignConfig
from freehold.tokenizer.bpe import END_OF_TEXT
from freehold.trainer.errors import TrainingError
from freehold.trainer.job import DTYPES
from freehold.trainer.validate import bits_per_byte, held_out


def open_for_use(folder: Path, dtype: str) -> Afmoe:
    """Return the model of a checkpoint, ready to compute in `dtype`, without gradients."""
    config, weights = dcp.read_model(folder, verify=False)
    model = Afmoe(config)
    model.load_state_dict(weights)
    return model.to_compute(DTYPES[dtype]).requires_grad_(False)


def measure(folder: Path, begins_with: Sequence[int], config: AlignConfig, work: Workspace) -> float | None:
    """Return the held-out bits per byte of a checkpoint; None when there is no held-out text."""
    begin = next(iter(begins_with), END_OF_TEXT)
    shards = ShardSet.load(work.input("tokenize") / "tokens")
    sources = {
        name: held_out(
            source,
            shards.document_bytes("validation", name),
            config.batch.context_tokens,
            config.trainer.validation_tokens,
            begin,
        )
        for name, source in shards.sources("validation").items()
        if source.total_tokens
    }
    return bits_per_byte(open_for_use(folder, config.trainer.dtype), sources)["val/bpb"] if sources else None


def judge(before: float, after: float, most: float, work: Workspace) -> dict[str, float]:
    """Write and return what was forgotten; TrainingError when it is more than `most`."""
    rise = after / before - 1
    found = {"before": round(before, 6), "after": round(after, 6), "rise": round(rise, 6)}
    write_json(work.folder / "forgetting.json", found)
    work.log.say(f"  held-out bits per byte: {before:.3f} before, {after:.3f} after ({100 * rise:+.1f} %)")
    if rise > most:
        raise TrainingError(
            "alignment forgot more of the held-out text than allowed",
            where="align.max_forgetting",
            found=f"bits per byte rose by {100 * rise:.1f} %, from {before:.3f} to {after:.3f}",
            expected=f"at most {100 * most:.1f} %",
            todo="raise align.replay, lower align.optim.lr or the steps, and run align again with --clean",
        )
    return found
