"""Byte counts in and out."""

from __future__ import annotations

from math import ceil, floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.text.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 << 30),
        ("500MB", 500_000_000),
        ("1.5 GiB", 3 << 29),
        (" 2g ", 2 << 30),
        ("3T", 3 << 40),
        ("7kB", 7000),
        ("12B", 12),
        ("1024", 1024),
        (".5MiB", 1 << 19),
        (77, 77),
        (0, 0),
    ],
)
def test_sizes(text: int | str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "lots", "8Gib1", "-1", "1e9", "8 G B", "GiB", -1, True, 1.5, None, "9" * 30])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 50, "1024.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_format(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text


@given(st.integers(0, 1 << 60))
def test_what_is_written_can_be_read(num_bytes: int) -> None:
    assert abs(parse_size(format_size(num_bytes)) - num_bytes) <= num_bytes * 0.051


@given(st.integers(0, 1 << 50))
def test_a_need_that_is_written_is_enough(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes, floor)) <= num_bytes <= parse_size(format_size(num_bytes, ceil))
