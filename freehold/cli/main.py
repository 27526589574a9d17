"""What runs a command and says why it failed: text on stderr, and with --json one object on stdout."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence

from freehold.cli import look, machine, make, prove, read, rollouts
from freehold.cli.parser import Parser
from freehold.core import environment
from freehold.core.errors import FreeholdError
from freehold.core.log import printable
from freehold.core.version import VERSION

EXAMPLES = """examples:
  freehold run recipes/laptop.yaml                    the whole walk, redoing only what is missing
  freehold run recipes/laptop.yaml --dry-run          what it would do
  freehold pretrain recipes/laptop.yaml optim.lr=3e-4 --fork lr3e-4
  freehold chat runs/laptop                           talk to the model
  freehold serve runs/laptop --port 8000              OpenAI-compatible server
  freehold plan large                                 what training it takes, before anything starts
  freehold trace sotu                                 where did this source go?
  freehold takedown sotu runs/laptop                  what learned from it, and the cheapest way back
  freehold why runs/laptop 12                         what trained a step of align
  freehold lineage runs/laptop                        from sources to GGUF
  freehold release runs/laptop                        a signed folder that strangers can check
  freehold verify-resume recipes/laptop.yaml          kill it, resume it, compare every bit
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 well, 2 the user's mistake, 130 stopped, 137 killed."""
    environment.prepare()
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a letter must not end a command
            stream.reconfigure(errors="backslashreplace")
    try:
        from freehold.core.machine import machine_limits

        with machine_limits():
            return _do(argv)
    except FreeholdError as error:
        return _fail(error, argv)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return _fail(Stopped("stopped", todo="run the same command again to continue"), argv)


class Stopped(FreeholdError):
    """The user stopped a command."""

    code = 130


def _fail(error: FreeholdError, argv: Sequence[str]) -> int:
    """Say why a command failed, on stderr and with --json on stdout too; return its exit code.

    A stage of a walk hands the JSON to its parent, which prints it.
    """
    if "--json" in argv:
        print(json.dumps({"error": error.to_dict()}))
    if not ("--json" in argv and "--parent" in argv):
        print(printable(f"error: {error}"), file=sys.stderr)
    return getattr(error, "code", 2)


def _do(argv: Sequence[str]) -> int:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    for item in rest:  # argparse takes positionals in one place only; overrides may stand anywhere
        if item.startswith("-") or "=" not in item or not hasattr(args, "overrides"):
            parser.error(f"unrecognized argument: {item}")
        args.overrides.append(item)
    if getattr(args, "allow_secret", None):
        from freehold.core.secrets import allow

        allow(args.allow_secret)
    if not hasattr(args, "do"):
        parser.print_help()
        return 2
    return int(args.do(args) or 0)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = Parser(
        prog="freehold",
        description="Own a Trinity-class language model outright: data, training, alignment, proof, serving.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"freehold {VERSION}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    for room in (machine, make, read, look, prove, rollouts):
        room.add_verbs(verbs)
    return parser
