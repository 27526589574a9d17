"""What must hold of every conversation that is learned from, rendered as ids with a mask: each a bug that others had.

A survey checks each row of a file; docs/alignment.md lists the reports behind them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from freehold.conversations.messages import Message
from freehold.core.marks import IGNORE
from freehold.tokenizer.chat import render_ids

if TYPE_CHECKING:
    import numpy as np

    from freehold.tokenizer.bpe import Tokenizer

BEGIN, START, END = "<|begin_of_text|>", "<|im_start|>", "<|im_end|>"
Rendered = tuple[list[int], list[bool]]


def violations(tokenizer: Tokenizer, messages: Sequence[Message], rendered: Rendered) -> list[str]:
    """Return the names of the invariants that a rendered conversation breaks; none of a good one."""
    checks: dict[str, Callable[[], bool]] = {
        "the prompt is what the model learned to continue": lambda: continues_its_prompt(tokenizer, messages, rendered),
        "a turn only appends": lambda: only_appends(tokenizer, messages, rendered),
        "some tokens are learned, and not all": lambda: 0 < sum(rendered[1]) < len(rendered[0]),
        "the end of a turn is learned": lambda: learns_to_stop(tokenizer, messages, rendered),
        "tools are rendered as they were given": lambda: tools_unchanged(tokenizer, messages, rendered),
        "no text becomes a special token": lambda: specials_are_the_templates(tokenizer, messages, rendered),
        "one beginning, one end a turn": lambda: begins_once(tokenizer, messages, rendered),
    }
    return [name for name, holds in checks.items() if not holds()]


def continues_its_prompt(tokenizer: Tokenizer, messages: Sequence[Message], rendered: Rendered) -> bool:
    """Return whether the prompt of each answer, as it is served, is a beginning of what is learned."""
    for at, message in enumerate(messages):
        if message["role"] == "assistant" and at:
            prompt, _ = render_ids(tokenizer, messages[:at], tools=messages[0].get("tools"), generation=True)
            if rendered[0][: len(prompt)] != prompt:
                return False
    return True


def only_appends(tokenizer: Tokenizer, messages: Sequence[Message], rendered: Rendered) -> bool:
    """Return whether the first turns alone have the ids that they have in the full conversation."""
    for at in range(1, len(messages)):
        if messages[at]["role"] == "tool":  # results of one turn are rendered together
            continue
        part, _ = render_ids(tokenizer, messages[:at], tools=messages[0].get("tools"))
        if rendered[0][: len(part)] != part:
            return False
    return True


def learns_to_stop(tokenizer: Tokenizer, messages: Sequence[Message], rendered: Rendered) -> bool:
    """Return whether the token that ends each learned turn is learned."""
    ids, mask = rendered
    wanted = sum(message["role"] == "assistant" and message.get("train") is not False for message in messages)
    return wanted == sum(learned for token, learned in zip(ids, mask, strict=True) if token == tokenizer.specials[END])


def tools_unchanged(tokenizer: Tokenizer, messages: Sequence[Message], rendered: Rendered) -> bool:
    """Return whether each tool's schema is in the prompt byte for byte: Arrow fills unions of columns with nulls."""
    text = tokenizer.decode(rendered[0], skip_specials=False)
    return all(json.dumps(tool, ensure_ascii=False) in text for tool in messages[0].get("tools") or ())


def specials_are_the_templates(tokenizer: Tokenizer, messages: Sequence[Message], rendered: Rendered) -> bool:
    """Return whether there are as many control tokens as the template writes, whatever the text says."""
    plain = [{**m, "content": "x" if m.get("content") else m.get("content")} for m in messages]
    ids, _ = render_ids(tokenizer, plain, tools=messages[0].get("tools"))
    control = {tokenizer.specials[name] for name in (BEGIN, START, END)}
    return sum(token in control for token in rendered[0]) == sum(token in control for token in ids)


def begins_once(tokenizer: Tokenizer, messages: Sequence[Message], rendered: Rendered) -> bool:
    """Return whether the conversation begins with one begin token, and every turn that starts also ends."""
    ids, _ = rendered
    begin, start, end = (tokenizer.specials[name] for name in (BEGIN, START, END))
    pairs = [token for token in ids if token in (start, end)]
    return ids[0] == begin and ids.count(begin) == 1 and pairs == [start, end] * (len(pairs) // 2)


def packs_unchanged(rendered: Sequence[Rendered], targets: np.ndarray) -> bool:
    """Return whether a packed row [T] has the targets that its conversations have alone, one after another."""
    at = 0
    for ids, mask in rendered:
        alone = [token if learned else IGNORE for token, learned in zip(ids[1:], mask[1:], strict=True)]
        if targets[at : at + len(alone)].tolist() != alone:
            return False
        at += len(alone)
    return all(target == IGNORE for target in targets[at:].tolist())


def keeps_id_0(rendered: Rendered, targets: np.ndarray) -> bool:
    """Return whether a learned token with the id 0 is a target like any other: 0 is false, but not nothing."""
    ids, mask = rendered
    wanted = [n for n in range(1, len(ids)) if mask[n] and ids[n] == 0]
    return all(targets[n - 1] == 0 for n in wanted)
