"""The HTTP server as its users meet it: the official client, files and batches, keys."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.http_server import GREEDY, lines, make_served_model, server, wait_for

KEY = "a-key-of-ours"
TALK: list[Any] = [{"role": "user", "content": "john smith, 3 May 1990"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_model(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with server(model, "--api-key", KEY, "--served-model-name", "demo") as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)


def test_models(client: openai.OpenAI) -> None:
    (found,) = client.models.list().data
    assert found.id == "demo" and client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other': 'demo' is served"):
        client.models.retrieve("other")


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt="record: john", **GREEDY)
    assert whole.choices[0].finish_reason == "length" and whole.usage is not None
    assert whole.usage.completion_tokens == 12 and whole.usage.prompt_tokens == 13
    chunks = list(
        client.completions.create(
            model="demo", prompt="record: john", stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len(chunks) > 6
    several = client.completions.create(model="demo", prompt=["record: john", "x"], n=2, logprobs=2, **GREEDY)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[1].text == whole.choices[0].text != several.choices[2].text
    logprobs = several.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert "".join(logprobs.tokens) == whole.choices[0].text
    echoed = client.completions.create(
        model="demo", prompt="record: john", echo=True, logprobs=0, max_tokens=0, extra_body={"temperature": 0}
    )
    assert echoed.choices[0].text == "record: john"
    assert echoed.choices[0].logprobs is not None and len(echoed.choices[0].logprobs.token_logprobs or ()) == 13


def test_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=TALK, logprobs=True, top_logprobs=2, **GREEDY)
    message = whole.choices[0].message
    assert message.role == "assistant" and message.content
    assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.content or ()) == 12
    chunks = list(client.chat.completions.create(model="demo", messages=TALK, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    prompt = f"user: {TALK[0]['content']}\nassistant:"
    token_ids = client.completions.create(model="demo", prompt=prompt, **GREEDY)
    assert token_ids.usage is not None and whole.usage is not None
    assert token_ids.usage.prompt_tokens == whole.usage.prompt_tokens + 1, "the template has no beginning of sequence"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": "x" * 900}, "the model takes 256"),
        ({"prompt": [99999]}, "token id 99999 is outside the vocabulary"),
        ({"temperature": -1}, "temperature=-1 is not allowed"),
        ({"extra_body": {"best": 3}}, "best: not supported"),
        ({"max_tokens": 0}, "max_tokens=0 is not allowed"),
        ({"stream": True, "prompt": "x" * 900}, "the model takes 256"),
        ({"extra_body": {"stream_options": {"x": 1}}}, "only include_usage is supported"),
    ],
)
def test_bad_requests(client: openai.OpenAI, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(**{"model": "demo", "prompt": "x", **GREEDY, **changes})


def test_a_template_of_the_callers_own_is_refused(client: openai.OpenAI) -> None:
    for text in ("x", "", "{{ messages }}"):
        with pytest.raises(openai.BadRequestError, match="chat_template is a program"):
            client.chat.completions.create(model="demo", messages=TALK, extra_body={"chat_template": text})
    body = {"chat_template_kwargs": {"chat_template": "x"}}
    with pytest.raises(openai.BadRequestError, match="chat_template_kwargs has chat_template"):
        client.chat.completions.create(model="demo", messages=TALK, extra_body=body)


def test_one_of_the_models_templates_may_be_named(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f"}}

    def num_prompt_tokens(**options: Any) -> int:
        usage = client.chat.completions.create(model="demo", messages=TALK, **options, **GREEDY).usage
        assert usage is not None
        return usage.prompt_tokens

    plain, with_tools = num_prompt_tokens(), num_prompt_tokens(tools=[tool])
    assert with_tools > plain
    assert num_prompt_tokens(tools=[tool], extra_body={"chat_template": "default"}) == plain
    assert num_prompt_tokens(tools=[tool], extra_body={"chat_template": "tool_use"}) == with_tools
    assert num_prompt_tokens(extra_body={"chat_template": "tool_use"}) == plain + len("None")


def test_bodies_that_are_none(url: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for content, kind, status in (
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"{}", "text/plain", 415),
    ):
        answer = httpx.post(f"{url}/completions", content=content, headers={**headers, "Content-Type": kind})
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert httpx.get(f"{url}/nothing", headers=headers).json()["error"]["code"] == 404
    assert httpx.get(f"{url}/completions", headers=headers).status_code == 405
    assert httpx.post(f"{url}/files", content=b"x", headers=headers).status_code == 400


def test_nobody_comes_in_without_the_key(url: str) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    assert httpx.get(f"{url}/models").status_code == 401
    assert httpx.get(url.replace("/v1", "/health")).json() == {"status": "ok"}


def test_metrics(url: str, client: openai.OpenAI) -> None:
    def value(name: str) -> float:
        text = httpx.get(url.replace("/v1", "/metrics")).text
        return float(re.findall(rf"^flexgen_lite_{name} (.*)$", text, re.M)[0])

    before = value("generated_tokens_total")
    client.completions.create(model="demo", prompt="x", **GREEDY, extra_body={"ignore_eos": True})
    assert value("generated_tokens_total") == before + 12
    assert value(r'memory_bytes\{kind="budget"\}') == 2 << 30


def test_a_caller_who_goes_frees_its_place(url: str, client: openai.OpenAI) -> None:
    def running() -> float:
        text = httpx.get(url.replace("/v1", "/metrics")).text
        return float(re.findall(r'requests\{state="running"\} (.*)', text)[0])

    stream = client.completions.create(
        model="demo", prompt="x", stream=True, max_tokens=250, n=20, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(
            f"{url}/completions",
            json={"prompt": "x", "max_tokens": 250, "n": 20, "ignore_eos": True},
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=0.05,
        )
    for _ in range(200):
        if running() == 0:
            return
        time.sleep(0.02)
    raise AssertionError("sequences run on for nobody")


def test_files(client: openai.OpenAI) -> None:
    stored = client.files.create(file=("in.jsonl", b"abc\n"), purpose="batch")
    assert (stored.filename, stored.bytes, stored.purpose) == ("in.jsonl", 4, "batch")
    assert client.files.retrieve(stored.id).id == stored.id
    assert stored.id in [file.id for file in client.files.list(limit=1)], "pages follow one another"
    assert client.files.content(stored.id).read() == b"abc\n"
    assert client.files.delete(stored.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        client.files.retrieve(stored.id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve("..%2F..%2Fsecret")


def test_a_batch(client: openai.OpenAI) -> None:
    chat = lines(1).replace(b'"0"', b'"chat"').replace(b"/v1/completions", b"/v1/chat/completions")
    chat = chat.replace(b'"prompt": "0: "', b'"messages": [{"role": "user", "content": "x"}]')
    content = lines(5) + b"\nno json\n" + lines(1, max_tokens=0).replace(b'"0"', b'"bad"') + chat
    source = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=source.id, endpoint="/v1/completions", completion_window="24h", metadata={"a": "b"}
    )
    done = wait_for(client, batch.id, "completed", "failed")
    assert done.status == "completed" and done.metadata == {"a": "b"}
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (8, 5, 3)
    rows = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    alone = client.completions.create(model="demo", prompt="3: ", **GREEDY)
    texts = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
    assert {row["response"]["body"]["model"] for row in rows} == {"demo"}
    assert texts.keys() == set("01234") and texts["3"] == alone.choices[0].text
    errors = [json.loads(line) for line in client.files.content(done.error_file_id).text.splitlines()]
    assert sorted(str(row["custom_id"]) for row in errors) == ["None", "bad", "chat"]
    assert any("the batch is for '/v1/completions'" in row["error"]["message"] for row in errors)
    assert batch.id in [one.id for one in client.batches.list()]


def test_bad_batches(client: openai.OpenAI) -> None:
    source = client.files.create(file=("in.jsonl", lines(1)), purpose="batch")
    for changes, error in (
        ({"endpoint": "/v1/embeddings"}, openai.BadRequestError),
        ({"input_file_id": "file-000000000000000000000000"}, openai.NotFoundError),
        ({"metadata": {"a": 1}}, openai.BadRequestError),
        ({"extra_body": {"what": 1}}, openai.BadRequestError),
    ):
        good = {"input_file_id": source.id, "endpoint": "/v1/completions", "completion_window": "24h"}
        with pytest.raises(error):
            client.batches.create(**{**good, **changes})  # type: ignore[arg-type]
    with pytest.raises(openai.NotFoundError, match="there is no batch"):
        client.batches.retrieve("batch-1")


def test_names_without_an_encoding_do_no_harm(url: str, client: openai.OpenAI) -> None:
    source = client.files.create(file=("in.jsonl", lines(1)), purpose="batch")
    body = {"input_file_id": source.id, "endpoint": "/v1/completions", "metadata": {"a": "\ud800"}}
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    assert httpx.post(f"{url}/batches", content=json.dumps(body), headers=headers).json()["metadata"] == {"a": "\ud800"}
    for path in ("batches", "files?limit=1", "batches?limit=100"):
        assert httpx.get(f"{url}/{path}", headers=headers).status_code == 200
    assert httpx.get(f"{url}/files?limit={'1' * 5000}", headers=headers).status_code == 400


def test_pages_of_other_servers_change_nothing(url: str) -> None:
    """A form in a web page, which asks no leave."""
    headers = {"authorization": f"Bearer {KEY}", "origin": "http://elsewhere.example"}
    upload = {"file": ("in.jsonl", b"x")}
    there = httpx.post(f"{url}/files", headers=headers, files=upload, data={"purpose": "batch"})
    assert there.status_code == 403 and "pages of other servers" in there.json()["error"]["message"]
    headers["origin"] = url.removesuffix("/v1")
    here = httpx.post(f"{url}/files", headers=headers, files=upload, data={"purpose": "batch"})
    assert here.status_code == 200


def test_a_cancelled_batch_keeps_what_is_done(client: openai.OpenAI) -> None:
    content = lines(2000, max_tokens=200, ignore_eos=True)
    source = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=source.id, endpoint="/v1/completions", completion_window="24h")
    wait_for(client, batch.id, "in_progress")
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = wait_for(client, batch.id, "cancelled", "completed", "failed")
    assert done.status == "cancelled"
    if done.output_file_id is not None:
        rows = client.files.content(done.output_file_id).text.splitlines()
        assert len(rows) < 2000 and all(json.loads(row)["error"] is None for row in rows)


def test_options_that_cannot_be(model: Path, url: str) -> None:
    port = url.split(":")[2].split("/")[0]
    for options, words in (
        (("--port", port), "in use"),
        (("--api-key", ""), "the API key is empty"),
        (("--api-key", "a", "--api-key-file", "b"), "exclude each other"),
        (("--host", "192.0.2.1"), "192.0.2.1"),
    ):
        command = [sys.executable, "-m", "flexgen_lite", "serve", "--model", str(model), "--ram", "2GiB", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
