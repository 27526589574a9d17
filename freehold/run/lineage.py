"""The graph of a run: sources, stages, checkpoints and exports, with the hashes that tie them together."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from freehold.core.artifact import MANIFEST, read_json, read_manifest, sha256_json
from freehold.core.errors import ArtifactError
from freehold.run.layout import EVALUATE, EXPORTED, SERVE, WALK
from freehold.run.trace import read_checkpoints

# The stages that make something others are made from: neither an evaluation nor an answer of the server is.
STAGES = tuple(name for name in WALK if name not in (EVALUATE, SERVE))


@dataclass(frozen=True)
class Node:
    """One thing that exists, or should."""

    name: str
    kind: str
    """source | gather | curate | teacher | rephrase | tokenizer | tokens | checkpoint | hf | gguf | outside"""
    detail: str = ""
    content_sha256: str = ""
    created: str = ""


@dataclass(frozen=True)
class Edge:
    """`made` was made from `origin`; `recorded` is the hash of the origin that `made` wrote down."""

    origin: str
    made: str
    recorded: str = ""
    matches: bool = True


@dataclass
class Graph:
    """What there is, what it was made from, and what does not fit together."""

    run: str
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the graph as JSON-able data."""
        return {**asdict(self), "sound": self.sound}

    @property
    def sound(self) -> bool:
        """Whether every recorded hash is that of the artifact that is there."""
        return all(edge.matches for edge in self.edges)


def lineage(run_folder: Path) -> Graph:
    """Read a run's manifests into a graph; ArtifactError when the folder holds no finished stage."""
    manifests = {}
    for stage in STAGES:
        if (run_folder / stage / MANIFEST).exists():
            manifests[stage] = read_manifest(run_folder / stage)
    if not manifests:
        raise ArtifactError(
            "not a run: it holds no finished stage",
            where=run_folder,
            expected=f"gather/{MANIFEST}",
            todo="run `freehold run RECIPE` first, or name another run folder",
        )
    graph = Graph(run_folder.name)
    graph.missing = [f"{s}: not finished" for s in STAGES if s not in manifests and not WALK[s].optional]
    present = {stage: str(manifest["content_sha256"]) for stage, manifest in manifests.items()}

    def add(node: Node) -> str:
        graph.nodes.append(node)
        return node.name

    def stage_edge(origin: str, made: str, stage: str, needs: str) -> None:
        """Tie `made`, written by `stage`, to `origin`, written by `needs`, by the stages' hashes."""
        recorded = str(manifests.get(stage, {}).get("inputs", {}).get(needs, ""))
        known = bool(recorded) and needs in present
        graph.edges.append(Edge(origin, made, recorded, recorded == present[needs] if known else not recorded))

    if "gather" in manifests:
        gather = add(_stage_node("gather", manifests["gather"], "documents"))
        for name, version, licence in _sources(run_folder / "gather" / "sources.json"):
            add(Node(f"source {name}", "source", f"{version} {licence}".strip()))
            graph.edges.append(Edge(f"source {name}", gather))
    if "curate" in manifests:
        add(_stage_node("curate", manifests["curate"], "documents"))
        stage_edge("gather", "curate", "curate", "gather")
    teacher = manifests.get("rephrase", {}).get("counts", {}).get("teacher", "")
    if teacher:
        add(_stage_node("rephrase", manifests["rephrase"], "documents"))
        stage_edge("curate", "rephrase", "rephrase", "curate")
        add(Node(f"teacher {teacher}", "teacher", "wrote documents again"))
        graph.edges.append(Edge(f"teacher {teacher}", "rephrase"))
    if "tokenize" in manifests:
        for part in ("tokenizer", "tokens"):
            add(_part(part, part, manifests["tokenize"], f"{part}/"))
            stage_edge("curate", part, "tokenize", "curate")
            if teacher:
                stage_edge("rephrase", part, "tokenize", "rephrase")
        graph.edges.append(Edge("tokenizer", "tokens"))
    named: dict[str, list[str]] = {"pretrain": [], "align": []}
    checkpoints = read_checkpoints(run_folder)
    names = {c["content_sha256"]: c["stage_type"] or c["path"] for c in checkpoints if c["path"].count("/") == 1}
    for checkpoint in checkpoints:
        if checkpoint["path"].count("/") > 1:
            continue
        stage, name = checkpoint["stage"], checkpoint["stage_type"] or checkpoint["path"]
        detail = f"{checkpoint['path']}, {checkpoint['step']:,} steps, phase {checkpoint['phase']}"
        add(Node(name, "checkpoint", detail, checkpoint["content_sha256"], checkpoint["created"]))
        parent = checkpoint["parent"]
        if named[stage]:
            # A later phase goes on where the one before it ended, in the same stage.
            graph.edges.append(Edge(named[stage][-1], name))
        elif parent in names:
            graph.edges.append(Edge(names[parent], name, parent))
        elif parent and named["pretrain"] and stage == "align":
            graph.edges.append(Edge(named["pretrain"][-1], name, parent, matches=False))
        elif parent:
            add(Node(f"outside {parent[:12]}", "outside", "a checkpoint of another run", parent))
            graph.edges.append(Edge(f"outside {parent[:12]}", name, parent))
        if stage in manifests:
            if stage == "pretrain":
                stage_edge("tokens", name, "pretrain", "tokenize")
            else:
                stage_edge("curate", name, "align", "curate")
                stage_edge("tokenizer", name, "align", "tokenize")
        named[stage].append(name)
    if "export" in manifests:
        exported = manifests["export"].get("config", {}).get("checkpoint", EXPORTED)
        origin = next((c["stage_type"] or c["path"] for c in checkpoints if c["path"] == exported), exported)
        _add_exports(graph, manifests["export"], add, stage_edge, origin, exported.partition("/")[0])
    existing = {node.name for node in graph.nodes}
    for name in sorted({edge.origin for edge in graph.edges} - existing):
        add(Node(name, "missing", "not in this run folder any more"))
    return graph


def _add_exports(
    graph: Graph,
    manifest: dict[str, Any],
    add: Callable[[Node], str],
    stage_edge: Callable[[str, str, str, str], None],
    origin: str,
    stage: str,
) -> None:
    """Add the Hugging Face folder and the GGUF files, made from the checkpoint node `origin` of `stage`."""
    if any(name.startswith("hf/") for name in manifest["files"]):
        add(_part("HF export", "hf", manifest, "hf/"))
        stage_edge(origin, "HF export", "export", stage)
    for name in sorted(name for name in manifest["files"] if name.endswith(".gguf")):
        record = manifest["files"][name]
        detail = f"export/{name}, {record['bytes'] / 1e6:,.1f} MB"
        add(Node(name.rpartition("/")[2], "gguf", detail, record["sha256"], manifest.get("created", "")))
        stage_edge(origin, name.rpartition("/")[2], "export", stage)


def _stage_node(stage: str, manifest: dict[str, Any], counted: str) -> Node:
    count = manifest["counts"].get(counted)
    count = count.get("out") if isinstance(count, dict) else count
    detail = f"{count:,} {counted}" if isinstance(count, int) else ""
    return Node(stage, stage, detail, manifest["content_sha256"], manifest.get("created", ""))


def _part(name: str, kind: str, manifest: dict[str, Any], prefix: str) -> Node:
    """Return the node of a folder inside an artifact: hashed as an artifact of those files would be."""
    files = {path: record for path, record in manifest["files"].items() if path.startswith(prefix)}
    content = sha256_json({path: record["sha256"] for path, record in files.items()})
    size = sum(record["bytes"] for record in files.values())
    return Node(name, kind, f"{len(files)} files, {size / 1e6:,.1f} MB", content, manifest.get("created", ""))


def _sources(path: Path) -> list[tuple[str, str, str]]:
    if not path.exists():
        return []
    sources = read_json(path)
    return [
        (name, str(entry.get("version", "")), ", ".join(entry.get("licences", {})))
        for name, entry in sorted(sources.items())
    ]


def draw(graph: Graph, *, mermaid: bool = False, width: int = 120) -> str:
    """Return the graph as a tree for a terminal, or as a mermaid graph."""
    return _mermaid(graph) if mermaid else _tree(graph, width)


def _tree(graph: Graph, width: int) -> str:
    from rich.console import Console
    from rich.tree import Tree

    origins: dict[str, list[Edge]] = {}
    for edge in graph.edges:
        origins.setdefault(edge.made, []).append(edge)
    place = {node.name: number for number, node in enumerate(graph.nodes)}
    # A node hangs below the newest thing it was made from; what else went into it is written beside it.
    below: dict[str, list[Node]] = {}
    main: dict[str, str] = {}
    for node in graph.nodes:
        above = [edge.origin for edge in origins.get(node.name, []) if not edge.origin.startswith("source ")]
        if node.kind != "source":
            main[node.name] = max(above, key=lambda name: place[name]) if above else ""
            below.setdefault(main[node.name], []).append(node)

    def label(node: Node) -> str:
        edges = origins.get(node.name, [])
        text = node.name + (f"  {node.content_sha256[:12]}" if node.content_sha256 else "")
        text += f"  {node.created}" if node.created else ""
        text += f"  {node.detail}" if node.detail else ""
        beside = [e.origin for e in edges if e.origin != main[node.name] and not e.origin.startswith("source ")]
        text += f"  (also from {', '.join(beside)})" if beside else ""
        for edge in edges:
            if not edge.matches:
                text += f"  CHANGED: made from {edge.origin} {edge.recorded[:12]}, which is not the one here"
        return text

    def grow(tree: Tree, name: str) -> None:
        for node in below.get(name, []):
            branch = tree.add(label(node))
            if node.name == "gather":
                for source in (n for n in graph.nodes if n.kind == "source"):
                    branch.add(f"{source.name}  {source.detail}")
            grow(branch, node.name)

    tree = Tree(f"run {graph.run}" + ("" if graph.sound else "  (some recorded hashes do not match)"))
    grow(tree, "")
    for line in graph.missing:
        tree.add(f"missing: {line}")
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, highlight=False, markup=False, emoji=False).print(tree)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n"))


def _mermaid(graph: Graph) -> str:
    key = {node.name: f"n{number}" for number, node in enumerate(graph.nodes)}
    lines = ["graph TD"]
    for node in graph.nodes:
        text = "<br/>".join(part for part in (node.name, node.content_sha256[:12], node.detail) if part)
        lines.append(f'  {key[node.name]}["{text.replace(chr(34), chr(39))}"]')
    for edge in graph.edges:
        arrow = "-->" if edge.matches else "-. changed .->"
        lines.append(f"  {key[edge.origin]} {arrow} {key[edge.made]}")
    return "\n".join(lines)
