"""JSON on lines that every reader finds, and JSON that is read as UTF-8."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.cli.console import JsonConsole
from flexgen_lite.http.generate import _line
from flexgen_lite.text.json_text import JsonError, json_line, parse_json

EVERY_END = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\x7f\x80\x9f\0\udfff\ud800"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def lines_of_httpx(data: bytes) -> list[str]:
    return list(
        httpx.Response(200, content=data, headers={"content-type": "text/event-stream; charset=utf-8"}).iter_lines()
    )


@pytest.mark.parametrize("character", EVERY_END, ids=lambda character: f"U+{ord(character):04X}")
def test_whatever_may_end_a_line_is_escaped(character: str) -> None:
    row = json_line({"text": f"a{character}b", f"key{character}": 1})
    assert f"\\u{ord(character):04x}" in row or json.dumps(character)[1:-1] in row
    assert row.splitlines() == [row] and character not in row
    assert json.loads(row.encode()) == {"text": f"a{character}b", f"key{character}": 1}


def test_events_of_a_stream_are_lines() -> None:
    event = _line({"choices": [{"text": EVERY_END}]})
    assert event.encode().decode().splitlines() == [event.removesuffix("\n\n"), ""]
    assert lines_of_httpx(event.encode()) == event.splitlines()
    assert json.loads(event.removeprefix("data: "))["choices"][0]["text"] == EVERY_END


def test_events_for_programs_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = JsonConsole()
    console.log(f"a{EVERY_END}b")
    console.error(f"a{EVERY_END}b", 2)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["message"] for event in found] == [f"a{EVERY_END}b"] * 2


def test_letters_stay_readable() -> None:
    assert json_line({"é": "日本 \U0001f600"}) == '{"é": "日本 \U0001f600"}'


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_every_reader_finds_the_same_lines(values: list[Any]) -> None:
    data = b"".join(json_line(value).encode() + b"\n" for value in values)
    for found in (
        data.splitlines(),
        data.decode().splitlines(),
        list(io.StringIO(data.decode(), newline=None)),
        lines_of_httpx(data),
    ):
        assert [json.loads(line) for line in found] == values


@given(VALUES)
def test_what_is_written_is_read(value: Any) -> None:
    assert parse_json(json_line(value).encode()) == value
    assert parse_json(b"\xef\xbb\xbf" + json_line(value).encode() + b"\r\n") == value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": "caf\xe9"}', "not JSON: byte 11 (0xe9) is not UTF-8: save it as UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "byte 8 (0xed) is not UTF-8"),
        (b'{"a": "\x93quoted\x94"}', "byte 8 (0x93) is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "byte 4 is NUL, which no text has: save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "byte 2 is NUL"),
        ('{"a": 1}'.encode("utf-16-be"), "byte 1 is NUL"),
        ('{"a": 1}'.encode("utf-32-le"), "byte 2 is NUL"),
        (b'{"a": "b\0c"}', "byte 9 is NUL"),
        (b"", "not JSON: Expecting value at character 1"),
        (b'{"a": 1', "not JSON: Expecting ',' delimiter at character 8"),
        (b'{"a": 1} {"b": 2}', "not JSON: Extra data at character 10"),
        (b'{"a": "b\rc"}', "not JSON: Invalid control character"),
        (b"[" * 100_000, "not JSON that can be read: nested too deeply"),
        (b'{"a": ' * 100_000, "not JSON that can be read: nested too deeply"),
    ],
)
def test_what_is_no_json_in_utf8(data: bytes, words: str) -> None:
    """`json.loads` would take UTF-16 and UTF-32 for what they are, without a word."""
    with pytest.raises(JsonError) as caught:
        parse_json(data)
    assert words in str(caught.value) and len(str(caught.value)) < 200


def test_a_number_of_more_digits_than_can_be_read_is_infinite() -> None:
    assert parse_json(b"[" + b"9" * 5000 + b", -" + b"9" * 100_000 + b", 1e400]") == [math.inf, -math.inf, math.inf]
    assert parse_json(b"9" * 4000) == int("9" * 4000)
