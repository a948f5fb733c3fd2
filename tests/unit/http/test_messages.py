"""The HTTP API refuses whatever is sent in a short sentence, and reads JSON as UTF-8 only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from flexgen_lite.client.client import Client
from flexgen_lite.http.app import Api
from tests.fake_engine import FakeEngine

pytestmark = pytest.mark.timeout(60)
HUGE = "x" * 100_000
PROMPT = {"prompt": "hi", "max_tokens": 3}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("h")
    with FakeEngine(folder / "e", model="/models/" + "m" * 100_000) as engine:
        api = Api(lambda: Client(engine.endpoint), folder / "data")
        yield TestClient(api.app)
        api.batches.close()


def refused(response: Any, status: int, *words: str) -> None:
    message = response.json()["error"]["message"]
    assert response.status_code == status and len(response.content) < 1500, response.content[:1500]
    assert message.splitlines() == [message] and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": HUGE}, ("there is no model 'xxx",)),
        ({"prompt": ["hi", HUGE, 5]}, ("prompt is missing or neither",)),
        ({"prompt": [5, HUGE]}, ('prompt has "xxx', "give whole numbers from 0 to 2147483647")),
        ({"seed": 1 << 63}, ("seed=9223372036854775808", "from 0 to 9223372036854775807")),
        ({"seed": HUGE}, ("seed='xxx", "from 0 to 9223372036854775807")),
        ({"n": 129}, ("n=129", "from 1 to 128")),
        ({"logprobs": 21}, ("logprobs=21", "from 0 to 20")),
        ({"stream": HUGE}, ('stream is "xxx', "give true or false")),
        ({"stream_options": {HUGE: 1}}, ("only include_usage is supported",)),
        ({HUGE: 1}, ("not supported; supported are",)),
        ({"logit_bias": {HUGE: 1}}, ("its keys must be token ids, from 0 to 2147483647",)),
    ],
)
def test_bodies(changes: dict[str, Any], words: tuple[str, ...], http: TestClient) -> None:
    refused(http.post("/v1/completions", json=PROMPT | changes), 404 if "model" in changes else 400, *words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (json.dumps(PROMPT).encode("utf-16"), "the body is not JSON: byte 4 is NUL"),
        (json.dumps(PROMPT).encode("utf-32-le"), "the body is not JSON: byte 2 is NUL"),
        (b'{"prompt": "caf\xe9"}', "the body is not JSON: byte 16 (0xe9) is not UTF-8: save it as UTF-8"),
        (b"\x1f\x8b\x08", "the body is not JSON: byte 2 (0x8b) is not UTF-8"),
        (b"", "the body is not JSON: Expecting value at character 1"),
        (b"[" * 100_000, "the body is not JSON that can be read: nested too deeply"),
        (
            b'{"prompt": "hi", "seed": ' + b"9" * 100_000 + b"}",
            "seed=inf is not allowed: give a whole number from 0 to",
        ),
        (b"[1]", "the body is not a JSON object"),
    ],
)
def test_what_is_no_json_in_utf8(data: bytes, words: str, http: TestClient) -> None:
    refused(http.post("/v1/completions", content=data, headers={"content-type": "application/json"}), 400, words)


def test_a_byte_order_mark_is_taken(http: TestClient) -> None:
    data = b"\xef\xbb\xbf" + json.dumps(PROMPT).encode()
    answer = http.post("/v1/completions", content=data, headers={"content-type": "application/json"})
    assert answer.json()["choices"][0]["text"] == "HI"


def test_other_requests(http: TestClient) -> None:
    refused(http.post("/v1/completions", content=b"{}", headers={"content-type": HUGE}), 415, "send application/json")
    long = HUGE[:60_000]  # as much as a client takes
    for path in (f"/{long}", f"/v1/models/{long}", f"/v1/files/{long}", f"/v1/batches/{long}"):
        refused(http.get(path), 404, "there is no ", "xxx")
    refused(http.get("/v1/files", params={"limit": long}), 400, "limit is 'xxx", "give 1 to 100")
    refused(http.get("/v1/files", params={"after": long}), 400, "after is 'xxx")
    refused(http.delete(f"/v1/models/{long}"), 405, "DELETE is not for /v1/models/xxx")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"endpoint": HUGE}, 'endpoint is "xxx'),
        ({"endpoint": [HUGE]}, 'endpoint is ["xxx'),
        ({HUGE: 1, HUGE + "y": 2}, "not supported"),
        ({"endpoint": "/v1/completions", "input_file_id": HUGE}, "there is no file 'xxx"),
        ({"endpoint": "/v1/completions", "completion_window": [HUGE]}, "completion_window is not a string"),
        ({"endpoint": "/v1/completions", "metadata": {HUGE: 1}}, "metadata is not an object of strings"),
    ],
)
def test_batches(body: dict[str, Any], words: str, http: TestClient) -> None:
    refused(http.post("/v1/batches", json=body), 404 if "no file" in words else 400, words)
