"""The guardrails of a server: one policy a route, on what comes in and on what goes out."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from freehold.core.errors import RequestError
from freehold.guard.config import GuardConfig, Place
from freehold.guard.policy import Counts, Policy
from freehold.guard.stream import AnswerGuard
from freehold.stages.serve.answers import Choice
from freehold.tokenizer.dialects import Piece

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
LOG = logging.getLogger("uvicorn.error")


class Withheld(RequestError):
    """A policy forbids a prompt that is no conversation."""


class Guards:
    """The policies of all routes, with one count; made at start, so that a missing filter is known then."""

    def __init__(self, config: GuardConfig) -> None:
        self.counts = Counts()
        self._policies = {route: Policy(config, route, self.counts, LOG.warning) for route in ROUTES}

    def of(self, route: str) -> Policy:
        """Return the policy of a route; a conversation's for whatever has none of its own."""
        return self._policies.get(route, self._policies[ROUTES[0]])


def answer_guard(policy: Policy) -> AnswerGuard | None:
    """Return what judges one answer; None when no rule looks at answers."""
    return AnswerGuard(policy) if policy.acts("answer") else None


def check_logprobs(policy: Policy, wanted: bool | None) -> None:
    """Refuse log-probabilities where answers are held or changed: they name every token of what is not shown."""
    if wanted and policy.acts("answer", "block", "redact"):
        raise RequestError("log-probabilities would show what a policy withholds", where="logprobs", expected="none")


def judge_messages(policy: Policy, messages: list[dict[str, Any]]) -> bool:
    """Redact messages in place; return whether a rule forbids to answer."""
    blocked = False
    for message in messages:
        place: Place = "tools" if message["role"] == "tool" else "prompt"
        for name in ("content", "reasoning_content"):
            if message.get(name):
                verdict = policy.judge(message[name], place)
                message[name] = verdict.text
                blocked |= verdict.blocked
    return blocked


async def withheld(choices: Sequence[Choice], message: str) -> AsyncGenerator[tuple[int, list[Piece]]]:
    """Yield answers that say why there are none."""
    for number, choice in enumerate(choices):
        yield number, choice.withhold(message)
