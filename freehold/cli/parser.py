"""What every verb needs: a parser whose errors are ours, the arguments of a recipe, and the run folder asked for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from freehold.core.errors import ArtifactError, ConfigError

EXAMPLES = {"recipe": "recipes/laptop.yaml", "path": "runs/laptop", "document": "sotu"}
"""What each positional may be."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one message, as JSON too."""

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError instead of leaving."""
        needed = message.partition("the following arguments are required: ")[2]
        if needed:
            names = [name for name in needed.split(", ") if name != "key=value"]
            verb_name = self.prog.rpartition(" ")[2]
            example = EXAMPLES.get(names[0], "")
            raise ConfigError(
                f"`{self.prog}` needs to know which {' and which '.join(names)} to work on",
                where=self.prog,
                expected=f"`freehold {verb_name} {' '.join(name.upper() for name in names)}`"
                + (f", e.g. `freehold {verb_name} {example}`" if example else ""),
                todo=f"see `{self.prog} --help`",
            )
        raise ConfigError(message, where=self.prog, todo=f"see `{self.prog} --help`")


def verb(verbs: Any, name: str, text: str, do: Any, **defaults: Any) -> argparse.ArgumentParser:
    """Add a verb that calls `do`; return its parser."""
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(do=do, **defaults)
    return parser


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a recipe, its overrides and the flags of a walk."""
    parser.add_argument("recipe", type=Path, help="YAML recipe, e.g. recipes/laptop.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. optim.lr=3e-4")
    walk_flags(parser)


def walk_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a walk or of one of its stages."""
    parser.add_argument("--dry-run", action="store_true", help="show the filled recipe and what it implies; do nothing")
    parser.add_argument(
        "--clean",
        action="store_true",
        help="make again what is damaged or was made by another recipe or code; a single stage: always",
    )
    parser.add_argument("--fork", default="", metavar="NAME", help="keep this run; make the changed one as runs/NAME")
    parser.add_argument(
        "--strict-code", action="store_true", help="refuse stages that other code made, instead of warning"
    )
    parser.add_argument(
        "--allow-secret",
        action="append",
        default=[],
        metavar="VARIABLE@HOST",
        help="let a recipe send this variable of the environment to this host; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)


def run_folder(given: Path | None) -> Path:
    """Return the run folder asked for, or the newest below runs/; ArtifactError when there is none."""
    if given is not None:
        if not given.is_dir():
            raise ArtifactError("no such run folder", where=given, todo="run folders are below runs/")
        return given
    runs = sorted((p for p in Path("runs").glob("*") if p.is_dir()), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise ArtifactError("there is no run yet", where="runs/", todo="freehold run recipes/laptop.yaml")
    return runs[-1]
