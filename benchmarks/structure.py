"""Write JSON for many random schemas with a model of random weights; `jsonschema` judges every answer.

    python benchmarks/structure.py [--schemas 200] [--seed 0]

Random weights prefer no token to another, so what is valid here is valid because it is enforced. An answer that the
length limit cuts is counted apart. Also printed: milliseconds to compile a schema, microseconds for a mask.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import torch

from freehold.core.log import Log
from freehold.stages.serve.schema import ChatRequest
from freehold.stages.serve.structure import Structures
from freehold.tokenizer.bpe import Tokenizer, train
from freehold.tokenizer.output import AnswerFormat

MAX_TOKENS = 2000


def schema(draws: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a random schema whose values are of bounded size, so that random answers end."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "date"]
    kind = draws.choice(
        kinds if depth > 2 else [*kinds, "object", "object", "object", "array", "array", "anyOf", "ref"]
    )
    low = draws.randint(-50, 50)
    if kind == "object" or depth == 0:
        names = [f"key {n} é" if draws.random() < 0.2 else f"k{n}" for n in range(draws.randint(1, 5))]
        return {
            "type": "object",
            "properties": {name: schema(draws, depth + 1) for name in names},
            "required": [name for name in names if draws.random() < 0.7],
            "additionalProperties": False,
        }
    return {
        "string": {"type": "string", "maxLength": draws.randint(0, 9)},
        "integer": {"type": "integer", "minimum": low, "maximum": low + draws.randint(0, 1000)},
        "number": {"type": "number", "minimum": low, "exclusiveMaximum": low + 10, "multipleOf": 0.5},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": draws.sample(["a", "b\n", 'c"', 1, 2.5, None, True, {"x": []}], draws.randint(1, 5))},
        "const": {"const": draws.choice(["é😀", 0, [1, 2]])},
        "date": {"type": "string", "format": draws.choice(["date", "time", "uuid", "ipv4"])},
        "array": {
            "type": "array",
            "items": schema(draws, depth + 1) if kind == "array" else {},
            "minItems": 1,
            "maxItems": draws.randint(1, 3),
        },
        "anyOf": {"anyOf": [schema(draws, depth + 1) for _ in range(2)] if kind == "anyOf" else []},
        "ref": {"$ref": "#/$defs/shared"},
    }[kind]


def write(constraint: Any, tokenizer: Tokenizer, draws: torch.Generator, times: list[float]) -> str | None:
    """Return what random weights write under a constraint; None when the length limit cuts it."""
    ids: list[int] = []
    for _ in range(MAX_TOKENS):
        logits = torch.randn(tokenizer.vocab_size, generator=draws)
        began = time.perf_counter()
        constraint.mask(logits)
        times.append(time.perf_counter() - began)
        token = int(logits.softmax(-1).multinomial(1, generator=draws))
        if token in (tokenizer.eos, tokenizer.end_of_text):
            return tokenizer.decode(ids)
        ids.append(token)
        constraint.took(token)
    return None


def main() -> None:
    """Print how many answers are valid; exit 1 if one is not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text = Path(json.__file__).read_text() + Path(argparse.__file__).read_text()
    tokenizer = train([text], 2000, Log(quiet=True))
    structures = Structures(tokenizer, AnswerFormat())
    draws, random_weights = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    counts = dict.fromkeys(("valid", "cut", "refused", "invalid"), 0)
    compiled, masks = [], []
    for number in range(args.schemas):
        wanted = schema(draws) | {"$defs": {"shared": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}}}
        request = ChatRequest(
            model="x", messages=[{"role": "user", "content": ""}], reasoning_effort="none",
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": wanted}},
        )  # fmt: skip
        began = time.perf_counter()
        try:
            make = structures.of(request)
        except Exception as error:
            counts["refused"] += 1
            print(f"schema {number}: {error}", file=sys.stderr)
            continue
        compiled.append(time.perf_counter() - began)
        assert make is not None
        found = write(make(), tokenizer, random_weights, masks)
        try:
            if found is not None:
                checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
                jsonschema.Draft202012Validator(wanted, format_checker=checker).validate(json.loads(found))
            counts["cut" if found is None else "valid"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            counts["invalid"] += 1
            print(f"schema {number}: {str(error)[:300]}\n{found!r}\n{json.dumps(wanted)}", file=sys.stderr)
    print(
        f"{args.schemas} schemas: {counts}; compile {1e3 * statistics.median(compiled):.1f} ms, "
        f"mask {1e6 * statistics.mean(masks):.0f} us (p99 {1e6 * sorted(masks)[int(len(masks) * 0.99)]:.0f})"
    )
    sys.exit(counts["invalid"] > 0)


if __name__ == "__main__":
    main()
