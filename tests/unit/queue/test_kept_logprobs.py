"""Logprobs come back as they were, in little memory."""

from __future__ import annotations

import tracemalloc

import pytest

from flexgen_lite.queue.kept_logprobs import KeptLogprobs
from flexgen_lite.wire.sampling import TokenLogprobs


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_they_come_back(num_top: int) -> None:
    kept = KeptLogprobs(num_top)
    given = [
        TokenLogprobs(-0.5 * n, n + 1, tuple((1000 * n + i, -0.25 * i) for i in range(num_top))) for n in range(30)
    ]
    for found in given:
        kept.append(found)
    assert list(kept) == given and len(kept) == 30


def test_memory() -> None:
    found = TokenLogprobs(-0.5, 1, tuple((i, -0.25 * i) for i in range(20)))
    tracemalloc.start()
    try:
        kept = KeptLogprobs(20)
        for _ in range(10_000):
            kept.append(found)
        assert tracemalloc.get_traced_memory()[1] < 10_000 * 21 * 8 * 2.5, "with what growing takes"
    finally:
        tracemalloc.stop()
