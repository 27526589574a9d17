"""The report of a run: what is there is shown, what is missing is named."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from freehold.core.artifact import write_json, write_manifest
from freehold.core.errors import ArtifactError
from freehold.core.table import Table
from freehold.run import layout, report
from freehold.run.figure import HEAT_COLUMNS, draw, heat_map, phase_spans, picture


def metrics_row(step: int, phase: str, **more: object) -> dict[str, object]:
    return {
        "step": step,
        "phase": phase,
        "tokens": step * 100,
        "loss/mean": 5.0 - step / 10,
        "optim/lr": 1.0,
        "perf/tokens_per_s": 1000.0 + step,
        "perf/mfu": 0.25,
        "perf/memory_bytes": 2_000_000_000,
        "moe/max_vio": 2.0 / step,
        "moe/max_vio/1": 2.0 / step,
        "moe/max_vio/10": 1.0 / step,
        "moe/max_vio/2": 3.0 / step,
        "moe/load/1": [3, 1, 0, 0],
        "moe/load/2": [1, 1, 1, 1],
        "moe/dead": 2,
        "moe/entropy": 0.75,
        "moe/entropy/1": 0.5,
        "moe/bias_abs_max": 0.25,
        "moe/bias_abs_max/1": 0.125 * step,
        "moe/router_logit_max": 8.0,
        "moe/router_logit_max/1": 3.0,
        **more,
    }


@pytest.fixture
def rows() -> list[dict[str, object]]:
    return [
        metrics_row(1, "stable"),
        metrics_row(2, "stable"),
        {"step": 2, "val/bpb": 3.0, "val/bpb/plays": 3.2},
        metrics_row(3, "anneal"),
        {"step": 3, "moe/alarm": [1, 2]},
        metrics_row(4, "anneal"),
        {"step": 4, "val/bpb": 2.0, "val/bpb/plays": 2.2},
    ]


@pytest.fixture
def run_folder(tmp_path: Path, rows: list[dict[str, object]]) -> Path:
    run = tmp_path / "small"
    for stage in layout.WALK:
        (run / stage).mkdir(parents=True)
    (run / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    align = [metrics_row(1, "sft", **{"loss/mean": 2.5}), metrics_row(2, "sft", **{"loss/mean": 1.5})]
    (run / "align" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in align))
    sources = {
        "plays": source("plays==1.0", {"LicenseRef-PD": 7}, "MIT", 7, 12345),
        "code": source("3.11", {"MIT": 2, "PSF-2.0": 1500}, "PSF-2.0", 1502, 99),
        "docs": {"kind": "debian", "left_out": "GPL-2.0-only is copyleft", "documents": 0, "bytes": 0},
    }
    write_json(run / "gather" / "sources.json", sources)
    write_json(run / "evaluate" / "results.json", RESULTS)
    exact = {"mean_kl": 1e-13, "top1_agreement": 1.0, "passed": True, "failures": []}
    write_json(run / "export" / "parity.json", {"reference": "our model in fp32", "exports": {"hf": exact}})
    write_json(run / "serve" / "answer.json", {"question": "What is the capital of France?", "answer": "Paris."})
    (run / "export" / "gguf").mkdir()
    (run / "export" / "gguf" / "Small-F32.gguf").write_bytes(b"x" * 1_500_000)
    (run / "pretrain" / "base").mkdir()
    (run / "pretrain" / "base" / "trainer.json").write_text('{"stage_type": "Base"}')
    write_manifest(run / "pretrain" / "base", kind="checkpoint")
    share = {"source": "plays", "tokens": 90, "upsampled": 1.0}
    mixture = [{**share, "phase": "stable"}, {**share, "phase": "anneal", "tokens": 1230, "upsampled": 2.5}]
    for stage in layout.WALK:
        counts = {"mixture": mixture, "epochs": {"plays": 1.5}} if stage == "pretrain" else {}
        write_manifest(run / stage, kind=stage, counts=counts, seconds=12.34, peak_memory_bytes=1_500_000_000)
    return run


def source(version: str, licences: dict[str, int], wrapper: str, documents: int, size: int) -> dict[str, object]:
    rights = {"version": version, "licences": licences, "wrapper_licence": wrapper}
    return {**rights, "documents": documents, "bytes": size}


def accuracy(value: float) -> dict[str, object]:
    return {"items": 40, "correct": 10, "accuracy": value, "low": value - 0.1, "high": value + 0.1, "chance": 0.25}


RESULTS = {
    "settings": {"context_tokens": 64, "dtype": "float32"},
    "text": {
        "sources": {"plays": {"bytes": 1000, "documents": 2, "xz": 2.5, "zstd": 2.6}},
        "overall": {"bytes": 1000, "documents": 2, "xz": 2.5, "zstd": 2.6},
    },
    "checkpoints": {
        name: {
            "bits_per_byte": {"sources": {"plays": {"bits_per_byte": bits}}, "overall": {"bits_per_byte": bits}},
            "tasks": {"tasks": {"capitals": {"kind": "choice", **accuracy(right)}}, "overall": accuracy(right)},
        }
        for name, bits, right in (("base", 2.0, 0.3), ("preview", 2.25, 0.6))
    },
    "gain": {"from": "base", "to": "preview", "tasks": {"capitals": 0.3}, "overall": 0.3},
}


def test_report_shows_what_each_stage_left(run_folder: Path) -> None:
    path = report.write_report(run_folder)
    text = path.read_text(encoding="utf-8")
    sha = json.loads((run_folder / "pretrain" / "base" / "manifest.json").read_text())["content_sha256"][:12]
    assert path == run_folder / "report.md"
    assert "| gather | gather/ |" in text
    assert "| 12.3 | 1.50 |" in text
    assert "| docs |  | left out: GPL-2.0-only is copyleft |  | 0 | 0 |" in text
    assert f"| Base | pretrain/base/ | {sha} |" in text
    assert "| GGUF Small-F32.gguf (1.5 MB) | export/gguf/Small-F32.gguf |" in text
    assert "| pretrain | 4 | 400 | 4.900 | 4.600 | 1,003 | 25.0 % | 2.00 |" in text
    assert "| plays | 90 (x1.0) | 1,230 (x2.5) | 1.50 |" in text
    assert "| plays | 1,000 | 2.500 | 2.600 | 2.000 (0.80) | 2.250 (0.90) |" in text
    assert "| capitals | 40 | 25 | 30.0 [20.0–40.0] | 60.0 [50.0–70.0] | +30.0 |" in text
    assert "| hf | 1e-13 | 1 | yes |" in text
    assert "| plays | plays==1.0 | LicenseRef-PD | MIT | 7 | 12,345 |" in text
    assert "| code | 3.11 | PSF-2.0 (1,500), MIT (2) | PSF-2.0 | 1,502 | 99 |" in text
    assert "| layer 1 | 2.00 | 2.00 | 0.50 | 0.50 | 0.50 | 3.00 |" in text
    assert "Experts without a token in the last step: 2." in text
    assert "Collapse alarms: 1, the first at step 3 (layer 1, 2)." in text
    assert text.index("layer 2 |") < text.index("layer 10 |")
    assert "> What is the capital of France?" in text
    assert "> **Paris.**" in text
    assert "has not finished" not in text


def test_report_is_the_same_each_time(run_folder: Path) -> None:
    report.write_report(run_folder)
    first = (run_folder / "report.png").read_bytes(), (run_folder / "report.md").read_bytes()
    report.write_report(run_folder)
    assert first == ((run_folder / "report.png").read_bytes(), (run_folder / "report.md").read_bytes())


def test_picture_is_a_png_of_readable_size(run_folder: Path) -> None:
    report.write_report(run_folder)
    data = (run_folder / "report.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert width > 1200
    assert height > 700


def test_empty_run_names_what_is_missing_and_draws_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a run folder"):
        report.write_report(tmp_path)
    write_manifest(tmp_path / "gather", kind="gather")
    (tmp_path / "report.png").write_bytes(b"of an earlier run")
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert (
        "the stage has not finished: curate, tokenize, pretrain, align, evaluate, export, audit, release, serve" in text
    )
    assert not (tmp_path / "report.png").exists()
    assert "not finished, so not shown: curate" in report.summary(tmp_path)


def test_full_disk_keeps_the_old_picture(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_folder / "report.png").write_bytes(b"of an earlier run")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtifactError, match="No space left"):
        report.write_report(run_folder)
    assert (run_folder / "report.png").read_bytes() == b"of an earlier run"


def test_summary_fits_the_terminal_and_holds_the_figures(run_folder: Path) -> None:
    text = report.summary(run_folder, width=100)
    assert max(map(len, text.splitlines())) <= 100
    for part in ("2.250 (0.90)", "+30.0", "LicenseRef-PD", "1e-13", "it answered:      Paris."):
        assert part in text


def test_rich_markup_in_an_answer_is_text(run_folder: Path) -> None:
    write_json(run_folder / "serve" / "answer.json", {"question": "[bold]?", "answer": "[red]x[/red]"})
    assert "[red]x[/red]" in report.summary(run_folder)


def test_training_rows_count_alignment_on_from_pretraining(run_folder: Path) -> None:
    rows = report.training_rows(run_folder)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 3, 4, 4, 5, 6]
    assert [row["phase"] for row in rows[-2:]] == ["SFT", "SFT"]


def test_phases_touch_and_rows_without_one_belong_to_the_last(rows: list[dict[str, object]]) -> None:
    assert phase_spans(rows) == [("stable", 1, 2), ("anneal", 2, 4)]
    assert phase_spans([{"step": 3, "val/bpb": 1.0}]) == [("", 3, 3)]


def test_heat_map_is_relative_to_an_equal_share(rows: list[dict[str, object]]) -> None:
    names, edges, relative = heat_map(rows)
    assert names == ["1", "2"]
    assert edges.tolist() == [0, 1, 2, 3, 4]
    assert relative[0].tolist() == [[3, 1, 0, 0], [1, 1, 1, 1]]


def test_heat_map_sums_steps_into_bins() -> None:
    rows = [{"step": s, "moe/load/3": [s % 2, 1 - s % 2]} for s in range(1, 2 * HEAT_COLUMNS + 1)]
    names, edges, relative = heat_map(rows)
    assert relative.shape == (HEAT_COLUMNS, 1, 2)
    assert edges[0] == 0
    assert edges[-1] == 2 * HEAT_COLUMNS
    assert (relative == 1).all()  # two steps a bin, one for each expert


def test_of_many_layers_some_are_shown_and_the_title_says_so() -> None:
    rows = [{"step": s, "loss/mean": 3.0, **{f"moe/load/{n}": [n, 1, 1, 1] for n in range(40)}} for s in range(1, 9)]
    axes = picture(rows, {}).axes[1]
    assert axes.get_title(loc="left") == "Load of every expert, 1 = an equal share (6 of 40 layers)"
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"layer {n}" for n in (0, 8, 16, 23, 31, 39)]


def test_alarms_are_marked_and_figures_drawn_layer_by_layer(rows: list[dict[str, object]]) -> None:
    figure = picture(rows, {})
    panels = {axes.get_title(loc="left").partition(":")[0]: axes for axes in figure.axes}
    marked = {line.get_label(): list(line.get_xdata()) for line in panels["MaxVio"].get_lines()}
    assert marked["collapse alarm"] == [3]
    assert len(panels["MaxVio"].get_lines()) == 3 + 1 + 1  # three layers, the mean, the alarms
    assert len(panels["Router"].get_lines()) == 1 + 1


def test_draws_without_experts_validation_or_results() -> None:
    rows = [{"step": s, "phase": "stable", "loss/mean": 3.0, "optim/lr": 1.0} for s in range(1, 4)]
    assert draw(rows, {})[:4] == b"\x89PNG"


def test_markdown_table_escapes_what_would_break_it() -> None:
    text = Table("T", ["a", "b"], [["x|y", "two\nlines"]], "Note.").markdown(level=3)
    assert text == "### T\n\n| a | b |\n| :-- | --: |\n| x\\|y | two lines |\n\nNote.\n"


def test_reading_a_run_needs_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from freehold.run import report; report.summary(Path(sys.argv[1]));"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_next_commands_work_as_typed(tmp_path, monkeypatch):
    """Where the shell does not find `freehold`, its path is printed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    command = report.next_commands(tmp_path)[0].removesuffix(f" chat {tmp_path}")
    assert command != "freehold"
    done = subprocess.run([*command.split(), "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("freehold "), done.stderr
