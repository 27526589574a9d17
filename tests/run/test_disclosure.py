"""Documents from the ledger: every figure is recorded, what is not is unknown, and a change shows as a diff."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_fixture import build_run

from freehold.cli import main
from freehold.core.artifact import read_manifest, write_manifest
from freehold.core.errors import ArtifactError, ConfigError
from freehold.run.card import Statements, facts, read_statements
from freehold.run.disclosure import MAKERS, UNKNOWN, difference, make
from freehold.run.figure import draw_data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def texts(run: Path) -> dict[str, str]:
    return make(facts(run), Statements(), list(MAKERS))


def test_facts_are_those_of_the_tables(run: Path) -> None:
    found = facts(run)
    by_source = {row["source"]: row for row in found["sources"]}
    assert by_source["speeches"]["documents"] == 2  # one of three was dropped
    assert (by_source["speeches"]["tokens"], by_source["speeches"]["train_tokens"]) == (49, 40)
    assert by_source["made"]["conversations"] == 1
    assert {row["licence"]: row["documents"] + row["conversations"] for row in found["licences"]} == {
        "LicenseRef-PD-USGov": 2,
        "PSF-2.0 OR MIT": 1,
        "Apache-2.0": 1,
    }
    assert sum(found["lengths"]["documents"]) == found["sized"] == 3
    read = {(row["stage"], row["source"]): row["tokens"] for row in found["read"]}
    assert read == {("pretrain", "speeches"): 50, ("pretrain", "code"): 30, ("align", "made"): 12}
    assert found["languages"] == [
        {"language": "not looked at", "documents": 4, "bytes": 276, "kinds": ["code", "conversation", "prose"]}
    ]


def test_unknown_is_said(texts: dict[str, str]) -> None:
    for name in ("eu-training-content.md", "ab2013.md"):
        assert UNKNOWN in texts[name]
    assert f"**Provider name and contact details:** {UNKNOWN}" in texts["eu-training-content.md"]
    assert f"(section 1798.140(b)):** {UNKNOWN}" in texts["ab2013.md"]


def test_statements_fill_what_no_ledger_holds(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "stated.yaml"
    path.write_text("provider: Example AG, Basel\npurpose: to answer questions\nurl: https://example.org/data\n")
    texts = make(facts(run), read_statements(path), list(MAKERS))
    assert "**Provider name and contact details:** Example AG, Basel" in texts["eu-training-content.md"]
    assert "to answer questions" in texts["ab2013.md"]
    assert json.loads(texts["croissant.json"])["url"] == "https://example.org/data"
    path.write_text("providr: x\n")
    with pytest.raises(ConfigError, match="did you mean `provider`"):
        read_statements(path)


def test_eu_summary_has_every_section(texts: dict[str, str]) -> None:
    headings = re.findall(r"^#+ (\d(?:\.\d)*)\.", texts["eu-training-content.md"], re.M)
    assert headings == [
        "1", "1.1", "1.2", "1.3", "2", "2.1", "2.2", "2.2.1", "2.2.2", "2.3", "2.4", "2.5", "2.6",
        "3", "3.1", "3.2", "3.3",
    ]  # fmt: skip
    assert "less than 1 billion tokens (60 tokens for training)" in texts["eu-training-content.md"]


def test_ab2013_has_twelve_items(texts: dict[str, str]) -> None:
    assert [int(n) for n in re.findall(r"^(\d+)\. \*\*", texts["ab2013.md"], re.M)] == list(range(1, 13))
    assert "3 documents (69 tokens) and 1 conversations" in texts["ab2013.md"]


def test_ai_written_rows_are_named(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    for stage in ("gather", "curate"):
        path = run / stage / "conversations/made.parquet"
        table = pq.read_table(path)
        place = table.schema.get_field_index("teacher")
        pq.write_table(table.set_column(place, "teacher", pa.array(["SmolLM2-135M"])), path)
    texts = make(facts(run), Statements(), ["eu", "ab2013"])
    assert "**Was synthetic AI-generated data used?** yes\n- written by SmolLM2-135M" in texts["eu-training-content.md"]
    assert "was or is used:** yes: by SmolLM2-135M" in texts["ab2013.md"]


def test_croissant_is_valid(run: Path, texts: dict[str, str]) -> None:
    """The required properties of the specification, and references that lead somewhere."""
    metadata = json.loads(texts["croissant.json"])
    for key in ("@context", "@type", "conformsTo", "name", "description", "license", "url", "creator", "datePublished"):
        assert metadata[key], key
    assert metadata["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert metadata["@type"] == "sc:Dataset"
    files = {entry["@id"]: entry for entry in metadata["distribution"]}
    recorded = read_manifest(run / "curate")["files"]
    assert set(files) == {"documents/code.parquet", "documents/speeches.parquet", "conversations/made.parquet"}
    for name, entry in files.items():
        assert entry["@type"] == "cr:FileObject"
        assert entry["sha256"] == recorded[name]["sha256"]
        assert entry["contentSize"] == f"{(run / entry['contentUrl']).stat().st_size} B"
    ids = []
    for record in metadata["recordSet"]:
        assert record["@type"] == "cr:RecordSet"
        columns = []
        for field in record["field"]:
            ids.append(field["@id"])
            assert (field["@type"], field["dataType"]) == ("cr:Field", "sc:Text")
            columns.append(field["source"]["extract"]["column"])
            place = field["source"]["fileObject"]["@id"]
        assert columns == pq.read_schema(run / files[place]["contentUrl"]).names
        assert record["key"]["@id"] in ids
    assert len(ids) == len(set(ids))
    used = {key for entry in _objects(metadata) for key in entry if not key.startswith("@")}
    # These are words of schema.org; the context must explain every other.
    assert used - set(metadata["@context"]) == {
        "name", "description", "license", "url", "identifier", "creator", "datePublished", "dateCreated",
        "distribution", "contentUrl", "contentSize", "encodingFormat", "sha256",
    }  # fmt: skip


def _objects(value: object) -> list[dict[str, object]]:
    if isinstance(value, list):
        return [found for item in value for found in _objects(item)]
    if not isinstance(value, dict):
        return []
    return [value, *(found for key, item in value.items() if key != "@context" for found in _objects(item))]


def test_same_run_same_text_and_a_change_is_a_diff(run: Path, texts: dict[str, str], tmp_path: Path) -> None:
    assert difference(texts, make(facts(run), Statements(), list(MAKERS))) == ""
    other = build_run(tmp_path / "tiny")
    path = other / "curate/documents/code.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    write_manifest(other / "curate", kind="curate", counts={"documents": {"in": 4, "out": 2}})
    changes = difference(texts, make(facts(other), Statements(), list(MAKERS)), ("old", "new"))
    assert "--- old/data.md\n+++ new/data.md" in changes
    assert re.search(r"^-\| PSF-2.0 OR MIT \|", changes, re.M)


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "card")]
    assert main(["card", str(run), "--check", *out]) == 1  # nothing is there yet
    assert main(["card", str(run), *out]) == 0
    assert (tmp_path / "card/data.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["card", str(run), "--check", *out]) == 0
    assert capsys.readouterr().out == ""
    (tmp_path / "card/ab2013.md").write_text("old\n")
    assert main(["card", str(run), "--check", "--kind", "eu", *out]) == 0
    assert main(["card", str(run), "--check", *out]) == 1
    assert "-old" in capsys.readouterr().out
    assert main(["card", str(run), "--diff", str(run), *out]) == 0


def test_picture_of_a_corpus_that_is_not_tokenized(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", "curate")
    found = facts(run)
    assert draw_data(found).startswith(b"\x89PNG")
    assert "Not tokenized yet: unknown." in make(found, Statements(), ["data"])["data.md"]
    with pytest.raises(ArtifactError, match="no finished corpus"):
        facts(build_run(tmp_path / "early", "gather"))
