"""The HTTP server as its users meet it: the official client, files and batches, keys, ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette

from flexgen_lite.cli import serve
from tests.chat_model import make_chat_model

KEY = "a-key-of-ours"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
TALK: list[Any] = [{"role": "user", "content": "john smith, 3 May 1990"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@contextlib.contextmanager
def server(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The base URL and the process; it ends with the block if it has not before."""
    command = [sys.executable, "-m", "flexgen_lite", "serve", "--port", "0", "--ram", "2GiB", *options]
    process = subprocess.Popen(
        [*command, "--model", str(model), "--dtype", "float32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/v1", line)
        assert found, line + (process.stderr.read() if process.wait(30) else "")
        yield found[0], process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_chat_model(tmp_path_factory.mktemp("serve"), TEMPLATE)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}" + TEMPLATE, encoding="utf-8")
    return model


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with server(model, "--api-key", KEY, "--served-model-name", "demo") as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)


def wait_for(client: openai.OpenAI, batch_id: str, *states: str) -> Any:
    for _ in range(600):
        batch = client.batches.retrieve(batch_id)
        if batch.status in states:
            return batch
        time.sleep(0.05)
    raise AssertionError(f"the batch stays {batch.status}")


def lines(count: int, **body: Any) -> bytes:
    rows = [
        {
            "custom_id": str(n),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"{n}: ", **GREEDY, **body},
        }
        for n in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


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


def test_a_batch_goes_on_with_the_next_server(model: Path, tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path / "data"))
    with server(model, *data) as (url, process):
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)
        source = client.files.create(file=("in.jsonl", lines(300, max_tokens=80, ignore_eos=True)), purpose="batch")
        batch = client.batches.create(input_file_id=source.id, endpoint="/v1/completions", completion_window="24h")
        for _ in range(3000):
            if (out := next((tmp_path / "data/batches").glob("*.jsonl"), None)) and out.stat().st_size:
                break
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 0
    rows_before = len(next((tmp_path / "data/batches").glob("*.jsonl")).read_bytes().splitlines())
    assert 0 < rows_before < 300
    with server(model, *data) as (url, _):
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)
        command = [sys.executable, "-m", "flexgen_lite", "serve", "--port", "0", "--ram", "2GiB", *data]
        other = subprocess.run([*command, "--model", str(model)], capture_output=True, text=True, timeout=60)
        assert other.returncode == 2 and "is in use by another server" in other.stderr
        done = wait_for(client, batch.id, "completed", "failed")
        assert done.status == "completed" and done.request_counts.completed == 300
        rows = client.files.content(done.output_file_id).text.splitlines()
        assert sorted(int(json.loads(row)["custom_id"]) for row in rows) == list(range(300))


def coordinator_of(process: subprocess.Popen[str]) -> int | None:
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "coordinator"], capture_output=True, text=True, check=False
    )
    return int(found.stdout) if found.stdout else None


SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 5, "max_tokens": 150, "extra_body": {"ignore_eos": True}}


def test_the_server_outlives_its_engine(model: Path, tmp_path: Path) -> None:
    """With a batch, a stream and callers on it; those who look after it are told."""
    with server(model, "--served-model-name", "m", "--data-dir", str(tmp_path / "data")) as (url, process):
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=120)
        content = lines(200, temperature=0.9, seed=1, max_tokens=60, ignore_eos=True)
        source = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=source.id, endpoint="/v1/completions", completion_window="24h")
        whole: dict[int, str] = {}
        stream: list[str] = []

        def ask(number: int) -> None:
            whole[number] = client.completions.create(model="m", prompt=f"{number}", **SEEDED).choices[0].text

        def listen() -> None:
            chunks = client.completions.create(model="m", prompt="record: john", stream=True, logprobs=1, **SEEDED)
            stream.extend(choice.text for chunk in chunks for choice in chunk.choices)

        callers = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
        callers.append(threading.Thread(target=listen))
        for caller in callers:
            caller.start()
        rows = tmp_path / "data/batches" / f"{batch.id}.jsonl"
        while len(stream) < 10 or not rows.exists() or not rows.stat().st_size:
            time.sleep(0.02)
        os.kill(coordinator_of(process) or 0, signal.SIGKILL)
        for path in ("/health", "/metrics"):
            while (answer := httpx.get(url.replace("/v1", path), timeout=30)).status_code == 200:
                time.sleep(0.02)
            words = answer.json()["error"]["message"]
            assert answer.status_code == 503 and "killed by SIGKILL; it is being started again" in words
        assert client.models.list().data, "the rest is there"
        late = client.completions.create(model="m", prompt="0", **SEEDED)
        for caller in callers:
            caller.join(120)
        assert httpx.get(url.replace("/v1", "/health")).json() == {"status": "ok"}
        assert "flexgen_lite_engine_restarts_total 1\n" in httpx.get(url.replace("/v1", "/metrics")).text
        for number in range(5):
            assert whole[number] == client.completions.create(model="m", prompt=f"{number}", **SEEDED).choices[0].text
        assert late.choices[0].text == whole[0]
        assert "".join(stream) == client.completions.create(model="m", prompt="record: john", **SEEDED).choices[0].text
        done = wait_for(client, batch.id, "completed", "failed")
        assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 200, 0)
        found = {
            row["custom_id"]: row for row in map(json.loads, client.files.content(done.output_file_id).iter_lines())
        }
        assert found.keys() == {str(number) for number in range(200)}
        for number in (0, 77, 199):
            text = found[str(number)]["response"]["body"]["choices"][0]["text"]
            settings = {**SEEDED, "temperature": 0.9, "seed": 1, "max_tokens": 60}
            assert text == client.completions.create(model="m", prompt=f"{number}: ", **settings).choices[0].text


def test_the_server_ends_with_an_engine_that_dies_again_and_again(model: Path) -> None:
    with server(model) as (url, process):
        dead: set[int | None] = {None}
        for _ in range(3):
            while (engine := coordinator_of(process)) in dead:
                time.sleep(0.05)
            assert engine is not None
            os.kill(engine, signal.SIGKILL)
            dead.add(engine)
        assert process.wait(30) == 1
        assert process.stderr is not None
        assert process.stderr.read().endswith("error: the engine ended unexpectedly, killed by SIGKILL\n")
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_idle_connections(model: Path) -> None:
    """They are kept for longer than callers keep theirs, so that none is closed while a request is on its way; but they
    do not hold up the end."""
    assert serve._settings(Starlette()).timeout_keep_alive > 90
    with server(model) as (url, process), httpx.Client() as caller:
        assert caller.get(url.replace("/v1", "/health")).status_code == 200
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and "graceful shutdown exceeded" not in errors


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
