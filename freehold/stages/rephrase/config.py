"""The settings of `freehold rephrase`: who rewrites, which passages, and in which way."""

from __future__ import annotations

import urllib.parse
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from freehold.core.config import Config
from freehold.ledger.policy import Policy

StrategyName = Literal["question_answer", "pedagogical", "condensed", "restructured"]
Kind = Literal["prose", "code", "docstring", "reference", "generated"]


class TeacherBase(Config):
    """The terms its words come under."""

    licence: str = Field(
        min_length=1,
        description="SPDX expression of what the teacher writes: its weights' licence, or a LicenseRef for terms of "
        "use; rows get the stricter licence, the teacher's or the seed's",
    )
    licence_evidence: str = Field(pattern=r"\S", description="what shows that licence: a file, a page, a contract")
    vendor: str = Field("", description="who made the teacher, for policies that ask")
    country: str = Field("", description="country of the vendor, as ISO 3166 has it")
    compute: str = Field("", description="country in which it was trained, as ISO 3166 has it")


class EndpointTeacher(TeacherBase):
    """A model behind an OpenAI-compatible server: vLLM, llama.cpp, `freehold serve`, a provider."""

    kind: Literal["endpoint"] = "endpoint"
    url: str = Field("http://127.0.0.1:8000/v1", pattern="^https?://[^/]", description="the server's base, up to /v1")
    model: str = Field(min_length=1, description="the model's name there; rows carry it")
    revision: str = Field("", description="version of its weights; another one is asked again")
    api_key_variable: str = Field("", description="environment variable that holds the key, if it wants one")

    @field_validator("url")
    @classmethod
    def _an_address(cls, url: str) -> str:
        # Each of these raises for what could never be asked.
        parts = urllib.parse.urlsplit(url)
        if parts.username or parts.password:
            raise ValueError(
                "an address without a name and password: a recipe is kept and passed on, use api_key_variable"
            )
        _ = parts.port, (parts.hostname or "").encode("idna"), parts.path.encode("ascii")
        return url


class GgufTeacher(TeacherBase):
    """A GGUF file that llama.cpp opens here: no server is needed."""

    kind: Literal["gguf"] = "gguf"
    path: str = Field(min_length=1, description="the file; with `distribution`, its path in that")
    distribution: str = Field("", description="installed Python distribution that ships it")
    threads: int = Field(2, ge=1, description="threads of llama.cpp")


Teacher = Annotated[EndpointTeacher | GgufTeacher, Field(discriminator="kind")]


class Strategy(Config):
    """Which passages one strategy rewrites."""

    sources: tuple[str, ...] = Field((), description="sources of curate whose documents are seeds; none named: all")
    kinds: tuple[Kind, ...] = Field(("prose", "reference", "docstring"), description="kinds of document that are seeds")
    passages: int = Field(1000, ge=1, description="most passages, chosen by the hash of seed, strategy and place")


class Sampling(Config):
    """How the teacher picks its words; each request's seed follows from the run's seed and the passage."""

    temperature: float = Field(0.7, ge=0, le=2, description="0: always the likeliest token")
    top_p: float = Field(0.9, gt=0, le=1, description="share of the likelihood that is drawn from")
    max_tokens: int = Field(512, ge=16, description="most tokens of a rewrite; one that reaches it is dropped")


class RephraseConfig(Config):
    """rephrase: passages of curated documents, written again by a teacher. Without a teacher nothing is done."""

    teacher: Teacher | None = Field(None, description="who rewrites; none: the stage does nothing")
    strategies: dict[StrategyName, Strategy] = Field(
        default={"condensed": Strategy(), "question_answer": Strategy()}, description="what is asked for"
    )
    passage_chars: tuple[int, int] = Field(
        (300, 1500), description="fewest and most characters of a passage; documents are cut between paragraphs"
    )
    sampling: Sampling = Field(default_factory=Sampling, description="how the teacher picks its words")
    concurrency: int = Field(8, ge=1, le=1024, description="requests under way at the same time; vLLM batches them")
    tries: int = Field(5, ge=1, description="times a request is sent before the teacher counts as gone")
    min_accepted: float = Field(
        0.02, ge=0, le=1, description="least share of rewrites that must pass, or it is an error; 0: any"
    )
    reuse: tuple[str, ...] = Field(
        (), description="answers.jsonl of other runs: what was asked there is not asked again"
    )
    exclude: tuple[str, ...] = Field((), description="ids of rewrites, or `rephrased_<strategy>`, that must not stay")
    policy: Policy = Field(
        default=Policy(), description="what may enter, as in gather: judges seed and teacher together"
    )

    @model_validator(mode="after")
    def _whole(self) -> RephraseConfig:
        least, most = self.passage_chars
        if not 0 < least < most:
            raise ValueError(f"passage_chars ({least}, {most}) must be a smaller and a larger number above 0")
        if not self.strategies:
            raise ValueError("at least one strategy")
        return self


def plan(config: RephraseConfig) -> list[str]:
    """Return what this configuration implies, for --dry-run."""
    if config.teacher is None:
        return ["no teacher: nothing is rewritten"]
    teacher = config.teacher
    name = f"{teacher.model} at {teacher.url}" if isinstance(teacher, EndpointTeacher) else teacher.path
    most = sum(strategy.passages for strategy in config.strategies.values())
    return [
        f"teacher: {name}, {teacher.licence}",
        *(
            f"{key}: up to {one.passages:,} passages of {', '.join(one.sources or one.kinds)}"
            for key, one in config.strategies.items()
        ),
        f"at most {most:,} requests of up to {config.sampling.max_tokens:,} tokens, {config.concurrency} at the same "
        "time; what was answered before is not asked again",
    ]
