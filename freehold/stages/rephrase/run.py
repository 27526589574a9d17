"""Passages of curated documents go to a teacher; what passes the checks becomes documents with the rights of both.

Answers are kept as they come, by the content of the request, in `answers.jsonl`: a killed run, a changed limit or a
teacher that died costs nothing that was answered before. What is written follows from the answers alone, in a fixed
order, whatever order they came in.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from freehold.core.artifact import Workspace, sha256_json, write_json
from freehold.core.document import Document, document_id, read_rows, replace, write_rows, write_table
from freehold.core.errors import DataError
from freehold.core.machine import machine_limits
from freehold.ledger.licence import strictest
from freehold.ledger.policy import Claim, gate
from freehold.stages.rephrase.checks import LEAST_QUESTION_WORDS, judge, measure
from freehold.stages.rephrase.config import RephraseConfig, Strategy
from freehold.stages.rephrase.prompts import PROMPTS, clean
from freehold.stages.rephrase.teacher import Answer, Identity, Teacher, open_teacher
from freehold.text import Why
from freehold.text.held_out import Questions, plain_words, read_questions
from freehold.text.words import read_words, split_words

ANSWERS = "answers.jsonl"
PROBE = 32
"""This many answers of which none passes stop the asking: a teacher that only copies must not be paid to the end."""
SAMPLES = 2
_COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "seed", "seed_source")),
        ("passage", pa.int32()),
        *((name, pa.string()) for name in ("strategy", "prompt", "teacher", "sampling", "request_sha256")),
        ("kept", pa.bool_()),
        *((name, pa.string()) for name in ("reason", "detail")),
        *((name, pa.float64()) for name in ("length", "copied", "kept_facts", "new_numbers", "new_names", "repeated")),
    ]
)


# Scripts without spaces end a sentence with a mark of their own and nothing after it; Thai ends one with a space.
_SENTENCE_END = re.compile(r"[.!?।۔؟။។][\"'”’)]*(?=\s)|[。！？．｡][」』”’）]*|(?<=[\u0e00-\u0eff])(?= )")


@dataclass(frozen=True)
class Passage:
    """A stretch of a seed that is rewritten in one piece."""

    seed: Document
    """Without its text."""
    number: int
    text: str


@dataclass(frozen=True)
class Request:
    """One passage for one strategy: what is sent, and the hash of all that decides the answer."""

    strategy: str
    passage: Passage
    body: dict[str, Any]
    key: str


@dataclass(frozen=True)
class Rewrite:
    """An answer, cleaned and judged."""

    text: str
    found: dict[str, float]
    why: Why | None


def run(config: RephraseConfig, work: Workspace) -> dict[str, Any]:
    """Write `documents/`, `rewrites.parquet` and `report.json`; nothing at all without a teacher.

    Returns counts by strategy. Raises LicenceError when the policy stops what a teacher would write, before it is
    asked; TeacherGone when it does not answer; DataError when its rewrites are of no use. Answers are kept always.
    """
    if config.teacher is None:
        work.log.say("rephrase: no teacher, nothing to do")
        return {"documents": 0, "bytes": 0, "strategies": {}}
    seeds = sorted((work.input("curate") / "documents").glob("*.parquet"))
    _check_sources(config, [path.stem for path in seeds])
    held_out = questions_of(work.input("curate") / "tasks")
    passages: dict[str, list[Passage]] = {}
    for name, strategy in config.strategies.items():
        passages[name] = choose(name, strategy, seeds, config, work.seed)
        if not passages[name]:
            raise DataError(
                "there is no passage to rewrite",
                where=f"rephrase.strategies.{name}",
                expected=f"training documents of {', '.join(strategy.kinds)} with paragraphs of "
                f"{config.passage_chars[0]} characters or more",
            )
    _gate(config, passages)
    with open_teacher(config, work.folder / "log" / "teacher.txt") as teacher:
        requests = [
            _request(name, passage, teacher.identity, config, work.seed)
            for name, chosen in sorted(passages.items())
            for passage in chosen
        ]
        judged: dict[str, Rewrite] = {}

        def heard(request: Request, answer: Answer) -> None:
            judged[request.key] = _judged(request, answer, config, held_out)
            if (
                config.min_accepted
                and len(judged) == PROBE
                and not any(rewrite.why is None for rewrite in judged.values())
            ):
                raise _useless("the first", list(judged.values()), work)

        with Answers(work.folder / ANSWERS, config.reuse, {request.key for request in requests}) as answers:
            before = sum(request.key in answers for request in requests)
            work.log.say(
                f"rephrase: {len(requests):,} passages for {teacher.identity.name}"
                + (f", {before:,} answered before" if before else "")
            )
            ask(requests, teacher, answers, config.concurrency, heard, work)
        identity = teacher.identity
    return _write(requests, judged, identity, config, work)


def questions_of(tasks: Path) -> Questions:
    """Return the held-out questions as rewrites are compared with them: word for word, whatever the punctuation."""
    return Questions(read_questions(tasks), least_words=LEAST_QUESTION_WORDS, plain=plain_words)


def choose(name: str, strategy: Strategy, paths: Sequence[Path], config: RephraseConfig, seed: int) -> list[Passage]:
    """Return the passages of one strategy: those with the lowest hash of (seed, strategy, document, number)."""

    def ranked() -> Iterator[tuple[bytes, Passage]]:
        for path in paths:
            if strategy.sources and path.stem not in strategy.sources:
                continue
            for row in read_rows(path, Document):
                if row.split == "train" and row.kind in strategy.kinds:
                    seed_row = replace(row, text="")  # a passage must not hold its whole document in memory
                    for number, text in enumerate(cut(row.text, *config.passage_chars)):
                        place = f"{seed}\0{name}\0{row.id}\0{number}"
                        yield hashlib.sha256(place.encode()).digest(), Passage(seed_row, number, text)

    lowest = heapq.nsmallest(strategy.passages, ranked(), key=lambda one: one[0])
    return sorted((one for _, one in lowest), key=lambda p: (p.seed.source, p.seed.id, p.number))


def cut(text: str, least_chars: int, most_chars: int) -> Iterator[str]:
    """Yield passages of whole paragraphs, each as long as fits; a longer paragraph is cut after a sentence."""
    held = ""
    for paragraph in re.split(r"\n\s*\n", text):
        for part in _sentences(paragraph.strip(), most_chars):
            if held and len(held) + 2 + len(part) > most_chars:
                if len(held) >= least_chars:
                    yield held
                held = ""
            held = f"{held}\n\n{part}" if held else part
    if len(held) >= least_chars:
        yield held


def _sentences(paragraph: str, most_chars: int) -> Iterator[str]:
    """Yield a paragraph in parts of at most `most_chars` that end with a sentence; what has no end is skipped."""
    while len(paragraph) > most_chars:
        ends = [m.end() for m in _SENTENCE_END.finditer(paragraph[:most_chars])]
        if not ends:
            return
        yield paragraph[: ends[-1]]
        paragraph = paragraph[ends[-1] :].lstrip()
    if paragraph:
        yield paragraph


class Answers:
    """What teachers have answered, by the hash of the request: a file that only grows, a line an answer."""

    def __init__(self, path: Path, others: Sequence[str], wanted: set[str]) -> None:
        """Read the answers to `wanted`, from other runs first; DataError for a file of theirs that is not there."""
        self.path, self._found = path, dict[str, Answer]()
        for other in map(Path, others):
            if not other.is_file():
                raise DataError(
                    "no such answers", where="rephrase.reuse", found=other, expected=f".../rephrase/{ANSWERS}"
                )
            self._found.update(_read_answers(other, wanted))
        own = _read_answers(path, wanted) if path.exists() else {}
        self._found.update(own)
        with machine_limits(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            # A line that a kill cut off must not spoil the next one.
            if self._file.tell() and not _ends_with_newline(path):
                self._file.write(b"\n")
        for key in self._found.keys() - own.keys():
            self._append(key, self._found[key])

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Answer:
        return self._found[key]

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer; one that refused the request is not kept, the server may be mended."""
        self._found[key] = answer
        if not answer.refused:
            self._append(key, answer)

    def _append(self, key: str, answer: Answer) -> None:
        line = {"key": key, "text": answer.text, "finish_reason": answer.finish_reason}
        with machine_limits(self.path):
            self._file.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")
            self._file.flush()


def ask(
    requests: Sequence[Request],
    teacher: Teacher,
    answers: Answers,
    concurrency: int,
    heard: Callable[[Request, Answer], None],
    work: Workspace,
) -> None:
    """Ask what is not answered yet, `concurrency` at a time, and keep each answer as it comes.

    `heard` gets every answer, old ones first. After an error nothing more is sent, and what is under way is kept
    when it comes.
    """
    for request in requests:
        if request.key in answers:
            heard(request, answers[request.key])
    missing = iter([request for request in requests if request.key not in answers])
    total = sum(request.key not in answers for request in requests)
    under_way: dict[Future[Answer], Request] = {}
    with ThreadPoolExecutor(concurrency) as pool:

        def come() -> Iterator[tuple[Request, Answer]]:
            while under_way:
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    request = under_way.pop(future)
                    answer = future.result()
                    answers.add(request.key, answer)
                    yield request, answer

        try:
            for request in islice(missing, concurrency):
                under_way[pool.submit(teacher.ask, request.body)] = request
            for request, answer in work.log.track(come(), "rephrase", total=total, unit="passages"):
                heard(request, answer)
                for following in islice(missing, 1):
                    under_way[pool.submit(teacher.ask, following.body)] = following
        except BaseException:
            teacher.stop()
            for future, request in under_way.items():
                if future.exception() is None:  # waits for it
                    answers.add(request.key, future.result())
            raise


def _request(name: str, passage: Passage, identity: Identity, config: RephraseConfig, seed: int) -> Request:
    place = f"{seed}\0{name}\0{passage.seed.id}\0{passage.number}\0sampling"
    body = {
        "model": identity.name,
        "messages": PROMPTS[name].messages(passage.text),
        **config.sampling.model_dump(),
        "seed": int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big") >> 1,
    }
    return Request(name, passage, body, sha256_json({"revision": identity.revision, "body": body}))


def _judged(request: Request, answer: Answer, config: RephraseConfig, held_out: Questions) -> Rewrite:
    prompt, passage = PROMPTS[request.strategy], request.passage.text
    text = clean(answer.text)
    found = measure(passage, text)
    why = (
        judge(answer, text, passage, prompt.ask, prompt.limits, prompt.form, found)
        or held_out.in_documents([text], [read_words(text)])[0]
    )
    return Rewrite(text, found, why)


def _check_sources(config: RephraseConfig, names: list[str]) -> None:
    for name, strategy in config.strategies.items():
        if f"rephrased_{name}" in names:
            raise DataError(
                "a source has the name of a rewritten one", where="gather.sources", found=f"rephrased_{name}"
            )
        for source in strategy.sources:
            if source not in names:
                raise DataError(
                    "no such source",
                    where=f"rephrase.strategies.{name}.sources",
                    found=source,
                    expected=", ".join(names),
                )


def _gate(config: RephraseConfig, passages: Mapping[str, Sequence[Passage]]) -> None:
    """Judge what would be written before anybody is asked; LicenceError names it."""
    assert config.teacher is not None
    rights = {
        (p.seed.source, p.seed.licence, p.seed.licence_evidence): name
        for name, chosen in sorted(passages.items())
        for p in chosen
    }
    claims = [
        Claim(f"rephrased_{name}", "", source, "", strictest(licence, config.teacher.licence), evidence)
        for (source, licence, evidence), name in sorted(rights.items())
    ]
    for _ in gate(claims, config.policy):
        pass


def _write(
    requests: Sequence[Request],
    judged: Mapping[str, Rewrite],
    identity: Identity,
    config: RephraseConfig,
    work: Workspace,
) -> dict[str, Any]:
    assert config.teacher is not None
    seen: dict[str, str] = {}
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS.names}
    documents: dict[str, list[Document]] = {name: [] for name in config.strategies}
    by_strategy: dict[str, list[tuple[Request, Rewrite, Why | None]]] = {name: [] for name in config.strategies}
    sampling = json.dumps(config.sampling.model_dump(), sort_keys=True)
    excluded = set(config.exclude)
    for request in requests:
        rewrite, passage = judged[request.key], request.passage
        source, prompt = f"rephrased_{request.strategy}", f"{request.strategy}@{PROMPTS[request.strategy].version}"
        identifier = document_id(source, f"{passage.seed.id}#{passage.number}")
        why = rewrite.why
        if why is None:
            first = seen.setdefault(" ".join(split_words(rewrite.text)), identifier)
            why = ("duplicate", f"of {first}") if first != identifier else None
        if why is None and (gone := excluded & {identifier, source}):
            why = ("excluded", min(gone))
        by_strategy[request.strategy].append((request, rewrite, why))
        row = {
            "id": identifier,
            "seed": passage.seed.id,
            "seed_source": passage.seed.source,
            "passage": passage.number,
            "strategy": request.strategy,
            "prompt": prompt,
            "teacher": identity.name,
            "sampling": sampling,
            "request_sha256": request.key,
            "kept": why is None,
            "reason": why[0] if why else "",
            "detail": why[1] if why else "",
            **{"kept_facts" if key == "kept" else key: round(value, 4) for key, value in rewrite.found.items()},
        }
        for name, column in columns.items():
            column.append(row[name])
        if why is None:
            seed = passage.seed
            documents[request.strategy].append(
                Document(
                    id=identifier,
                    text=rewrite.text + "\n",
                    source=source,
                    source_version=f"{prompt} {sampling}",
                    path=f"{seed.id}#{passage.number}",
                    sha256=hashlib.sha256((rewrite.text + "\n").encode()).hexdigest(),
                    wrapper_licence="",
                    licence=strictest(seed.licence, config.teacher.licence),
                    licence_evidence=f"{seed.licence_evidence}; {identity.name}: {config.teacher.licence_evidence}",
                    acquired=seed.acquired,
                    kind="generated",
                    synthetic_from=seed.id,
                    teacher=identity.name,
                    split="train",
                    address=seed.address,
                    fetched=seed.fetched,
                )
            )
    known = {*columns["id"], *(f"rephrased_{name}" for name in config.strategies)}
    if unknown := sorted(excluded - known):
        raise DataError("an excluded row was not rewritten", where="rephrase.exclude", found=", ".join(unknown[:5]))
    counts: dict[str, Any] = {"teacher": identity.name, "strategies": {}}
    for name, rows in by_strategy.items():
        dropped = Counter(why[0] for _, _, why in rows if why)
        counts["strategies"][name] = {
            "asked": len(rows),
            "kept": len(documents[name]),
            "dropped": dict(sorted(dropped.items())),
        }
        work.log.say(
            f"  {name}: {len(documents[name]):,} of {len(rows):,} kept"
            + "".join(f", {n:,} {reason}" for reason, n in sorted(dropped.items()))
        )
        passed = sum(rewrite.why is None for _, rewrite, _ in rows)
        if config.min_accepted and passed < max(1, config.min_accepted * len(rows)):
            raise _useless(name, [rewrite for _, rewrite, _ in rows], work)
    for name, made in documents.items():
        if made:
            write_rows(
                work.folder / "documents" / f"rephrased_{name}.parquet", sorted(made, key=lambda d: d.id), Document
            )
    write_table(work.folder / "rewrites.parquet", pa.table(columns, schema=_COLUMNS))
    counts["documents"] = sum(map(len, documents.values()))
    counts["bytes"] = sum(len(d.text.encode()) for made in documents.values() for d in made)
    samples = {name: _samples(rows) for name, rows in by_strategy.items()}
    write_json(work.folder / "report.json", {**counts, "samples": samples})
    return counts


def _samples(rows: Sequence[tuple[Request, Rewrite, Why | None]]) -> list[dict[str, Any]]:
    """Return the first passages with their rewrites, for each reason and for none."""
    shown: Counter[str] = Counter()
    found = []
    for request, rewrite, why in rows:
        reason = why[0] if why else ""
        shown[reason] += 1
        if shown[reason] <= SAMPLES:
            found.append(
                {"reason": ": ".join(why) if why else "kept", "passage": request.passage.text, "rewrite": rewrite.text}
            )
    return found


def _useless(which: str, rewrites: Sequence[Rewrite], work: Workspace) -> DataError:
    reasons = Counter(rewrite.why[0] for rewrite in rewrites if rewrite.why)
    return DataError(
        "the teacher's rewrites are of no use",
        where=work.folder / ANSWERS,
        found=f"{which}: of {len(rewrites):,} {sum(r.why is None for r in rewrites):,} passed; "
        + ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common()),
        todo="read some answers; take another teacher, other strategies, or other `limits`. The answers are kept",
    )


def _read_answers(path: Path, wanted: set[str]) -> dict[str, Answer]:
    """Return the wanted answers of a file; a line that a kill cut off is passed over."""
    found = {}
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                if row["key"] in wanted:
                    found[row["key"]] = Answer(str(row["text"]), str(row["finish_reason"]))
            except (ValueError, KeyError, TypeError):
                continue
    return found


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
