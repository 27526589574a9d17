"""The Dockerfile names files that exist and the image that the Kubernetes example runs."""

from __future__ import annotations

from pathlib import Path

import yaml
from image import environment, instructions

ROOT = Path(__file__).resolve().parent.parent
KNOWN = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "CMD"}


def test_each_instruction_is_known_and_copies_what_exists():
    lines = instructions(ROOT / "Dockerfile")
    assert {word for word, _ in lines} <= KNOWN
    assert lines[0][0] == "FROM"
    copied = [source for word, rest in lines if word == "COPY" for source in rest.split()[:-1]]
    assert copied
    assert all((ROOT / source).exists() for source in copied)


def test_image_follows_the_usual_lint_rules():
    """Root is left, versions are pinned, package lists are removed in the layer that made them, no `latest` base."""
    lines = instructions(ROOT / "Dockerfile")
    assert any(word == "USER" and rest != "root" for word, rest in lines)
    assert not lines[0][1].endswith(":latest")
    assert ":" in lines[0][1]
    runs = [rest for word, rest in lines if word == "RUN"]
    assert all(
        "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists" in rest for rest in runs if "apt" in rest
    )
    assert all("--constraint constraints.txt" in rest for rest in runs if "pip install" in rest)
    assert any(environment(rest).get("PIP_NO_CACHE_DIR") for word, rest in lines if word == "ENV")


def test_compiler_and_python_of_the_image_fit():
    runs = " ".join(rest for word, rest in instructions(ROOT / "Dockerfile") if word == "RUN")
    assert "g++" in runs, "the CPU kernels are compiled on first use"
    assert "[export]" in runs


def test_kubernetes_example_uses_the_image():
    documents = list(yaml.safe_load_all((ROOT / "examples/kubernetes.yaml").read_text(encoding="utf-8")))
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    images = [
        container["image"]
        for document in documents
        if document["kind"] == "Job"
        for container in document["spec"]["template"]["spec"]["containers"]
    ]
    assert images
    assert all(f"docker build -t {image.split(':')[0]} " in text for image in images)


def test_ignored_files_keep_runs_and_environments_out():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv", "runs", "corpus"} <= set(ignored)
