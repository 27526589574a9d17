"""`freehold calibrate PATH`: the importance matrix of a model, with a report and a picture of what its experts saw."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from freehold.cli.exporting import model_folder, run_of
from freehold.core.errors import ConfigError
from freehold.run.layout import TOKENIZE, RunFolder

EXAMPLES = """examples:
  freehold calibrate runs/laptop --output out/imatrix.gguf                 on the held-out text of the run
  freehold calibrate Trinity-Nano/ --text mine.txt --output imatrix.gguf   on text of yours
then: freehold export PATH --types Q4_K_M --imatrix out/imatrix.gguf --output out/
Next to the file: its report (.json) and a picture of tokens by expert and layer (.png)."""


def calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the text, and the limits."""
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", type=Path, help="run folder, checkpoint, or Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="importance matrix to write (.gguf)")
    parser.add_argument(
        "--text", type=Path, action="append", default=[], metavar="FILE",
        help="UTF-8 text to calibrate on; repeatable (default: the held-out text of the run)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=100_000, metavar="N", help="at most this much (default 100000)")
    parser.add_argument(
        "--floor", type=int, default=16, metavar="N",
        help="tokens the median expert of each layer must see (default 16)",
    )  # fmt: skip
    parser.add_argument(
        "--candidates", type=int, default=1, metavar="N",
        help="read N times --tokens and keep what reaches seldom used experts (default 1: text order)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where the model runs")
    parser.add_argument("--json", action="store_true", help="machine-readable report on stdout")


def calibrate(args: argparse.Namespace) -> int:
    """Write importance matrix, report and picture."""
    if args.output.suffix != ".gguf" or args.tokens < 1 or args.floor < 0 or args.candidates < 1:
        raise ConfigError(
            "not what a calibration can do", where="--output, --tokens, --floor, --candidates",
            found=f"{args.output}, {args.tokens}, {args.floor}, {args.candidates}",
            expected="FILE.gguf, >= 1 token, >= 0, >= 1",
        )  # fmt: skip
    folder = model_folder(args.path)
    run = run_of(folder)
    tokenized = RunFolder(run).stage(TOKENIZE) if run and RunFolder(run).finished(TOKENIZE) else None
    if not args.text and tokenized is None:
        raise ConfigError("no text to calibrate on", where=args.path, todo="give --text FILE")
    from freehold.core.artifact import write_atomic, write_json
    from freehold.run.figure import draw_calibration
    from freehold.stages.export.calibrate import calibrate_folder

    found = calibrate_folder(
        folder, args.output, texts=args.text, tokenized=tokenized, tokens=args.tokens, floor=args.floor,
        candidates=args.candidates, device=args.device,
    )  # fmt: skip
    write_json(args.output.with_suffix(".json"), found)
    write_atomic(args.output.with_suffix(".png"), draw_calibration(found))
    if args.json:
        print(json.dumps(found))
        return 0
    idle = sum(len(layer["idle"]) for layer in found["layers"].values())
    print(f"{args.output}: {found['tokens']:,} tokens in {found['chunks']} chunks; {idle} experts saw none of them")
    return 0
