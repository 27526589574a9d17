"""The verbs that look at what is here before anything starts: doctor and init."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from freehold.cli.parser import verb
from freehold.core.errors import ArtifactError


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this module to the parser."""
    doctor = verb(verbs, "doctor", "what this machine has, how fast it is, what will be slow here and why", _doctor)
    doctor.add_argument("--runs", type=Path, default=Path("runs"), help="where runs will be (default: runs)")
    doctor.add_argument("--json", action="store_true", help="everything, machine-readable")
    init = verb(verbs, "init", "look at your files and write a recipe that fits them and this machine", _init)
    init.add_argument("paths", nargs="+", type=Path, help="folders or files: text, JSON lines, conversations, a model")
    init.add_argument("--name", default="own", help="name of the run (default: own)")
    init.add_argument(
        "--licence", default="", help="what your text is under: SPDX, or LicenseRef-Own for your own work"
    )
    init.add_argument("--minutes", type=float, default=30.0, help="longest pre-training, by the planner (default: 30)")
    init.add_argument("--output", type=Path, help="file to write (default: NAME.yaml; never overwritten)")
    init.add_argument("--dry-run", action="store_true", help="print the recipe; write nothing")
    init.add_argument("--json", action="store_true", help="what was seen and chosen, and the recipe, machine-readable")


def _doctor(args: argparse.Namespace) -> int:
    from freehold.run import doctor

    facts = doctor.examine(args.runs)
    print(json.dumps(doctor.as_json(facts)) if args.json else doctor.as_text(facts))
    return 0


def _init(args: argparse.Namespace) -> int:
    from freehold.core.artifact import write_atomic
    from freehold.run import init

    output = args.output or Path(f"{args.name}.yaml")
    if output.exists() and not args.dry_run:
        raise ArtifactError("there is a file of this name", where=output, todo="give another --output or --name")
    found = init.look(args.paths)
    written = init.write_recipe(
        found, args.name, output, init.measured_machine(), 60 * args.minutes, licence=args.licence
    )
    if not args.dry_run:
        write_atomic(output, written.text)
    if args.json:
        print(json.dumps({"recipe": written.text, "said": written.said, "next": written.next}))
        return 0
    print(written.text if args.dry_run else f"wrote {output}\n")
    print("\n".join(f"- {line}" for line in written.said))
    print("\nnext:\n" + "\n".join(f"  {command}" for command in written.next))
    return 0
