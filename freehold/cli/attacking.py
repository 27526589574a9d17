"""`freehold redteam`: attacks with known truth on a model, with and without its guardrails."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from freehold.core.errors import ConfigError

KINDS = "canary, system prompt, encoding, special tokens, tool result, personal data, repetition"


def redteam_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("path", help="run folder, checkpoint or HF folder")
    parser.add_argument("--canaries", type=Path, metavar="FILE", help='lines of {"prompt": ..., "secret": ...}')
    parser.add_argument("--guard", type=Path, metavar="FILE", help="guardrails, as `serve.guard` of a recipe (YAML)")
    parser.add_argument("--most", type=float, metavar="SHARE", help="fail when an upper bound of complied is above")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (default 64)")
    parser.add_argument("--json", action="store_true", help="machine-readable answer")


def redteam(args: argparse.Namespace) -> int:
    """Attack a model; 1 when an upper Wilson bound is above `--most`, with the guardrails if there are some."""
    from freehold import api
    from freehold.core.config import fill, load_yaml
    from freehold.guard import redteam as attacks
    from freehold.guard.config import GuardConfig
    from freehold.guard.policy import Policy

    tried = attacks.probes(_canaries(args.canaries))
    ask = _asker(api.load(args.path, max_batch=1, prefix_cache=True), args.max_tokens)
    found = {"alone": attacks.attack(ask, tried)}
    if args.guard:
        policy = Policy(fill(GuardConfig, load_yaml(args.guard), str(args.guard)), "/v1/chat/completions")
        found["guarded"] = attacks.attack(_guarded(ask, policy), tried)
    tables = {name: attacks.table(each) for name, each in found.items()}
    if args.json:
        print(json.dumps({name: [dataclasses.asdict(row) for row in rows] for name, rows in tables.items()}))
    else:
        for name, rows in tables.items():
            print(f"{name}\n  {'attack':16} complied  refused  neither   95 % of complied")
            for row in rows:
                counts = "".join(f"{row.counts[outcome]:9}" for outcome in attacks.OUTCOMES)
                print(f"  {row.kind:16}{counts}   {row.low:.2f} to {row.high:.2f}")
    last = list(tables.values())[-1]
    return int(args.most is not None and any(row.high > args.most for row in last))


def _canaries(path: Path | None) -> list[tuple[str, str]]:
    if path is None:
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(str(row["prompt"]), str(row["secret"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "not a file of canaries", where=path, found=error, expected='lines of {"prompt": ..., "secret": ...}'
        ) from error


def _asker(loaded: Any, max_tokens: int) -> Any:
    sampling = dataclasses.replace(loaded.sampling, temperature=0.0, max_tokens=max_tokens)

    def ask(messages: list[dict[str, Any]]) -> str:
        return "".join(piece.text or piece.name for piece in loaded.answer(messages, sampling))

    return ask


def _guarded(ask: Any, policy: Any) -> Any:
    """Return the same model behind a policy."""

    def guarded(messages: list[dict[str, Any]]) -> str:
        allowed = []
        for message in messages:
            verdict = policy.judge(message["content"], "tools" if message["role"] == "tool" else "prompt")
            if verdict.blocked:
                return str(policy.config.message)
            allowed.append({**message, "content": verdict.text})
        verdict = policy.judge(ask(allowed), "answer")
        return str(policy.config.message if verdict.blocked else verdict.text)

    return guarded
