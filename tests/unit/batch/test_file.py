"""The batch file format, line by line."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.batch.file import BadLine, BatchRequest, IdSet, count_lines, read_requests
from flexgen_lite.client.sampling_params import SamplingParams


def line(custom_id: object = "a", body: object = None, **other: object) -> bytes:
    row = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": body or {"prompt": "hi"},
        **other,
    }
    return json.dumps(row).encode() + b"\n"


def read(*lines: bytes) -> list[BatchRequest | BadLine]:
    return list(read_requests(iter(lines)))


def test_a_request_with_everything() -> None:
    body = {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 5,
        "min_tokens": 1,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "seed": 9,
        "stop_token_ids": [4],
        "ignore_eos": True,
        "return_token_ids": True,
        "n": 1,
    }
    params = SamplingParams(5, 1, 0.0, 3, 0.5, 9, [4], True)
    assert read(line("a", body)) == [BatchRequest("a", [1, 2], params, True, "m")]


def test_the_least_request_has_the_defaults_of_the_interface() -> None:
    nulls = {"prompt": "hi", "seed": None, "max_tokens": None, "n": None}
    assert read(line("a"), b"\n", b"  \n", line("b", nulls)) == [
        BatchRequest("a", "hi", SamplingParams(), False, None),
        BatchRequest("b", "hi", SamplingParams(), False, None),
    ]


@pytest.mark.parametrize(
    ("bad", "custom_id", "message"),
    [
        (b"{", None, "line 1: not JSON"),
        (b"\xff\xfe", None, "not JSON"),
        (b"[" * 100_000, None, "not JSON"),
        (b"[1]", None, "not a JSON object"),
        (line(7), None, "custom_id is missing or not a string"),
        (line("a", method="GET"), "a", 'method is "GET": only "POST" is supported'),
        (line("a", url="/v1/embeddings"), "a", "supported are /v1/completions, /v1/chat/completions"),
        (line("a", extra=1), "a", "extra: not supported"),
        (line("a", [1]), "a", "body is missing or not an object"),
        (line("a", {"x": 1}), "a", "body.x: not supported"),
        (line("a", {"max_tokens": 3}), "a", "body.prompt is missing"),
        (line("a", {"prompt": ["a", "b"]}), "a", 'body.prompt has "a" among its token ids'),
        (line("a", {"prompt": [1, -1]}), "a", "body.prompt has -1"),
        (line("a", {"prompt": [1, 1 << 70]}), "a", "body.prompt has"),
        (line("a", {"prompt": "\ud800"}), "a", "not Unicode text"),
        (line("a", {"prompt": "x", "n": 0}), "a", "body.n=0 is not allowed"),
        (line("a", {"prompt": "x", "n": True}), "a", "body.n=True is not allowed"),
        (line("a", {"prompt": "x", "echo": "yes"}), "a", 'body.echo is "yes": give true or false'),
        (line("a", {"prompt": "x", "max_tokens": 0}), "a", "body.max_tokens=0 is not allowed: give 1 or more"),
        (line("a", {"prompt": "x", "model": 1}), "a", "body.model is not a string"),
        (line("a", {"prompt": "x", "return_token_ids": 1}), "a", "body.return_token_ids is 1"),
        (line("a", {"prompt": "x", "temperature": "hot"}), "a", "body.temperature='hot' is not allowed"),
        (line("a", {"prompt": "x", "temperature": float("nan")}), "a", "body.temperature=nan is not allowed"),
        (line("a", {"prompt": "x", "max_tokens": 0}), "a", "body.max_tokens=0 is not allowed"),
    ],
)
def test_a_bad_line_says_why_and_the_next_is_read(bad: bytes, custom_id: str | None, message: str) -> None:
    found = read(bad, line("next"))
    assert isinstance(found[0], BadLine)
    assert found[0].custom_id == custom_id
    assert message in found[0].message
    assert isinstance(found[1], BatchRequest)


def test_a_custom_id_may_come_once() -> None:
    found = read(line("a"), line("b"), line("a"))
    assert isinstance(found[2], BadLine)
    assert found[2].message == "line 3: custom_id 'a' was used by an earlier line: give each its own"
    assert found[2].is_repeat


def test_bad_lines_are_told_apart_wherever_they_stand() -> None:
    def digests(*lines: bytes) -> list[str]:
        return [item.digest for item in read(*lines) if isinstance(item, BadLine)]

    first, second, again, third = digests(b"{x\n", b"{y\n", b"{x", b"{x\r\n")
    assert len({first, second, again, third}) == 4
    assert digests(line("good"), b"{y", b"\n", b"{x\n", b"{x\n", b"{x\n") == [second, first, again, third]


@given(st.lists(st.text(st.characters(codec=None), max_size=3)))
def test_the_id_set_is_a_set(texts: list[str]) -> None:
    ids, seen = IdSet(), set()
    for text in texts:
        assert (text in ids) == (text in seen)
        assert ids.add(text) == (text not in seen)
        assert text in ids
        seen.add(text)


def test_memory_does_not_grow_with_the_file() -> None:
    def lines(count: int) -> Iterator[bytes]:
        return (line(f"request-{number}", {"prompt": "x" * 4000}) for number in range(count))

    tracemalloc.start()
    try:
        for _ in read_requests(lines(4000)):
            pass
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("text", "count"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\n\n \r\nb", 2)])
def test_count_lines(tmp_path: Path, text: bytes, count: int) -> None:
    (tmp_path / "f").write_bytes(text)
    assert count_lines(tmp_path / "f") == count
