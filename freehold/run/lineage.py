"""The graph of a run: sources, stages, checkpoints and exports, with the hashes that tie them together."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from freehold.core.artifact import MANIFEST, read_json, read_manifest, sha256_json
from freehold.core.errors import ArtifactError
from freehold.core.log import printable
from freehold.run.ancestry import Record, ancestors, ancestors_of_stage, origin_of, unknown
from freehold.run.checkpoints import Checkpoint, exported_checkpoint, read_checkpoints
from freehold.run.layout import (
    ALIGN,
    AUDIT,
    CURATE,
    EVALUATE,
    EXPORT,
    GATHER,
    PRETRAIN,
    RELEASE,
    REPHRASE,
    SERVE,
    TOKENIZE,
    WALK,
    RunFolder,
)

# The stages that make something others are made from: what judges a model, signs it or asks it is none.
STAGES = tuple(name for name in WALK if name not in (EVALUATE, AUDIT, RELEASE, SERVE))


@dataclass(frozen=True)
class Node:
    """One thing that exists, or should."""

    name: str
    kind: str
    """source | gather | curate | teacher | rephrase | tokenizer | tokens | checkpoint | hf | gguf | outside"""
    detail: str = ""
    content_sha256: str = ""
    created: str = ""
    origin: str = ""
    """Who made it and where: `vendor Acme, country US`; of models, teachers and packages that say it."""


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
    run = RunFolder(run_folder)
    manifests = {stage: read_manifest(run.stage(stage)) for stage in STAGES if run.finished(stage)}
    if not manifests:
        raise ArtifactError(
            "not a run: it holds no finished stage",
            where=run_folder,
            expected=f"{GATHER}/{MANIFEST}",
            todo="run `freehold run RECIPE` first, or name another run folder",
        )
    builder = _Builder(run, manifests)
    builder.add_data()
    builder.add_checkpoints()
    builder.add_exports()
    builder.add_missing()
    return builder.graph


class _Builder:
    """Fills a graph stage by stage, in the order of the walk."""

    def __init__(self, run: RunFolder, manifests: dict[str, dict[str, Any]]) -> None:
        self.run, self.manifests = run, manifests
        self.graph = Graph(run.root.name)
        self.graph.missing = [f"{s}: not finished" for s in STAGES if s not in manifests and not WALK[s].optional]
        self.checkpoints = read_checkpoints(run.root)
        self.labels = {c.content_sha256: c.label for c in self.checkpoints if c.named}

    def add(self, node: Node) -> str:
        """Add a node; return its name."""
        self.graph.nodes.append(node)
        return node.name

    def tie(self, origin: str, made: str, recorded: str = "", matches: bool = True) -> None:
        """Add an edge."""
        self.graph.edges.append(Edge(origin, made, recorded, matches))

    def stage_edge(self, origin: str, made: str, stage: str, needs: str) -> None:
        """Tie `made`, written by `stage`, to `origin`, written by `needs`, by the stages' hashes."""
        recorded = str(self.manifests.get(stage, {}).get("inputs", {}).get(needs, ""))
        known = bool(recorded) and needs in self.manifests
        self.tie(origin, made, recorded, recorded == self.manifests[needs]["content_sha256"] if known else not recorded)

    def add_data(self) -> None:
        """Add sources, documents, teacher, tokenizer and tokens."""
        if GATHER in self.manifests:
            self.add(_stage_node(GATHER, self.manifests[GATHER], "documents"))
            configured = self.manifests[GATHER].get("config", {}).get("sources") or {}
            for name, version, licence in _sources(self.run.sources):
                made_by = origin_of(configured.get(name, {}).get("made_by") or {})
                self.add(Node(f"source {name}", "source", f"{version} {licence}".strip(), origin=made_by))
                self.tie(f"source {name}", GATHER)
        if CURATE in self.manifests:
            self.add(_stage_node(CURATE, self.manifests[CURATE], "documents"))
            self.stage_edge(GATHER, CURATE, CURATE, GATHER)
        teacher = self.manifests.get(REPHRASE, {}).get("counts", {}).get("teacher", "")
        if teacher:
            self.add(_stage_node(REPHRASE, self.manifests[REPHRASE], "documents"))
            self.stage_edge(CURATE, REPHRASE, REPHRASE, CURATE)
            settings = self.manifests[REPHRASE].get("config", {}).get("teacher") or {}
            made_by = origin_of(settings)
            self.add(Node(f"teacher {teacher}", "teacher", "wrote documents again", origin=made_by))
            self.tie(f"teacher {teacher}", REPHRASE)
            for record in ancestors_of_stage(self.run, REPHRASE):
                if record.run:
                    self.tie(self._add_record(record), f"teacher {teacher}", record.content_sha256)
        if TOKENIZE in self.manifests:
            for part in ("tokenizer", "tokens"):
                self.add(_part(part, part, self.manifests[TOKENIZE], f"{part}/"))
                self.stage_edge(CURATE, part, TOKENIZE, CURATE)
                if teacher:
                    self.stage_edge(REPHRASE, part, TOKENIZE, REPHRASE)
            self.tie("tokenizer", "tokens")

    def add_checkpoints(self) -> None:
        """Add the named checkpoints, each with its parent and what its stage read."""
        before: dict[str, str] = {}
        for checkpoint in (c for c in self.checkpoints if c.named):
            stage, name = checkpoint.stage, checkpoint.label
            detail = f"{checkpoint.path}, {checkpoint.step:,} steps, phase {checkpoint.phase}"
            self.add(Node(name, "checkpoint", detail, checkpoint.content_sha256, checkpoint.created))
            self._add_parent(checkpoint, before)
            if stage in self.manifests and stage == PRETRAIN:
                self.stage_edge("tokens", name, PRETRAIN, TOKENIZE)
            elif stage in self.manifests:
                self.stage_edge(CURATE, name, stage, CURATE)
                self.stage_edge("tokenizer", name, stage, TOKENIZE)
            before[stage] = name

    def _add_parent(self, checkpoint: Checkpoint, before: dict[str, str]) -> None:
        """Tie a checkpoint to the one it was started from; `before` is the last one of each stage."""
        name, parent = checkpoint.label, checkpoint.parent
        if checkpoint.stage in before:
            # A later phase continues where the one before it ended, in the same stage.
            self.tie(before[checkpoint.stage], name)
        elif parent in self.labels:
            self.tie(self.labels[parent], name, parent)
        elif parent and PRETRAIN in before and checkpoint.stage == ALIGN:
            self.tie(before[PRETRAIN], name, parent, matches=False)
        elif parent:
            known = {record.content_sha256: record for record in ancestors(self.run, checkpoint)}
            record = known.get(parent) or unknown("it has no record", parent)
            self.tie(self._add_record(record), name, parent)

    def _add_record(self, record: Record) -> str:
        """Add a checkpoint of another run and its own ancestors; return its node."""
        name = record.name if record.run else f"outside {record.content_sha256[:12] or record.path}"
        if name in {node.name for node in self.graph.nodes}:
            return name
        licences = ", ".join(sorted({row.licence or "unknown" for row in record.rows}))
        detail = f"a checkpoint of another run, learned from {licences}" if licences else "a checkpoint of another run"
        detail = "; ".join([detail, *record.unknown])
        made_by = "; ".join(str(made.origin) for made in record.origins)
        self.add(Node(name, "outside", detail, record.content_sha256, origin=made_by))
        for parent in record.parents:
            self.tie(self._add_record(parent), name, parent.content_sha256)
        return name

    def add_exports(self) -> None:
        """Add the Hugging Face folder and the GGUF files."""
        manifest = self.manifests.get(EXPORT)
        if manifest is None:
            return
        exported = exported_checkpoint(manifest)
        stage = exported.partition("/")[0]
        origin = next((c.label for c in self.checkpoints if c.path == exported), exported)
        if any(name.startswith("hf/") for name in manifest["files"]):
            self.stage_edge(origin, self.add(_part("HF export", "hf", manifest, "hf/")), EXPORT, stage)
        for name in sorted(name for name in manifest["files"] if name.endswith(".gguf")):
            record, made = manifest["files"][name], name.rpartition("/")[2]
            detail = f"{EXPORT}/{name}, {record['bytes'] / 1e6:,.1f} MB"
            self.add(Node(made, "gguf", detail, record["sha256"], manifest.get("created", "")))
            self.stage_edge(origin, made, EXPORT, stage)

    def add_missing(self) -> None:
        """Add a node for each origin that is not in the folder any more."""
        existing = {node.name for node in self.graph.nodes}
        for name in sorted({edge.origin for edge in self.graph.edges} - existing):
            self.add(Node(name, "missing", "not in this run folder any more"))


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
    # A node hangs below the newest thing it was made from; what else went into it is named in its line.
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
        text += f"  ({node.origin})" if node.origin else ""
        also = [e.origin for e in edges if e.origin != main[node.name] and not e.origin.startswith("source ")]
        text += f"  (also from {', '.join(also)})" if also else ""
        for edge in edges:
            if not edge.matches:
                text += f"  CHANGED: made from {edge.origin} {edge.recorded[:12]}, which is not the one here"
        return text

    def grow(tree: Tree, name: str) -> None:
        for node in below.get(name, []):
            branch = tree.add(label(node))
            if node.name == GATHER:
                for source in (n for n in graph.nodes if n.kind == "source"):
                    branch.add(f"{source.name}  {source.detail}" + (f"  ({source.origin})" if source.origin else ""))
            grow(branch, node.name)

    tree = Tree(f"run {graph.run}" + ("" if graph.sound else "  (some recorded hashes do not match)"))
    grow(tree, "")
    for line in graph.missing:
        tree.add(f"missing: {line}")
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, highlight=False, markup=False, emoji=False).print(tree)
    return printable("\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n")))


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
