"""Answers in each dialect, and every way to cut them: shared by the tests and `benchmarks/dialects.py`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from freehold.tokenizer.dialects import Piece
from freehold.tokenizer.output import AnswerParser, TextStream

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "plan",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "share": {"type": ["number", "null"]},
                    "deep": {"type": "object"},
                    "list": {"type": "array"},
                    "sure": {"type": "boolean"},
                    "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                    "kind": {"enum": ["a", 1]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]

HERMES = [
    '<think>\nwhy? 😀\n</think>\n\nLet me see.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
    '<tool_call>\n{"name": "plan", "arguments": {"city": "Zürich \\" } {", "deep": {"a": [1, {"b": "]"}]}, '
    '"days": 3}}\n</tool_call>',
    '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call> and <tool_call>not one</tool_call> text',
    '<think>a <tool_call>{"name": "now"}</tool_call> b</think>c <tool_call>{"name": "now", "arguments": "{}"}',
    '<tool_call>{"name": "plan", "arguments": {"city": "cut in the mi',
    "plain < text <thing> </tool_call> with <tool ends\n <thi",
    '<tool_call>\n{"name": "n\\u00e9", "arguments": {"x": "\\\\"}, "id": 7}\n</tool_call>  tail',
]
XML = [
    "<think>\nwhy? 😀\n</think>\n\nLet me see.\n<tool_call>\n<function=now>\n</function>\n</tool_call>\n"
    '<tool_call>\n<function=plan>\n<parameter=city>\nZürich\n\n "quoted" \\ <b> </p\n</parameter>\n'
    "<parameter=days>\n3\n</parameter>\n"
    '<parameter=deep>\n{"a": [1, {"b": "é\\n"}]}\n</parameter>\n<parameter=share>null</parameter>\n'
    "<parameter=sure>maybe</parameter><parameter=unknown>4</parameter>\n</function>\n</tool_call>",
    "<tool_call><function=plan><parameter=list>[]</parameter><parameter=either>12</parameter>"
    "<parameter=kind>a</parameter></function></tool_call> and <tool_call>not one</tool_call> text",
    "<think>a <tool_call><function=now></function></tool_call> b</think>c",
    "<tool_call>\n<function=plan>\n<parameter=city>\ncut in the mi",
    "<tool_call>\n<function=plan>\n<parameter=days>\n1",
    "<tool_call><function=plan><parameter=city>no end\n<parameter=days>2</function></tool_call>",
    "<tool_call><function=plan><parameter=city>\n\n</parameter><parameter=share>NaN</parameter></function></tool_call>",
    "plain < text <thing> </tool_call> with <function=now> ends\n <thi",
]
TEXTS = {"hermes": HERMES, "xml": XML}


class Bytes:
    """A vocabulary of single bytes, then of `tokens`."""

    def __init__(self, tokens: Sequence[bytes] = ()) -> None:
        self.tokens = [bytes([n]) for n in range(256)] + list(tokens)
        self.vocab_size = len(self.tokens)

    def decode_bytes(self, ids, *, skip_specials: bool = True) -> bytes:
        """Return the bytes of ids."""
        return b"".join(self.tokens[i] for i in ids)


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbours of one kind; nothing else about events may depend on the cut."""
    out: list[Piece] = []
    for piece in pieces:
        if out and piece.kind == out[-1].kind and piece.kind not in ("call", "call_end"):
            out[-1] = Piece(piece.kind, out[-1].text + piece.text)
        else:
            out.append(piece)
    return out


def parse(chunks: Sequence[str], **options) -> list[Piece]:
    """Return the events of a text that comes in pieces."""
    parser = AnswerParser(**options)
    return [piece for chunk in chunks for piece in parser.feed(chunk)] + parser.finish()


def parse_tokens(tokens: Sequence[bytes], **options) -> list[Piece]:
    """Return the events of a text that comes in tokens, whose edges may be inside characters."""
    vocabulary = Bytes(tokens)
    text, parser = TextStream(vocabulary), AnswerParser(**options)
    pieces = [piece for n in range(256, vocabulary.vocab_size) for piece in parser.feed(text.feed(n))]
    return pieces + parser.feed(text.finish()) + parser.finish()


def cuts(text: str, draws: random.Random) -> Iterator[list[bytes]]:
    """Yield the text in bytes, in pieces of 2 to 7 bytes, cut once, twice or at random, without end."""
    data = text.encode()
    while True:
        how = draws.randrange(4)
        if how == 0:
            edges = sorted(draws.sample(range(1, len(data)), draws.choice((1, 2))))
        elif how == 1:
            width = draws.randint(2, 7)
            edges = list(range(draws.randint(1, width), len(data), width))
        elif how == 2:
            edges = list(range(1, len(data)))
        else:
            share = draws.random()
            edges = [n for n in range(1, len(data)) if draws.random() < share]
        yield [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True)]
