"""Metrics reach every callback: metrics.jsonl always, trackers that the recipe names, a user's own."""

import re
import sys
import textwrap
from pathlib import Path

import pytest
from test_loop import make

from freehold.core.errors import ConfigError
from freehold.core.log import Log, read_metrics
from freehold.trainer.callbacks import Console, RunInfo, WandB, build_callbacks
from freehold.trainer.config import TrainerConfig

DOCS = Path(__file__).parents[2] / "docs/callbacks.md"
STAND_IN = """
    from pathlib import Path

    class Run:
        def __init__(self, dir, name, id, resume, config, job_type):
            self.file = (Path(dir) / "calls.txt").open("a")
            print("init", name, id, resume, job_type, file=self.file)

        def define_metric(self, name, step_metric):
            print("axis", name, step_metric, file=self.file)

        def log(self, values):
            print("log", values, file=self.file)

        def finish(self):
            self.file.close()

    init = Run
"""


def settings(*callbacks):
    return TrainerConfig(dtype="float32", threads=1, checkpoint_every_steps=4, log_every_steps=2, callbacks=callbacks)


def write(folder, name, text):
    (folder / f"{name}.py").write_text(textwrap.dedent(text))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An empty folder of packages, first on the path; what a test imports from it is forgotten afterwards."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_documented_callback_is_found_by_its_entry_point(tmp_path, packages):
    text = DOCS.read_text()
    write(packages, "my_tracker", re.search(r"```python\n(.+?)```", text, re.S)[1])
    info = packages / "my_tracker-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-tracker\nVersion: 1.0\n")
    declared = re.search(r'entry-points."freehold.callbacks"\]\n +(\w+) = "([\w:.]+)"', text)
    (info / "entry_points.txt").write_text(f"[freehold.callbacks]\n{declared[1]} = {declared[2]}\n")
    make(tmp_path / "run", trainer=settings("lines")).run()
    lines = (tmp_path / "run/lines.txt").read_text().splitlines()
    assert lines[0] == "start pretrain 0 16"
    assert [line.split()[0] for line in lines[1:]] == ["2", "4", "5", "6", "8"]  # 5 and 8 end phases
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [" ".join([str(row.pop("step")), *sorted(row)]) for row in rows] == lines[1:]


def test_wandb_gets_numbers_on_an_axis_of_ours(tmp_path, packages):
    write(packages, "wandb", STAND_IN)
    folder = tmp_path / "mine" / "pretrain"
    folder.mkdir(parents=True)
    tracker = WandB(RunInfo(folder, "pretrain", 7, {}))
    tracker.log(8, {"loss/mean": 2.5, "phase": "stable", "moe/load/1": [1, 2]})
    tracker.close()
    assert (folder / "calls.txt").read_text().splitlines() == [
        "init mine-pretrain mine-pretrain allow pretrain",
        "axis * step",
        "log {'loss/mean': 2.5, 'step': 8}",
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package_names_the_pip_line(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[name], None)
    with pytest.raises(ConfigError, match=rf"(?s)callback {name} is not installed.*pip install 'freehold\[{name}\]'"):
        make(tmp_path, trainer=settings(name)).run()


def test_unknown_callback_names_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)unknown callback.*slack.*tensorboard, wandb"):
        build_callbacks(["slack"], RunInfo(tmp_path, "align", 0, {}), "align.trainer.callbacks")


def test_bare_trainer_opens_no_tracker(tmp_path):
    make(tmp_path, trainer=settings("slack"))


def test_console_says_every_tenth_log_point(tmp_path, capsys):
    console = Console(Log(tmp_path), total_steps=40, every_steps=2)
    figures = {"optim/grad_norm": 1.0, "optim/lr": 1.0, "perf/tokens_per_s": 9.0, "perf/mfu": 0.1}
    for step in (2, 20):
        console.log(step, {"loss/mean": 2.5, "phase": "stable", "perf/memory_bytes": 1e9, "perf/eta_s": 7.0, **figures})
    console.log(20, {"val/bpb": 1.25})
    said = capsys.readouterr().err
    assert "stable 2/40" not in said
    assert "stable 20/40  loss 2.500  norm 1.00  lr x1.00  9 tok/s  MFU 10%  1.0 GB  7 s left" in said
    assert "step 20: validation bits per byte 1.2500" in said
