"""The walk's release: gather what the run made, sign it, write the root's fingerprint next to it."""

from __future__ import annotations

from typing import Any

from freehold.core.artifact import Workspace, write_atomic
from freehold.run import card, release
from freehold.run.anchoring import open_keys
from freehold.run.layout import RunFolder
from freehold.run.releasing.config import ReleaseConfig


def run(config: ReleaseConfig, work: Workspace) -> dict[str, Any]:
    """Write `pack/` and `root.txt`; return what the manifest keeps.

    Raises LicenceError when a row may not be redistributed, ProofError while a take-down is pending.
    """
    run_folder = RunFolder(work.folder.parent)
    keys = open_keys(config.keys, run_folder)
    if keys.label:
        work.log.warn(f"no keys were given: signing with keys {keys.label}")
    contents = release.gather_contents(
        run_folder.root, card.read_statements(config.statements), config.name, config.detached
    )
    digest = release.build(contents, keys, run_folder.release)
    write_atomic(run_folder.release_root, keys.root_fingerprint + "\n")
    work.log.say(f"signed as {contents.name}: {run_folder.release}")
    return {"name": contents.name, "files_sha256": digest, "root": keys.root_fingerprint, "keys": keys.label}
