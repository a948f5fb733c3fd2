"""Whatever is given, a message names the field and the limit, on one line that can be read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexgen_lite import ConfigError, EngineConfig, SamplingParams
from flexgen_lite.batch.file import BadLine, read_requests
from flexgen_lite.client.sampling_params import MAX_TOKEN_ID
from flexgen_lite.config.engine import parse_setting
from flexgen_lite.openai.request_body import _KNOWN, CHAT, COMPLETIONS, BodyError, parse_body
from flexgen_lite.text.json_text import JsonError, json_line, parse_json
from flexgen_lite.text.shown import MAX_SHOWN, shown, shown_json, shown_kind, shown_names, shown_path, shown_text
from flexgen_lite.wire.codec import Codec, MessageError
from flexgen_lite.wire.sampling import MAX_BIASED, MAX_STOP_CHARACTERS, MAX_STOPS, WHOLE_NUMBERS, WireParams

LONGEST = 500
HUGE = "x" * 100_000
HUGE_VALUES: list[Any] = [
    HUGE, "\u2028\x85\ud800\n" * 10_000, "9" * 100_000, 10**4000, -(10**4000), 1 << 63, -1, float("nan"), float("inf"),
    -1e400, 1e3, 2.5, True, None, [HUGE] * 3, [[[[[[HUGE]]]]]], {HUGE: HUGE}, {str(n): "x" for n in range(5000)},
    [10**4000], {"5": 10**4000}, {"5": HUGE}, list(range(20_000)), {}, [], "", 0,
]  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)


def told(message: str, *words: str) -> None:
    assert len(message) < LONGEST, f"{len(message)} characters: {message[:LONGEST]}"
    assert message.splitlines() == [message]
    message.encode()
    for word in words:
        assert word in message


def limits_of(name: str) -> list[str]:
    """What the message about a wrong whole number says."""
    if name == "top_k":
        return ["-1 to 9223372036854775807"]
    low, high = WHOLE_NUMBERS[name]
    return [f"{low} to {high}"]


def check_params(name: str, value: Any) -> None:
    try:
        SamplingParams(**{name: value})
    except ValueError as error:
        is_far_out = name in WHOLE_NUMBERS and (type(value) is not int or value.bit_length() > 60)
        told(str(error), name, *(limits_of(name) if is_far_out else ()))


PARAMS = [field.name for field in dataclasses.fields(SamplingParams)]


@pytest.mark.parametrize("name", PARAMS)
def test_sampling_params(name: str) -> None:
    for value in (*HUGE_VALUES, 10**5000, b"x" * 100_000, object(), SamplingParams):
        check_params(name, value)


@given(st.sampled_from(PARAMS), values)
def test_sampling_params_of_any_kind(name: str, value: Any) -> None:
    check_params(name, value)


def check_body(url: str, name: str, value: Any) -> None:
    body = {"prompt": "hi"} if url == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
    body[name] = value
    try:
        parse_body(url, body, "body.")
    except BodyError as error:
        told(str(error), name)
    row = {"custom_id": "a", "method": "POST", "url": url, "body": body}
    (item,) = read_requests(iter([json_line(row).encode()]))
    if isinstance(item, BadLine):
        told(item.message, name)


FIELDS = [(url, name) for url in (COMPLETIONS, CHAT) for name in sorted(_KNOWN[url])]


@pytest.mark.parametrize(("url", "name"), FIELDS)
def test_bodies_and_batch_lines(url: str, name: str) -> None:
    for value in HUGE_VALUES:
        check_body(url, name, value)


@given(st.sampled_from(FIELDS), values)
def test_bodies_and_batch_lines_of_any_kind(field: tuple[str, str], value: Any) -> None:
    check_body(*field, value)


@pytest.mark.parametrize("key", ["custom_id", "method", "url", "body"])
def test_the_keys_of_a_batch_line(key: str) -> None:
    for value in HUGE_VALUES:
        row = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "hi"}, key: value}
        for item in read_requests(iter([json_line(row).encode()] * 2)):
            if isinstance(item, BadLine):
                told(item.message, "line ")


@pytest.mark.parametrize(
    "unknown", [{HUGE: 1}, {"\x85" * 100_000: 1}, {"\ud800": 1}, {"": 1}, {f"{HUGE}{n}": n for n in range(100)}],
    ids=range(5),
)  # fmt: skip
def test_unknown_names(unknown: dict[str, int]) -> None:
    for url in (COMPLETIONS, CHAT):
        with pytest.raises(BodyError) as caught:
            parse_body(url, {"prompt": "hi", **unknown}, "body.")
        told(str(caught.value)[-LONGEST + 1 :], "not supported; supported are")
        assert len(str(caught.value)) < LONGEST + 100  # with the list of what is supported
    (item,) = read_requests(iter([json_line({"custom_id": "a", **unknown}).encode()]))
    assert isinstance(item, BadLine)
    told(item.message, "not supported; supported are body, custom_id, method, url")
    with pytest.raises(ConfigError) as wrong:
        EngineConfig(model="m", **unknown)
    told(str(wrong.value).partition(";")[0], " key" if "\ud800" not in unknown else "a key has characters")


@pytest.mark.parametrize("name", EngineConfig.model_fields)
def test_the_configuration(name: str) -> None:
    more = (10**5000, f"tcp://{HUGE}:1", "tcp://host:65536", f"ipc://{HUGE}", "1" * 400 + ".5GiB", b"x" * 9999)
    for value in (*HUGE_VALUES, *more):
        try:
            EngineConfig(**{"model": "m", name: value})
        except ConfigError as error:
            told(str(error), name)
    long = "x" * 5000  # read as YAML, which takes its time; of more characters in test_settings
    for text in (long, "9" * 10_000, "[" * 1000, "2026-99-99", f"[{long}", "1e999", ".inf"):
        try:
            EngineConfig.load(None, {"model": "m"} | dict([parse_setting(f"{name}={text}")]))
        except ConfigError as error:
            told(str(error), name)


@pytest.mark.parametrize("setting", [HUGE, HUGE + "=1", "layer_slots=" + HUGE, "ram=[" + HUGE, "model=" + HUGE])
def test_settings(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.load(None, dict([parse_setting(setting)]))
    told(str(caught.value))


@given(st.binary())
@example(HUGE.encode())
@example(b"\xe9" * 100_000)
@example(b"[" * 100_000)
@example(b'{"a": 1' + b" " * 100_000)
def test_what_is_no_json(data: bytes) -> None:
    try:
        parse_json(data)
    except JsonError as error:
        told(str(error), "not JSON")


@pytest.mark.parametrize("name", sorted(WHOLE_NUMBERS))
@pytest.mark.parametrize("value", [-1, 1 << 63, (1 << 64) - 1])
def test_a_client_of_another_make_is_told_the_same_limits(name: str, value: int) -> None:
    params = dataclasses.replace(SamplingParams().to_wire(), **{name: value})
    problem = params.problem()
    assert problem is not None
    told(problem, f"{name}={value} is not allowed: give {' to '.join(map(str, WHOLE_NUMBERS[name]))}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stop": (HUGE,)}, f"give 1 to {MAX_STOP_CHARACTERS}"),
        ({"stop": ("a",) * 100_000}, f"give at most {MAX_STOPS}"),
        ({"logit_bias": tuple((n, 1.0) for n in range(100_000))}, f"give at most {MAX_BIASED}"),
        ({"logit_bias": ((5, float("nan")),)}, "from -100 to 100"),
        ({"temperature": float("inf")}, "a finite number from 0 (greedy) up"),
    ],
)
def test_many_or_long(changes: dict[str, Any], words: str) -> None:
    problem = dataclasses.replace(SamplingParams().to_wire(), **changes).problem()
    assert problem is not None
    told(problem, words)


def test_messages_on_the_wire() -> None:
    codec = Codec(WireParams)
    with pytest.raises(MessageError) as caught:
        codec.decode(codec.encode(SamplingParams().to_wire()).replace(b"WireParams", b"x" * 10))
    told(str(caught.value), "unknown message")


@given(values)
def test_values_are_shown_on_one_line(value: Any) -> None:
    check_shown(value)


@pytest.mark.parametrize("number", range(len(HUGE_VALUES)))
def test_long_values_are_shown_short(number: int) -> None:
    check_shown(HUGE_VALUES[number])


def check_shown(value: Any) -> None:
    for text in (shown(value), shown_text(value), shown_kind(value)):
        assert len(text) <= MAX_SHOWN + 10 and text.isprintable()
    if not isinstance(value, float):
        text = shown_json(value)
        assert len(text) <= MAX_SHOWN + 3 and len(text.splitlines()) <= 1
        if len(text) < MAX_SHOWN and "NaN" not in text and "Infinity" not in text:
            assert json.loads(text) == value


def test_how_values_are_shown() -> None:
    assert shown("x" * 58) == repr("x" * 58)
    assert shown("x" * 100) == "'" + "x" * 59 + "..."
    assert shown(10**5000) == "<a whole number of 16610 bits>"
    assert shown_json("é" * 100) == '"' + "é" * 59 + "..."
    assert shown_names([]) == "" and shown_names(["a"]) == "a" and shown_names(["a", "b"]) == "a, b"
    assert shown_names(["a", HUGE, "c", "d", "e"]) == f"a, {'x' * 40}..., c, d, e"
    assert shown_names([HUGE] * 3) == f"{'x' * 40}... and 2 more"
    assert shown_names(f"name-{n}" for n in range(1000)) == ", ".join(f"name-{n}" for n in range(7)) + " and 993 more"
    assert shown_path("/a/b") == "/a/b"
    assert shown_path("/" + HUGE + "/model.safetensors").endswith("x/model.safetensors")
    assert [shown_kind(value) for value in (None, True, 1, "a", b"", {})] == [
        "None",
        "True",
        "an int",
        "a str",
        "bytes",
        "a dict",
    ]
    assert MAX_TOKEN_ID == 2**31 - 1
