"""How many threads decode fastest on this machine, now: measured, because no rule holds.

A step of a small model is shorter than waking a second thread; a step of a large one is bound by memory, which more
threads read faster; and threads that share a core with another program wait for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from freehold.infer.engine import Engine
from freehold.infer.sampler import Sampling

STEPS = 8
"""Tokens decoded in one measurement."""
ROUNDS = 3
"""Measurements of each number of threads, in turn, so that a disturbance meets all of them; the best one counts."""
WORTH = 0.9
"""More threads must take at most this share of the time: they cost other programs something."""
HOPELESS = 1.5
"""A number of threads that takes this many times as long as one is not measured again."""


@contextmanager
def computing_threads(count: int) -> Iterator[None]:
    """Compute with this many threads: sums, and so the last digits of a figure, may depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_threads(engine: Engine) -> int:
    """Set PyTorch's threads to the number that decodes fastest; return it.

    OMP_NUM_THREADS, which is the user's word, is kept, and so is the number on any device but a CPU. A number of
    threads that gives other bits than one thread is not taken: what a model answers does not depend on the choice.
    """
    before = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS") or next(engine.model.parameters()).device.type != "cpu":
        return before
    # What this process may use: in a container that is less than what the machine has.
    cores = len(os.sched_getaffinity(0))
    # Powers of two and all cores: the curve is flat between them, and each measurement costs a user's time.
    candidates = sorted({cores, *(2**n for n in range(cores.bit_length()) if 2**n <= cores)})
    best = 1
    try:
        best = _fastest(engine, candidates)
    finally:
        torch.set_num_threads(best)
    return best


def _fastest(engine: Engine, candidates: list[int]) -> int:
    """Return the number of threads whose best measurement is shortest, of those that give the bits of one thread."""
    seconds = dict.fromkeys(candidates, float("inf"))
    expected: list[tuple[int, float]] = []
    out: set[int] = set()
    """Numbers of threads that are far slower than one, or give other bits."""
    for _ in range(ROUNDS):
        # In turn, not one after the other: another program that starts meanwhile disturbs all of them.
        for threads in [n for n in candidates if n not in out]:
            torch.set_num_threads(threads)
            taken, found = _decode(engine, HOPELESS * seconds[1])
            expected = expected or found
            if found == expected:
                seconds[threads] = min(seconds[threads], taken)
            else:
                out.add(threads)
    best = candidates[0]
    for threads in candidates[1:]:
        if seconds[threads] < WORTH * seconds[best]:
            best = threads
    return best


def _decode(engine: Engine, limit_s: float) -> tuple[float, list[tuple[int, float]]]:
    """Return the seconds of some steps of one stream, without the prompt, and what they gave.

    Ends early, with what there is, when they take longer than the limit.
    """
    steps = min(STEPS, engine.limit_tokens - 1)
    # One stream, greedy: what a user of the API waits for, and comparable bit for bit.
    stream = engine.stream([0], Sampling(temperature=0, max_tokens=steps))
    found = [(first.id, first.logprob) for first in [next(stream)]]
    began = time.perf_counter()
    for token in stream:
        found.append((token.id, token.logprob))
        if time.perf_counter() - began > limit_s:
            break
    return time.perf_counter() - began, found
