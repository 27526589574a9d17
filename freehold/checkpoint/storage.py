"""What PyTorch DCP writes to and reads from: its data files, with metadata as JSON and nothing unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader, WriteResult
from torch.futures import Future

from freehold.checkpoint.metadata import Chunk, DataFiles, TensorEntry, write_metadata


class Writer(dcp.FileSystemWriter):
    """DCP's writer without the random id and the path in its metadata: the same state gives the same bytes."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata as JSON: a pickle would run code of whoever made the folder."""
        stored = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for each in results for r in each}
        write_metadata(
            Path(self.path),
            {
                key: TensorEntry(
                    str(entry.properties.dtype).removeprefix("torch."),
                    tuple(entry.size),
                    tuple(_chunk(chunk, stored[key, tuple(chunk.offsets)]) for chunk in entry.chunks),
                )
                for key, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            },
        )


def _chunk(chunk: ChunkStorageMetadata, stored: Any) -> Chunk:
    return Chunk(tuple(chunk.offsets), tuple(chunk.sizes), stored.relative_path, stored.offset, stored.length)


class Reader(StorageReader):
    """Gives DCP's planner the tensors of checked metadata; nothing is unpickled but plain tensor heads."""

    def __init__(self, entries: Mapping[str, TensorEntry], files: DataFiles) -> None:
        self.entries, self.files = entries, files
        self.chunks = {(key, chunk.offsets): chunk for key, entry in entries.items() for chunk in entry.chunks}

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return what the planner asks for: dtype, shape and chunks of each tensor."""
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=getattr(torch, entry.dtype)),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks],
                )
                for key, entry in self.entries.items()
            }
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every part that the plan asks for into the tensor that waits for it."""
        for item in plan.items:
            index: MetadataIndex = item.storage_index
            chunk, dtype = self.chunks[index.fqn, tuple(index.offset or ())], self.entries[index.fqn].dtype
            first, count = (item.storage_offsets[0], item.lengths[0]) if chunk.sizes else (0, None)
            part = torch.from_numpy(self.files.read(chunk, dtype, first, count))
            part = part.view(torch.bfloat16) if dtype == "bfloat16" else part
            for axis in range(1, part.ndim):
                part = part.narrow(axis, item.storage_offsets[axis], item.lengths[axis])
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def set_up_storage_reader(self, *_: Any, **__: Any) -> None:
        """Do nothing: the files open when they are read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: one reader reads one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Accept the folder the reader was made for."""
        return True
