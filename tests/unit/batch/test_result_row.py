"""Result rows, and what those of an earlier run answer."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite.batch.file import BadLine, BatchRequest, read_requests
from flexgen_lite.batch.result_row import RowsThere, encode_row, request_id_of
from flexgen_lite.client.completion import Completion, CompletionOutput, Logprob
from flexgen_lite.client.sampling_params import SamplingParams
from flexgen_lite.openai.response_body import response_body

OUT = Path("out.jsonl")
ENGINE = "0" * 16


def request(custom_id: str = "a", prompt: Any = "hi", ids: bool = False, **params: Any) -> BatchRequest:
    return BatchRequest(custom_id, prompt, SamplingParams(**params), ids, None)


def row(item: BatchRequest | BadLine, *, error: str | None = None, engine: str = ENGINE) -> bytes:
    body = None
    if isinstance(item, BatchRequest) and error is None:
        body = response_body(item, Completion(0, item.prompt, [CompletionOutput("grüß 🙂\0", [5], "stop")], 2), "m")
    return encode_row("0" * 24, item.custom_id, request_id_of(item, engine), body, error)


def there(*lines: bytes) -> RowsThere:
    return RowsThere(OUT, io.BytesIO(b"".join(lines)))


def test_the_same_request_has_the_same_id_whatever_it_is_called() -> None:
    assert request_id_of(request("a"), ENGINE) == request_id_of(request("b", temperature=1), ENGINE)
    given = "/v1/completions"
    lines = [
        {"custom_id": "1", "method": "POST", "url": given, "body": {"prompt": [1], "temperature": 0, "model": "x"}},
        {"custom_id": "2", "body": {"temperature": 0.0, "n": 1, "seed": None, "prompt": [1]}, "url": given},
    ]
    lines[1]["method"] = "POST"
    one, two = read_requests(iter(json.dumps(line).encode() for line in lines))
    assert request_id_of(one, ENGINE) == request_id_of(two, ENGINE)


def test_whatever_decides_about_the_answer_changes_the_id() -> None:
    items = [
        request(),
        request(prompt="ho"),
        request(prompt=[1, 23]),
        request(prompt=[12, 3]),
        request(ids=True),
        request(temperature=0),
        request(seed=1),
        request(max_tokens=17),
        request(stop_token_ids=[1]),
    ]
    found = {request_id_of(item, ENGINE) for item in items} | {request_id_of(request(), "1" * 16)}
    assert len(found) == len(items) + 1
    assert all(len(text) == 20 and text.startswith("req_") for text in found)


def test_rows_are_found_again() -> None:
    bad, repeat = BadLine(None, "not JSON", "1" * 16), BadLine("a", "again", "2" * 16, True)
    late = request("\ud800\0", seed=4)
    rows = there(row(request()), row(bad, error="x"), row(repeat, error="x"), row(late, error="too long"))
    assert rows.num_rows == 4
    for item, failed in ((request(), False), (bad, True), (repeat, True), (late, True)):
        assert rows.has(item, request_id_of(item, ENGINE))
        assert rows.is_failed(item, request_id_of(item, ENGINE)) == failed
    for item in (request("b"), BadLine(None, "not JSON", "3" * 16), BadLine("a", "again", "4" * 16, True)):
        assert not rows.has(item, request_id_of(item, ENGINE))


@pytest.mark.parametrize(
    ("item", "engine"),
    [
        (request(temperature=0), ENGINE),
        (request(prompt="ho"), ENGINE),
        (request(), "1" * 16),
        (BadLine("a", "body is missing", "1" * 16), ENGINE),
    ],
)
def test_a_row_that_answers_something_else_is_no_answer(item: BatchRequest | BadLine, engine: str) -> None:
    with pytest.raises(FileExistsError, match=r"out\.jsonl has a row for 'a' that answers another .*--overwrite"):
        there(row(request())).has(item, request_id_of(item, engine))


def test_a_line_that_was_bad_may_be_mended() -> None:
    bad = BadLine("a", "body is missing", "1" * 16)
    assert not there(row(bad, error="x")).has(request(), request_id_of(request(), ENGINE))


@pytest.mark.parametrize("before", [b"", row(request("before"))])
def test_a_last_row_torn_anywhere_is_passed_over(before: bytes) -> None:
    last = row(request("last"))
    for length in range(len(last)):
        rows = there(before, last[:length])
        assert (rows.num_rows, rows.num_bytes) == (bool(before), len(before))
        assert not rows.has(request("last"), request_id_of(request("last"), ENGINE))
    assert there(before, last).num_bytes == len(before + last)


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"\0\n", b'{"id": "batch_req_0\0\0\0', b'{"id": "batch_req_0\n'])
def test_what_a_power_cut_leaves_is_passed_over(tail: bytes) -> None:
    assert there(tail).num_bytes == 0
    assert there(row(request()), tail).num_bytes == len(row(request()))


GOOD = json.loads(row(request()))


@pytest.mark.parametrize(
    "foreign",
    [
        b"a note\n",
        b"a note",
        b"[1]\n",
        b"7",
        b"null\n",
        b"\xff\xfe\n",
        b"[" * 100_000,
        json.dumps({**GOOD, "custom_id": 7}).encode() + b"\n",
        json.dumps({**GOOD, "response": None}).encode() + b"\n",
        json.dumps({**GOOD, "response": {"request_id": "req_" + "0" * 24}}).encode() + b"\n",
        json.dumps({"custom_id": "a", "response": {"request_id": "req_" + "0" * 16}}).encode(),
    ],
)
def test_a_line_of_others_is_refused(foreign: bytes) -> None:
    with pytest.raises(FileExistsError, match=r"out\.jsonl, line 1 is not a result row of run-batch: give another"):
        there(foreign)
    after = foreign if foreign.endswith(b"\n") else foreign + b"\n"
    with pytest.raises(FileExistsError, match=r"out\.jsonl, line 2 is not"):
        there(row(request()), after, row(request("b")))


def test_a_torn_row_in_the_middle_is_refused() -> None:
    with pytest.raises(FileExistsError, match="line 2 is not"):
        there(row(request()), row(request("b"))[:40] + b"\n", row(request("c")))


def test_memory_is_a_few_dozen_bytes_a_row() -> None:
    lines = [row(request(f"id-{n}", "x" * 2000), error="x") for n in range(6000)]
    tracemalloc.start()
    try:
        rows = RowsThere(OUT, (bytes(bytearray(line)) for line in lines))
        assert tracemalloc.get_traced_memory()[1] < 100 * 6000 + 500_000, "not 12 MB; other threads may hold some"
        assert rows.num_rows == 6000
    finally:
        tracemalloc.stop()


def test_a_body_with_several_answers_that_echo_the_prompt_and_its_logprobs() -> None:
    params = SamplingParams(n=2, logprobs=1, prompt_logprobs=1)
    item = BatchRequest("a", "a b", params, False, None, echo=True)
    entry = {4: Logprob(-0.5, 1, " b")}
    outputs = [CompletionOutput(text, [7], "length", [{7: Logprob(-1.0, 2, text)}], [0]) for text in (" c", " d")]
    texts = {3: "a", 4: " b", 7: " c"}
    completion = Completion(0, "a b", outputs, 2, None, [3, 4], [None, entry], "a b", texts, prompt_offsets=[0, 1])
    first, second = response_body(item, completion, "m")["choices"]
    assert (first["text"], second["text"], second["index"]) == ("a b c", "a b d", 1)
    assert first["logprobs"] == {
        "tokens": ["a", " b", " c"],
        "token_logprobs": [None, -0.5, -1.0],
        "top_logprobs": [None, {" b": -0.5}, {" c": -1.0}],
        "text_offset": [0, 1, 3],
    }
    assert "prompt_logprobs" not in first
    assert response_body(item, completion, "m")["usage"]["completion_tokens"] == 2


def test_a_body_with_logprobs_of_the_prompt() -> None:
    item = request("a", prompt="a b", prompt_logprobs=0, max_tokens=0)
    completion = Completion(
        0, "a b", [CompletionOutput("", [], "length")], 2, None, [3, 4], [None, {4: Logprob(-0.5, 1, " b")}]
    )
    (choice,) = response_body(item, completion, "m")["choices"]
    assert choice["prompt_logprobs"] == [None, {"4": {"logprob": -0.5, "rank": 1, "decoded_token": " b"}}]


ENDS = "\v\f\x1c\x1d\x1e\x7f\x85\u2028\u2029\ud800"


def test_nothing_in_a_row_ends_it_early() -> None:
    output = CompletionOutput(f"text{ENDS}", [5], "stop", [{5: Logprob(-1.0, 1, f"token{ENDS}")}])
    item = request(f"id{ENDS}", logprobs=0)
    body = response_body(item, Completion(0, f"prompt{ENDS}", [output], 2, token_texts={5: f"token{ENDS}"}), f"m{ENDS}")
    good = encode_row("0" * 24, item.custom_id, request_id_of(item, ENGINE), body, None)
    bad = encode_row("1" * 24, f"id{ENDS}", "line_" + "0" * 16, None, f"wrong{ENDS}")
    assert (good + bad).decode().splitlines() == [good.decode()[:-1], bad.decode()[:-1]]
    assert json.loads(good)["response"]["body"]["choices"][0]["text"] == f"text{ENDS}"
    assert json.loads(bad)["error"]["message"] == f"wrong{ENDS}"
    assert there(good, bad).num_rows == 2


def test_rows_of_earlier_versions_are_found_again() -> None:
    """These had the same characters bare."""
    new = encode_row("0" * 24, "a\u2028b", "req_" + "0" * 16, None, "wrong")
    old = new.replace(b"\\u2028", "\u2028".encode())
    assert old != new and there(old).has(request("a\u2028b"), "req_" + "0" * 16)


def test_rows_of_chats_that_earlier_versions_wrote_still_answer() -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    line["body"] = {"messages": [{"role": "user", "content": "Hello"}]}
    (item,) = read_requests(iter([json.dumps(line).encode()]))
    assert request_id_of(item, "engine") == "req_e7b90dc2a0003978"
