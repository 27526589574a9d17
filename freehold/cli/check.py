"""`freehold align --check FILE`: count a file of conversations before anything is trained on it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from freehold.core.errors import ConfigError

if TYPE_CHECKING:
    from freehold.tokenizer.bpe import Tokenizer


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file to check, which stands in place of the recipe."""
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="in place of a recipe: count a file of conversations or pairs"
    )
    parser.add_argument("--format", default="auto", help="format of that file's rows (default: by their keys)")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="count its lengths in tokens")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N of its conversations, coloured by what is learned"
    )
    recipe = next(action for action in parser._actions if action.dest == "recipe")
    recipe.nargs = "?"


def check(args: argparse.Namespace) -> int:
    """Count a file of conversations; exit code 1 when a row is refused."""
    from freehold.conversations.formats import FORMATS
    from freehold.conversations.survey import survey
    from freehold.core.config import unknown_key

    if args.format not in ("auto", *FORMATS):
        raise unknown_key("--format", args.format, ["auto", *FORMATS])
    tokenizer = None
    if args.tokenizer:
        from freehold.tokenizer.bpe import Tokenizer

        tokenizer = Tokenizer.load(args.tokenizer)
    if args.show:
        return _show(args, tokenizer)
    found = survey(args.check, args.format, tokenizer)
    print(json.dumps(found.to_dict()) if args.json else found.text())
    return 0 if found.passed else 1


def _show(args: argparse.Namespace, tokenizer: Tokenizer | None) -> int:
    from freehold.conversations.show import shown

    if tokenizer is None:
        raise ConfigError(
            "tokens are shown with a tokenizer", where="--show", expected="--tokenizer runs/laptop/tokenize/tokenizer"
        )
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for text in shown(args.check, args.format, tokenizer, args.show, colour=colour):
        print(text)
    return 0
