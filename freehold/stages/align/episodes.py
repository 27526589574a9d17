"""Plays episodes: a policy answers, an environment replies, until it is done. Ids are only ever appended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from freehold.environments.audit import guarded
from freehold.environments.protocol import Answer, Environment, EnvironmentFault, Message, Policy, Task, total
from freehold.infer.engine import Engine
from freehold.infer.sampler import Sampling
from freehold.model.afmoe import Afmoe
from freehold.tokenizer.bpe import END_OF_TEXT, Tokenizer
from freehold.tokenizer.chat import render_ids
from freehold.tokenizer.output import AnswerParser

END_OF_TURN = "<|im_end|>"
REVEALING = {"reward", "score", "correct", "gold", "expected", "solution"}
"""Keys that a tool's result has only when it shows the policy what it is judged by."""


class EnginePolicy:
    """The weights that train, asked through the engine; a version for each state of the weights."""

    def __init__(self, model: Afmoe, tokenizer: Tokenizer, *, most_tokens: int, max_tokens: int, temperature: float):
        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.engine = Engine(model, max_batch=256, limit_tokens=most_tokens)
        self.stop_ids = (tokenizer.specials[END_OF_TURN], END_OF_TEXT)
        self.version = ""

    def refresh(self) -> str:
        """Compute the version of the weights as they are now."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        self.version = digest.hexdigest()
        return self.version

    def answer(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Answer]:
        """Return one answer a prompt; with a temperature of 0 the likeliest tokens."""
        settings = [
            Sampling(temperature=self.temperature, max_tokens=self.max_tokens, stop_ids=self.stop_ids, seed=seed)
            for seed in seeds
        ]
        return [Answer(one.ids, one.logprobs, one.finish_reason) for one in self.engine.generate(prompts, settings)]


@dataclass
class Episode:
    """One episode as far as it is played."""

    task: Task
    environment: Environment
    group: int
    member: int
    seed: int
    ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    state: Any
    turns: list[Message] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)
    truncated: bool = False
    done: bool = False

    @property
    def where(self) -> str:
        """Return the environment and task, for messages."""
        return f"{self.environment.name}: {self.task.id}"

    def parts(self) -> dict[str, float]:
        """Return the parts of the reward."""
        parts = dict(guarded(self.where, lambda: self.environment.reward(self.task, self.state, self.turns)))
        total(parts, self.where)
        return {name: float(value) for name, value in parts.items()}

    @property
    def calls(self) -> int:
        """Return how many tools were called."""
        return sum(len(turn.get("tool_calls") or ()) for turn in self.turns)

    @property
    def invalid_calls(self) -> int:
        """Return how many calls the environment could not read."""
        return int(self.state.get("invalid", 0)) if isinstance(self.state, dict) else 0


def seed_of(*parts: object) -> int:
    """Return a seed that depends on nothing but the parts."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # fits int64, which the ledger holds


class Player:
    """Plays episodes with one tokenizer and dialect."""

    def __init__(self, tokenizer: Tokenizer, *, dialect: str, max_turns: int, most_tokens: int, max_tokens: int):
        self.tokenizer, self.dialect, self.max_turns = tokenizer, dialect, max_turns
        self.most_tokens, self.max_tokens = most_tokens, max_tokens
        self.end = tokenizer.specials[END_OF_TURN]

    def begin(self, environment: Environment, task: Task, group: int, member: int, seed: int) -> Episode:
        """Return an episode before its first turn."""
        ids, _ = render_ids(self.tokenizer, task.messages, tools=task.tools, generation=True)
        if len(ids) + self.max_tokens > self.most_tokens:
            raise EnvironmentFault(
                "a task does not fit a row",
                where=f"{environment.name}: {task.id}",
                found=f"{len(ids)} tokens of prompt and {self.max_tokens} to answer",
                expected=f"at most {self.most_tokens} tokens",
                todo="raise align.batch.context_tokens, or lower align.phases.*.rl.max_tokens",
            )
        state = guarded(f"{environment.name}: {task.id}", lambda: environment.start(task))
        return Episode(task, environment, group, member, seed, ids, [False] * len(ids), [0.0] * len(ids), state)

    def play(self, episodes: Sequence[Episode], policy: Policy) -> None:
        """Play episodes to their end, all that are not done in one batch; no order of arrival matters."""
        for turn in range(self.max_turns):
            active = [one for one in episodes if not one.done]
            if not active:
                return
            answers = policy.answer([one.ids for one in active], [one.seed for one in active])
            for episode, answer in zip(active, answers, strict=True):
                self._take(episode, answer, last=turn == self.max_turns - 1)

    def _take(self, episode: Episode, answer: Answer, *, last: bool) -> None:
        """Add a turn of the assistant and what the environment says to it."""
        if len(answer.logprobs) != len(answer.ids):
            raise EnvironmentFault(
                "a policy gave another number of log-probabilities than tokens",
                where=episode.where,
                found=len(answer.logprobs),
                expected=len(answer.ids),
            )
        episode.ids += answer.ids
        episode.sampled += [True] * len(answer.ids)
        episode.logprobs += answer.logprobs
        episode.turns.append(message_of(self.tokenizer, answer.ids, episode.task.tools, self.dialect))
        if answer.finish_reason == "length" or not answer.ids or answer.ids[-1] != self.end:
            # What was cut might have become right: its reward is not known.
            episode.truncated = answer.finish_reason == "length"
            episode.done = True
            return
        environment, task, turn = episode.environment, episode.task, episode.turns[-1]
        reply = guarded(episode.where, lambda: environment.step(task, episode.state, turn))
        episode.state, episode.done = reply.state, reply.done or last
        if reply.messages and not episode.done:
            _check_reveals_nothing(episode, reply.messages)
            episode.results += reply.messages
            given = continuation(self.tokenizer, reply.messages)
            episode.ids += given
            episode.sampled += [False] * len(given)
            episode.logprobs += [0.0] * len(given)
            if len(episode.ids) + self.max_tokens > self.most_tokens:
                episode.truncated = episode.done = True


def message_of(tokenizer: Tokenizer, ids: Sequence[int], tools: Sequence[Message], dialect: str) -> Message:
    """Return a turn of the assistant as a message: content, reasoning and calls."""
    parser = AnswerParser(tools=tools or None, dialect=dialect)
    # A model may have more rows than its tokenizer has tokens; such an id is no text.
    text = tokenizer.decode([token for token in ids if token < tokenizer.vocab_size], skip_specials=True)
    said = {"content": "", "reasoning": ""}
    calls: list[dict[str, Any]] = []
    for piece in [*parser.feed(text), *parser.finish()]:
        if piece.kind == "call":
            calls.append({"type": "function", "function": {"name": piece.name, "arguments": ""}})
        elif piece.kind == "arguments":
            calls[-1]["function"]["arguments"] += piece.text
        elif piece.kind in said:
            said[piece.kind] += piece.text
    message: dict[str, Any] = {"role": "assistant", "content": said["content"]}
    if said["reasoning"]:
        message["reasoning_content"] = said["reasoning"]
    if calls:
        message["tool_calls"] = calls
    return message


def continuation(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the ids that follow the end of the assistant's turn: what was said to it, and the start of its next turn.

    The turn itself is not rendered again: text need not come back as the tokens that were drawn.
    """
    ids, _ = render_ids(tokenizer, [{"role": "assistant", "content": ""}, *messages], generation=True)
    return ids[ids.index(tokenizer.specials[END_OF_TURN]) + 1 :]


def _check_reveals_nothing(episode: Episode, messages: Sequence[Message]) -> None:
    for message in messages:
        try:
            result = json.loads(message.get("content") or "null")
        except ValueError:
            continue
        if isinstance(result, dict) and (found := REVEALING & set(result)):
            raise EnvironmentFault(
                "an environment shows the policy what it is judged by",
                where=episode.where,
                found=f"a result with {', '.join(sorted(found))}",
                expected="results of tools alone",
                todo="repair the environment: a policy learns to read its reward, not to solve the task",
            )
