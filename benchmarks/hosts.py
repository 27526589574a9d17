"""Two machines train one model; one dies, the network is cut, a machine returns: same bits, nothing typed.

    python benchmarks/hosts.py --json benchmarks/results/hosts.json        as root, on Linux (ip netns)

Each machine is a network namespace with an address of its own on a virtual cable; both see the same run folder, as
machines of a cluster see shared storage. What starts the command when a machine boots (systemd, Kubernetes, Slurm) is
played by this script: it types the same command again, and nothing else.

    straight    both machines, undisturbed: the bits to compare with
    rank        the rank of machine 1 is killed
    machine     the cable of machine 1 is pulled and all its processes are killed; 5 s later it boots
    network     the cable is pulled for `--cut` seconds, all processes live on

After each the weights, the optimizer's state and the digest of the rows that were read must be those of `straight`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from common import environment, write

from freehold.checkpoint import dcp

ADDRESS = ("10.77.0.1", "10.77.0.2")
SPACE = ("freehold0", "freehold1")
CABLE = ("fh0", "fh1")
STEPS, SAVE = 60, 10
SETTINGS = [
    f"phases.stable.steps={STEPS // 2}", f"phases.anneal.steps={STEPS // 2}", f"trainer.checkpoint_every_steps={SAVE}",
    "trainer.validate_every_steps=0", "trainer.threads=1", "parallel.nproc=1", "parallel.hosts=2", "parallel.shard=2",
    "parallel.device=cpu", "parallel.supervise.hang_s=20", "batch.sequences=4",
]  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def two_machines() -> Iterator[None]:
    """Make two network namespaces with a cable between them; remove them at the end."""
    for space in SPACE:
        subprocess.run(["ip", "netns", "del", space], check=False, stderr=subprocess.DEVNULL)
    try:
        for space in SPACE:
            ip("netns", "add", space)
        ip("link", "add", CABLE[0], "netns", SPACE[0], "type", "veth", "peer", "name", CABLE[1], "netns", SPACE[1])
        for number in (0, 1):
            ip("-n", SPACE[number], "link", "set", "lo", "up")
            ip("-n", SPACE[number], "addr", "add", f"{ADDRESS[number]}/24", "dev", CABLE[number])
            plug(number, True)
        yield
    finally:
        for space in SPACE:
            subprocess.run(["ip", "netns", "del", space], check=False)


def plug(number: int, connected: bool) -> None:
    """Connect or pull the cable of a machine."""
    ip("-n", SPACE[number], "link", "set", CABLE[number], "up" if connected else "down")


def boot(number: int, name: str, log: Path) -> subprocess.Popen[bytes]:
    """Start the one command on a machine."""
    command = [sys.executable, "-m", "freehold.cli", "pretrain", "tiny", f"name={name}", *SETTINGS]
    own = {"FREEHOLD_HOST": str(number), "MASTER_ADDR": ADDRESS[0], "GLOO_SOCKET_IFNAME": CABLE[number]}
    with log.open("ab") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", SPACE[number], *command], env=os.environ | own, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


def processes_of(machine: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return all processes of a machine, its supervisor first."""
    supervisor = psutil.Process(machine.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def step_of(run: Path, number: int) -> int:
    """Return the step that a machine's rank last reported."""
    folder = run / "pretrain" / "log" / ("" if number == 0 else "host_1")
    beats = sorted(folder.glob(f"world_*/rank_{number}.json"))
    try:
        return int(json.loads(beats[-1].read_text()).get("step", -1))
    except (IndexError, ValueError):
        return -1


def bits_of(run: Path) -> dict[str, str]:
    """Return a hash of every tensor of the last checkpoint, by part, and the digest of the rows."""
    folder = run / "pretrain" / "base"
    facts = dcp.check(folder)
    found = {"rows": str(facts["data_sum"])}
    for part, tensors in dcp.load(folder).items():
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found[part] = digest.hexdigest()[:16]
    return found


def trial(fault: str, runs: Path, cut_s: float) -> dict[str, Any]:
    """Train once with a fault; return seconds, worlds, what was said and the bits."""
    run, began, typed = runs / f"hosts_{fault}", time.monotonic(), 2
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(runs / "tiny", run, ignore=shutil.ignore_patterns("pretrain", "align", "evaluate", "export"))
    logs = [run / f"machine_{number}.txt" for number in (0, 1)]
    machines = [boot(number, run.name, logs[number]) for number in (0, 1)]
    struck = None
    while any(machine.poll() is None for machine in machines):
        if fault != "straight" and struck is None and step_of(run, 1) >= STEPS // 2 + 5:
            struck = time.monotonic()
            if fault == "rank":
                processes_of(machines[1])[-1].send_signal(signal.SIGKILL)
            elif fault == "machine":
                plug(1, False)
                for process in reversed(processes_of(machines[1])):
                    process.kill()
                time.sleep(5)
                plug(1, True)
                machines[1], typed = boot(1, run.name, logs[1]), typed + 1
            else:
                plug(1, False)
                time.sleep(cut_s)
                plug(1, True)
        time.sleep(0.1)
    seconds = time.monotonic() - began
    codes = [machine.returncode for machine in machines]
    said = [line for log in logs for line in log.read_text(errors="replace").splitlines() if "starting again" in line]
    events = (run / "pretrain" / "log" / "supervisor.jsonl").read_text().splitlines()
    worlds = sum(json.loads(line)["event"] == "started" for line in events)
    found = {"seconds": round(seconds, 1), "exit_codes": codes, "worlds": worlds, "said": said, "commands": typed}
    if any(codes):
        raise SystemExit(f"{fault}: exit codes {codes}; see {logs[0]} and {logs[1]}")
    return {**found, "struck_after_s": None if struck is None else round(struck - began, 1), "bits": bits_of(run)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", default="rank,machine,network")
    parser.add_argument("--cut", type=float, default=20.0, help="seconds without a network")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs = Path("runs")
    if not (runs / "tiny" / "tokenize" / "manifest.json").exists():
        command = [sys.executable, "-m", "freehold.cli", "run", "tiny", "until=tokenize", "--quiet"]
        subprocess.run(command, check=True)
    result: dict[str, Any] = {"steps": STEPS, "save_every_steps": SAVE, "cut_s": args.cut, "trials": {}}
    with two_machines():
        for fault in ("straight", *filter(None, args.faults.split(","))):
            result["trials"][fault] = found = trial(fault, runs, args.cut)
            found["same_bits"] = found["bits"] == result["trials"]["straight"]["bits"]
            print(
                f"{fault}: {found['seconds']} s, {found['worlds']} worlds, same bits: {found['same_bits']}", flush=True
            )
            for line in found["said"]:
                print(f"  {line}")
    result["environment"] = environment()
    write(args.json, result)
    return int(not all(found["same_bits"] for found in result["trials"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
