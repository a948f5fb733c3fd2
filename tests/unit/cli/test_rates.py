"""Rates over the last seconds, and what is left."""

from __future__ import annotations

import pytest

from flexgen_lite.cli.rates import Expected, Window, clock, seconds_left


def test_a_window_forgets() -> None:
    window = Window(10)
    assert window.rate("x") == 0
    for second in range(60):
        window.add(second, {"x": 5.0 * second if second < 30 else 150 + 2.0 * (second - 30)})
    assert window.rate("x") == pytest.approx(2)
    assert window.rate("y") == 0


def test_a_pass_longer_than_the_window_still_has_a_rate() -> None:
    window = Window(10)
    for second in (0, 100, 200):
        window.add(second, {"x": float(second)})
    assert window.rate("x") == pytest.approx(1)


def test_what_is_left() -> None:
    assert seconds_left(0, 100, 60, 0) is None
    assert seconds_left(10, None, 60, 1) is None
    assert seconds_left(10, 100, 2, 5) is None
    assert seconds_left(50, 100, 50, 1) == pytest.approx(50)
    assert seconds_left(50, 100, 50, 3) == pytest.approx(25)
    assert seconds_left(50, 100, 50, 0) == pytest.approx(50), "nothing came lately: bursts are usual"
    assert seconds_left(100, 100, 50, 1) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "unknown"), (7, "0:07"), (59.6, "1:00"), (750, "12:30"), (11_100, "3:05:00"), (187_200, "2d 4h")],
)
def test_times_as_people_read_them(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("done", "elapsed", "left"),
    [
        (0, 0, 100),
        (0, 30, 70),
        (0, 130, 0),
        (50, 60, 40),  # as predicted
        (50, 120, 80),  # half as fast
        (100, 90, 0),
        (5, 2 * 24, 76 * 1.25),  # a twentieth is a quarter of what is trusted
    ],
)
def test_a_prediction_is_corrected_by_what_is_seen(done: float, elapsed: float, left: float) -> None:
    """The first request takes 20 s, each hundredth of the others 0.8."""
    assert Expected((20, 40, 60, 80, 100)).seconds_left(done, 100, elapsed) == pytest.approx(left)
