"""Files of conversations: the format is found once a file, rows are refused by number, and the survey counts."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from freehold.cli import main
from freehold.conversations.files import format_of, read
from freehold.conversations.survey import percentiles, survey
from freehold.core.errors import DataError
from freehold.core.log import Log
from freehold.tokenizer.bpe import train


def talk(number: int, **more: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{number}!", **more}]
    return {"messages": said}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_lines_and_arrays_are_read_with_their_numbers(tmp_path):
    rows = [talk(1), talk(2), talk(3)]
    lines = jsonl(tmp_path / "a.jsonl", [rows[0], "", rows[1], rows[2]])
    array = tmp_path / "a.json"
    array.write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    assert [row.number for row in read(lines, "messages")] == [1, 3, 4]
    assert [row.number for row in read(array, "messages")] == [1, 2, 3]
    assert [row.made for row in read(lines, "messages")] == [row.made for row in read(array, "messages")]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_read_as_plain_ones(pack, tmp_path):
    rows = [talk(1), talk(2)]
    plain = jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.packed").write_bytes(pack(plain.read_bytes()))
    (tmp_path / "a.json.packed").write_bytes(pack(json.dumps(rows).encode()))
    expected = [row.made for row in read(plain, "messages")]
    for name in ("a.jsonl.packed", "a.json.packed"):
        assert format_of(tmp_path / name) == "messages"
        assert [row.made for row in read(tmp_path / name, "messages")] == expected
    (tmp_path / "cut").write_bytes(pack(b"x" * 100_000)[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        list(read(tmp_path / "cut", "messages"))


def test_parquet_rows_are_those_of_json_lines(tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    rows = [
        talk(1),
        {**talk(2), "source": "me"},
        {"messages": [*talk(3)["messages"], *talk(4, tool_calls=[call])["messages"]]},
    ]
    pq.write_table(pa.Table.from_pylist(rows, pa.Table.from_pylist([rows[2], rows[1]]).schema), tmp_path / "a.parquet")
    expected = [row.made for row in read(jsonl(tmp_path / "a.jsonl", rows), "messages")]
    assert [row.made for row in read(tmp_path / "a.parquet", format_of(tmp_path / "a.parquet"))] == expected
    # One value that many rows repeat is small on disk, and must not be in memory once for each of them.
    big = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["ab " * 300_000]))
    answers = pa.array(["no"] * 3000)
    pq.write_table(pa.table({"prompt": big, "completion": answers}), tmp_path / "bomb.parquet", store_schema=False)
    found = list(read(tmp_path / "bomb.parquet", "prompt_completion", max_bytes=10_000))
    assert len(found) == 3000
    assert "max_document_bytes" in found[-1].reason
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="parquet file of conversations cannot be read"):
        list(read(tmp_path / "no.parquet", "messages"))


def test_refused_rows_are_named_by_number(tmp_path):
    long = json.dumps(talk(5)) + " " * 500
    path = jsonl(tmp_path / "a.jsonl", [talk(1), "{", "[1]", {"prompt": "a", "completion": "b"}, long, talk(6)])
    found = {row.number: row.reason for row in read(path, format_of(path, "messages"), max_bytes=300)}
    assert [bool(reason) for reason in found.values()] == [False, True, True, True, True, False]
    assert "not JSON" in found[2]
    assert "not a JSON object but list" in found[3]
    assert found[4] == "a row of prompt_completion in a file of messages"
    assert "max_document_bytes = 300" in found[5]


def test_a_named_format_takes_rows_with_more_keys(tmp_path):
    row = {"prompt": "a", "completion": "b", "label": True}
    path = jsonl(tmp_path / "a.jsonl", [row])
    assert format_of(path) == "unpaired"
    assert next(read(path, format_of(path, "prompt_completion"))).made is not None


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([talk(1), {"instruction": "a", "output": "b"}], r"(?s)several formats.*1 messages, 1 alpaca"),
        ([{"text": "a"}], r"(?s)no row of a format.*row 1: has the keys of no format: text"),
        ([], "(?s)no row of a format.*no rows"),
        (["[1,"], "(?s)not JSON.*a.jsonl"),
    ],
)
def test_files_without_one_format_are_refused(tmp_path, rows, says):
    with pytest.raises(DataError, match=says):
        format_of(jsonl(tmp_path / "a.jsonl", rows))


def test_unreadable_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        format_of(tmp_path / "absent.jsonl")


def test_survey_counts_roles_reasoning_and_lengths(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [talk(1), talk(1), talk(2, reasoning="so"), talk(3, content="")])
    found = survey(path)
    assert (found.rows, found.refused[0][0], found.duplicates, found.with_reasoning) == (4, 4, 1, 1)
    assert found.roles == {"user": 3, "assistant": 3}
    assert "row 4 refused: a turn of the assistant says nothing" in found.text()
    tokens = survey(path, tokenizer=train(["1? 1! 2? so"] * 9, 290, Log(quiet=True))).to_dict()
    assert 0 < tokens["learned_share"]["p50"] < 1
    assert tokens["tokens"]["p100"] > 10
    assert percentiles(range(1, 101)) == {"p5": 5, "p50": 50, "p95": 95, "p100": 100}


def test_check_exits_with_1_for_refused_rows(tmp_path, capsys):
    good, bad = jsonl(tmp_path / "good.jsonl", [talk(1)]), jsonl(tmp_path / "bad.jsonl", [talk(1), talk(2, content="")])
    assert main(["align", "--check", str(good)]) == 0
    assert main(["align", "--check", str(bad), "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["refused"] == [{"row": 2, "reason": "a turn of the assistant says nothing: no content, reasoning or "
                                "calls"}]  # fmt: skip
    assert main(["align", "--check", str(good), "--format", "opnai"]) == 2
    assert main(["align"]) == 2
    assert "a recipe is missing" in capsys.readouterr().err
