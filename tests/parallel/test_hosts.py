"""Supervisors of two machines that share a folder: real processes, ranks with little to do; with training:
benchmarks/hosts.py.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from freehold.core.config import fill
from freehold.core.errors import ConfigError
from freehold.parallel.config import ParallelConfig, check_divisible
from freehold.parallel.hosts import host_number

RANK = """
import json, os, signal, sys, time
from pathlib import Path
from freehold.parallel.heartbeat import Heartbeat

heartbeat, rank, run = Heartbeat(), int(os.environ["RANK"]), Path(sys.argv[1])
assert os.environ["WORLD_SIZE"] == "2" and os.environ["MASTER_ADDR"] == "node0"
world = int(Path(os.environ["FREEHOLD_HEARTBEAT"]).name[6:])
for step in range(8):
    heartbeat.beat(step, "step")
    if world == 1 and step == 4:
        (run / f"at_{rank}").touch()
        TROUBLE
    time.sleep(0.05)
print(json.dumps({"rank": rank, "world": world, "port": os.environ["MASTER_PORT"]}))
"""
MACHINE = """
import sys
from pathlib import Path
from freehold.parallel import hosts
from freehold.parallel.config import SuperviseConfig
from freehold.parallel.supervise import Supervisor

hosts.BEAT_S, hosts.LOST_S = 0.2, 1.0
run, number = Path(sys.argv[1]), int(sys.argv[2])
say = lambda line: print(line, flush=True)
others = hosts.Hosts(run / "hosts", number, 2, 1, say)
supervisor = Supervisor([sys.executable, "-c", (run / "rank.py").read_text(), str(run)], 1, run / f"host_{number}",
                        SuperviseConfig(max_relaunches=9), newest_step=lambda: -1, say=say, hosts=others)
print(supervisor.run())
others.close()
"""


class Machines:
    """Two machines; `boot` starts the command on one."""

    def __init__(self, folder, trouble):
        self.folder = folder
        (folder / "rank.py").write_text(RANK.replace("TROUBLE", trouble))

    def boot(self, number):
        command = [sys.executable, "-c", MACHINE, str(self.folder), str(number)]
        environment = {**os.environ, "MASTER_ADDR": "node0", "FREEHOLD_HOST": str(number)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def answers(*machines):
    outputs = [machine.communicate(timeout=30)[0].splitlines() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    return outputs, [json.loads(next(line for line in reversed(lines) if line.startswith("{"))) for lines in outputs]


def test_killed_rank_restarts_both_machines(tmp_path):
    machines = Machines(tmp_path, "rank == 1 and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)")
    outputs, found = answers(machines.boot(0), machines.boot(1))
    assert [(each["rank"], each["world"]) for each in found] == [(0, 2), (1, 2)]
    assert found[0]["port"] == found[1]["port"]
    assert outputs[0][0].startswith("machine 1: rank 1 was ended by SIGKILL after step 4")
    assert outputs[1][0].startswith("rank 1 was ended by SIGKILL after step 4")


def test_machine_that_dies_and_returns_is_waited_for(tmp_path):
    machines = Machines(tmp_path, "time.sleep(60)")
    first, second = machines.boot(0), machines.boot(1)
    while not (tmp_path / "at_1").exists():
        time.sleep(0.05)
    rank = json.loads((tmp_path / "host_1" / "world_001" / "rank_1.json").read_text())["pid"]
    second.kill()
    os.killpg(rank, signal.SIGKILL)
    second.communicate()
    time.sleep(1.5)  # longer than a machine may be silent
    assert first.poll() is None
    outputs, found = answers(first, machines.boot(1))
    assert outputs[0][0].startswith("machine 1 is lost: no sign")
    assert [each["world"] for each in found] == [2, 2]


@pytest.mark.parametrize("environment", [{}, {"FREEHOLD_HOST": "2", "MASTER_ADDR": "x"}, {"FREEHOLD_HOST": "1"}])
def test_machine_without_a_number_is_refused(environment):
    with pytest.raises(ConfigError, match="which of the machines"):
        host_number(2, environment)
    assert host_number(1, environment) == 0
    assert host_number(2, {"FREEHOLD_HOST": "1", "MASTER_ADDR": "x"}) == 1


def test_degrees_multiply_over_machines():
    parallel = fill(ParallelConfig, {"nproc": 4, "hosts": 2, "shard": 8}, "parallel")
    check_divisible(parallel, sequences=8, micro_sequences=1)
    with pytest.raises(ConfigError, match="parallel.nproc x parallel.hosts"):
        check_divisible(parallel.model_copy(update={"hosts": 1, "shard": 4, "replicate": 2, "nproc": 3}).model_copy(
            update={"hosts": 3}), sequences=8, micro_sequences=1)  # fmt: skip
