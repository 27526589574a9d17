"""The verbs that look at what is here before anything starts: doctor and init."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from freehold.cli.parser import verb


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this module to the parser."""
    doctor = verb(verbs, "doctor", "what this machine has, how fast it is, what will be slow here and why", _doctor)
    doctor.add_argument("--runs", type=Path, default=Path("runs"), help="where runs will be (default: runs)")
    doctor.add_argument("--json", action="store_true", help="everything, machine-readable")


def _doctor(args: argparse.Namespace) -> int:
    from freehold.run import doctor

    facts = doctor.examine(args.runs)
    print(json.dumps(doctor.as_json(facts)) if args.json else doctor.as_text(facts))
    return 0
