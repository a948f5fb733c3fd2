"""What is said of a run beside what had been predicted of it."""

from __future__ import annotations

import json

import pytest

from flexgen_lite.cost.comparison import Prediction, where_they_part
from flexgen_lite.cost.job import JobTime

PREDICTED = Prediction(100.0, {"disk": 80.0, "compute": 60.0}, (("twice the RAM", 1.6),))


def job(seconds: float, **busy: float) -> JobTime:
    return JobTime(1.0, seconds, 10, busy, 100, 50, 5, 5)


def test_changes_are_told_by_how_much_they_help() -> None:
    found = Prediction.of(job(100, disk=0.8), {"less": job(200), "more": job(50), "no time": job(0)})
    assert found == Prediction(100, {"disk": 80.0}, (("more", 2.0), ("less", 0.5)))


def test_it_goes_through_json() -> None:
    assert Prediction.from_dict(json.loads(json.dumps(PREDICTED.to_dict()))) == PREDICTED


@pytest.mark.parametrize("values", [None, 3, {}, {"seconds": "x"}, {"seconds": 1, "lanes": [], "changes": []}])
def test_what_is_none_is_none(values: object) -> None:
    assert Prediction.from_dict(values) is None


@pytest.mark.parametrize(
    ("seconds", "lanes", "said"),
    [
        (104, {"disk": 84, "compute": 60}, "104.0 s where 100.0 were predicted, +4%"),
        (130, {"disk": 108, "compute": 61}, "+30%: they part at disk, which worked 108.0 s, predicted 80.0"),
        (70, {"disk": 79, "compute": 35}, "-30%: they part at compute, which worked 35.0 s, predicted 60.0"),
        (130, {"disk": 82, "compute": 61}, "+30%: no lane worked longer by so much, it is what they waited"),
        (130, {"disk": 80, "compute": 60, "attention": 30}, "they part at attention, which worked 30.0 s, predicted 0"),
        (0, {}, ""),
    ],
)
def test_where_they_part(seconds: float, lanes: dict[str, float], said: str) -> None:
    assert said in where_they_part(PREDICTED, seconds, lanes)
