"""Thoughts, tool calls and stop strings come out the same however the text is cut into pieces."""

from __future__ import annotations

import itertools

import pytest

from freehold.tokenizer.output import AnswerParser, Piece, TextStream, partial

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "<x>"}}\n</tool_call>'
ADD = Piece("call", '{"a": 1, "b": "<x>"}', "add")


def joined(pieces: list[Piece]) -> list[Piece]:
    """Join neighbours of one kind, and the events of a call to one."""
    out: list[Piece] = []
    for piece in pieces:
        if out and piece.kind == out[-1].kind in ("content", "reasoning"):
            out[-1] = Piece(piece.kind, out[-1].text + piece.text)
        elif piece.kind == "arguments":
            out[-1] = Piece("call", out[-1].text + piece.text, out[-1].name)
        elif piece.kind != "call_end":
            out.append(piece)
    return out


def parse(chunks, **options) -> list[Piece]:
    parser = AnswerParser(**options)
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)]
    return joined(pieces + parser.finish())


def splits(text: str):
    """Yield the text whole, by characters, and cut at every place and at every pair of places a few apart."""
    yield [text]
    yield list(text)
    for cut in range(1, len(text)):
        yield [text[:cut], text[cut:]]
    for cut, width in itertools.product(range(1, len(text)), (1, 3, 7)):
        yield [text[:cut], text[cut : cut + width], text[cut + width :]]


C, R = (lambda t: Piece("content", t)), (lambda t: Piece("reasoning", t))


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("Hello there.\n", {}, [C("Hello there.\n")]),
        ("<think>\nwhy?\nso \n</think>\n\nHi  you ", {}, [R("why?\nso"), C("Hi  you ")]),
        ("<think></think>Hi", {}, [C("Hi")]),
        ("<think>cut in the mid", {}, [R("cut in the mid")]),
        ("\nhm</think>\nHi", {"thinking": True}, [R("hm"), C("Hi")]),
        ("only thoughts", {"thinking": True}, [R("only thoughts")]),
        ("Let me see.\n" + CALL, {}, [C("Let me see."), ADD]),
        (f"<think>\nadd\n</think>\n\n{CALL}\n{CALL}", {}, [R("add"), ADD, ADD]),
        (f"<think>a\n{CALL}\nb</think>c", {}, [R("a"), ADD, R("b"), C("c")]),
        (CALL.removesuffix("</tool_call>"), {}, [ADD]),
        ('<tool_call>{"name": "add", "argum', {}, [C('{"name": "add", "argum')]),
        ("a <tool_call>not json</tool_call> b", {}, [C("anot json b")]),
        ('<tool_call>{"name": "f", "arguments": 3}</tool_call>', {}, [C('{"name": "f", "arguments": 3}')]),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', {}, [Piece("call", "{}", "f")]),
        ('<tool_call>{"name": "f"}</tool_call>', {}, [Piece("call", "{}", "f")]),
        ("<tool_call>[1]</tool_call>", {}, [C("[1]")]),
        ('<tool_call>{"name": "f"}</tool_call>', {"tools": None}, [C('{"name": "f"}')]),
        ("a </think> b </tool_call>c", {}, [C("a  b c")]),
        ("<think>a <think> b</think>c", {}, [R("a  b"), C("c")]),
        ("if a < b and <thing> or </them>", {}, [C("if a < b and <thing> or </them>")]),
        ("ends with <thi", {}, [C("ends with <thi")]),
        ("x <th<think>y</think>z", {}, [C("x <th"), R("y"), C("z")]),
        ("", {}, []),
    ],
)
def test_every_cut_gives_the_same_answer(text, options, expected):
    for chunks in splits(text):
        found = parse(chunks, **options)
        assert found == expected, chunks
        assert not any(tag in p.text for p in found for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>"))


class Letters:
    """A vocabulary of single bytes, of which 1 and 3 are control tokens."""

    vocab_size = 256

    def decode_bytes(self, ids, *, skip_specials=True):
        return bytes(i for i in ids if i not in (1, 3))


def stream(data, **options) -> tuple[list[str], bool]:
    text = TextStream(Letters(), **options)
    return [text.feed(b) for b in data] + [text.finish()], text.stopped


def test_characters_come_whole():
    parts, _ = stream("aé€😀z".encode())
    assert [p for p in parts if p] == ["a", "é", "€", "😀", "z"]
    assert "".join(stream("é".encode()[:1])[0]) == "�"


@pytest.mark.parametrize(
    ("text", "stop", "shown", "stopped"),
    [
        ("one two three", ["two"], "one ", True),
        ("one two three", ["four"], "one two three", False),
        ("aab", ["ab"], "a", True),
        ("abac", ["abad"], "abac", False),
        ("x\n\ny", ["\n\n", "\n"], "x", True),
        ("été", ["té"], "é", True),
        ("stop", ["stop"], "", True),
        ("sto", ["stop"], "sto", False),
    ],
)
def test_stop_strings_are_found_across_tokens_and_not_shown(text, stop, shown, stopped):
    parts, found = stream(text.encode(), stop=stop)
    assert ("".join(parts), found) == (shown, stopped)


class Words(Letters):
    """A vocabulary of whole words."""

    def decode_bytes(self, ids, *, skip_specials=True):
        return b"".join([b"one two three "][i] for i in ids)


def test_the_first_of_two_stop_strings_in_one_token_counts():
    text = TextStream(Words(), stop=["three", "two"])
    assert (text.feed(0), text.stopped, text.feed(0), text.finish()) == ("one ", True, "", "")


def test_control_tokens_and_unknown_ids_are_not_shown():
    assert "".join(stream([97, 3, 98, 1, 99999])[0]) == "ab"


def test_partial_is_the_longest_beginning_of_a_mark():
    assert partial("abc<to", ("<tool>", "<t")) == 3
    assert partial("abc", ("x",)) == 0
    assert partial("<t", ("<t",)) == 0
