"""`freehold export PATH` on a run, a checkpoint or a Hugging Face folder: GGUF files without a recipe or torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from freehold.core.errors import ConfigError, ExportError
from freehold.run.layout import CURATE, EXPORT, GATHER, IMPORTED, NAMED, REPHRASE, RunFolder

EXAMPLES = """on a recipe this is the stage of the walk: Hugging Face folder and GGUF files, proven.
on a model it writes GGUF files:
  freehold export runs/laptop --types Q4_K_M,Q8_0 --output out/       the last checkpoint of a run
  freehold export runs/laptop/pretrain/base --output out/            one checkpoint
  freehold export Trinity-Nano/ --types Q4_K_M,Q6_K --output out/    any Hugging Face folder of an AFMoE model
A stopped export resumes when the command is repeated. More: docs/stages/export.md"""


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of an export of a folder."""
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    folder = parser.add_argument_group("export of a run, a checkpoint or a model folder")
    folder.add_argument("--types", help="GGUF file types, comma-separated (default Q4_K_M,Q8_0)")
    folder.add_argument("--output", type=Path, metavar="FOLDER", help="folder for the files")
    folder.add_argument("--name", help="first part of the files' names (default: the folder's name)")
    folder.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix, see `freehold calibrate`")
    folder.add_argument("--licence", default="", help="SPDX expression of the weights (default: the model's LICENSE)")
    folder.add_argument("--workers", type=int, default=0, help="threads that quantize (default: one a core)")
    folder.add_argument(
        "--use", action="append", default=[], choices=["train", "distill", "redistribute", "commercial"],
        help="what a run's model must be free for, with the uses of its policy",
    )  # fmt: skip


def is_folder_export(args: argparse.Namespace) -> bool:
    """Whether the positional of `export` is a folder, not a recipe; ConfigError for options that do not belong."""
    if args.stage != EXPORT:
        return False
    if args.recipe is not None and args.recipe.is_dir():
        return True
    if args.types or args.output or args.imatrix:
        raise ConfigError(
            "--types, --output and --imatrix belong to the export of a folder", where=f"freehold export {args.recipe}",
            expected="a run, a checkpoint or a model folder; in a recipe the keys are export.types, ...",
        )  # fmt: skip
    return False


def export_path(args: argparse.Namespace) -> int:
    """Export a run, a checkpoint or a model folder."""
    from freehold.stages.export.folder import Request, describe, export_folder, parse_types
    from freehold.stages.export.source import open_source

    if args.overrides:
        raise ConfigError("an export of a folder takes no settings", found=args.overrides[0], todo="use the options")
    if args.output is None and not args.dry_run:
        raise ConfigError("a folder for the files is missing", where="--output", expected="--output FOLDER")
    folder = model_folder(args.recipe)
    check_rights(folder, tuple(args.use))
    request = Request(
        parse_types(args.types or "Q4_K_M,Q8_0"), args.output or Path(), args.name or name_of(folder), args.imatrix,
        args.workers, args.licence,
    )  # fmt: skip
    if args.dry_run:
        source = open_source(folder)
        answer = describe(source, request)
        source.weights.close()
    else:
        quiet = args.quiet or args.json
        answer = export_folder(folder, request, lambda line: None if quiet else print(line, file=sys.stderr))
    print(json.dumps(answer) if args.json else _text(answer, dry=args.dry_run))
    return 0


def model_folder(path: Path) -> Path:
    """Return the model that a path means: itself, or the last named checkpoint of a run."""
    if (path / "config.json").is_file():
        return path
    for name in (*reversed(NAMED), IMPORTED):
        if (path / name / "config.json").is_file():
            return path / name
    raise ExportError(
        "neither a run nor a model folder", where=path, found="no config.json and no finished checkpoint",
        expected="a recipe, a run folder, a checkpoint, or a Hugging Face folder",
    )  # fmt: skip


def name_of(folder: Path) -> str:
    """Return a name for the files: that of the run for its checkpoint, else the folder's."""
    folder = folder.resolve()
    run = run_of(folder)
    return (run.name if run else folder.name).replace(" ", "-")


def run_of(folder: Path) -> Path | None:
    """Return the run that a checkpoint is in; None for a folder that stands alone."""
    parents = folder.resolve().parents
    return next((run for run in parents[1:3] if RunFolder(run).any_finished()), None)


def check_rights(folder: Path, uses: tuple[str, ...]) -> None:
    """Raise LicenceError when the policy of a run does not let this checkpoint out, as its export stage would."""
    run = run_of(folder)
    if run is None or not RunFolder(run).finished(CURATE):
        return
    from freehold.core.artifact import read_manifest
    from freehold.core.config import fill
    from freehold.ledger.policy import Policy
    from freehold.run import policy_check

    def policy_of(stage: str) -> Policy:
        config: dict[str, Any] = read_manifest(run / stage).get("config", {})
        return fill(Policy, config.get("policy", {}), f"{stage}.policy")

    rewritten = policy_of(REPHRASE) if RunFolder(run).finished(REPHRASE) else None
    wanted = {"checkpoint": folder.resolve().relative_to(run).as_posix(), "uses": uses}
    policy_check.before_stage(
        run, EXPORT, policy_of(GATHER), wanted, rewritten, policy_check.recorded_reservations(RunFolder(run))
    )


def _text(answer: dict[str, Any], *, dry: bool) -> str:
    if not dry:
        lines = [*answer["files"].values()]
        speed = answer["bytes_read"] / 1e6 / max(answer["seconds"], 1e-9)
        read = f"{answer['bytes_read'] / 1e9:,.2f} GB read in {answer['seconds']:,.0f} s, {speed:,.0f} MB/s"
        return "\n".join([*lines, read])
    lines = [f"{answer['model']}: {answer['bytes_read'] / 1e9:,.2f} GB to read"]
    for file in answer["files"].values():
        changes = "".join(f"; {count} tensors {change}" for change, count in file["fallbacks"].items())
        lines.append(f"{file['file']}: {file['bytes'] / 1e9:,.3f} GB{changes}")
    space = f"{answer['bytes_written'] / 1e9:,.2f} GB to write, {answer['bytes_free'] / 1e9:,.1f} GB free"
    return "\n".join([*lines, space])
