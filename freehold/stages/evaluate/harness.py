"""Our tasks as files of lm-evaluation-harness, which then asks what we ask and counts what we count.

The harness moves white space from the end of a prompt to the beginning of the answer, and our prompts end in a line
break. So the line break is written before each choice, where the harness would put it, and one more choice is the line
break alone; the functions written next to the tasks subtract it. The unit of agreement is the request: `requests.jsonl`
has a fingerprint of each (prompt ids, continuation ids).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from freehold.core.artifact import write_atomic
from freehold.core.errors import DataError
from freehold.stages.evaluate.items import Item
from freehold.tokenizer.bpe import Tokenizer
from freehold.tokenizer.chat import render, render_ids

FUNCTIONS = "freehold_results"
"""Name of the module of functions that is written next to the tasks."""
OPENING = "assistant\n"
"""What a rendered prompt ends in: the text after its last special token."""


def write_tasks(folder: Path, tasks: dict[str, list[Item]], tokenizer: Tokenizer, answer_tokens: int) -> list[str]:
    """Write `freehold_<task>.yaml` and its `.jsonl` for every task, and `requests.jsonl`; return the tasks' names.

    The prompt is the rendered chat, special tokens included: the harness's tokenizer turns it into the ids
    that our own evaluation scores. Data files are found from inside `folder` (see its README.md).
    """
    names = []
    fingerprints: list[dict[str, object]] = []
    for task, items in tasks.items():
        name, choice = f"freehold_{task}", items[0].kind == "choice"
        rows = [
            {"id": i.id, "prompt": render(i.prompt, generation=True), "answer": i.answer}
            | (_moved(render(i.prompt, generation=True), i.choices or []) if choice else {})
            for i in items
        ]
        lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows]
        write_atomic(folder / f"{name}.jsonl", "".join(lines))
        write_atomic(folder / f"{name}.yaml", declaration(name, choice, answer_tokens))
        for item in items if choice else ():
            prompt, tails = choice_ids(tokenizer, item)
            for number, tail in enumerate(tails):
                record = {"task": name, "id": item.id, "choice": number, "sha256": fingerprint(prompt, tail)}
                fingerprints.append(record)
        names.append(name)
    if names:
        write_atomic(folder / f"{FUNCTIONS}.py", RESULTS)
        write_atomic(folder / "requests.jsonl", "".join(json.dumps(one, sort_keys=True) + "\n" for one in fingerprints))
        write_atomic(folder / "README.md", README.format(names=",".join(names)))
    return names


def _moved(prompt: str, choices: Sequence[str]) -> dict[str, object]:
    """Return a prompt without its last line break and the choices after one; the last is the line break alone."""
    return {"prompt": prompt.removesuffix("\n"), "choices": [f"\n{choice}" for choice in (*choices, "")]}


def choice_ids(tokenizer: Tokenizer, item: Item) -> tuple[list[int], list[list[int]]]:
    """Return the ids of a choice item's prompt and of each choice after it.

    The text after the last special token is encoded as one, as every other runtime does. Raises DataError when a token
    would span the end of the prompt: then the cost of the choice alone is not known.
    """
    prompt, _ = render_ids(tokenizer, item.prompt, generation=True)
    opening = tokenizer.encode(OPENING)
    tails = []
    for choice in item.choices or []:
        joint = tokenizer.encode(OPENING + choice)
        if joint[: len(opening)] != opening or len(joint) == len(opening):
            raise DataError(
                "a token spans the end of the prompt and the beginning of a choice",
                where=item.id,
                found=repr(choice),
                expected="a choice that begins with a letter, a digit or a mark",
                todo="remove the white space at its beginning",
            )
        tails.append(joint[len(opening) :])
    return prompt, tails


def fingerprint(prompt: Sequence[int], continuation: Sequence[int]) -> str:
    """Return the SHA-256 of a request: its prompt ids, a separator, its continuation ids."""
    text = ",".join(map(str, prompt)) + "|" + ",".join(map(str, continuation))
    return hashlib.sha256(text.encode()).hexdigest()


def declaration(name: str, choice: bool, answer_tokens: int) -> str:
    """Return the YAML of one task."""
    task: dict[str, object] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice" if choice else "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in (("acc", "acc_bytes") if choice else ("exact",))
        ],
        "metadata": {"version": 2.0},
    }
    if choice:
        task["doc_to_choice"] = "{{choices}}"
    else:
        task["generation_kwargs"] = {"until": ["<|im_end|>"], "max_gen_toks": answer_tokens, "do_sample": False}
    # A tag of the harness's own, which YAML libraries do not write.
    function = "choice" if choice else "generated"
    return yaml.safe_dump(task, sort_keys=False) + f"process_results: !function {FUNCTIONS}.{function}\n"


RESULTS = '''"""How the tasks in this folder are counted: as `results.json` of the same run counts them."""


def choice(doc, results):
    """Subtract what the line break before each answer costs: the last choice is the line break alone."""
    *values, line_break = [value for value, _ in results]
    sums = [value - line_break for value in values]
    per_byte = [value / len(text[1:].encode()) for value, text in zip(sums, doc["choices"])]
    figures = {"acc": sums, "acc_bytes": per_byte}
    return {name: float(best.index(max(best)) == doc["answer"]) for name, best in figures.items()}


def generated(doc, results):
    """Compare an answer after white space, case and a final dot are levelled."""
    return {"exact": float(level(results[0]) == level(str(doc["answer"])))}


def level(text):
    return " ".join(text.split()).casefold().rstrip(".").rstrip()
'''

README = """# These tasks in lm-evaluation-harness

The data files are named relative to this folder, so start the harness here. With the exported model:

    lm_eval --include_path . --tasks {names} --model hf --model_args pretrained=../../export/hf

Against a running `freehold serve` (the tokenizer is needed to count tokens):

    lm_eval --include_path . --tasks {names} --model local-completions \\
      --model_args base_url=http://127.0.0.1:8000/v1/completions,model=freehold,tokenizer=../../export/hf

`acc_bytes` and `exact` follow the rules of `results.json`: of the choices, the one with the highest log-probability per
byte; of answers, the same text. The last choice of each item measures the line break between prompt and answer, and
`{functions}.py` subtracts it. `requests.jsonl` has the fingerprint of each request.
""".replace("{functions}", FUNCTIONS)
