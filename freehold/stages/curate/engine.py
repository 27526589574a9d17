"""Where shards are worked on: in this process, in several, or on a Ray cluster. What comes out is the same."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from freehold.core import errors
from freehold.core.errors import ArtifactError, ConfigError, FreeholdError
from freehold.stages.curate.shards import Job, Shard, make_shard


def make_all(job: Job, shards: Sequence[Shard]) -> Iterator[int]:
    """Make the shards that are not there yet, yielding the number of each as it is finished."""
    missing = [shard for shard in shards if not (job.shards / f"{shard.number:05d}").exists()]
    if not missing:
        return
    if job.config.engine == "ray":
        yield from _on_ray(job, missing)
    elif job.config.workers > 1 and len(missing) > 1:
        yield from _in_processes(job, missing)
    else:
        for shard in missing:
            make_shard(job, shard)
            yield shard.number


def _in_processes(job: Job, shards: Sequence[Shard]) -> Iterator[int]:
    # A forked process would inherit the locks of threads that it does not have.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(job.config.workers, len(shards)), mp_context=context) as pool:
        try:
            running = {pool.submit(make_shard, job, shard): shard.number for shard in shards}
            for future in as_completed(running):
                future.result()
                yield running[future]
        except BrokenProcessPool as error:
            # The pool starts workers one by one as shards are submitted. One that starts while the pool ends the others
            # is not ended with them, and closing the pool would wait for it without end.
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise ArtifactError(
                "a worker was killed, perhaps by the system for lack of memory",
                where="curate.workers",
                found=f"{len(shards):,} shards for {job.config.workers} workers",
                todo="run the same command again to resume; if it was memory, with fewer workers or a smaller "
                "curate.shard_bytes",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _on_ray(job: Job, shards: Sequence[Shard]) -> Iterator[int]:
    """Make the shards on the Ray cluster of this process, of RAY_ADDRESS, or on one that is started here.

    Every node must see the run folder under the same path. A worker that dies takes nothing with it: a shard is renamed
    into place whole, and Ray gives what was not finished to another worker.
    """
    try:
        # Both must be said before Ray is imported.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise ConfigError(
            "this engine needs a package that is not installed",
            where="curate.engine",
            found=error,
            todo="pip install 'freehold[ray]' -c constraints.txt, or set curate.engine=local",
        ) from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        with contextlib.suppress(AttributeError):
            context.print_on_execution_start = False
        data = ray.data.from_items([{"place": place} for place in range(len(shards))], override_num_blocks=len(shards))
        todo = list(shards)

        def work(row: dict[str, Any]) -> dict[str, Any]:
            shard = todo[row["place"]]
            try:
                make_shard(job, shard)
            except FreeholdError as error:  # Ray would wrap it, and try again what cannot succeed
                return {"number": shard.number, "kind": type(error).__name__, "error": json.dumps(error.to_dict())}
            return {"number": shard.number, "kind": "", "error": ""}

        for row in data.map(work).iter_rows():
            if row["kind"]:
                raise getattr(errors, row["kind"])(**json.loads(row["error"]))
            yield int(row["number"])
    except ray.exceptions.RaySystemError as error:
        raise ArtifactError(
            "the Ray cluster gave up", where="curate.engine", found=error, todo="run the same command again to resume"
        ) from error
    finally:
        if ours:
            ray.shutdown()
