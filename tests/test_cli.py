"""Every failure says why, as text and, with --json, as one JSON object on stdout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from freehold import cli
from freehold.core.errors import ConfigError
from freehold.run import settings
from freehold.run.layout import RunFolder
from freehold.run.processes import Ended, StageFailed, locked, run_process
from freehold.run.recipe import resolve

RECIPE = "recipes/tiny.yaml"


class Interrupting(list):
    """Arguments during whose reading Ctrl-C is pressed."""

    def __iter__(self):
        signal.raise_signal(signal.SIGINT)
        return super().__iter__()


@pytest.mark.parametrize(
    ("args", "what", "where"),
    [
        ("run RECIPE runs_dir=FILE", "could not write or read: Not a directory", "FILE/tiny"),
        ("run RECIPE runs_dir=/proc/nope", "could not write or read", "/proc/nope/tiny"),
        ("run RECIPE name=" + "x" * 300, "could not write or read: File name too long", None),
        ("run RECIPE pretrain.optim.lr=fast", "not a valid value", "pretrain.optim.lr"),
        ("run RECIPE until=nowhere", "no such stage", "until"),
        ("run RECIPE --nonsense", "unrecognized argument: --nonsense", None),
        ("run", "`freehold run` needs to know which recipe", "freehold run"),
        ("walk", "invalid choice", "freehold"),
        ("trace x --step one", "invalid int value", "freehold trace"),
        ("lineage nowhere", "no such run folder", "nowhere"),
    ],
)
def test_failures_are_printed_as_text_and_json(args, what, where, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    words = args.replace("RECIPE", RECIPE).replace("FILE", str(file)).split()
    assert cli.main(words) == 2
    assert capsys.readouterr().out == ""
    assert cli.main([*words, "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert what in error["what"]
    assert where is None or error["where"] == where.replace("FILE", str(file))
    assert error["todo"] or error["expected"]
    assert err.startswith("error: ")
    assert what in err


def test_ctrl_c_before_anything_is_read(capsys):
    assert cli.main(Interrupting(["run", RECIPE, "--dry-run", "--json"])) == 130
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["what"] == "stopped"
    assert err.startswith("error: stopped")


def test_a_stage_hands_its_error_to_the_walk(tmp_path, capfd):
    recipe = tmp_path / "r.yaml"
    source = "{kind: folder, path: nowhere, licence: MIT, licence_evidence: {rule: mine}}"
    recipe.write_text(f"name: r\nruns_dir: {tmp_path}\ngather:\n  sources:\n    mine: {source}\n")
    assert cli.main(["run", str(recipe), "until=gather", "--json"]) == 2
    out, err = capfd.readouterr()
    error = json.loads(out)["error"]
    assert error["what"].startswith("gather: ")
    assert "nowhere" in f"{error['where']} {error['found']}"
    assert err.count(error["what"].removeprefix("gather: ")) == 1  # printed once, by the walk


@pytest.mark.parametrize("name", ["1e5", "007", "2024", "2024_01_15", "2024-01-15", "on", "1.50"])
def test_a_run_is_called_what_is_written(name, tmp_path):
    assert resolve(Path(RECIPE), fork=name).head.name == name
    assert resolve(Path(RECIPE), [f"name={name}"]).head.name == name
    assert resolve(Path(RECIPE), [f'name="{name}"']).head.name == name
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"base: {Path(RECIPE).resolve()}\nname: {name}\n")
    assert resolve(recipe).head.name == name


def test_a_name_that_is_no_text():
    with pytest.raises(ConfigError, match="name"):
        resolve(Path(RECIPE), ["name=null"])


def test_schema_shows_first_what_a_newcomer_sets(capsys):
    assert cli.main(["schema"]) == 0
    text = capsys.readouterr().out
    for stage, keys in settings.FIRST.items():
        assert cli.main(["schema", stage]) == 0
        schema = json.loads(capsys.readouterr().out)
        assert schema["x-first"] == list(keys)
        assert list(schema["properties"])[0] == keys[0].partition(".")[0]
        assert len(settings.first_settings(stage)) == len(keys)  # each is a setting that exists
        assert all(f"  {stage}.{key} " in text for key in keys)


CHILD = """
import signal, sys, time
from pathlib import Path
seen = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: seen.append(number))
print("a library chats")
Path(sys.argv[1]).touch()
while not seen:
    time.sleep(0.01)
time.sleep(0.1)  # it saves what it has; a second signal would arrive meanwhile
print('{"signals": %s}' % [int(number) for number in seen])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_stage_once_and_is_awaited(number, tmp_path, capsys):
    ready = tmp_path / "ready"

    def press() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    presser = threading.Thread(target=press)
    presser.start()
    with locked(RunFolder(tmp_path)) as lock:
        found = run_process([sys.executable, "-c", CHILD, str(ready)], lock)
    presser.join()
    assert found == Ended(0, {"signals": [number]}, asked=True)
    assert signal.getsignal(number) == handler
    assert capsys.readouterr().err == "a library chats\n"


def test_a_suspended_walk_suspends_its_stage(tmp_path):
    """Ctrl-Z stops both, and `fg` lets both continue."""
    code = (
        "import sys; from freehold.run import processes as p; print(p.run_process([sys.executable, *sys.argv[1:]], 2))"
    )
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(0.5); print(1)"
    process = subprocess.Popen([sys.executable, "-c", code, "-c", child], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
        time.sleep(0.01)
    states = [Path(f"/proc/{n}/stat") for n in (process.pid, pid)]
    process.send_signal(signal.SIGTSTP)
    deadline = time.monotonic() + 20
    while any(path.read_text().rpartition(")")[2].split()[0] != "T" for path in states):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out == "Ended(code=0, answer={}, asked=False)\n"


@pytest.mark.parametrize(
    ("code", "exit_code", "says"),
    [
        (-9, 137, "perhaps by the system for lack of memory"),
        (137, 137, "perhaps by the system for lack of memory"),
        (-15, 143, "was stopped"),
        (130, 130, "was stopped"),
        (-11, 139, "did not finish"),
        (1, 1, "did not finish"),
    ],
)
def test_how_a_stage_ended(code, exit_code, says):
    error = StageFailed("pretrain", code)
    assert error.code == exit_code
    assert says in error.what
    assert error.todo


def test_no_home_no_locale_and_escape_codes_are_no_traceback(tmp_path):
    """An empty environment, a terminal of ASCII, and a name that would clear the screen."""
    recipe = tmp_path / "\x1b[2J\u00e9.yaml"
    recipe.write_text("name: r\ngather: 3\n")
    command = [sys.executable, "-m", "freehold.cli", "run", str(recipe), "--dry-run"]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin"}
    result = subprocess.run(command, capture_output=True, env=environment, cwd=Path(cli.__file__).parents[2])
    assert result.returncode == 2
    assert b"Traceback" not in result.stderr
    assert b"\x1b" not in result.stderr
    command[4:] = [RECIPE, "--dry-run"]
    result = subprocess.run(command, capture_output=True, env=environment, cwd=Path(cli.__file__).parents[2])
    assert result.returncode == 0, result.stderr
