"""The verb that shows a run as a page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from freehold.cli.parser import run_folder, verb


def add_verbs(verbs: Any) -> None:
    """Add the verb of this module to the parser."""
    text = "write everything a run recorded as one page that needs no network, or serve it while the run trains"
    dashboard = verb(verbs, "dashboard", text, _dashboard)
    dashboard.add_argument("run", nargs="?", type=Path, help="run folder (default: the newest below runs/)")
    dashboard.add_argument("--output", type=Path, help="file to write (default: dashboard.html in the run folder)")
    dashboard.add_argument("--live", action="store_true", help="serve the page on this machine; it follows the run")
    dashboard.add_argument("--port", type=int, default=8080, help="for --live; 0 takes a free one")
    dashboard.add_argument("--json", action="store_true", help="machine-readable answer")


def _dashboard(args: argparse.Namespace) -> int:
    from freehold.run import dashboard
    from freehold.run.layout import RunFolder

    run = run_folder(args.run)
    if args.live:
        dashboard.serve(run, args.port)
        return 0
    output = args.output or RunFolder(run).dashboard
    size = dashboard.write(run, output)
    print(json.dumps({"page": str(output), "bytes": size}) if args.json else f"{output}: {size / 1e6:.2f} MB")
    return 0
