"""Answers of different lengths."""

from __future__ import annotations

import pytest

from flexgen_lite.cost.job import JobRequest
from flexgen_lite.launcher.answers import AnswerTokens


def test_lengths_are_drawn_between_both_ends() -> None:
    found = list(AnswerTokens.parse("5-9").of([JobRequest(3, 20, 20)] * 400))
    assert {one.generated for one in found} == {5, 6, 7, 8, 9} and {one.max_tokens for one in found} == {20}
    assert sum(one.generated for one in found) / 400 == pytest.approx(7, abs=0.3)
    assert len({id(one) for one in found}) == 5
    assert found == list(AnswerTokens(5, 9).of([JobRequest(3, 20, 20)] * 400)), "the same each time"


def test_no_answer_is_longer_than_it_may_be() -> None:
    (found,) = AnswerTokens.parse("50").of([JobRequest(3, 20, 20)])
    assert found.generated == 20


@pytest.mark.parametrize("text", ["", "0", "-3", "9-5", "a", "1.5", "3-x", "1-2-3"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(ValueError, match="a range such as 60-140"):
        AnswerTokens.parse(text)
