"""Curves, segments of both kinds of rows, disks that are faster or slower than when loads were measured."""

from __future__ import annotations

import json

import pytest

from flexgen_lite.cost.rates import AttentionRates, Curve, Rates, SegmentRates

LINE = Curve(((1, 1.0), (4, 2.0), (16, 10.0)))


@pytest.mark.parametrize(
    ("rows", "seconds"), [(0, 0), (1, 1), (0.5, 1), (2.5, 1.5), (4, 2), (10, 6), (16, 10), (28, 18)]
)
def test_a_curve_is_straight_between_its_points_and_goes_on(rows: float, seconds: float) -> None:
    assert LINE.at(rows) == pytest.approx(seconds)


def test_a_single_point_is_a_rate() -> None:
    assert Curve(((8, 2.0),)).at(32) == pytest.approx(8.0)


def test_single_rows_cost_what_they_cost_beyond_prompts() -> None:
    rates = SegmentRates(prompt=Curve(((1, 1.0), (101, 11.0))), decode=Curve(((1, 2.0), (101, 32.0))))
    assert rates.seconds(0, 51) == pytest.approx(6.0)
    assert rates.seconds(51, 0) == pytest.approx(17.0)
    assert rates.seconds(51, 50) == pytest.approx(11.0 + (17.0 - 6.0))


def rates(**changes: object) -> Rates:
    segments = {"packed 0>0": SegmentRates(LINE, LINE), "raw -1>0": SegmentRates(Curve(((1, 9.0),)), LINE)}
    values: dict[str, object] = {
        "segments": segments, "pair": {0: 1e-9}, "head": LINE, "attention": {0: AttentionRates(1e-4, 1e-6, 1e-8, 1e-7)},
        "load": {0: 1.0, -1: 3.0}, "upload": {}, "begin": LINE, "turn": (1e-3, 1e-5),
        "reads_beside_compute": 0.9, "disk": 1e9,
    }  # fmt: skip
    return Rates(**(values | changes))  # type: ignore[arg-type]


def test_json_and_back() -> None:
    assert Rates.from_dict(json.loads(json.dumps(rates().to_dict()))) == rates()
    for broken in ({}, {"segments": 1}, {**rates().to_dict(), "turn": [1]}):
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError, IndexError)):
            Rates.from_dict(broken)


def test_a_kind_that_was_not_measured_is_as_the_one_that_ends_alike() -> None:
    assert rates().segment(True, (0, 0)).prompt is LINE
    assert rates().segment(False, (-1, 0)).prompt.at(1) == 9.0
    assert rates().segment(True, (5, 0)).prompt is LINE, "packed comes first"


@pytest.mark.parametrize(("rows", "share"), [(1, 0.9), (4, 0.9), (10, 0.7), (16, 0.5), (1000, 0.5)])
def test_products_beside_the_loader(rows: int, share: float) -> None:
    assert rates(computes_beside_disk=((4, 0.9), (16, 0.5))).computes_at(rows) == pytest.approx(share)
    assert rates().computes_at(rows) == 1.0


def test_a_faster_disk_does_not_help_where_weights_are_converted() -> None:
    """Of 1 GB; it takes 3 s to be cast."""
    read = {0: 10**9, -1: 10**9}
    assert rates().with_disk(2e9, read, {-1}).load == pytest.approx({0: 0.5, -1: 3.0})
    assert rates().with_disk(0.25e9, read, {-1}).load == pytest.approx({0: 4.0, -1: 4.0})
    quick = rates(load={0: 0.8, -1: 1.2})
    assert quick.with_disk(2e9, read, {-1}).load == pytest.approx({0: 0.4, -1: 0.6}), "as the disk lets them"
    assert rates().with_disk(2e9, {5: 10**9}, ()).load == {5: 0.5}, "of a kind that had no slot"
    assert rates(disk=0.0).with_disk(2e9, read, ()).load == rates().load, "made-up weights come from no disk"
