"""The chat in the terminal: from a pipe, and as someone types."""

from __future__ import annotations

import builtins
import io

import pytest

from freehold import api
from freehold.core.config import fill
from freehold.core.errors import RequestError
from freehold.infer.limits import ContextOverflow
from freehold.stages.chat import run as chat_run
from freehold.stages.chat.config import ChatConfig, plan
from freehold.tokenizer.output import Piece


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def config(path, **more) -> ChatConfig:
    return ChatConfig(path=path, temperature=0, max_tokens=8, **more)


def typed(monkeypatch, *lines) -> None:
    """Type these lines, then end the input; an exception class is raised instead."""
    waiting = iter(lines)

    def answer(prompt: str = "") -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", answer)


def watch(monkeypatch) -> list:
    """Return a list that will hold the messages of each answer asked for."""
    seen: list = []
    original = api.Loaded.answer

    def watched(self, prompt, sampling):
        seen.append(list(prompt))
        return original(self, prompt, sampling)

    monkeypatch.setattr(api.Loaded, "answer", watched)
    return seen


def test_a_pipe_gets_one_answer_a_line(tiny_checkpoint):
    out = io.StringIO()
    chat_run.chat(config(tiny_checkpoint), io.StringIO("Hello\n\nHow are you?\nHello\n"), out)
    lines = out.getvalue().split("\n")
    loaded = api.load(tiny_checkpoint)
    expected = [" ".join(loaded.generate(q, max_tokens=8).split("\n")) for q in ("Hello", "How are you?", "Hello")]
    assert lines == [*expected, ""]


def test_conversation_continues_until_reset(tiny_checkpoint, monkeypatch):
    seen = watch(monkeypatch)
    typed(monkeypatch, "Hello", "And?", "/reset", "", "Hello", "/system Be brief.", "Hello", "/help", "/quit", "never")
    out = Terminal()
    chat_run.chat(config(tiny_checkpoint), Terminal(), out)
    roles = [[m["role"] for m in messages] for messages in seen]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"], ["system", "user"]]
    monkeypatch.undo()
    assert chat_run.printable(api.load(tiny_checkpoint).generate("Hello", max_tokens=8)) in out.getvalue()
    assert "(forgotten)" in out.getvalue()
    assert out.getvalue().count(chat_run.HELP) == 2  # at the start, and for what is no command


def test_ctrl_c_stops_an_answer_not_the_chat(tiny_checkpoint, monkeypatch):
    original = api.Loaded.answer
    calls = []

    def interrupted(self, prompt, sampling):
        calls.append(len(prompt))
        pieces = original(self, prompt, sampling)
        yield next(pieces)
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(api.Loaded, "answer", interrupted)
    typed(monkeypatch, "Hello", KeyboardInterrupt, "Again")  # then the end of the input
    out = Terminal()
    chat_run.chat(config(tiny_checkpoint, system="Be kind."), Terminal(), out)
    assert calls == [2, 4]
    assert "…" in out.getvalue()
    assert "/quit" in out.getvalue()


def test_too_long_message_is_refused_and_nothing_forgotten(tiny_checkpoint, monkeypatch):
    seen = watch(monkeypatch)
    typed(monkeypatch, "Hi", "word " * 2000, "Hello")
    out = Terminal()
    chat_run.chat(config(tiny_checkpoint), Terminal(), out)
    assert "at most 1024 tokens" in out.getvalue()
    assert "forgotten" not in out.getvalue().replace(chat_run.HELP, "")
    assert [m["content"] for m in seen[-1] if m["role"] == "user"] == ["Hi", "Hello"]


def test_a_line_of_a_pipe_that_is_too_long_is_an_error(tiny_checkpoint):
    out = io.StringIO()
    with pytest.raises(ContextOverflow, match="at most 1024 tokens") as caught:
        chat_run.chat(config(tiny_checkpoint), io.StringIO("Hello\n\n" + "word " * 2000 + "\n"), out)
    assert caught.value.where == "line 3"
    assert out.getvalue().count("\n") == 1


def test_long_conversation_drops_oldest_turns_and_says_so(tiny_checkpoint, monkeypatch):
    seen = watch(monkeypatch)
    asked = [f"question {n} " + "word " * 90 for n in range(12)]
    typed(monkeypatch, *asked)
    out = Terminal()
    chat_run.chat(config(tiny_checkpoint, system="Be kind."), Terminal(), out)
    loaded = api.load(tiny_checkpoint)
    notice = "(the conversation no longer fits the context: its oldest question and answer are forgotten)"
    turns = [[m["content"].split(" word")[0] for m in messages if m["role"] == "user"] for messages in seen]
    assert [found[-1] for found in turns] == [f"question {n}" for n in range(12)]  # all were answered
    assert turns[-1][0] != "question 0"
    assert len(turns[-1]) > 2
    assert out.getvalue().count(notice) == 12 - len(turns[-1])
    for messages, found in zip(seen, turns, strict=True):
        assert messages[0] == {"role": "system", "content": "Be kind."}
        assert [m["role"] for m in messages[1:]] == ["user", "assistant"] * (len(found) - 1) + ["user"]
        assert len(loaded.prompt_ids(messages)) + 8 <= 1024


@pytest.mark.parametrize("more", [{}, {"max_tokens": 512}])
def test_answers_end_with_the_context(short_folder, more):
    out = io.StringIO()
    chat_run.chat(ChatConfig(path=short_folder, temperature=0, **more), io.StringIO("hi\n"), out)
    assert out.getvalue() == " ".join(api.load(short_folder).generate("hi").split("\n")) + "\n"


@pytest.mark.parametrize("shown", [True, False])
def test_reasoning_is_dimmed_or_hidden(tiny_checkpoint, monkeypatch, shown):
    pieces = [
        Piece("reasoning", "hm"),
        Piece("content", "Paris"),
        Piece("call", name="look"),
        Piece("arguments", "{}"),
        Piece("call_end"),
    ]
    monkeypatch.setattr(api.Loaded, "answer", lambda *_: iter(pieces))
    typed(monkeypatch, "Hello")
    out = Terminal()
    chat_run.chat(config(tiny_checkpoint, show_reasoning=shown), Terminal(), out)
    assert "Paris" in out.getvalue()
    assert (chat_run.DIM + "hm" in out.getvalue()) == shown
    assert ("[calls look({})]" in out.getvalue()) == shown


def test_the_plan_names_the_model(tmp_path):
    assert plan(config(tmp_path)) == [f"talks to {tmp_path}"]


def test_pipe_that_is_no_utf8_is_refused_by_line(tiny_checkpoint):
    """Whatever the locale says: it would be lenient in one country and a traceback in another."""
    lines = io.TextIOWrapper(io.BytesIO("Hällo\n".encode() + b"caf\xe9 ol\xe9?\n"), encoding="ascii")
    out = io.StringIO()
    with pytest.raises(RequestError, match="not UTF-8") as caught:
        chat_run.chat(config(tiny_checkpoint), lines, out)
    assert caught.value.where == "line 2"
    assert out.getvalue().count("\n") == 1


def test_terminal_of_another_encoding_ends_no_chat(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(api.Loaded, "answer", lambda *_: iter([Piece("content", "né"), Piece("content", "→")]))
    typed(monkeypatch, UnicodeDecodeError("ascii", b"\xe9", 0, 1, "no"), "Hello")

    class Ascii(io.TextIOWrapper):
        def isatty(self):
            return True

    out = Ascii(io.BytesIO(), encoding="ascii")
    chat_run.chat(config(tiny_checkpoint), Terminal(), out)
    out.flush()
    assert b"n??" in out.buffer.getvalue()
    assert b"not UTF-8" in out.buffer.getvalue()


def test_control_codes_do_not_reach_the_terminal(tiny_checkpoint, monkeypatch):
    evil = "\x1b]52;c;ZXZpbA==\x07 \x9b2J a\tb\nc"
    pieces = [
        Piece("reasoning", evil),
        Piece("content", evil),
        Piece("call", name="\x1b[0m"),
        Piece("arguments", '{"a": "\x1b"}'),
    ]
    monkeypatch.setattr(api.Loaded, "answer", lambda *_: iter(pieces))
    typed(monkeypatch, "Hello")
    out = Terminal()
    chat_run.chat(config(tiny_checkpoint), Terminal(), out)
    left = out.getvalue().replace(chat_run.DIM, "").replace(chat_run.PLAIN, "")
    assert "a\tb\nc" in left
    assert not set(left) & {"\x1b", "\x07", "\x9b"}


def test_policy_holds_in_the_terminal(tiny_checkpoint):
    out = io.StringIO()
    rules = {"mail": {"kind": "personal", "find": ["email"]}, "word": {"kind": "pattern", "patterns": ["heliotrope"]}}
    loaded = api.load(tiny_checkpoint)
    talk = chat_run.Talk(
        loaded, fill(ChatConfig, {"path": "x", "guard": {"rules": rules}, "max_tokens": 2}, "chat"), out
    )
    talk.say("say heliotrope")
    assert (out.getvalue(), talk.messages) == ("This answer was withheld by a policy.\n", [])
    talk.say("I am jane.roe@contoso.com")
    assert talk.messages[0]["content"] == "I am [REDACTED]"
    shown = talk._guarded(iter([Piece("content", "helio"), Piece("content", "trope"), Piece("content", "!")]))
    assert [piece.text for piece in shown] == ["This answer was withheld by a policy."]
