"""The harness itself: it must say which rank failed and why, must not hang, and must work afterwards."""

import os
import time

import pytest
import torch
from ranks import RankError


def add(number):
    total = torch.tensor(torch.distributed.get_rank() + number)
    torch.distributed.all_reduce(total)
    return int(total)


def fail_on_one(what):
    if torch.distributed.get_rank() == 1:
        if what == "raise":
            raise ValueError("on purpose")
        if what == "die":
            os._exit(7)
        time.sleep(60)
    torch.distributed.all_reduce(torch.zeros(1))


def test_a_world_runs_one_function_after_another(ranks):
    assert ranks(2).run(add, 0) == [1, 1]
    assert ranks(2).run(add, 10) == [21, 21]


@pytest.mark.parametrize(
    ("what", "words"), [("raise", "ValueError: on purpose"), ("die", "ended with code 7"), ("hang", "fail_on_one")]
)
def test_a_failing_rank_is_named_and_the_next_world_works(ranks, what, words):
    with pytest.raises(RankError, match=r"rank 1 of 2[\s\S]*" + words):
        ranks(2).run(fail_on_one, what, timeout_s=2)
    assert ranks(2).run(add, 0) == [1, 1]
