"""The launchers in examples/: what they would start is a command of ours, with the environment that it reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from freehold.core.config import fill, merge
from freehold.planner.config import PlanConfig, plan_of_recipe
from freehold.planner.estimate import estimate
from freehold.run.recipe import resolve

ROOT = Path(__file__).parents[2]
RECIPE = "gpu8"
DEGREES = ["parallel.nproc=0", "parallel.shard=2", "parallel.expert=2"]


@pytest.fixture
def machine(tmp_path):
    """A PATH with what a cluster has and this machine has not; `freehold` prints its place, then does a dry run."""
    programs = {
        "scontrol": "echo node7; echo node8",
        "srun": "while [[ $1 == --* ]]; do shift; done; "
        'for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n SLURM_NTASKS=2 "$@"; done',
        "freehold": 'echo "at $RANK $LOCAL_RANK of $WORLD_SIZE by $MASTER_ADDR:$MASTER_PORT"; '
        f'exec {sys.executable} -m freehold.cli "$@" --dry-run',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "FREEHOLD_VENV": "none"}


def do(command, env):
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_slurm(machine):
    script = ROOT / "examples" / "slurm.sh"
    assert do(["bash", "-n", script], machine).returncode == 0
    env = {**machine, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "1234567"}
    done = do(["bash", script, RECIPE, *DEGREES], env)
    assert done.returncode == 0, done.stderr
    assert [f"at {n} {n} of 2 by node7:34567" in done.stdout for n in (0, 1)] == [True, True]
    assert done.stdout.count("sharded: replicate 1 x shard 2 x context 1 x pipeline 1 = 2 processes") == 2
    assert "usage: sbatch" in do(["bash", script], env).stderr
    assert do(["bash", script, RECIPE, "parallel.shards=2"], env).returncode == 2


def test_slurm_requeues_before_the_time_limit(tmp_path):
    """The batch shell gets USR1; the ranks save on TERM; the job is queued again under its number."""
    calls, programs = tmp_path / "calls", tmp_path / "bin"
    programs.mkdir()
    stubs = {
        "scontrol": f'if [ "$1" = show ]; then echo node7; else echo scontrol "$@" >> {calls}; fi',
        "scancel": f'echo scancel "$@" >> {calls}; kill -TERM "$(cat {tmp_path}/rank)"',
        "srun": f"trap 'echo saved >> {calls}; exit 143' TERM; echo $$ > {tmp_path}/rank; while :; do sleep 0.1; done",
        "freehold": "exit 1",
    }
    for name, text in stubs.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node7", "SLURM_JOB_ID": "77"}
    process = subprocess.Popen(["bash", ROOT / "examples" / "slurm.sh", RECIPE], env=env, cwd=tmp_path)
    while not (tmp_path / "rank").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert calls.read_text().splitlines() == ["scancel --signal=TERM 77", "saved", "scontrol requeue 77"]


def test_slurm_names_a_missing_environment(tmp_path):
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_NODELIST": "node7", "SLURM_JOB_ID": "77"}
    done = subprocess.run(
        ["bash", ROOT / "examples" / "slurm.sh", RECIPE], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "FREEHOLD_VENV" in done.stderr


@pytest.mark.parametrize(("name", "device", "gib", "minutes"), [("gpu1", "a100", 40, 10), ("gpu8", "h100", 80, 10)])
def test_gpu_recipe_fits_by_the_plan(name, device, gib, minutes):
    pretrain = resolve(ROOT / "recipes" / f"{name}.yaml").stages["pretrain"].config
    plan = fill(PlanConfig, merge(plan_of_recipe(name, pretrain.model_dump(mode="json")),
                                  {"machine": {"device": device}}), "plan")  # fmt: skip
    found = estimate(plan)
    assert found["problems"] == []
    assert found["figures"]["memory/peak"].value < 0.92 * gib * 2**30
    assert found["figures"]["run/days"].value * 24 * 60 < minutes
    assert plan.parallel.devices == int(name[3:])


def test_slurm_asks_for_the_processes_its_example_needs():
    text = (ROOT / "examples" / "slurm.sh").read_text()
    asked = {k: int(v) for k, v in (w.split("=") for w in text.split() if w.startswith(("--nodes=", "--ntasks-per")))}
    replicate, shard = (int(w.split("=")[1]) for w in text.split() if w.startswith(("parallel.rep", "parallel.sh")))
    assert asked["--nodes"] * asked["--ntasks-per-node"] == replicate * shard


def job():
    service, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text())
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return job, container, {e["name"]: e["value"] for e in container["env"]}


def test_kubernetes(machine):
    _, container, env = job()
    script = container["command"][2]
    assert do(["bash", "-n", "-c", script], machine).returncode == 0
    env = {**machine, **env, "RANKS_PER_POD": "2", "WORLD_SIZE": "4", "JOB_COMPLETION_INDEX": "1"}
    done = do([*container["command"], RECIPE, "parallel.nproc=0", "parallel.shard=4", "parallel.expert=2"], env)
    assert done.returncode == 0, done.stderr
    assert all(f"at {2 + n} {n} of 4 by freehold-0.freehold:29500" in done.stdout for n in (0, 1))
    assert done.stdout.count("shard 4 x context 1 x pipeline 1 = 4 processes") == 2
    failed = do([*container["command"], RECIPE, "parallel.shards=4"], env)
    assert failed.returncode == 1
    assert "parallel.shards" in failed.stderr


@pytest.mark.parametrize(("rank_does", "code"), [("exit 0", 0), ("((RANK)) && exit 3; exec sleep 60", 1)])
def test_kubernetes_notices_what_ends_before_it_looks(tmp_path, rank_does, code):
    _, container, env = job()
    (tmp_path / "freehold").write_text(f"#!/bin/bash\n{rank_does}\n")
    (tmp_path / "freehold").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **env, "RANKS_PER_POD": "4", "JOB_COMPLETION_INDEX": "0"}
    done = subprocess.run(container["command"], env=env, capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stderr) == (code, "")


def test_kubernetes_counts_its_processes_the_same_everywhere():
    spec, container, env = job()
    spec, degrees = spec["spec"], dict(a.split("=") for a in container["args"] if "=" in a)
    world = int(env["WORLD_SIZE"])
    assert spec["completions"] == spec["parallelism"]
    assert spec["completions"] * int(env["RANKS_PER_POD"]) == world
    assert int(degrees["parallel.replicate"]) * int(degrees["parallel.shard"]) == world
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(env["RANKS_PER_POD"])
