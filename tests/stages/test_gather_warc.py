"""Web archives: pages come in with address, day and headers, and what sites reserve is judged at every gate."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from gather_fixtures import FREE, documents, gather, page, report

from freehold import cli
from freehold.core.artifact import Workspace, write_manifest
from freehold.core.config import fill
from freehold.core.document import Document, read_rows
from freehold.core.errors import DataError, LicenceError
from freehold.core.log import Log
from freehold.data.shards import ShardSet
from freehold.ledger.policy import Policy
from freehold.ledger.reservations import Reservations
from freehold.run import policy_check
from freehold.run.report import tables
from freehold.run.takedown import takedown
from freehold.run.takedown_recipe import write_recipe
from freehold.stages.curate.config import CurateConfig
from freehold.stages.curate.run import run as curate
from freehold.stages.gather.config import GatherConfig
from freehold.stages.tokenize.config import TokenizeConfig
from freehold.stages.tokenize.run import run as tokenize

WORDS = """
    the of and to in that it was for on as with his they at be this from had by but not what all were we when your
    can said there use an each which she do how their if will up other about out many then them these so some her
    would make like him into time has look two more write go see number no way could people my than first water been
    call who oil its now find long down day did get come made may part harbour mountain library orchard railway
"""
HTML = "Content-Type: text/html"


def story(number: int) -> str:
    dice = random.Random(number)
    return " ".join(" ".join(dice.choices(WORDS.split(), k=9)).capitalize() + "." for _ in range(20))


def record(address: str, body: bytes, *headers: str, status: str = "200 OK", number: int = 0, kind: str = "response") -> bytes:  # noqa: E501 # fmt: skip
    """Return one WARC record of an HTTP answer."""
    http = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", *headers)).encode() + b"\r\n"
    block = http + body
    head = (
        f"WARC/1.1\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{number}>\r\nWARC-Date: 2021-03-04T05:06:07Z\r\n"
        f"WARC-Target-URI: {address}\r\nContent-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def crawl() -> list[bytes]:
    a, b = "https://a.example", "https://b.example"
    cc = 'Link: <https://creativecommons.org/licenses/by-sa/4.0/>; rel="license"'
    return [
        record(f"{a}/0", page("Harbour", f"<p>{story(0)}</p>"), HTML, number=0),
        record(f"{a}/1", f"<p>caf\xe9. {story(1)}</p>".encode("latin-1"), f"{HTML}; charset=iso-8859-1", number=1),
        record(f"{a}/2", gzip.compress(story(2).encode()), "Content-Type: text/plain", "Content-Encoding: gzip", number=2),  # noqa: E501
        record(f"{a}/3", page("No", f"<p>{story(3)}</p>"), HTML, "X-Robots-Tag: noai", number=3),
        record(f"{b}/4", page("No", f"<p>{story(4)}</p>", '<meta name="tdm-reservation" content="1">'), HTML, number=4),
        record(f"{b}/5", page("Gone", f"<p>{story(5)}</p>"), HTML, status="404 Not Found", number=5),
        record(f"{b}/6", b"\x89PNG", "Content-Type: image/png", number=6),
        record(f"{b}/7", page("Yes", f"<p>{story(7)}</p>"), HTML, cc, number=7),
        record(f"{a}/asked", b"", number=8, kind="request"),
    ]  # fmt: skip


def source(folder: Path, **more: Any) -> dict[str, Any]:
    return {"kind": "warc", "path": str(folder), **FREE, **more}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from a web archive to tokens."""
    root = tmp_path_factory.mktemp("web")
    (root / "crawl").mkdir()
    records = crawl()
    (root / "crawl" / "one.warc").write_bytes(b"".join(records[:2]))
    (root / "crawl" / "two.warc.gz").write_bytes(b"".join(gzip.compress(one) for one in records[2:]))
    out = root / "runs" / "web"
    keys: dict[str, Any] = {"sources": {"web": source(root / "crawl", members=["*.example/?"], settled="looked at")}}
    keys["policy"] = {"allow_copyleft": True}
    counts = gather(out / "gather", keys["sources"], policy=keys["policy"])
    config = fill(GatherConfig, keys, "gather").model_dump(mode="json")
    write_manifest(out / "gather", kind="gather", counts=counts, config=config)
    work = Workspace(out / "curate", "curate", "web", 0, Log(quiet=True), {"gather": out / "gather"})
    write_manifest(out / "curate", kind="curate", counts=curate(CurateConfig(), work), config={})
    work = Workspace(out / "tokenize", "tokenize", "web", 0, Log(quiet=True), {"curate": out / "curate"})
    write_manifest(out / "tokenize", kind="tokenize", counts=tokenize(TokenizeConfig(vocab_size=400), work), config={})
    return out


def test_pages_come_with_address_day_and_headers(run: Path) -> None:
    rows = {row.address: row for row in documents(run / "gather", "web")}
    assert sorted(rows) == ["https://a.example/0", "https://a.example/1", "https://a.example/2", "https://b.example/7"]
    assert {row.fetched for row in rows.values()} == {"2021-03-04"}
    assert rows["https://a.example/0"].text.startswith(f"Harbour\n\n{story(0)}")
    assert rows["https://a.example/1"].text.startswith("caf\xe9.")
    assert rows["https://a.example/2"].text.startswith(story(2))
    assert rows["https://b.example/7"].licence == "CC-BY-SA-4.0 AND LicenseRef-PD-USGov"
    found = report(run / "gather", "web")
    assert {host: one["rule"] for host, one in found["reserved"]["hosts"].items()} == {
        "a.example": "https://a.example/3, HTTP header: x-robots-tag: noai",
        "b.example": "https://b.example/4, HTML: tdm-reservation: 1",
    }
    assert {one["date"] for one in found["reserved"]["hosts"].values()} == {"2021-03-04"}
    reasons = [one["reason"] for one in found["skipped"]["named"]]
    assert any("404" in reason for reason in reasons)
    assert any("image/png" in reason for reason in reasons)
    shown = {table.title: table.rows for table in tables(run)}["Reserved by their sites"]
    assert [(*row[:2], row[5]) for row in shown] == [(f"{name}.example", "1", "2021-03-04") for name in "ba"]
    assert all(int(row[3]) > 100 for row in shown)
    assert list(found["files"]) == ["one.warc", "two.warc.gz"]


def test_addresses_go_through_curate_to_tokens(run: Path) -> None:
    kept = {row.id: row.address for row in read_rows(run / "curate/documents/web.parquet", Document)}
    assert kept
    assert all(kept.values())
    shards = ShardSet.load(run / "tokenize/tokens", verify=True)
    for split in ("train", "validation"):
        shard = shards.shards["web", split]
        table = pq.read_table(shard.path.with_suffix(".parquet"))
        if len(table):
            assert dict(zip(shard.ids, table["address"].to_pylist(), strict=True)).items() <= kept.items()


def snapshot(folder: Path, site: str = "a.example") -> Reservations:
    (folder / site).mkdir(parents=True, exist_ok=True)
    (folder / site / "robots.txt").write_text("User-agent: GPTBot\nDisallow: /\n")
    return Reservations(snapshot=str(folder), date="2026-11-01")


def test_later_reservation_stops_the_mixture_and_is_a_takedown(run: Path, tmp_path: Path) -> None:
    policy = Policy.model_validate({"allow_copyleft": True})
    policy_check.before_stage(run, "pretrain", policy, {}, None, snapshot(tmp_path / "other", "c.example"))
    today = snapshot(tmp_path / "sites")
    with pytest.raises(LicenceError, match=r"reserved by a\.example on 2026-11-01, a\.example/robots\.txt:2") as caught:
        policy_check.before_stage(run, "pretrain", policy, {}, None, today)
    groups = policy_check.corpus(run, policy, snapshot=today.open())
    lost = next(group for group in groups if group.verdict.decision == "refuse")
    trained = [r for r in read_rows(run / "curate/documents/web.parquet", Document) if "a.example" in r.address]
    trained = [row for row in trained if row.split == "train"]
    table = pq.read_table(run / "tokenize/tokens/web.train.parquet").to_pylist()
    tokens = sum(row["tokens"] for row in table if row["id"] in {one.id for one in trained})
    assert lost.documents == len(trained)
    assert f"{len(trained)} documents, {tokens:,} tokens" in str(caught.value)
    answer = takedown(run, "reserved", reservations=today)
    assert (answer.matched_by, answer.asked) == ("reserved", 3)
    assert takedown(run, "A.EXAMPLE").asked == takedown(run, "a.example").asked == 3
    (run / "gather/resolved.yaml").write_text("sources: {}\n")
    (run / "curate/resolved.yaml").write_text("exclude: {}\n")
    written = Path(write_recipe(run, answer, tmp_path, today).recipe).read_text()
    assert all(row.id in written for row in trained)
    assert "date: '2026-11-01'" in written


def test_rights_and_takedown_read_a_snapshot_that_is_typed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot(tmp_path / "sites")
    typed = ["--reservations", str(tmp_path / "sites"), "--date", "2026-11-02"]
    assert cli.main(["rights", str(run)]) == 0
    assert cli.main(["rights", str(run), *typed]) == 1
    assert "reserved by a.example on 2026-11-02" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["takedown", "reserved", str(run), *typed]) == 0
    assert "reserved" in capsys.readouterr().out
    assert cli.main(["takedown", "reserved", str(run)]) == 2


def test_archives_that_are_damaged_or_bombs_are_named(tmp_path: Path) -> None:
    whole = b"".join(crawl()[:3])
    (tmp_path / "crawl").mkdir()
    (tmp_path / "crawl" / "cut.warc").write_bytes(whole[:-300] + b"no record" * 40)
    gather(tmp_path / "out", {"web": source(tmp_path / "crawl")})
    assert [row.address for row in documents(tmp_path / "out", "web")][:2] == ["https://a.example/0", "https://a.example/1"]  # noqa: E501 # fmt: skip
    with pytest.raises(DataError, match="web archives unpack to more than they may"):
        gather(tmp_path / "no", {"web": source(tmp_path / "crawl", max_unpacked_bytes=1000)})
    bomb = record("https://a.example/bomb", gzip.compress(b"a " * 4_000_000), "Content-Type: text/plain",
                  "Content-Encoding: gzip")  # fmt: skip
    (tmp_path / "crawl" / "cut.warc").write_bytes(bomb + whole)
    gather(tmp_path / "bomb", {"web": source(tmp_path / "crawl", max_document_bytes=100_000)})
    assert len(documents(tmp_path / "bomb", "web")) == 3
    assert "max_document_bytes" in report(tmp_path / "bomb", "web")["skipped"]["named"][0]["reason"]
    (tmp_path / "crawl" / "cut.warc").unlink()
    (tmp_path / "crawl" / "one.warc.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match="a page of a web archive is not where it was"):
        gather(tmp_path / "stream", {"web": source(tmp_path / "crawl")})
    with pytest.raises(DataError, match="some sources of the recipe are not here"):
        gather(tmp_path / "none", {"web": source(tmp_path / "nowhere")})
