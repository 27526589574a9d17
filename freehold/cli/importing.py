"""`freehold import FOLDER`: a published model becomes a run folder with one checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from freehold.run.layout import IMPORT


def import_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, its name and its rights."""
    parser.add_argument("path", help="folder with config.json, safetensors and, for text, tokenizer.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings; see `freehold schema import`")
    parser.add_argument("--name", required=True, help="name of the run folder that the model becomes a root of")
    parser.add_argument("--licence", required=True, help="SPDX expression of the weights, e.g. Apache-2.0")
    parser.add_argument(
        "--evidence", required=True, help="what shows it: `FILE: words quoted from that file`, or a statement"
    )
    parser.add_argument("--clean", action="store_true", help="import again in place of what is there")
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")


def import_(args: argparse.Namespace) -> int:
    """Import a folder and say how to use it."""
    from freehold.core.artifact import read_manifest
    from freehold.core.config import fill, override
    from freehold.stages.importing.config import ImportConfig

    file, _, quote = args.evidence.partition(": ")
    quoted = bool(quote) and "/" not in file and any(Path(args.path).glob(file))
    evidence = {"file": file, "quote": quote} if quoted else {"rule": args.evidence}
    data = {"path": args.path, "name": args.name, "licence": args.licence, "licence_evidence": evidence}
    config = fill(ImportConfig, override(data, args.overrides), IMPORT)
    from freehold.stages.importing.run import import_model

    folder = import_model(config, clean=args.clean, quiet=args.quiet or args.json)
    if args.json:
        print(json.dumps({"folder": str(folder), "counts": read_manifest(folder)["counts"]}))
    elif not args.quiet:
        print(f"try `freehold chat {folder.parent}`, or begin a recipe with `base: {folder / 'recipe.yaml'}`")
    return 0
