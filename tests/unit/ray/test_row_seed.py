"""Seeds that are made of rows."""

from __future__ import annotations

from datetime import date
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.ray.row_seed import SEED_BITS, RowSeeds, row_digest

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
rows = st.dictionaries(st.text(max_size=5), values, max_size=4)


@given(st.lists(rows, max_size=6))
def test_the_same_batch_gives_the_same_seeds_and_no_two_rows_one(batch: list[dict[str, Any]]) -> None:
    one, other = RowSeeds(), RowSeeds()
    seeds = [one.seed(row) for row in batch]
    reordered = [dict(reversed(list(row.items()))) for row in batch]  # columns have no order
    assert [other.seed(row) for row in reordered] == seeds
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << SEED_BITS for seed in seeds)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2), (1, 1.0), (1, True), (0, False), (None, ""), ("1", 1), ("a", b"a"), ([], None), ([[1], 2], [[1, 2]]),
        (["ab", "c"], ["a", "bc"]), ({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}), (date(2020, 1, 1), date(2020, 1, 2)),
        (numpy.array([1, 2]), numpy.array([2, 1])), ("\ud800", "\ud801"), (-1, 1),
    ],
)  # fmt: skip
def test_what_differs_has_another_seed(one: Any, other: Any) -> None:
    assert RowSeeds().seed({"column": one}) != RowSeeds().seed({"column": other})


def test_an_object_that_is_no_data_counts_by_its_type() -> None:
    class Picture:
        pass

    assert row_digest({"image": Picture()}) == row_digest({"image": Picture()})
    assert row_digest({"image": Picture(), "id": 1}) != row_digest({"image": Picture(), "id": 2})
