"""The life of the HTTP server: its ends, its engine's ends, and batches that go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette

from flexgen_lite.cli import serve
from tests.chat_model import make_quick_model
from tests.http_server import TEMPLATE, lines, server, wait_for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick_model(tmp_path_factory.mktemp("serve"), TEMPLATE)


def test_a_batch_goes_on_with_the_next_server(model: Path, tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path / "data"))
    with server(model, *data) as (url, process):
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)
        content = lines(10, max_tokens=3, ignore_eos=True) + lines(140, first=10, max_tokens=60, ignore_eos=True)
        source = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=source.id, endpoint="/v1/completions", completion_window="24h")
        for _ in range(3000):
            if (out := next((tmp_path / "data/batches").glob("*.jsonl"), None)) and out.stat().st_size:
                break
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 0
    rows_before = len(next((tmp_path / "data/batches").glob("*.jsonl")).read_bytes().splitlines())
    assert 0 < rows_before < 150
    with server(model, *data) as (url, _):
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)
        command = [sys.executable, "-m", "flexgen_lite", "serve", "--port", "0", "--ram", "2GiB", *data]
        other = subprocess.run([*command, "--model", str(model)], capture_output=True, text=True, timeout=60)
        assert other.returncode == 2 and "is in use by another server" in other.stderr
        done = wait_for(client, batch.id, "completed", "failed")
        assert done.status == "completed" and done.request_counts.completed == 150
        rows = client.files.content(done.output_file_id).text.splitlines()
        assert sorted(int(json.loads(row)["custom_id"]) for row in rows) == list(range(150))


def coordinator_of(process: subprocess.Popen[str]) -> int | None:
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "flexgen_lite.engine"], capture_output=True, text=True, check=False
    )
    return int(found.stdout) if found.stdout else None


SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 5, "max_tokens": 120, "extra_body": {"ignore_eos": True}}


def test_the_server_outlives_its_engine(model: Path, tmp_path: Path) -> None:
    """With a batch, a stream and callers on it; those who look after it are told."""
    with server(model, "--served-model-name", "m", "--data-dir", str(tmp_path / "data")) as (url, process):
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=120)
        sampled: dict[str, Any] = {"temperature": 0.9, "seed": 1, "ignore_eos": True}
        content = lines(10, max_tokens=3, **sampled) + lines(90, first=10, max_tokens=70, **sampled)
        source = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=source.id, endpoint="/v1/completions", completion_window="24h")
        whole: dict[int, str] = {}
        stream: list[str] = []

        def ask(number: int) -> None:
            whole[number] = client.completions.create(model="m", prompt=f"{number}", **SEEDED).choices[0].text

        def listen() -> None:
            chunks = client.completions.create(model="m", prompt="record: john", stream=True, logprobs=1, **SEEDED)
            stream.extend(choice.text for chunk in chunks for choice in chunk.choices)

        callers = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
        callers.append(threading.Thread(target=listen))
        for caller in callers:
            caller.start()
        rows = tmp_path / "data/batches" / f"{batch.id}.jsonl"
        deadline = time.monotonic() + 60
        while len(stream) < 10 or not rows.exists() or not rows.stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert all(caller.is_alive() for caller in callers)
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
        for number in range(2):
            assert whole[number] == client.completions.create(model="m", prompt=f"{number}", **SEEDED).choices[0].text
        assert late.choices[0].text == whole[0]
        assert "".join(stream) == client.completions.create(model="m", prompt="record: john", **SEEDED).choices[0].text
        done = wait_for(client, batch.id, "completed", "failed")
        assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 100, 0)
        found = {
            row["custom_id"]: row for row in map(json.loads, client.files.content(done.output_file_id).iter_lines())
        }
        assert found.keys() == {str(number) for number in range(100)}
        for number in (0, 77, 99):
            text = found[str(number)]["response"]["body"]["choices"][0]["text"]
            settings = {**SEEDED, "temperature": 0.9, "seed": 1, "max_tokens": 3 if number < 10 else 70}
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
