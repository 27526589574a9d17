import pytest

from freehold.optim.config import PhaseConfig
from freehold.optim.schedule import Schedule

WSD = {
    "stable": PhaseConfig(steps=10, warmup_steps=4, checkpoint="truebase"),
    "anneal": PhaseConfig(steps=5, shape="linear", end=0.0),
}


def test_warmup_stable_decay():
    schedule = Schedule(WSD)
    factors = [schedule.at(step).factor for step in range(15)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:10] == [1.0] * 6
    assert factors[10:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_ends_and_names():
    schedule = Schedule(WSD, first_step=100)
    assert schedule.ends() == {"stable": 110, "anneal": 115}
    assert schedule.total_steps == 115
    assert schedule.at(109).is_last
    assert schedule.at(110).phase == "anneal"
    with pytest.raises(IndexError, match="115"):
        schedule.at(115)


def test_cosine_ends_where_it_says():
    schedule = Schedule({"decay": PhaseConfig(steps=8, shape="cosine", start=1.0, end=0.1)})
    assert schedule.at(7).factor == pytest.approx(0.1)
    assert schedule.at(3).factor == pytest.approx(0.55)
