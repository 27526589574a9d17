"""The verbs that explain a step of reinforcement learning: what trained it, and the same computed again."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from freehold.cli.parser import run_folder, verb


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this module to the parser."""
    why = verb(verbs, "why", "which prompts, policy, verifiers and licences trained a step of align", _why)
    replay = verb(
        verbs,
        "replay",
        "compute rewards, advantages and loss of a step of rl again; exit 1 when a bit differs",
        _replay,
    )
    for parser in (why, replay):
        parser.add_argument("run", type=Path, help="run folder")
        parser.add_argument("step", type=int, help="optimizer step, from 0")
        parser.add_argument("--json", action="store_true", help="machine-readable answer")


def _why(args: argparse.Namespace) -> int:
    from freehold.run import rollout_steps

    answer = rollout_steps.why(run_folder(args.run), args.step)
    print(json.dumps(answer.to_dict(), indent=1) if args.json else answer.text())
    return 0


def _replay(args: argparse.Namespace) -> int:
    from freehold.run import rollout_steps

    answer = rollout_steps.replay(run_folder(args.run), args.step)
    print(json.dumps(asdict(answer), indent=1) if args.json else answer.text())
    return 1 if answer.difference else 0
