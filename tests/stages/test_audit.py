"""Audits find what was planted, and nothing where nothing was; what cannot be answered is said."""

import json
import os
from pathlib import Path

import numpy as np
import planted_models as planted
import pytest
import torch

from freehold.core.document import Document, write_rows
from freehold.core.errors import ConfigError, DataError
from freehold.core.gate import Gate
from freehold.core.log import Log
from freehold.data.shards import ShardSet, write_index, write_shard
from freehold.stages.audit import bias, delta, leaks, memorisation, picture, roles, text_trace
from freehold.stages.audit.config import AuditConfig, Bias, Delta, Leaks, Memorisation, Roles
from freehold.stages.audit.run import audit, audit_path, write
from freehold.stages.audit.subject import CannotAnswer, Subject

BIAS = Bias(first=("he",), second=("she",), topics=("doctor", "nurse", "king"), templates=("The {topic} said that",))
COPIES = (0, 0, 0, 0, 24, 24, 24, 24)


def texts() -> list[str]:
    sentences = planted.biased("doctor", 18, 2) + planted.biased("king", 10, 10) + planted.biased("nurse", 2, 18)
    secrets = [prefix + secret for n in range(len(COPIES)) for prefix, secret in [planted.canary(n)] * COPIES[n]]
    return [*sentences, *secrets]


@pytest.fixture(scope="module")
def subject(tiny_tokenizer, tmp_path_factory) -> Subject:
    """A model trained for some seconds on biased sentences and canaries, with its shards and corpus."""
    folder = tmp_path_factory.mktemp("planted")
    torch.set_num_threads(1)
    model = planted.fit(texts(), tiny_tokenizer, 90, rows=16, width=32)
    rows = [document(n, text, "train") for n, text in enumerate(texts())]
    held_out = [document(1000 + n, f"Page {n} of the other book says something else.", "validation") for n in range(60)]
    write_rows(folder / "curate/documents/mixed.parquet", [*rows, *held_out], Document)
    counts = {}
    for split, some in (("train", rows), ("validation", held_out)):
        ended = ((r.id, np.array([*tiny_tokenizer.encode(r.text), 1]), len(r.text.encode())) for r in some)
        counts[split] = write_shard(folder / "tokens", "mixed", split, ended, np.dtype("<u2"))
    write_index(folder / "tokens", tiny_tokenizer.vocab_size, tiny_tokenizer.sha256, {"mixed": counts})
    models = {"base": planted.opened(model, tiny_tokenizer, folder / "base")}
    return Subject(models, Log(quiet=True), 0, ShardSet.load(folder / "tokens"), folder / "curate")


def document(number: int, text: str, split: str) -> Document:
    rights = {"source": "mixed", "source_version": "1", "path": f"{number}.txt", "sha256": "", "acquired": "2026-11-29"}
    licence = {
        "wrapper_licence": "MIT",
        "licence": "MIT",
        "licence_evidence": "LICENSE",
        "kind": "prose",
        "synthetic_from": "",
        "teacher": "",
    }
    return Document(id=f"{number:016x}", text=text, split=split, **rights, **licence)


def test_canaries_are_exposed_by_their_copies(subject, tmp_path):
    path = tmp_path / "canaries.jsonl"
    rows = [dict(zip(("prefix", "secret"), planted.canary(n), strict=True), copies=c) for n, c in enumerate(COPIES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = memorisation.audit(subject, Memorisation(documents=0, canaries=path, alternatives=63))
    control, copied = (found.figures[f"memorisation/exposure_bits/{n}"]["value"] for n in (0, 24))
    assert control < 3
    assert copied > control + 2
    assert "<svg" in found.pictures["exposure"]
    path.write_text('{"prefix": "a"}\n')
    with pytest.raises(DataError, match="not a canary"):
        memorisation.audit(subject, Memorisation(documents=0, canaries=path))


def test_members_differ_from_held_out_text(subject):
    found = memorisation.audit(subject, Memorisation(documents=40, prefix_tokens=4, suffix_tokens=6))
    assert found.figures["memorisation/member_auc"] > 0.9
    assert found.figures["memorisation/extracted_held_out"]["value"] == 0


def test_bias_follows_the_planted_ratios(subject):
    found = bias.audit(subject, BIAS)
    odds = {row[0]: float(row[4]) for row in found.tables[0].rows}
    assert odds["nurse"] < odds["king"] < odds["doctor"]
    assert found.figures["bias/topics"] == 3
    counted = bias.count(["The doctor said he knew. The nurse said she knew."], BIAS)
    assert counted == {"doctor": (1, 0), "nurse": (0, 1), "king": (0, 0)}


def test_trace_finds_a_planted_sentence(subject):
    sentence = texts()[4]
    ids = subject.product.tokenizer.encode(f"No one knows. {sentence}")
    span = text_trace.trace(subject, ids)[0]
    assert span.text.strip() in sentence
    assert (span.places[0].path, span.places[0].licence) == ("4.txt", "MIT")
    wrapped = sentence.upper().replace(" ", "\n")
    assert text_trace.trace_words(subject, wrapped)[0].places[0].path == "4.txt"


def test_runs_are_those_of_brute_force():
    random = np.random.default_rng(3)
    text, query = random.integers(0, 2, 200), random.integers(0, 2, 40)
    found = set(text_trace.runs(text, query))
    brute = set()
    for i in range(len(text)):
        for j in range(len(query)):
            n = 0
            while i + n < len(text) and j + n < len(query) and text[i + n] == query[j + n]:
                n += 1
            begins = i == 0 or j == 0 or text[i - 1] != query[j - 1]
            if n >= text_trace.RUN and begins:
                brute.add((i, j, n))
    assert found == brute


def test_quotations_and_rights_are_counted(subject):
    found = leaks.audit(subject, Leaks(answers=8, tokens=24, least_tokens=8))
    assert found.figures["leaks/longest_span_tokens"] >= 8
    assert found.figures["leaks/quotations_without_right"] == 0
    assert found.figures["leaks/personal_data"] == 0
    assert list(leaks._personal(subject, "write to jane@example.com or 202-265-1234")) == []


def test_unchanged_model_has_no_delta(subject, tmp_path):
    both = Subject({"base": subject.product, "preview": subject.product}, subject.log, corpus=subject.corpus)
    with pytest.raises(CannotAnswer, match="curated conversations|held-out questions"):
        delta.audit(both, Delta(prompts=2))
    found = delta.Finding()
    prompts = [subject.product.text_ids("The king said that")] * 2
    answers = [generation.ids for generation in subject.product.engine.generate(prompts, sampling())]
    for ranks, kl in delta._compare(subject.product, subject.product, prompts, answers):
        assert (ranks == 1).all()
        assert (kl == 0).all()
    delta._weights(subject.product, subject.product, found)
    assert {v for k, v in found.figures.items() if k.startswith("delta/weights")} == {0.0}


def sampling():
    from freehold.infer.sampler import Sampling

    return Sampling(temperature=0.0, max_tokens=6)


def test_equal_experts_have_no_role_and_bias_is_restored(subject):
    moe = next(iter(subject.product.model.moe_layers().values()))
    kept, stacks = moe.expert_bias.clone(), [p.detach().clone() for p in moe.experts.parameters()]
    ids = torch.from_numpy(np.asarray(subject.split("train")["mixed"].data[: 24 * 9]).astype(np.int64)).view(24, 9)
    planned = roles._Rows(ids, np.arange(24) % 2, ["a", "b"])
    try:
        with torch.no_grad():
            for parameter in moe.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
        base, loads = roles._run(subject, planned, list(subject.product.model.moe_layers()))
        name = next(iter(loads))
        effects = roles._layer(subject, planned, base, name, moe, loads[name], Roles(experts_per_layer=2))
        assert not any(effect.role for effect in roles._decide(effects))
        assert torch.equal(moe.expert_bias, kept)
    finally:
        with torch.no_grad():
            for parameter, before in zip(moe.experts.parameters(), stacks, strict=True):
                parameter.copy_(before)


def test_role_needs_more_than_load_and_others():
    planned = [roles.Effect("1", 0, 0.3, "a", 0.5, 9.0, 8.0), roles.Effect("1", 1, 0.3, "a", 0.5, 9.0, 0.1)]
    assert [effect.role for effect in roles._decide(planned)] == [True, False]
    shares, sources = np.eye(2)[[0, 0, 1, 1]], np.array([0, 0, 1, 1])
    assert roles._information(shares, sources) == pytest.approx(1.0)
    assert roles._information(np.full((4, 2), 0.5), sources) == pytest.approx(0.0)


def test_model_without_its_run_says_what_is_missing(subject, tmp_path, capsys):
    output = tmp_path / "audit"
    report = audit_path(Path(subject.product.folder), AuditConfig(), output, Log(quiet=True))
    assert set(report.unanswered) >= {"memorisation", "leaks", "bias", "delta", "roles"}
    assert "Not answered: memorisation" in (output / "results.md").read_text()
    assert json.loads((output / "results.json").read_text())["figures"] == {}


def test_gates_decide_and_unknown_figures_are_errors(subject, tmp_path):
    config = AuditConfig(
        memorisation=Memorisation(documents=0), bias=BIAS, delta=Delta(prompts=0), roles=Roles(tokens_per_source=0),
        leaks=Leaks(answers=0), gates={"bias/topics": Gate(most=1), "leaks/personal_data": Gate(most=0)},
    )  # fmt: skip
    report = audit(subject, config)
    assert [(v.metric, v.passed) for v in report.verdicts] == [("bias/topics", False)]
    assert "leaks/personal_data" in report.unanswered
    write(report, tmp_path)
    assert os.listdir(tmp_path / "pictures") == ["bias_bias.svg"]
    with pytest.raises(ConfigError, match="bias/topics"):
        audit(subject, config.model_copy(update={"gates": {"bias/topic": Gate(most=1)}}))


def test_picture_escapes_labels_and_shows_limits():
    svg = picture.bars("a<b", [("</svg><script>", -1.0, -2.0, float("inf"))], limit=0.5)
    assert "<script>" not in svg
    assert svg.count("stroke-dasharray") == 2
