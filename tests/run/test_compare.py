"""Comparisons: intervals and tests with known answers, models that were asked other things, and a whole command."""

import math

import pytest

from freehold.core import statistics
from freehold.core.errors import ConfigError, DataError
from freehold.run.compare import Measured, bits_pair, compare, pair, tables, write


def model(name, right, items=40, bits=1.0):
    answers = [{"id": str(n), "task": "sums", "part": f"p{n % 8}", "correct": n < right} for n in range(items)]
    return Measured(name, answers, {f"a/{n}": (8 * bits * (10 + n), 10 + n) for n in range(12)})


def test_statistics_have_their_known_values():
    assert statistics.mcnemar(3, 11) == pytest.approx(0.0574, abs=1e-4)
    assert statistics.smallest_difference(300, 0.2) == pytest.approx(0.0723, abs=1e-4)
    assert statistics.holm([0.01, 0.04, 0.03]) == [True, False, False]
    area, rate = statistics.separation([2.0, 3.0], [0.0, 1.0])
    assert (area, rate) == (1.0, 1.0)
    assert statistics.separation([0.0, 1.0], [0.0, 1.0])[0] == 0.5
    whole = statistics.bootstrap([0.0, 1.0] * 50, [0] * 50 + [1] * 50)
    assert whole.low == whole.value == whole.high == 0.5, "each cluster has the same mean"
    assert statistics.bootstrap([]).low == -math.inf


def test_pairs_count_what_only_one_got_right():
    found = pair(model("a", 10), model("b", 16))
    assert (found["only_first"], found["only_other"], found["items"]) == (0, 6, 40)
    assert found["p"] == pytest.approx(2 / 2**6)
    assert found["difference"]["low"] > 0
    gap = bits_pair(model("a", 1), model("b", 1, bits=1.5))["difference"]
    assert gap["value"] == pytest.approx(4.0)


def test_models_asked_other_items_are_refused():
    with pytest.raises(DataError, match="not asked the same items"):
        compare([model("a", 1), model("b", 1, items=39)])
    with pytest.raises(ConfigError, match="nothing to compare with"):
        compare([model("a", 1)])


def test_files_hold_table_and_picture(tmp_path):
    three = [model("a", 10), model("<b>", 16), model("c", 10)]
    found = write(three, tmp_path)
    assert found["models"]["c"]["paired"]["all"]["p"] == 1.0
    assert "smallest shown" in (tmp_path / "compare.md").read_text()
    assert "<b>" not in (tmp_path / "compare.svg").read_text()
    assert [table.title for table in tables(three)][1] == "Paired differences"
