"""Parts of a batch file: each line is in one of them, and is there what it is in the whole file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.batch.file import BadLine, BatchRequest, count_lines, read_requests
from flexgen_lite.batch.shard import MAX_SHARDS, WHOLE, Shard
from flexgen_lite.batch.survey import survey
from flexgen_lite.batch.token_counts import MOST_COUNTED, count_tokens


def request(number: object, body: str = '{"prompt": "hi"}') -> bytes:
    text = f'{{"custom_id": "id-{number}", "method": "POST", "url": "/v1/completions", "body": {body}}}\n'
    return text.encode()


LINES = st.lists(
    st.one_of(
        st.integers(0, 8).map(request),
        st.integers(0, 8).map(lambda number: request(number, '{"prompt": 1.5}')),
        st.sampled_from([b"\n", b"  \n", b"{broken\n", b'{"custom_id": ""}\n', b"[]\n"]),
    ),
    max_size=30,
)


def told(item: BatchRequest | BadLine) -> tuple[object, ...]:
    """Without the digest: of a line that the whole file has several times, one that is bad by its body alone."""
    if isinstance(item, BadLine):
        return item.custom_id, item.message, item.is_repeat
    return (item.custom_id, item.prompt)


@given(LINES, st.integers(1, 7))
def test_each_line_is_in_one_shard_and_says_there_what_it_says_in_the_file(lines: list[bytes], count: int) -> None:
    whole = [told(item) for item in read_requests(iter(lines))]
    parts = [[told(item) for item in read_requests(iter(lines), Shard(n, count))] for n in range(count)]
    assert Counter(item for part in parts for item in part) == Counter(whole)
    for part in parts:
        assert part == [item for item in whole if item in part], "in the file's order"


@given(LINES, st.integers(1, 7))
def test_bad_lines_that_are_the_same_have_digests_of_their_own(lines: list[bytes], count: int) -> None:
    bad = [line for line in lines if line in (b"{broken\n", b"[]\n")]
    items = [item for n in range(count) for item in read_requests(iter(bad), Shard(n, count))]
    whole = [item for item in read_requests(iter(bad)) if isinstance(item, BadLine)]
    assert {item.digest for item in items if isinstance(item, BadLine)} == {item.digest for item in whole}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_lines_are_counted_by_shard(tmp_path: Path, count: int) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"".join([request(0), b"\n", request(1), request(2), b"{broken\n", b" \n", request(3)]))
    counts = [count_lines(path, Shard(n, count)) for n in range(count)]
    assert sum(number or 0 for number in counts) == count_lines(path) == 5
    surveyed = [survey(path, Shard(n, count)) for n in range(count)]
    assert sum(one.sequences for one in surveyed if one is not None) == 7
    whole = survey(path)
    assert all(one is None or one.longest_tokens == (whole and whole.longest_tokens) for one in surveyed)


def test_a_shard_that_has_no_line(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(request(0))
    assert count_lines(path, Shard(1, 2)) == 0
    assert survey(path, Shard(1, 2)) is None
    assert list(count_tokens(path, "", None, Shard(1, 2))) == []


def test_tokens_are_counted_of_the_shard_alone(tmp_path: Path) -> None:
    """Also where most of its lines are behind those that are looked at."""
    path = tmp_path / "in"
    bodies = [f'{{"prompt": [{", ".join("5" * (1 + n % 3))}]}}' for n in range(3 * MOST_COUNTED + 30)]
    path.write_bytes(b"".join(request(n, body) for n, body in enumerate(bodies)))
    for number in range(3):
        found = list(count_tokens(path, "", None, Shard(number, 3)))
        assert len(found) == MOST_COUNTED + 10
        assert {one.prompt for one in found} == {1 + number}


def test_what_is_given_is_read() -> None:
    assert Shard.parse("0/1") == WHOLE
    assert Shard.parse("3/4") == Shard(3, 4)
    assert str(Shard(3, 4)) == "3/4"
    assert [line for line in range(10) if Shard(3, 4).has(line)] == [3, 7]


@pytest.mark.parametrize("text", ["", "1", "1/0", "-1/4", "1/4/2", "a/b", "1/ 4", "0/9999999", "٣/٤", "1.0/2"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--shard .* is not allowed: give I/N, such as 0/4, 1/4, 2/4 and 3/4"):
        Shard.parse(text)


@pytest.mark.parametrize("text", ["4/4", "7/2", f"{MAX_SHARDS}/{MAX_SHARDS}"])
def test_shards_are_counted_from_0(text: str) -> None:
    count = text.partition("/")[2]
    with pytest.raises(
        ValueError, match=f"--shard {text}: the shards of {count} are 0/{count} to {int(count) - 1}/{count}"
    ):
        Shard.parse(text)
